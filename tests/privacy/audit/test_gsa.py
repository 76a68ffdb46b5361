from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from custom.config import ExperimentConfig
from custom.diffusion.loss import denoising_loss
from custom.diffusion.networks import build_network
from custom.diffusion.schedule import build_schedule
from privacy.audit import gradients as module
from privacy.audit.errors import Unattackable
from privacy.audit.gradients import Loss, evaluations_per_image, gradient_norms, gradient_score
from privacy.audit.queries import shared_noise
from privacy.gradients import per_patient_gradients

T = 100
ALPHAS = torch.cumprod(1 - torch.linspace(1e-3, 0.1, T), 0)
TIMESTEPS = (5, 20, 60)
TOLERANCE = 1e-4  # relative, of float32 sums in another order

Images = NDArray[np.float32]
Model = tuple[Loss, dict[str, Tensor]]


class Convolutions(nn.Module):
    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[spatial_dims - 2]
        self.first, self.norm, self.last = conv(2, 8, 3, padding=1), nn.GroupNorm(2, 8), conv(8, 1, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        level = (timesteps / T).view(-1, *(1,) * (x.ndim - 1)).expand(x.shape)
        return self.last(F.silu(self.norm(self.first(torch.cat([x, level], 1)))))  # type: ignore[no-any-return]


class Dense(nn.Module):
    """Wide enough to learn a few images by heart."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        sizes = (pixels + 1, 256, 256)
        self.hidden = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])
        self.last = nn.Linear(256, pixels)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        y = torch.cat([x.flatten(1), (timesteps / T)[:, None]], 1)
        for layer in self.hidden:
            y = F.silu(layer(y))
        return self.last(y).view(x.shape)  # type: ignore[no-any-return]


def model_of(network: nn.Module) -> Model:
    def loss(parameters: Mapping[str, Tensor], x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha = ALPHAS[timesteps].view(-1, *(1,) * (x0.ndim - 1))
        x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        predicted: Tensor = torch.func.functional_call(network, dict(parameters), (x_t, timesteps))
        return (predicted - noise).square().flatten(1).mean(1)

    return loss, dict(network.named_parameters())


def convolutions(spatial_dims: int = 2) -> Model:
    torch.manual_seed(0)
    return model_of(Convolutions(spatial_dims))


def unet(experiment: ExperimentConfig) -> Model:
    network = build_network(experiment.network, spatial_dims=2, seed=0)
    torch.manual_seed(1)
    for parameter in network.parameters():  # MONAI starts the output at zero, which would hide most gradients
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    schedule = build_schedule(experiment.schedule)

    def loss(parameters: Mapping[str, Tensor], x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        def call(x: Tensor, timesteps: Tensor) -> Tensor:
            inputs = {"x": x, "timesteps": timesteps}
            output: Tensor = torch.func.functional_call(network, dict(parameters), (), inputs)
            return output

        return denoising_loss(call, schedule, x0, noise, timesteps)

    return loss, dict(network.named_parameters())


def images(count: int, *spatial: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 1, *spatial)).astype(np.float32)


def one_gradient(model: Model, image: NDArray[np.float32], *, seed: int = 0) -> list[Tensor]:
    """Of one image [1, *spatial], timestep after timestep, by torch.autograd."""
    loss, parameters = model
    total = torch.zeros(())
    for t in TIMESTEPS:
        noise = shared_noise(seed, t, 0, image.shape)
        total = total + loss(parameters, torch.from_numpy(image)[None], noise, torch.tensor([t]))[0] / len(TIMESTEPS)
    return list(torch.autograd.grad(total, list(parameters.values())))


def slow_norms(model: Model, batch: Images, *, seed: int = 0) -> NDArray[np.float64]:
    rows = [[float(g.double().norm()) for g in one_gradient(model, image, seed=seed)] for image in batch]
    return np.array(rows)


def norms(model: Model, batch: Images, *, seed: int = 0, batch_size: int = 3) -> NDArray[np.float64]:
    return gradient_norms(*model, batch, timesteps=TIMESTEPS, seed=seed, batch_size=batch_size)


def assert_same(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> None:
    # A bias before a softmax over it has a gradient of rounding errors, which compare with nothing.
    rounding = 1e-6 * wanted.max()
    assert (wanted > rounding).mean() > 0.9
    np.testing.assert_allclose(found, wanted, rtol=TOLERANCE, atol=rounding)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_norms_equal_the_slow_loop(spatial_dims: int) -> None:
    model, batch = convolutions(spatial_dims), images(7, *(6,) * spatial_dims)
    found = norms(model, batch)
    assert found.shape == (7, len(model[1]))
    assert found.dtype == np.float64
    assert_same(found, slow_norms(model, batch))


def test_norms_of_the_real_network_equal_the_slow_loop(experiment: ExperimentConfig) -> None:
    model, batch = unet(experiment), images(3, 8, 8)
    assert_same(norms(model, batch, batch_size=2), slow_norms(model, batch))


def test_score_is_minus_the_norm_of_the_whole_gradient() -> None:
    model, batch = convolutions(), images(4, 6, 6)
    whole = [torch.cat([g.flatten() for g in one_gradient(model, image)]).double().norm() for image in batch]
    np.testing.assert_allclose(gradient_score(norms(model, batch)), -np.array(whole), rtol=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_change_nothing(batch_size: int) -> None:
    model, batch = convolutions(), images(5, 6, 6)
    np.testing.assert_allclose(norms(model, batch, batch_size=batch_size), norms(model, batch), rtol=TOLERANCE)


def test_other_images_and_their_order_change_nothing() -> None:
    model, batch = convolutions(), images(5, 6, 6)
    together = norms(model, batch)
    np.testing.assert_allclose(norms(model, batch[::-1]), together[::-1], rtol=TOLERANCE)
    np.testing.assert_allclose(norms(model, batch[2:3]), together[2:3], rtol=TOLERANCE)


def test_noise_is_the_seeds() -> None:
    model, batch = convolutions(), images(4, 6, 6)
    first = norms(model, batch, seed=0)
    torch.manual_seed(5)  # the global generator is left out of it
    np.testing.assert_array_equal(norms(model, batch, seed=0), first)
    other = norms(model, batch, seed=1)
    assert np.abs(other / first - 1).max() > 0.01
    assert_same(other, slow_norms(model, batch, seed=1))


def test_evaluations_are_those_that_are_made() -> None:
    (loss, parameters), batch = convolutions(), images(4, 6, 6)
    forwards = 0

    def counted(parameters: Mapping[str, Tensor], x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        nonlocal forwards
        forwards += len(x0)
        return loss(parameters, x0, noise, timesteps)

    norms((counted, parameters), batch, batch_size=1)
    assert 3 * forwards / len(batch) == evaluations_per_image(TIMESTEPS)


def test_memory_is_bounded_by_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def spy(loss: Any, parameters: Any, draws: Any) -> dict[str, Tensor]:
        held.append(len(draws[0]))
        return per_patient_gradients(loss, parameters, draws)

    monkeypatch.setattr(module, "per_patient_gradients", spy)
    norms(convolutions(), images(5, 6, 6), batch_size=2)
    assert held == [2, 2, 1]


def test_members_stand_out_in_an_overfitted_model_only() -> None:
    batch = images(60, 6, 6)
    member = np.arange(60) < 20
    torch.manual_seed(0)
    network = Dense(36)
    model = model_of(network)
    untrained = roc_auc_score(member, gradient_score(norms(model, batch, batch_size=20)))
    loss, parameters = model
    optimizer = torch.optim.Adam(parameters.values(), lr=2e-3)
    members, generator = torch.from_numpy(batch[member]), torch.Generator().manual_seed(0)
    for _ in range(600):
        noise = torch.randn(members.shape, generator=generator)
        optimizer.zero_grad()
        loss(parameters, members, noise, torch.randint(T, (20,), generator=generator)).mean().backward()
        optimizer.step()
    overfitted = roc_auc_score(member, gradient_score(norms(model, batch, batch_size=20)))
    assert overfitted > 0.8
    assert abs(untrained - 0.5) < 0.2


@given(st.lists(st.lists(st.floats(0, 1e3), min_size=3, max_size=3), min_size=1, max_size=5))
def test_score_falls_as_any_norm_grows(rows: list[list[float]]) -> None:
    score = gradient_score(np.array(rows))
    assert (score <= -np.array(rows).max(axis=1) + 1e-9).all()
    assert (gradient_score(np.array(rows) + 1) < score).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": images(2, 6, 6)[:0]}, "images"),
        ({"images": images(2, 6, 6)[:, 0]}, "images"),
        ({"images": images(2, 6, 6).astype(np.float64)}, "images"),
        ({"images": images(2, 6, 6) * np.float32("nan")}, "images"),
        ({"timesteps": ()}, "timesteps"),
        ({"timesteps": (5, 5)}, "timesteps"),
        ({"timesteps": (-1,)}, "timesteps"),
        ({"timesteps": (1.0,)}, "timesteps"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"parameters": {}}, "parameters"),
    ],
)
def test_what_cannot_be_attacked_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    loss, parameters = convolutions()
    arguments = {"parameters": parameters, "images": images(2, 6, 6), "timesteps": (5,), "seed": 0, "batch_size": 2}
    with pytest.raises(Unattackable, match=named):
        gradient_norms(loss, **{**arguments, **changes})


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    loss, parameters = convolutions()
    broken = {name: p.detach() * (float("nan") if name == "last.bias" else 1) for name, p in parameters.items()}
    with pytest.raises(Unattackable, match="gradient"):
        norms((loss, broken), images(2, 6, 6))


def test_a_bar_is_shown_where_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    loss, parameters = convolutions()
    for progress in (False, True):
        gradient_norms(loss, parameters, images(2, 6, 6), timesteps=(5,), seed=0, batch_size=2, progress=progress)
        assert ("gradient norms" in capfd.readouterr().err) is progress
