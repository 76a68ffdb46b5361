"""What a job will cost one site in memory, time and bytes, before it runs.

A round's own step (:func:`custom.training.training_step`, or per-patient gradients) runs on fake tensors, which have
shapes and no memory: what they would hold and compute is counted, so a volume that does not fit is known in seconds.
How fast this machine computes is measured on real steps at two small sizes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from custom import tasks
from custom.config import ExperimentConfig
from custom.device import fast_bfloat16, images_at_once, use
from custom.diffusion.checkpointing import checkpointed
from custom.diffusion.networks import Shapes
from custom.diffusion.objective import Objective
from custom.he_contexts import COEFF_MOD_BIT_SIZES, POLY_MODULUS_DEGREE
from custom.he_packing import packed_size
from custom.masked_vector import session_encoding, session_ring
from custom.memory import LiveMemory
from custom.model_config import TrainingConfig
from custom.private_training import patient_loss, trained_parameters
from custom.quantised import packed_bytes
from custom.round_parts import every_update, update_shapes
from custom.site_file import HardwareConfig
from custom.stages import (
    Stage,
    fresh_weights,
    model_autoencoder,
    model_shapes,
    stage_objective,
    stage_of,
    stage_shapes,
    stages,
)
from custom.strict import require
from custom.training import HELD_OUT_BATCH, HELD_OUT_IMAGES, training_step
from privacy.gradients import per_patient_gradients

# Measured on the CPU with the presets tiny and base, 32³ to 96³ (docs/volumes.md): what a process grows by beside its
# tensors and a second copy of those of the largest convolution. It is the kernels that oneDNN compiles and what the
# allocator keeps. On CUDA it stands, unmeasured, for context and cache.
WORKSPACE_BYTES = 512 << 20
LIBRARIES_BYTES = 700 << 20  # resident in a site's process before it builds a network

PROBE_FLOPS = 3e11  # of the real step at a small size: a few seconds on a core
PROBE_IMAGES = 4  # or patients, in it
PROBE_SECONDS = 2.0  # of such steps at least, of which the fastest counts: others may use the machine, too

# Two polynomials of so many coefficients of 64 bits for each prime of a fresh ciphertext; half as many numbers.
CIPHERTEXT_BYTES = 2 * 8 * POLY_MODULUS_DEGREE * (len(COEFF_MOD_BIT_SIZES) - 1)
CIPHERTEXT_NUMBERS = POLY_MODULUS_DEGREE // 2

SMALLEST_IMAGE = 8  # that medical_data.preprocess makes
CPU = torch.device("cpu")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One stage of a job at one site.

    Attributes:
        name: of what it trains.
        rounds: how many.
        steps_per_round: of training.
        parameters: trained.
        memory_bytes: peak of the process; on CUDA of the device.
        step_seconds: of one training step; under differential privacy with the expected number of patients.
        round_seconds: of the steps and the held-out loss.
        upload_bytes: a round's update as it leaves, without its envelope.
        download_bytes: a round's weights.
    """

    name: str
    rounds: int
    steps_per_round: int
    parameters: int
    memory_bytes: int
    step_seconds: float
    round_seconds: float
    upload_bytes: int
    download_bytes: int


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """A job at one site.

    Attributes:
        device: what it is for.
        patients: that train.
        available_bytes: of memory.
        stages: in their order.
    """

    device: str
    patients: int
    available_bytes: int
    stages: tuple[StageEstimate, ...]

    @property
    def memory_bytes(self) -> int:
        """The most that a stage needs."""
        return max(stage.memory_bytes for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.memory_bytes <= self.available_bytes

    @property
    def run_seconds(self) -> float:
        """Of all rounds, without the server's and the other sites' part."""
        return sum(stage.rounds * stage.round_seconds for stage in self.stages)


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One setting that needs less memory.

    Attributes:
        setting: as it stands in the site's or the job's file.
        memory_bytes: with it.
    """

    setting: str
    memory_bytes: int


def estimate(
    experiment: ExperimentConfig,
    hardware: HardwareConfig,
    *,
    patients: int,
    available_bytes: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Preflight:
    """Estimate every stage of a job at one site. Takes seconds, and sets PyTorch's threads as a round does.

    Not counted: the noise of differential privacy, masks and encryption, and a cohort's first preparation.

    Args:
        experiment: trains something.
        hardware: the site's.
        patients: that train there; they matter under differential privacy only.
        available_bytes: of memory; None asks this machine.
        clock: seconds, by which the real steps are timed.

    Raises:
        ConfigError: an audit, no patient, or CUDA that is not there.
    """
    device = _device(experiment, hardware, patients)
    return Preflight(
        device=device.type,
        patients=patients,
        available_bytes=available_memory(device) if available_bytes is None else available_bytes,
        stages=tuple(
            _estimated(_work(experiment, stage, hardware, patients, device), clock) for stage in stages(experiment)
        ),
    )


def memory_bytes(experiment: ExperimentConfig, hardware: HardwareConfig, *, patients: int) -> int:
    """Peak memory of a job at one site; arguments and errors as of :func:`estimate`."""
    device = _device(experiment, hardware, patients)
    return max(_memory(_work(experiment, stage, hardware, patients, device)) for stage in stages(experiment))


def step_bytes(experiment: ExperimentConfig, stage: Stage, hardware: HardwareConfig, *, patients: int) -> int:
    """What a process grows by in a stage's training steps, with network and optimiser; else as :func:`memory_bytes`."""
    device = _device(experiment, hardware, patients)
    return _peak(_work(experiment, stage, hardware, patients, device), _training_step) + WORKSPACE_BYTES


def levers(
    experiment: ExperimentConfig, hardware: HardwareConfig, *, patients: int, available_bytes: int
) -> Iterator[Lever]:
    """What each setting alone does about memory: the mildest value that fits, or the strongest where none does.

    Args:
        experiment, hardware, patients: as of :func:`estimate`.
        available_bytes: into which it should fit.
    """
    private = experiment.privacy is not None
    largest = max(stage.training.batch_size or 1 for stage in stages(experiment))

    def lever(
        setting: str, values: Sequence[T], change: Callable[[T], tuple[ExperimentConfig, HardwareConfig]]
    ) -> Lever:
        @cache
        def needed(value: T) -> int:
            return memory_bytes(*change(value), patients=patients)

        value = first_fitting(values, lambda value: needed(value) <= available_bytes)
        return Lever(setting=f"{setting} = {str(value).lower()}", memory_bytes=needed(value))

    if not private and not hardware.checkpointing:
        yield lever("hardware.checkpointing", [True], lambda on: (experiment, replace(hardware, checkpointing=on)))
    if not private and _in_float32(hardware) and fast_bfloat16(use(hardware)):
        yield lever("hardware.precision", ["bfloat16"], lambda _: (experiment, replace(hardware, precision="bfloat16")))
    if private and (fewer := range(min(hardware.patients_in_memory, patients) - 1, 0, -1)):
        yield lever(
            "hardware.patients_in_memory", fewer, lambda most: (experiment, replace(hardware, patients_in_memory=most))
        )
    if not private and (smaller := range(largest - 1, 0, -1)):
        yield lever("training.batch_size", smaller, lambda most: (_with_batches(experiment, most), hardware))
    multiple = experiment.preprocess.size // experiment.denoised_shape[-1] * _multiple(experiment, "denoiser")
    edges = range(experiment.preprocess.size - multiple, SMALLEST_IMAGE - 1, -multiple)
    if edges:
        yield lever("preprocess.size", edges, lambda edge: (_with_edge(experiment, edge), hardware))


def first_fitting(values: Sequence[T], fits: Callable[[T], bool]) -> T:
    """The first value that fits, where whatever follows one that fits does so, too; the last one if none does."""
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(values[middle]) else (middle + 1, high)
    return values[low]


def available_memory(device: torch.device) -> int:
    """Bytes that are free: of the device on CUDA; on the CPU no more than the process's control group may have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [file.read_text().strip() for file in CGROUP_LIMITS if file.is_file()]
    return min([psutil.virtual_memory().available, *(int(limit) for limit in limits if limit.isdigit())])


def upload_bytes(experiment: ExperimentConfig, stage: Stage) -> int:
    """The largest of a stage's updates as it leaves, without its envelope and the keys of masks."""
    rounds = [n for n in every_update(experiment) if stage_of(experiment, n) == stage]
    shapes = max((update_shapes(experiment, number) for number in rounds), key=_numbers)
    if experiment.secure_aggregation is not None:
        sizes = [session_encoding(experiment, tasks.TRAIN, number, parties=2).size for number in rounds]
        return max(sizes) * session_ring(experiment, tasks.TRAIN) // 8
    if experiment.encryption is not None:
        return math.ceil(packed_size(shapes) / CIPHERTEXT_NUMBERS) * CIPHERTEXT_BYTES
    if experiment.updates is not None and experiment.updates.bits is not None:
        return packed_bytes(shapes, bits=experiment.updates.bits) + 4 * len(shapes)
    return 4 * _numbers(shapes)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What a site computes in a round of a stage.

    Attributes:
        shape: of an image, or of its latents, [C, *spatial].
        count: images of a step; under differential privacy patients whose gradients are in memory at once.
        chunks: of patients in a step, counted up to 2: the gradients of one are kept until the next ones are there.
        patients: expected in a step under differential privacy.
    """

    experiment: ExperimentConfig
    stage: Stage
    hardware: HardwareConfig
    device: torch.device
    shape: tuple[int, ...]
    count: int
    chunks: int = 1
    patients: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Speed:
    """Seconds of a step: some for its tensors of parameters, however small the images, and some for each FLOP."""

    per_flop: float
    per_step: float = 0.0


def _device(experiment: ExperimentConfig, hardware: HardwareConfig, patients: int) -> torch.device:
    require(
        experiment.audit is None, argument="experiment.audit", value=experiment.name, remedy="an audit trains nothing"
    )
    require(patients >= 1, argument="patients", value=patients, remedy="give at least 1")
    there = hardware.device != "cuda" or torch.cuda.is_available()
    require(there, argument="hardware.device", value="cuda", remedy="no CUDA device here; ask where there is one")
    return use(hardware)


def _in_float32(hardware: HardwareConfig) -> bool:
    return hardware.precision == "float32" or (hardware.precision == "auto" and use(hardware).type == "cpu")


def _work(
    experiment: ExperimentConfig, stage: Stage, hardware: HardwareConfig, patients: int, device: torch.device
) -> _Work:
    shape = experiment.image_shape if stage.name == "autoencoder" else experiment.denoised_shape
    count, chunks, expected = stage.training.batch_size or 1, 1, 0.0
    if experiment.privacy is not None:
        rate = experiment.privacy.sampling_rate
        expected = rate * patients
        most = min(patients, math.ceil(expected + 4 * math.sqrt(expected * (1 - rate))))  # hardly ever more
        count = min(hardware.patients_in_memory, most)
        chunks = 2 if most > count else 1
    return _Work(
        experiment=experiment,
        stage=stage,
        hardware=hardware,
        device=device,
        shape=shape,
        count=count,
        chunks=chunks,
        patients=expected,
    )


def _estimated(work: _Work, clock: Callable[[], float]) -> StageEstimate:
    experiment, stage = work.experiment, work.stage
    speed, held_out = _speed(work, clock), 0.0
    step = speed.per_step + speed.per_flop * _flops(replace(work, chunks=1), _training_step)
    if experiment.privacy is None:
        held_out = HELD_OUT_IMAGES * speed.per_flop * _flops(replace(work, count=1), _evaluation)
    else:
        step *= work.patients / work.count
    return StageEstimate(
        name=stage.name,
        rounds=stage.rounds,
        steps_per_round=stage.training.steps_per_round,
        parameters=_numbers(stage_shapes(experiment, stage)),
        memory_bytes=_memory(work),
        step_seconds=step,
        round_seconds=stage.training.steps_per_round * step + held_out,
        upload_bytes=upload_bytes(experiment, stage),
        download_bytes=4 * _numbers(stage.needed(model_shapes(experiment))),
    )


def _memory(work: _Work) -> int:
    """Peak of a round: in its steps, on the held-out patients, or where images become latents."""
    experiment, stage = work.experiment, work.stage
    peaks = [_peak(work, _training_step)]
    if experiment.privacy is None:
        peaks.append(_peak(replace(work, count=min(HELD_OUT_BATCH, images_at_once(work.shape))), _evaluation))
    if experiment.autoencoder is not None and stage.name == "denoiser":
        peaks.append(_encoding_peak(work))
    if work.device.type == "cuda":
        return max(peaks) + WORKSPACE_BYTES
    received = _numbers(stage.needed(model_shapes(experiment)))
    moments = 2 * _numbers(stage_shapes(experiment, stage))  # of the last round, as they were read
    return LIBRARIES_BYTES + max(peaks) + WORKSPACE_BYTES + 4 * (received + moments)


def _peak(work: _Work, of: Callable[[_Work, Objective], Callable[[], object]]) -> int:
    """Bytes that two passes hold at most: the second training step has the optimiser's moments."""
    objective = _objective(work)
    with _fake(objective.network, work.device):
        run, memory = of(work, objective), LiveMemory()
        with memory:
            run()
            run()
    return memory.peak + memory.convolution


def _encoding_peak(work: _Work) -> int:
    experiment = work.experiment
    autoencoder = model_autoencoder(experiment, _weights(experiment))
    memory = LiveMemory()
    with _fake(autoencoder, work.device), torch.no_grad(), memory:
        batch = images_at_once(experiment.image_shape)
        autoencoder.encode(torch.empty(batch, *experiment.image_shape, device=work.device))
    return memory.peak + memory.convolution


def _flops(work: _Work, of: Callable[[_Work, Objective], Callable[[], object]]) -> int:
    objective = _objective(work)
    with _fake(objective.network, work.device):
        run = of(work, objective)
        with FlopCounterMode(display=False, custom_mapping=_attention_on_cpu()) as counter:
            run()
    return int(counter.get_total_flops())


def _attention_on_cpu() -> dict[Any, Callable[..., Any]]:
    """FLOPs from the shapes of query, key and value; PyTorch has the formulas and applies them on CUDA only."""
    aten = torch.ops.aten
    forward: Callable[..., int] = sdpa_flop_count
    backward: Callable[..., int] = sdpa_backward_flop_count
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: forward(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: backward(*shapes[:4]),
    }


def _speed(work: _Work, clock: Callable[[], float]) -> _Speed:
    """From two real training steps of the same network, with few images and of two small sizes."""
    work = replace(work, count=min(work.count, PROBE_IMAGES), chunks=1)
    edge, dims, multiple = work.shape[-1], len(work.shape) - 1, _multiple(work.experiment, work.stage.name)
    shrunk = edge * (PROBE_FLOPS / _flops(work, _training_step)) ** (1 / dims)
    smallest = min(edge, 2 * multiple)
    largest = max(smallest, min(edge, round(shrunk / multiple) * multiple))
    large, small = (_probed(work, edge, clock) for edge in (largest, smallest))
    flops, seconds = (one - other for one, other in zip(large, small, strict=True))
    if flops <= 0 or seconds <= 0:  # one size, or too much else going on to tell
        return _Speed(per_flop=large[1] / large[0])
    return _Speed(per_flop=seconds / flops, per_step=max(0.0, small[1] - small[0] * seconds / flops))


def _probed(work: _Work, edge: int, clock: Callable[[], float]) -> tuple[int, float]:
    """FLOPs and seconds of a real training step at a size."""
    work = replace(work, shape=(work.shape[0], *(edge,) * (len(work.shape) - 1)))
    weights = fresh_weights(work.experiment, seed=0)  # of zeros some steps make denormal numbers, which take long
    run = _training_step(work, stage_objective(work.experiment, work.stage, weights, work.device))
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < PROBE_SECONDS:  # the first one warms up
        start = clock()
        run()
        if work.device.type == "cuda":
            torch.cuda.synchronize(work.device)
        seconds.append(clock() - start)
    return _flops(work, _training_step), min(seconds)


def _training_step(work: _Work, objective: Objective) -> Callable[[], object]:
    """As a round makes it, on images of no meaning."""
    if work.experiment.privacy is not None:
        return _private_step(work, objective)
    network, training = objective.network, work.stage.training
    if work.hardware.checkpointing:
        checkpointed(network)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    x0, generator = torch.rand(work.count, *work.shape, device=work.device), torch.Generator()
    return lambda: training_step(
        objective,
        optimizer,
        x0,
        generator,
        gradient_clip=training.gradient_clip,
        precision=work.hardware.precision,
    )


def _private_step(work: _Work, objective: Objective) -> Callable[[], object]:
    """Chunks of per-patient gradients, their sum and AdamW; without clipping and noise, which hold and cost little."""
    privacy = work.experiment.privacy
    assert privacy is not None  # noqa: S101 - whoever calls this has looked
    parameters = trained_parameters(objective.network, privacy.trained)
    optimizer, loss = torch.optim.AdamW(parameters.values()), patient_loss(objective)
    draws = _draws(work, objective, work.count, privacy.draws_per_patient)

    def step() -> None:
        sums: dict[str, Tensor] = {}
        for _ in range(work.chunks):
            gradients = per_patient_gradients(loss, parameters, draws)
            sums = {name: gradient.sum(dim=0) + sums.get(name, 0.0) for name, gradient in gradients.items()}
        for name, parameter in parameters.items():
            parameter.grad = sums[name]
        optimizer.step()

    return step


def _evaluation(work: _Work, objective: Objective) -> Callable[[], object]:
    draws = _draws(work, objective, work.count)
    return torch.no_grad()(lambda: objective.loss(objective.network, *draws))


def _draws(work: _Work, objective: Objective, *leading: int) -> tuple[Tensor, Tensor, Tensor]:
    x0 = torch.rand(*leading, *work.shape, device=work.device)
    noise = torch.randn(*leading, *objective.noise_shape(work.shape), device=work.device)
    return x0, noise, torch.zeros(leading, dtype=torch.int64, device=work.device)


@contextmanager
def _fake(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, tensors have shapes and no memory; the network's parameters become such ones, on the device."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # the noise schedule is real
        for module in network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))
        yield


def _objective(work: _Work) -> Objective:
    return stage_objective(work.experiment, work.stage, _weights(work.experiment), CPU)


def _weights(experiment: ExperimentConfig) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in model_shapes(experiment).items()}


def _numbers(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _multiple(experiment: ExperimentConfig, stage: Literal["autoencoder", "denoiser"]) -> int:
    """Of which the edge of what a stage trains on must be."""
    if stage == "autoencoder" and experiment.autoencoder is not None:
        return experiment.autoencoder.shrink
    return int(2 ** (len(experiment.network.channels) - 1))


def _with_batches(experiment: ExperimentConfig, most: int) -> ExperimentConfig:
    def bounded(training: TrainingConfig) -> TrainingConfig:
        return replace(training, batch_size=min(training.batch_size or 1, most))

    autoencoder = experiment.autoencoder
    if autoencoder is not None and autoencoder.training is not None:
        autoencoder = replace(autoencoder, training=bounded(autoencoder.training))
    return replace(experiment, training=bounded(experiment.training), autoencoder=autoencoder)


def _with_edge(experiment: ExperimentConfig, edge: int) -> ExperimentConfig:
    return replace(experiment, preprocess=replace(experiment.preprocess, size=edge))
