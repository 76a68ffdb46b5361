from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from custom.config import ExperimentConfig
from custom.diffusion.loss import denoising_loss
from custom.diffusion.networks import build_network
from custom.diffusion.schedule import build_schedule
from privacy.audit.errors import Unattackable
from privacy.audit.gradients import Loss
from privacy.audit.queries import shared_noise
from privacy.audit.updates import Inversion, gradient_cosine, invert_update, loss_slope, rdlv

T = 100
ALPHAS = torch.cumprod(1 - torch.linspace(1e-3, 0.1, T), 0)
TIMESTEPS = (20, 40, 60, 80)
SIZE = 16

Images = NDArray[np.float32]
Weights = dict[str, Tensor]
Model = tuple[Loss, Weights]


class Dense(nn.Module):
    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(pixels + 1, 64), nn.Linear(64, 64), nn.Linear(64, pixels)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        y = torch.cat([x.flatten(1), (timesteps / T)[:, None]], 1)
        return self.last(F.silu(self.second(F.silu(self.first(y))))).view(x.shape)  # type: ignore[no-any-return]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        level = (timesteps / T).view(-1, 1, 1, 1).expand(x.shape)
        y = F.silu(self.first(torch.cat([x, level], 1)))
        return self.last(F.silu(self.second(y)))  # type: ignore[no-any-return]


def model_of(network: nn.Module, *, prediction: str) -> Model:
    def loss(parameters: Mapping[str, Tensor], x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha = ALPHAS[timesteps].view(-1, *(1,) * (x0.ndim - 1))
        a, b = alpha.sqrt(), (1 - alpha).sqrt()
        predicted: Tensor = torch.func.functional_call(network, dict(parameters), (a * x0 + b * noise, timesteps))
        target = noise if prediction == "epsilon" else a * noise - b * x0
        return (predicted - target).square().flatten(1).mean(1)

    return loss, {name: p.detach() for name, p in network.named_parameters()}


@pytest.fixture(scope="module")
def dense() -> Model:
    torch.manual_seed(0)
    return model_of(Dense(64), prediction="v")


@pytest.fixture(scope="module")
def convolutions() -> Model:
    torch.manual_seed(0)
    return model_of(Convolutions(), prediction="epsilon")


def images(count: int, *, seed: int = 0) -> Images:
    """Without any structure that members and non-members could share: [count, 1, 8, 8]."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, 1, 8, 8)).astype(np.float32)


def ellipses(count: int, *, seed: int) -> Images:
    """Of one family, whose mean image is a prior: [count, 1, SIZE, SIZE]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    drawn = []
    for _ in range(count):
        (cx, cy), (w, h), brightness = rng.uniform(-0.4, 0.4, 2), rng.uniform(0.25, 0.6, 2), rng.uniform(0, 0.9)
        drawn.append(np.where(((x - cx) / w) ** 2 + ((y - cy) / h) ** 2 < 1, brightness, -1))
    return np.stack(drawn)[:, None].astype(np.float32)


def gradient(
    loss: Loss, weights: Mapping[str, Tensor], x0: Tensor, noise: Tensor, timesteps: Sequence[int]
) -> dict[str, Tensor]:
    """Of the mean loss of a batch."""
    own = {name: p.clone().requires_grad_() for name, p in weights.items()}
    mean = loss(own, x0, noise, torch.tensor(timesteps)).mean()
    return dict(zip(own, torch.autograd.grad(mean, list(own.values())), strict=True))


def stepped(weights: Mapping[str, Tensor], towards: Mapping[str, Tensor], rate: float) -> Weights:
    return {name: p + rate * towards[name] for name, p in weights.items()}


def scaled(update: Mapping[str, Tensor], factor: float) -> Weights:
    return {name: factor * tensor for name, tensor in update.items()}


# ---- loss slope


@given(
    st.integers(2, 20),
    st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 10)), min_size=1, max_size=5),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_slope_is_that_of_least_squares(
    rounds: int, lines: list[tuple[float, float]], roughness: float, seed: int
) -> None:
    slopes, starts = np.array(lines).T
    r = np.arange(rounds)[:, None]
    straight = starts + slopes * r
    np.testing.assert_allclose(loss_slope(straight), slopes, atol=1e-9)
    rough = straight + roughness * np.random.default_rng(seed).standard_normal(straight.shape)
    np.testing.assert_allclose(loss_slope(rough), np.polyfit(r[:, 0], rough, 1)[0], atol=1e-9)


def test_members_losses_fall_faster(dense: Model) -> None:
    (loss, weights), targets, member = dense, images(40), np.arange(40) < 4
    x0 = torch.from_numpy(targets)
    noise, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)), torch.full((40,), 60)
    losses = []
    for _, update in zip(range(4), trained_rounds(dense, targets[member], rounds=4)[1], strict=True):
        losses.append(loss(weights, x0, noise, t).double().numpy())
        weights = stepped(weights, update, 1.0)
    assert roc_auc_score(member, -loss_slope(np.stack(losses))) > 0.9


@pytest.mark.parametrize("losses", [np.ones((1, 3)), np.ones(3), np.array([[0.0], [np.nan]])])
def test_losses_without_a_slope_are_refused(losses: NDArray[np.float64]) -> None:
    with pytest.raises(Unattackable, match="losses"):
        loss_slope(losses)


# ---- gradient cosine


def trained_rounds(
    model: Model, batch: Images, *, rounds: int, seed: int = 0, steps: int = 10
) -> tuple[list[Weights], list[Weights]]:
    """One site's: weights before each round and updates, by SGD with noise and timesteps of its own."""
    loss, weights = model
    x0, generator = torch.from_numpy(batch), torch.Generator().manual_seed(seed)
    starts, updates = [], []
    for _ in range(rounds):
        after = weights
        for _ in range(steps):
            noise = torch.randn(x0.shape, generator=generator)
            timesteps = torch.randint(T, (len(x0),), generator=generator).tolist()
            after = stepped(after, gradient(loss, after, x0, noise, timesteps), -0.1)
        starts.append(weights)
        updates.append({name: after[name] - weights[name] for name in weights})
        weights = after
    return starts, updates


def cosines(
    model: Model,
    starts: Sequence[Weights],
    updates: Sequence[Weights],
    batch: Images,
    *,
    seed: int = 0,
    batch_size: int = 16,
) -> NDArray[np.float64]:
    return gradient_cosine(model[0], starts, updates, batch, timesteps=TIMESTEPS, seed=seed, batch_size=batch_size)


def pull(model: Model, weights: Weights, image: Images) -> Weights:
    """−∇ of one image's loss [1, 1, 8, 8] with the attacker's own noise of seed 0."""
    x0 = torch.from_numpy(image).expand(len(TIMESTEPS), -1, -1, -1)
    noise = torch.cat([shared_noise(0, t, 0, image.shape[1:]) for t in TIMESTEPS])
    return scaled(gradient(model[0], weights, x0, noise, TIMESTEPS), -1.0)


def flat(weights: Weights, names: Sequence[str]) -> NDArray[np.float64]:
    return np.concatenate([weights[name].double().flatten().numpy() for name in names])


@pytest.mark.parametrize("rate", [1e-3, 1.0, 50.0])
def test_a_step_on_one_image_with_the_same_noise_has_cosine_1(dense: Model, rate: float) -> None:
    batch, weights = images(3), dense[1]
    update = scaled(pull(dense, weights, batch[1:2]), rate)
    found = cosines(dense, [weights], [update], batch)
    assert found[1] == pytest.approx(1, abs=1e-5)
    assert found[[0, 2]].max() < 0.9
    np.testing.assert_allclose(cosines(dense, [weights], [scaled(update, -1)], batch), -found, atol=1e-6)


def test_cosines_equal_the_slow_loop_over_rounds_and_images(dense: Model) -> None:
    batch = images(5)
    starts, updates = trained_rounds(dense, batch[:2], rounds=3)
    names = list(dense[1])
    wanted = np.zeros(5)
    for weights, update in zip(starts, updates, strict=True):
        delta = flat(update, names)
        for index in range(5):
            own = flat(pull(dense, weights, batch[index : index + 1]), names)
            wanted[index] += own @ delta / np.linalg.norm(own) / np.linalg.norm(delta) / 3
    # The order of the names is of no account.
    shuffled = [{name: update[name] for name in reversed(names)} for update in updates]
    for batch_size in (1, 2, 5, 16):
        np.testing.assert_allclose(cosines(dense, starts, shuffled, batch, batch_size=batch_size), wanted, atol=1e-5)


def test_a_site_s_updates_give_its_patients_away_and_the_mean_over_sites_less(dense: Model) -> None:
    """What secure aggregation takes away, with the same attack on what it lets through."""
    sites, rounds, own = 16, 3, 4
    pools = [images(own, seed=10 + site) for site in range(sites)]
    targets = np.concatenate([pools[0], images(60, seed=1)])
    member = np.arange(len(targets)) < own
    starts: list[Weights] = []
    alone: list[Weights] = []
    mean: list[Weights] = []
    model = dense
    for number in range(rounds):
        of_sites = [trained_rounds(model, p, rounds=1, seed=100 * number + s) for s, p in enumerate(pools)]
        updates = [each for _, (each,) in of_sites]
        starts.append(model[1])
        alone.append(updates[0])
        mean.append({name: torch.stack([u[name] for u in updates]).mean(0) for name in model[1]})
        model = model[0], stepped(model[1], mean[-1], 1.0)
    of_one = roc_auc_score(member, cosines(dense, starts, alone, targets))
    of_all = roc_auc_score(member, cosines(dense, starts, mean, targets))
    assert of_one > 0.95
    assert of_all < of_one - 0.15


def test_cosines_are_the_seeds(dense: Model) -> None:
    batch = images(4)
    starts, updates = trained_rounds(dense, batch[:2], rounds=1)
    first = cosines(dense, starts, updates, batch)
    torch.manual_seed(7)  # the global generator is left out of it
    np.testing.assert_array_equal(cosines(dense, starts, updates, batch), first)
    assert np.abs(cosines(dense, starts, updates, batch, seed=1) - first).max() > 1e-3


def test_rounds_that_cannot_be_attacked_are_refused_by_name(dense: Model) -> None:
    weights, batch = dense[1], images(2)
    update = pull(dense, weights, batch[:1])
    short = {name: tensor for name, tensor in update.items() if name != "last.bias"}
    misshapen = {**update, "last.bias": update["last.bias"][:1]}
    broken = {**update, "last.bias": update["last.bias"] * float("inf")}
    for starts, updates, named in (
        ([], [], "parameters, updates"),
        ([weights, weights], [update], "parameters, updates"),
        ([weights], [short], "parameters, update = "),
        ([weights], [misshapen], "parameters, update = "),
        ([weights], [broken], "update = 'not finite'"),
        ([weights], [scaled(update, 0)], "update = 'zero'"),
    ):
        with pytest.raises(Unattackable, match=named):
            cosines(dense, starts, updates, batch)
    with pytest.raises(Unattackable, match="images"):
        cosines(dense, [weights], [update], batch[:0])


def test_an_image_without_a_gradient_is_refused(dense: Model) -> None:
    loss, weights = dense

    def flat_loss(parameters: Mapping[str, Tensor], x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return 0 * loss(parameters, x0, noise, timesteps)

    with pytest.raises(Unattackable, match="gradient = 'zero'"):
        cosines((flat_loss, weights), [weights], [weights], images(2))


# ---- inversion


def inverted(model: Model, update: Weights, noise: Tensor | None, **changes: Any) -> Inversion:
    arguments: dict[str, Any] = {
        "image_shape": (1, SIZE, SIZE),
        "timesteps": (30,),
        "noise": noise,
        "steps": 300,
        "total_variation": 1e-3,
        "seed": 0,
    }
    return invert_update(*model, update, **{**arguments, **changes})


def of_one_image(model: Model, image: Images) -> tuple[Weights, Tensor]:
    """The update that a step on it makes, and with which noise."""
    noise = torch.randn(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return scaled(gradient(*model, torch.from_numpy(image), noise, (30,)), -0.05), noise


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_image_is_redrawn_from_its_update_and_not_from_a_noisy_one(convolutions: Model, which: int) -> None:
    image, prior = ellipses(3, seed=1)[which : which + 1], ellipses(200, seed=7).mean(0)
    update, noise = of_one_image(convolutions, image)
    found = inverted(convolutions, update, noise)
    assert found.cosine > 0.999
    assert found.images.shape == image.shape
    leak = rdlv(image, found.images, prior)
    assert leak.ssim > 0.9
    assert leak.rdlv > 0.3

    # Noise as differential privacy would add it: noise multiplier 1, of a clip norm that is the update's own norm.
    generator = torch.Generator().manual_seed(4)
    norm = float(torch.cat([tensor.flatten() for tensor in update.values()]).norm())
    noisy = {name: u + norm * torch.randn(u.shape, generator=generator) for name, u in update.items()}
    blurred = inverted(convolutions, noisy, noise)
    assert rdlv(image, blurred.images, prior).rdlv < 0
    assert blurred.cosine < 0.3


def test_the_update_s_length_is_of_no_account(convolutions: Model) -> None:
    update, noise = of_one_image(convolutions, ellipses(1, seed=1))
    first = inverted(convolutions, update, noise, steps=5)
    np.testing.assert_allclose(inverted(convolutions, scaled(update, 64.0), noise, steps=5).history, first.history)


def test_history_is_what_was_matched_before_every_step(convolutions: Model) -> None:
    image = ellipses(1, seed=1)
    update, noise = of_one_image(convolutions, image)
    found = inverted(convolutions, update, noise, steps=40)
    longer = inverted(convolutions, update, noise, steps=41)
    assert len(found.history) == 40
    assert found.history[0] < found.cosine
    assert longer.history[:10] == found.history[:10]
    assert abs(found.images).max() <= 1
    # The final cosine is that of the images that are returned, by the slow way.
    own = scaled(gradient(*convolutions, torch.from_numpy(found.images), noise, (30,)), -1.0)
    one, other = (flat(weights, list(update)) for weights in (own, update))
    wanted = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert found.cosine == pytest.approx(wanted, abs=1e-5)


def test_rough_images_are_what_total_variation_costs(convolutions: Model) -> None:
    update, noise = of_one_image(convolutions, ellipses(1, seed=1))

    def roughness(weight: float) -> float:
        x = inverted(convolutions, update, noise, total_variation=weight, steps=100).images
        return float(abs(np.diff(x, axis=2)).mean() + abs(np.diff(x, axis=3)).mean())

    assert roughness(1.0) < 0.3 * roughness(0.0)


def test_unknown_noise_is_sought_too(convolutions: Model) -> None:
    update, noise = of_one_image(convolutions, ellipses(1, seed=1))
    found = inverted(convolutions, update, None, steps=150)
    assert found.history[0] < 0.9
    assert found.cosine > 0.99  # a match, which need not be the patient
    held = torch.randn(noise.shape, generator=torch.Generator().manual_seed(9))
    assert inverted(convolutions, update, held, steps=150).cosine < found.cosine


def test_inversion_is_the_seeds_and_leaves_the_model_alone(convolutions: Model) -> None:
    weights = convolutions[1]
    update, _ = of_one_image(convolutions, ellipses(1, seed=1))
    before = {name: p.clone() for name, p in weights.items()}
    first = inverted(convolutions, update, None, steps=10)
    torch.manual_seed(7)  # the global generator is left out of it
    again = inverted(convolutions, update, None, steps=10)
    np.testing.assert_array_equal(again.images, first.images)
    assert again.history == first.history
    assert not np.array_equal(inverted(convolutions, update, None, steps=10, seed=1).images, first.images)
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in weights.items())


def test_the_right_timestep_matches_best(convolutions: Model) -> None:
    """How one who does not know the timestep tries candidates."""
    update, noise = of_one_image(convolutions, ellipses(1, seed=1))
    matches = {t: inverted(convolutions, update, noise, timesteps=(t,), steps=200).cosine for t in (5, 30, 90)}
    assert max(matches, key=lambda t: matches[t]) == 30


def test_a_batch_of_two_is_redrawn_together(convolutions: Model) -> None:
    pair, prior = ellipses(2, seed=1), ellipses(200, seed=7).mean(0)
    noise = torch.randn(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    update = scaled(gradient(*convolutions, torch.from_numpy(pair), noise, (30, 60)), -0.05)
    found = inverted(convolutions, update, noise, timesteps=(30, 60))
    assert found.images.shape == pair.shape
    assert rdlv(pair, found.images, prior).rdlv > 0.3


def test_the_real_network_s_update_can_be_inverted(experiment: ExperimentConfig) -> None:
    """Its fused attention has no second derivative; the attack gets by without."""
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

    model = loss, {name: p.detach() for name, p in network.named_parameters()}
    update, noise = of_one_image(model, ellipses(1, seed=1))
    found = inverted(model, update, noise, steps=15)
    assert found.cosine > found.history[0] + 0.01


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_shape": (SIZE, SIZE)}, "image_shape"),
        ({"image_shape": (2, SIZE, SIZE)}, "image_shape"),
        ({"image_shape": (1, SIZE, 0)}, "image_shape"),
        ({"timesteps": ()}, "timesteps"),
        ({"timesteps": (-1,)}, "timesteps"),
        ({"timesteps": (30, 30)}, "noise"),
        ({"noise": torch.full((1, 1, SIZE, SIZE), float("nan"))}, "noise"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"total_variation": -1e-3}, "total_variation"),
        ({"total_variation": float("nan")}, "total_variation"),
        ({"total_variation": float("inf")}, "total_variation"),
        ({"seed": -1}, "seed"),
    ],
)
def test_inversions_that_cannot_be_meant_are_refused_by_name(
    convolutions: Model, changes: dict[str, Any], named: str
) -> None:
    update, noise = of_one_image(convolutions, ellipses(1, seed=1))
    with pytest.raises(Unattackable, match=named):
        inverted(convolutions, update, **{"noise": noise, **changes})


def test_updates_without_a_direction_are_refused(convolutions: Model) -> None:
    update, noise = of_one_image(convolutions, ellipses(1, seed=1))
    with pytest.raises(Unattackable, match="update = 'zero'"):
        inverted(convolutions, scaled(update, 0), noise)
    with pytest.raises(Unattackable, match="update = 'not finite'"):
        inverted(convolutions, scaled(update, float("nan")), noise)
    with pytest.raises(Unattackable, match="parameters, update"):
        inverted(convolutions, {}, noise)


def test_a_loss_without_a_gradient_is_refused(convolutions: Model) -> None:
    loss, weights = convolutions
    update, noise = of_one_image(convolutions, ellipses(1, seed=1))

    def flat_loss(parameters: Mapping[str, Tensor], x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return 0 * loss(parameters, x0, noise, timesteps)

    with pytest.raises(Unattackable, match="cosine"):
        inverted((flat_loss, weights), update, noise)


# ---- relative data leakage value


def ssim(one: Images, other: Images) -> float:
    return float(structural_similarity(one[0].astype(float), other[0].astype(float), win_size=7, data_range=2.0))


def test_rdlv_is_relative_to_the_prior() -> None:
    (image,), prior = ellipses(1, seed=1), ellipses(200, seed=7).mean(0)
    to_prior = ssim(image, prior)
    perfect, nothing = rdlv(image[None], image[None], prior), rdlv(image[None], prior[None], prior)
    assert perfect.ssim == pytest.approx(1)
    assert perfect.rdlv == pytest.approx((1 - to_prior) / to_prior)
    assert nothing.rdlv == 0
    assert nothing.ssim == pytest.approx(to_prior)
    half = (image + prior) / 2
    assert rdlv(image[None], half[None], prior).rdlv == pytest.approx((ssim(image, half) - to_prior) / to_prior)


def test_rdlv_is_the_highest_over_all_pairs() -> None:
    """Of the relative values: the pair need not be the one with the highest similarity."""
    one, other = ellipses(2, seed=1)
    prior = ellipses(200, seed=7).mean(0)
    trained = np.stack([0.1 * one + 0.9 * prior, other])  # the first is nearly what everybody knows
    redrawn = np.stack([0.7 * other + 0.3 * prior, trained[0]])
    similarity = np.array([[ssim(x, y) for y in redrawn] for x in trained])
    to_prior = np.array([[ssim(x, prior)] for x in trained])
    values = (similarity - to_prior) / to_prior
    assert np.unravel_index(similarity.argmax(), (2, 2)) == (0, 1)
    found = rdlv(trained, redrawn, prior)
    assert found.rdlv == pytest.approx(values.max())
    assert (found.image, found.reconstruction) == (1, 0)
    assert found.ssim == pytest.approx(similarity[1, 0])


def test_rdlv_of_volumes() -> None:
    rng = np.random.default_rng(0)
    volume = rng.uniform(-1, 1, (1, 1, 8, 8, 8)).astype(np.float32)
    assert rdlv(volume, volume, 0.5 * volume[0]).ssim == pytest.approx(1)


def test_rdlv_that_means_nothing_is_refused() -> None:
    trained = ellipses(2, seed=1)
    broken = trained.copy()
    broken[0, 0, 0, 0] = np.nan
    for arguments, named in (
        ((trained[:0], trained, trained[0]), "images, reconstructions, prior"),
        ((trained, trained[:0], trained[0]), "images, reconstructions, prior"),
        ((trained, trained[..., 1:], trained[0]), "images, reconstructions, prior"),
        ((trained, trained, trained), "images, reconstructions, prior"),
        ((trained, broken, trained[0]), "not finite"),
        ((trained[..., :6], trained[..., :6], trained[0][..., :6]), "7 voxels"),
        ((trained, trained, np.ones_like(trained[0])), "prior = 'similarity"),
    ):
        with pytest.raises(Unattackable, match=named):
            rdlv(*arguments)


def test_bars_are_shown_where_they_are_asked_for(convolutions: Model, capfd: pytest.CaptureFixture[str]) -> None:
    update, noise = of_one_image(convolutions, ellipses(1, seed=1))
    loss, weights = convolutions
    for progress in (False, True):
        inverted(convolutions, update, noise, steps=1, progress=progress)
        assert ("inverting an update" in capfd.readouterr().err) is progress
        gradient_cosine(
            loss,
            [weights],
            [update],
            ellipses(1, seed=1),
            timesteps=(30,),
            seed=0,
            batch_size=1,
            progress=progress,
        )
        assert ("gradient cosines" in capfd.readouterr().err) is progress
