"""The figures equal slow references, say nothing where there is nothing and rank what is known to be better."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from custom.audit_target import denoiser
from custom.diffusion.loss import denoising_loss
from custom.diffusion.networks import build_network
from custom.diffusion.schedule import Schedule, build_schedule
from custom.evaluation import EFFNET, EFFNET_LAYER, _features, extractors
from custom.model_config import NetworkConfig, ScheduleConfig
from custom.strict import ConfigError
from custom.study.metrics import (
    band_losses,
    classifier_accuracy,
    diversity,
    features,
    kid_with_interval,
    membership_auc,
)
from privacy.audit.errors import Unattackable

Images = NDArray[np.float32]
Features = NDArray[np.float64]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_network(seed: int = 0) -> nn.Module:
    config = NetworkConfig(channels=(8, 16), attention=(False, False), norm_groups=4, head_channels=8)
    network = build_network(config, spatial_dims=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # the last layer is zero at first: a prediction of nothing tests nothing
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return network


def schedule(prediction: str = "v", timesteps: int = 100) -> Schedule:
    return build_schedule(ScheduleConfig(timesteps=timesteps, prediction=prediction))


def blobs(count: int, *, size: int = 16, seed: int) -> Images:
    """A Gaussian spot of random place, width and brightness in each image."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    cx, cy, w, b = (rng.uniform(low, high, (count, 1, 1)) for low, high in ((-0.5, 0.5),) * 2 + ((0.2, 0.5), (1, 2)))
    images = b * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * w**2)) - 1
    return images[:, None].astype(np.float32)


# --- held-out loss ---


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_band_losses_are_those_of_single_images(prediction: str) -> None:
    network, forward, images, bands = tiny_network(), schedule(prediction), blobs(70, seed=0), 4
    network.train()
    found = band_losses(network, forward, images, bands=bands, seed=7)
    assert network.training
    generator = torch.Generator().manual_seed(7)
    to_epsilon = denoiser(network, forward, torch.device("cpu"))
    for band in range(bands):
        noise = torch.randn(images.shape, generator=generator)
        order = torch.randperm(len(images), generator=generator)
        own, of_epsilon, seen = [], [], []
        for image, one, rank in zip(images, noise, order.tolist(), strict=True):
            t = torch.tensor([band * 25 + int((rank + 0.5) / len(images) * 25)])
            x0, one = torch.from_numpy(image)[None], one[None]
            with torch.no_grad():
                own.append(float(denoising_loss(network, forward, x0, one, t)))
                predicted = to_epsilon.epsilon(forward.noised(x0, one, t), t)
            of_epsilon.append(float((predicted - one).square().mean()))
            seen.append(int(t))
        assert (min(seen), max(seen)) == (band * 25, band * 25 + 24)
        assert np.bincount(np.array(seen) - band * 25).max() <= 3  # spread evenly: 70 images over 25 timesteps
        assert found.own[band] == pytest.approx(np.mean(own), rel=1e-5)
        assert found.epsilon[band] == pytest.approx(np.mean(of_epsilon), rel=1e-4)
    assert np.array_equal(found.own, found.epsilon) == (prediction == "epsilon")


def test_both_kinds_of_network_that_know_nothing_are_known_by_their_loss() -> None:
    """A network that answers 0 has E|ε|² = 1 as an ε network; as a v network its ε̂ errs by ᾱ |v|²."""

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    images = np.zeros((200, 1, 16, 16), np.float32)
    own, epsilon = band_losses(Nothing(), schedule("epsilon"), images, bands=2, seed=0)
    np.testing.assert_allclose(own, 1, atol=0.02)
    np.testing.assert_array_equal(own, epsilon)
    own, epsilon = band_losses(Nothing(), schedule("v"), images, bands=2, seed=0)
    alpha_bar = schedule("v").alphas_cumprod.double().reshape(2, 50)
    np.testing.assert_allclose(own, alpha_bar.mean(dim=1), rtol=0.02)  # v = √ᾱ ε here
    np.testing.assert_allclose(epsilon, alpha_bar.square().mean(dim=1), rtol=0.05)


def test_band_losses_need_images_and_bands() -> None:
    images = blobs(2, seed=0)
    for bands in (0, 101):
        with pytest.raises(ConfigError, match=f"bands = {bands}"):
            band_losses(tiny_network(), schedule(), images, bands=bands, seed=0)
    with pytest.raises(ConfigError, match="images"):
        band_losses(tiny_network(), schedule(), images[:0], seed=0)


# --- features and distances ---


def test_features_are_those_of_the_evaluation() -> None:
    images = blobs(3, size=28, seed=0)
    before = torch.random.get_rng_state()
    found = features(images)
    assert torch.equal(before, torch.random.get_rng_state())
    assert found.shape == (3, 1280)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, _features(extractors(None)[EFFNET], images)[EFFNET_LAYER].numpy())


def normal(count: int, *, seed: int, shift: float = 0.0) -> Features:
    return np.random.default_rng(seed).normal(shift, 1, (count, 30))


def slow_kid(x: Features, y: Features) -> float:
    """Eq. 4 of arXiv:1801.01401, pair by pair."""

    def k(a: Features, b: Features) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    def inside(z: Features) -> float:
        return float(np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]))

    return inside(x) + inside(y) - 2 * float(np.mean([k(a, b) for a in x for b in y]))


def test_kid_is_the_mean_over_pairs() -> None:
    x, y = normal(12, seed=0), normal(9, seed=1, shift=0.3)
    found = kid_with_interval(x, y, seed=0)
    assert found.kid == pytest.approx(slow_kid(x, y), rel=1e-10)
    assert found == kid_with_interval(x, y, seed=0)
    assert found != kid_with_interval(x, y, seed=1)


def test_a_resample_is_that_of_copied_images_without_their_pairs() -> None:
    """The bounds of one resample are its value: copies written out, pairs of one image with itself left out."""
    x, y = normal(6, seed=0), normal(5, seed=1)
    rng = np.random.default_rng(3)
    counts = [rng.multinomial(len(z), np.full(len(z), 1 / len(z))) for z in (x, y)]
    drawn = [np.repeat(np.arange(len(count)), count) for count in counts]

    def inside(z: Features, of: NDArray[np.int64]) -> float:
        return float(np.mean([(z[i] @ z[j] / 30 + 1) ** 3 for i in of for j in of if i != j]))

    across = np.mean([(x[i] @ y[j] / 30 + 1) ** 3 for i in drawn[0] for j in drawn[1]])
    found = kid_with_interval(x, y, seed=3, resamples=1)
    assert found.low == found.high == pytest.approx(inside(x, drawn[0]) + inside(y, drawn[1]) - 2 * across, rel=1e-10)


def test_kid_of_halves_of_one_distribution_is_zero_on_average_and_covered() -> None:
    """400 splits of one set: the mean is 0 within four standard errors, and most intervals hold 0."""
    everything = normal(120, seed=5)
    found = []
    for seed in range(400):
        order = np.random.default_rng(seed).permutation(120)
        found.append(kid_with_interval(everything[order[:60]], everything[order[60:]], seed=seed, resamples=100))
    kids = np.array([one.kid for one in found])
    assert abs(kids.mean()) < 4 * kids.std() / len(kids) ** 0.5
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert covered >= 0.93
    apart = kid_with_interval(normal(60, seed=0), normal(60, seed=1, shift=0.5), seed=0)
    assert 0 < apart.low < apart.kid < apart.high


def test_intervals_cover_a_distance_that_is_known() -> None:
    """The truth from 3000 images of each; 95 % intervals of 60 images hold it about as often as they say."""
    truth = kid_with_interval(normal(3000, seed=900), normal(3000, seed=901, shift=0.3), seed=0, resamples=1).kid
    held = []
    for seed in range(200):
        x, y = normal(60, seed=2 * seed), normal(60, seed=2 * seed + 1, shift=0.3)
        found = kid_with_interval(x, y, seed=seed)
        held.append(found.low <= truth <= found.high)
    assert np.mean(held) >= 0.9


def test_kid_agrees_with_torch_fidelity() -> None:
    x, y = normal(100, seed=0), normal(100, seed=1, shift=0.2)
    one, other = torch.from_numpy(x), torch.from_numpy(y)
    theirs = kid_features_to_metric(one, other, kid_subsets=100, kid_subset_size=50, rng_seed=0, verbose=False)
    ours = kid_with_interval(x, y, seed=0).kid
    # Their mean over 100 subsets, of which no two are independent: within half of a subset's spread.
    assert abs(ours - theirs[KEY_METRIC_KID_MEAN]) < 0.5 * theirs[KEY_METRIC_KID_STD]
    whole = kid_features_to_metric(one, other, kid_subsets=1, kid_subset_size=100, rng_seed=0, verbose=False)
    assert ours == pytest.approx(whole[KEY_METRIC_KID_MEAN], rel=1e-9)


@pytest.mark.parametrize("shapes", [((1, 30), (5, 30)), ((5, 30), (5, 29)), ((5,), (5, 30))])
def test_kid_needs_two_sets(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match="at least 2 of each"):
        kid_with_interval(np.zeros(shapes[0]), np.zeros(shapes[1]), seed=0)


def test_two_images_of_each_have_a_distance() -> None:
    """A resample of one image twice has no pair of different ones; it must not divide by 0."""
    assert np.isfinite(kid_with_interval(normal(2, seed=0), normal(2, seed=1), seed=0)).all()


# --- diversity ---


def test_a_set_that_repeats_itself_is_less_diverse() -> None:
    images, reference = blobs(40, size=28, seed=0), normal(40, seed=1)
    various = diversity(images, normal(40, seed=0), reference, seed=0)
    one = normal(1, seed=0) + 1e-3 * normal(40, seed=2)
    collapsed = diversity(np.repeat(images[:1], 40, axis=0), one, reference, seed=0)
    assert collapsed["ms_ssim"] == pytest.approx(1, abs=1e-4)
    assert various["ms_ssim"] < 0.7
    assert collapsed["recall"] == 0
    assert various["recall"] > 0.3
    assert set(various) == {"ms_ssim", "precision", "recall"}
    with pytest.raises(ConfigError, match="more than 3 features"):
        diversity(images, normal(3, seed=0), reference, seed=0)


# --- usefulness ---


def labelled(count: int, *, seed: int, noise: float = 1.0) -> tuple[Features, NDArray[np.int64]]:
    """Three classes around centres that are the same for every seed."""
    centres = np.random.default_rng(99).normal(0, 0.5, (3, 40))
    rng = np.random.default_rng(seed)
    label = np.arange(count) % 3
    return centres[label] + rng.normal(0, noise, (count, 40)), label


def test_better_images_teach_more() -> None:
    train, label = labelled(300, seed=0)
    test, test_label = labelled(300, seed=1)
    generated = {
        "real": labelled(150, seed=2)[0],
        "noisy": labelled(150, seed=2)[0] + 4 * np.random.default_rng(3).normal(size=(150, 40)),
        "noise": np.random.default_rng(4).normal(0, 1, (150, 40)) * np.array([1] * 20 + [0] * 20),
    }
    found = {name: classifier_accuracy(one, train, label, test, test_label) for name, one in generated.items()}
    accuracy = {name: one["trained_on_generated"] for name, one in found.items()}
    assert accuracy["real"] > accuracy["noisy"] > 1 / 3
    assert accuracy["real"] > accuracy["noise"] + 0.1
    assert len({one["trained_on_real"] for one in found.values()}) == 1
    assert abs(accuracy["real"] - found["real"]["trained_on_real"]) < 0.1


def test_the_yardstick_has_as_many_images_as_were_generated() -> None:
    train, label = labelled(400, seed=0)
    test, test_label = labelled(600, seed=1)
    few, many = (
        classifier_accuracy(labelled(count, seed=2)[0], train, label, test, test_label)["trained_on_real"]
        for count in (9, 400)
    )
    assert few < many - 0.05


def test_images_of_a_single_class_teach_that_class() -> None:
    train, label = labelled(120, seed=0, noise=0.1)
    test, test_label = labelled(31, seed=1, noise=0.1)
    generated = train[label == 2] + 0.01
    found = classifier_accuracy(generated, train, label, test, test_label)
    assert found["trained_on_generated"] == pytest.approx(np.mean(test_label == 2))
    assert found["trained_on_real"] > 0.95
    alone = classifier_accuracy(generated, train, np.zeros(120, np.int64), test, test_label)
    assert alone == dict.fromkeys(alone, pytest.approx(np.mean(test_label == 0)))
    with pytest.raises(ConfigError, match="one for each image"):
        classifier_accuracy(generated, train, label[1:], test, test_label)
    with pytest.raises(ConfigError, match="at least one of each"):
        classifier_accuracy(generated[:0], train, label, test, test_label)


# --- membership ---


def overfitted(images: Images, forward: Schedule, steps: int) -> nn.Module:
    config = NetworkConfig(channels=(16, 32), attention=(False, False), norm_groups=4, head_channels=8)
    network = build_network(config, spatial_dims=2, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.from_numpy(images)
    for _ in range(steps):
        noise = torch.randn(x0.shape, generator=generator)
        timesteps = torch.randint(30, (len(x0),), generator=generator)  # those that the attack looks at
        loss = denoising_loss(network, forward, x0, noise, timesteps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_fresh_network_gives_nobody_away(prediction: str) -> None:
    members, others = blobs(150, seed=0), blobs(150, seed=1)
    found = membership_auc(tiny_network(), schedule(prediction), members, others, seed=0)
    assert abs(found - 0.5) < 4 * (1 / (6 * 150)) ** 0.5  # standard deviation of an AUC of nothing: √(2/12n)
    turned = membership_auc(tiny_network(), schedule(prediction), others, members, seed=0)
    assert found + turned == pytest.approx(1)


def test_an_overfitted_network_gives_its_images_away() -> None:
    """Images of noise have nothing in common: what a network knows of them it has learnt by heart."""
    rng = np.random.default_rng(0)
    members, others = (rng.uniform(-1, 1, (8, 1, 8, 8)).astype(np.float32) for _ in range(2))
    forward = schedule()
    network = overfitted(members, forward, 300)
    assert membership_auc(network, forward, members, others, seed=0) > 0.9
    assert membership_auc(network, forward, others, members, seed=0) < 0.1


def test_an_attack_without_images_is_refused() -> None:
    images = blobs(4, seed=0)
    with pytest.raises(Unattackable):
        membership_auc(tiny_network(), schedule(), images[:0], images, seed=0)
