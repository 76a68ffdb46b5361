"""The fast path (vmap over patients) against the slow ones: autograd patient by patient, and Opacus' hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from custom.config import ExperimentConfig
from custom.diffusion.loss import denoising_loss
from custom.diffusion.networks import build_network
from custom.diffusion.schedule import build_schedule
from privacy.dpsgd import PatientLoss, PatientSGD, per_patient_gradients
from privacy.plan import DPConfig, calibrate
from privacy.rng import SeededRandomnessForTests

PATIENTS, DRAWS = 3, 2
TOLERANCE = 1e-5  # of float32 sums in another order

Case = tuple[nn.Module, PatientLoss, tuple[Tensor, ...]]


def convolutions(spatial_dims: int) -> nn.Module:
    conv = (nn.Conv2d, nn.Conv3d)[spatial_dims - 2]
    return nn.Sequential(conv(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), conv(4, 1, 3, padding=1))


def small_case(spatial_dims: int) -> Case:
    torch.manual_seed(0)
    network = convolutions(spatial_dims)

    def loss(parameters: Mapping[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return (functional_call(network, dict(parameters), (x,)) - target).square().flatten(1).mean(1)

    shape = (PATIENTS, DRAWS, 1, *(6,) * spatial_dims)
    return network, loss, (torch.randn(shape), torch.randn(shape))


def diffusion_case(spatial_dims: int, experiment: ExperimentConfig) -> Case:
    network = build_network(experiment.network, spatial_dims=spatial_dims, seed=0)
    torch.manual_seed(1)
    for parameter in network.parameters():  # MONAI starts the output at zero, which would hide most gradients
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    schedule = build_schedule(experiment.schedule)

    def loss(parameters: Mapping[str, Tensor], x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        def call(x: Tensor, timesteps: Tensor) -> Tensor:
            output: Tensor = functional_call(network, dict(parameters), (), {"x": x, "timesteps": timesteps})
            return output

        return denoising_loss(call, schedule, x0, noise, timesteps)  # type: ignore[arg-type]

    shape = (PATIENTS, DRAWS, 1, *(8,) * spatial_dims)
    return network, loss, (torch.rand(shape) * 2 - 1, torch.randn(shape), torch.randint(1000, (PATIENTS, DRAWS)))


Build = Callable[[ExperimentConfig], Case]
CASES: list[tuple[str, Build]] = [
    ("convolutions 2D", lambda _: small_case(2)),
    ("convolutions 3D", lambda _: small_case(3)),
    ("diffusion 2D", lambda experiment: diffusion_case(2, experiment)),
    ("diffusion 3D", lambda experiment: diffusion_case(3, experiment)),
]
each_case = pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in CASES])


def slow_loop(network: nn.Module, loss: PatientLoss, draws: tuple[Tensor, ...]) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    rows = []
    for patient in range(PATIENTS):
        total = loss(parameters, *(d[patient] for d in draws)).mean()
        rows.append(torch.autograd.grad(total, list(parameters.values())))
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(parameters)}


def assert_same(fast: Mapping[str, Tensor], slow: Mapping[str, Tensor]) -> None:
    assert fast.keys() == slow.keys()
    for name in slow:
        assert bool(slow[name].any()), f"{name}: a gradient of zero compares nothing"
        scale = max(1.0, float(slow[name].abs().max()))
        torch.testing.assert_close(fast[name], slow[name], atol=TOLERANCE * scale, rtol=0)


@each_case
def test_vmap_equals_the_loop_over_patients(build: Build, experiment: ExperimentConfig) -> None:
    network, loss, draws = build(experiment)
    fast = per_patient_gradients(loss, dict(network.named_parameters()), draws)
    slow = slow_loop(network, loss, draws)
    zero = {name for name in slow if slow[name].abs().max() < 1e-7}  # a bias before a softmax over it has none
    assert all("to_k.bias" in name for name in zero)
    assert_same({n: g for n, g in fast.items() if n not in zero}, {n: g for n, g in slow.items() if n not in zero})


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_vmap_equals_opacus_hooks(spatial_dims: int) -> None:
    from opacus import GradSampleModule

    network, loss, (x, target) = small_case(spatial_dims)
    fast = per_patient_gradients(loss, dict(network.named_parameters()), (x, target))
    hooked = GradSampleModule(network, loss_reduction="mean")
    with warnings.catch_warnings():
        # The images need no gradient: PyTorch says that a module's backward hook then fires without one for its input.
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
        (hooked(x.flatten(0, 1)) - target.flatten(0, 1)).square().flatten(1).mean(1).mean().backward()
    slow = {
        name.removeprefix("_module."): p.grad_sample.unflatten(0, (PATIENTS, DRAWS)).mean(1)
        for name, p in hooked.named_parameters()
    }
    assert_same(fast, slow)


def test_a_step_of_the_diffusion_model_is_the_slow_step(experiment: ExperimentConfig) -> None:
    network, loss, draws = diffusion_case(2, experiment)
    parameters = dict(network.named_parameters())
    clip_norm = 0.5
    rows = slow_loop(network, loss, draws)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in rows.values()]).norm(dim=0)
    assert bool((norms > clip_norm).any())
    factors = (clip_norm / norms).clamp(max=1.0)
    config = DPConfig(
        delta=1e-3,
        clip_norm=clip_norm,
        sampling_rate=1.0,
        steps_per_round=1,
        rounds=1,
        draws_per_patient=DRAWS,
        noise_multiplier=1.0,
    )
    plan = calibrate(config, patients=PATIENTS)
    noise = SeededRandomnessForTests(0)
    expected = {
        name: p.detach()
        - (torch.einsum("b,b...->...", factors, rows[name]) + clip_norm * noise.normal(p.shape).float()) / PATIENTS
        for name, p in parameters.items()
    }
    sgd = PatientSGD(
        parameters=parameters,
        optimizer=torch.optim.SGD(parameters.values(), lr=1.0),
        loss=loss,
        plan=plan,
        patients=PATIENTS,
        chunk_size=2,
        randomness=SeededRandomnessForTests(0),
    )
    sgd.step(lambda patients: [d[patients] for d in draws])
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=TOLERANCE, rtol=0)
