"""The fast path (vmap with rules) against the slow ones: autograd patient by patient, and Opacus' hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from custom.config import ExperimentConfig
from custom.diffusion.loss import denoising_loss
from custom.diffusion.networks import build_network
from custom.diffusion.schedule import build_schedule
from privacy import gradients as rules
from privacy.dpsgd import PatientSGD
from privacy.gradients import PatientLoss, per_patient_gradients
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


def slow_loop(
    network: nn.Module, loss: PatientLoss, draws: tuple[Tensor, ...], trained: Callable[[str], bool] = lambda _: True
) -> dict[str, Tensor]:
    parameters = {name: p for name, p in network.named_parameters() if trained(name)}
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
def test_fast_equals_the_loop_over_patients(build: Build, experiment: ExperimentConfig) -> None:
    network, loss, draws = build(experiment)
    fast = per_patient_gradients(loss, dict(network.named_parameters()), draws)
    slow = slow_loop(network, loss, draws)
    zero = {name for name in slow if slow[name].abs().max() < 1e-7}  # a bias before a softmax over it has none
    assert all("to_k.bias" in name for name in zero)
    assert_same({n: g for n, g in fast.items() if n not in zero}, {n: g for n, g in slow.items() if n not in zero})


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_fast_equals_opacus_hooks(spatial_dims: int) -> None:
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
    # One draw for all: the step's blocks are those in which the stream makes its numbers.
    normals = SeededRandomnessForTests(0).normal((sum(p.numel() for p in parameters.values()),)).float()
    noise = dict(zip(parameters, normals.split([p.numel() for p in parameters.values()]), strict=True))
    expected = {
        name: p.detach()
        - (torch.einsum("b,b...->...", factors, rows[name]) + clip_norm * noise[name].view_as(p)) / PATIENTS
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


# ---- layer by layer: each rule, each form of it, and what has none


class Reused(nn.Module):
    """One convolution, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.conv(x)))  # type: ignore[no-any-return]


class OfAConstant(nn.Module):
    """A convolution of the same image for all patients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.register_buffer("image", torch.randn(1, 2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(self.image)


class Attention(nn.Module):
    """Fused attention over the pixels, masked or not."""

    def __init__(self, *, masked: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(2, 8, bias=bias) for bias in (True, False, True)])
        self.mask = torch.ones(64, 64).tril().bool() if masked else None
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).mT
        q, k, v = (layer(pixels).unflatten(2, (2, 4)).transpose(1, 2) for layer in self.qkv)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal)


class Standardised(nn.Conv2d):
    """Its weight is computed from the trained one, so each patient's lies in memory of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class WithoutRule(nn.Module):
    """Products that are not layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.table = nn.Embedding(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        index = (x.flatten(1).sum(1).abs() % 5).long()
        return torch.einsum("kchw,cd->kdhw", x, self.weight).cumsum(2) + self.table(index)[:, :, None, None]


class Joined(nn.Module):
    """Concatenation along channels and along draws, resizing, and an image without draws."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.cat([x, F.interpolate(x, size=(8, 8), mode="nearest")], dim=1))
        return torch.cat([y, self.conv(torch.cat([x[0], x[-1]]))[None]])[1:] + y


class Squared(nn.Module):
    """Takes a derivative of its own, by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: self.conv(x).square().sum())(x)


LAYERS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("1D", lambda: nn.Conv1d(2, 3, 3), (9,)),
    ("2D, stride", lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (8, 8)),
    ("2D, dilation, no bias", lambda: nn.Conv2d(2, 3, 3, dilation=2, bias=False), (8, 8)),
    ("2D, groups", lambda: nn.Conv2d(2, 4, 3, groups=2), (8, 8)),
    ("2D, many channels", lambda: nn.Conv2d(2, 16, 3, stride=2, padding=1), (8, 8)),
    ("2D, many channels, groups, dilation", lambda: nn.Conv2d(2, 32, 3, groups=2, dilation=2), (8, 8)),
    ("3D, many channels", lambda: nn.Conv3d(2, 8, (1, 3, 3), padding=(0, 1, 1), bias=False), (4, 4, 4)),
    ("2D, kernel and stride not square", lambda: nn.Conv2d(2, 3, (1, 3), stride=(2, 1), padding=(0, 1)), (8, 8)),
    ("2D, 1 x 1", lambda: nn.Conv2d(2, 3, 1), (8, 8)),
    ("2D, 1 x 1, stride and padding keep the size", lambda: nn.Conv2d(2, 3, 1, stride=2, padding=2), (4, 4)),
    ("2D, padding by name", lambda: nn.Conv2d(2, 3, 3, padding="same"), (8, 8)),
    ("2D, padding reflected", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (8, 8)),
    ("2D, transposed", lambda: nn.ConvTranspose2d(2, 3, 3), (8, 8)),
    ("3D, stride", lambda: nn.Conv3d(2, 3, 3, stride=2, padding=1), (4, 4, 4)),
    ("3D, groups, dilation", lambda: nn.Conv3d(2, 2, 3, groups=2, dilation=2), (6, 6, 6)),
    ("reused", Reused, (8, 8)),
    ("of a constant", OfAConstant, (8, 8)),
    ("linear", lambda: nn.Linear(8, 3), (8, 8)),
    ("linear, flat", lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.SiLU(), nn.Linear(3, 2)), (8,)),
    ("group norm", lambda: nn.Sequential(nn.GroupNorm(2, 2), nn.Conv2d(2, 2, 1)), (8, 8)),
    ("group norm without weights", lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4, affine=False)), (8, 8)),
    ("attention", Attention, (8, 8)),
    ("attention, masked", lambda: Attention(masked=True), (8, 8)),
    ("attention, causal", lambda: Attention(causal=True), (8, 8)),
    ("layer norm, no rule", lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2)), (8, 8)),
    ("weight computed, rule does not fit", lambda: Standardised(2, 3, 3), (8, 8)),
    ("no rule", WithoutRule, (8, 8)),
    ("joined", Joined, (8, 8)),
    ("derivative inside", Squared, (8, 8)),
]


def layer_case(build: Callable[[], nn.Module], size: tuple[int, ...]) -> Case:
    torch.manual_seed(0)
    network = build()

    def loss(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(network, dict(parameters), (x,))
        return output.sin().flatten(1).sum(1)  # a gradient that differs between the elements

    return network, loss, (torch.randn(PATIENTS, DRAWS, 2, *size),)


@pytest.mark.parametrize("draws_per_patient", [1, DRAWS])
@pytest.mark.parametrize(("build", "size"), [pytest.param(b, s, id=name) for name, b, s in LAYERS])
def test_each_layer_equals_the_loop(
    build: Callable[[], nn.Module], size: tuple[int, ...], draws_per_patient: int
) -> None:
    network, loss, (x,) = layer_case(build, size)
    draws = (x[:, :draws_per_patient],)
    assert_same(per_patient_gradients(loss, dict(network.named_parameters()), draws), slow_loop(network, loss, draws))


def test_one_patient_alone_is_a_batch_too() -> None:
    network, loss, (x,) = layer_case(lambda: convolutions_of(2), (8, 8))
    alone = per_patient_gradients(loss, dict(network.named_parameters()), (x[:1],))
    slow = slow_loop(network, loss, (x,))
    assert_same(alone, {name: gradient[:1] for name, gradient in slow.items()})


def convolutions_of(channels: int) -> nn.Module:
    first, second, last = nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)
    return nn.Sequential(first, nn.GroupNorm(2, 8), nn.SiLU(), second, last)


SUBSETS: dict[str, Callable[[str], bool]] = {
    "weights": lambda name: "weight" in name,
    "biases": lambda name: "bias" in name,
    "first layer": lambda name: name.startswith("0."),
    "last layer": lambda name: name.startswith("4."),
    "norm": lambda name: name.startswith("1."),
    "one bias": lambda name: name == "3.bias",
}


@pytest.mark.parametrize("trained", [pytest.param(subset, id=name) for name, subset in SUBSETS.items()])
def test_a_subset_of_the_parameters_equals_the_loop(trained: Callable[[str], bool]) -> None:
    network, loss, draws = layer_case(lambda: convolutions_of(2), (8, 8))
    subset = {name: p for name, p in network.named_parameters() if trained(name)}
    assert_same(per_patient_gradients(loss, subset, draws), slow_loop(network, loss, draws, trained))


class Backwards(TorchDispatchMode):
    """Which gradients convolutions were asked for: (input, weight, bias)."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[tuple[bool, ...]] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[type-arg]
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("4.", []),  # 1 x 1: a product of matrices
        ("3.", [(True, False, False), (False, True, False)]),  # through the last layer, and its own
        ("0.", [(True, False, False), (True, False, False), (False, True, False)]),
    ],
)
def test_frozen_weights_cost_no_time(layer: str, expected: list[tuple[bool, ...]]) -> None:
    network, loss, draws = layer_case(lambda: convolutions_of(2), (8, 8))
    with Backwards() as asked:
        per_patient_gradients(loss, {n: p for n, p in network.named_parameters() if n.startswith(layer)}, draws)
    assert asked.masks == expected


def test_a_parameter_that_the_loss_does_not_use_has_a_gradient_of_zero() -> None:
    network, loss, draws = layer_case(Reused, (8, 8))
    gradients = per_patient_gradients(loss, {**dict(network.named_parameters()), "other": torch.ones(3)}, draws)
    assert torch.equal(gradients["other"], torch.zeros(PATIENTS, 3))


def test_mixed_precision_equals_the_loop(experiment: ExperimentConfig) -> None:
    network, plain, draws = layer_case(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Linear(6, 3)), (8, 8))

    def loss(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(parameters, x).float()

    fast = per_patient_gradients(loss, dict(network.named_parameters()), draws)
    for name, slow in slow_loop(network, loss, draws).items():
        assert fast[name].dtype == torch.float32
        torch.testing.assert_close(fast[name], slow, atol=0.03 * float(slow.abs().max()), rtol=0)


def test_the_diffusion_model_takes_the_rules(experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of its layers falls back to vmap's own in silence."""
    fell_back: list[object] = []

    def watched(rule: Callable[..., object]) -> Callable[..., object]:
        def call(operation: object, *placed: object, **options: object) -> object:
            result = rule(operation, *placed, **options)
            if result is None:
                fell_back.append(operation)
            return result

        return call

    watching = {operation: watched(rule) for operation, rule in rules._Rules._RULES.items()}
    monkeypatch.setattr(rules._Rules, "_RULES", watching)
    network, loss, draws = diffusion_case(2, experiment)
    per_patient_gradients(loss, dict(network.named_parameters()), draws)
    assert fell_back == []
    network, loss, draws = layer_case(lambda: Standardised(2, 3, 3), (8, 8))
    per_patient_gradients(loss, dict(network.named_parameters()), draws)
    assert fell_back == [torch.conv2d]
