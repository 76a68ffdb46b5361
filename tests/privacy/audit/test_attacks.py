from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from privacy.audit.attacks import BAND, GREY_BOX, LOSS_DRAWS, GreyBoxScores, grey_box_scores
from privacy.audit.errors import Unattackable
from privacy.audit.queries import STRIDE, Denoiser, Queries, shared_noise

T = 1000
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0).float()
A = ALPHAS.double().sqrt().numpy()  # √ᾱ_t
B = (1 - ALPHAS.double()).sqrt().numpy()  # √(1−ᾱ_t)

Array = NDArray[Any]
OfOneImage = Callable[[Array, int], Array]


def denoiser(epsilon: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
    return Denoiser(epsilon=epsilon, alphas_cumprod=ALPHAS)


def one_by_one(epsilon: OfOneImage) -> Denoiser:
    """From a function of one image [*spatial] and t, in float64."""

    def batched(x: Tensor, timesteps: Tensor) -> Tensor:
        each = [epsilon(image[0].double().numpy(), int(t)) for image, t in zip(x, timesteps, strict=True)]
        return torch.from_numpy(np.stack(each)[:, None]).float()

    return denoiser(batched)


def of_gaussian(mean: float, scale: float) -> OfOneImage:
    """Optimal predictor for images from N(μ, s² I): ε*(x_t, t) = √(1−ᾱ_t) (x_t − √ᾱ_t μ) / (ᾱ_t s² + 1 − ᾱ_t)."""
    return lambda x, t: slope(scale, t) * (x - A[t] * mean)


def slope(scale: float, t: int) -> float:
    return float(B[t] / (A[t] ** 2 * scale**2 + B[t] ** 2))


def of_memory(memory: Array) -> Denoiser:
    """Optimal predictor for the empirical distribution of images [M, 1, *spatial]."""
    known = torch.from_numpy(memory).flatten(1).double()

    def epsilon(x: Tensor, timesteps: Tensor) -> Tensor:
        t = int(timesteps[0])
        flat = x.flatten(1).double()
        weights = torch.softmax(-torch.cdist(flat, A[t] * known).square() / (2 * B[t] ** 2), 1)
        return ((flat - A[t] * (weights @ known)) / B[t]).float().view(x.shape)

    return denoiser(epsilon)


def wavy(x: Array, t: int) -> Array:
    """Nothing's optimum: it is far from linear, and each pixel depends on all others."""
    return np.sin(2 * x) + 0.3 * np.roll(x, 1, 0) + x.mean() * np.cos(x) + t / T


def images(count: int, *spatial: int, seed: int = 0, scale: float = 0.5) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal((count, 1, *spatial))).astype(np.float32)


def score(
    model: Denoiser, batch: Array, name: str, *, timesteps: tuple[int, ...] = (100,), seeds: tuple[int, ...] = (0,)
) -> Array:
    found = grey_box_scores(model, batch, timesteps=timesteps, seeds=seeds, attacks=(name,), batch_size=7)
    return found.scores[name]


# --- slow references: one image, one pixel at a time, float64 ---


def norm4(error: Array) -> float:
    return sum(abs(float(value)) ** 4 for value in error.flat) ** 0.25


def step(epsilon: OfOneImage, x: Array, t: int, target: int) -> Array:
    predicted = epsilon(x, t)
    x_0 = (x - B[t] * predicted) / A[t]
    return A[target] * x_0 + B[target] * predicted


def inversion(epsilon: OfOneImage, x: Array, t: int) -> Array:
    for s in range(0, t, 10):
        x = step(epsilon, x, s, s + 10)
    return x


def reference_loss(epsilon: OfOneImage, x: Array, t: int, seed: int) -> float:
    total = 0.0
    for draw in range(LOSS_DRAWS):
        noise = np.random.default_rng([seed, t, draw]).standard_normal(x.shape, dtype=np.float32)
        error = noise - epsilon(A[t] * x + B[t] * noise, t)
        total += sum(float(value) ** 2 for value in error.flat) / x.size
    return total / LOSS_DRAWS


def reference_sima(epsilon: OfOneImage, x: Array, t: int, seed: int) -> float:
    return norm4(epsilon(x, t))


def reference_pia(epsilon: OfOneImage, x: Array, t: int, seed: int) -> float:
    proposed = epsilon(x, 0)
    return norm4(proposed - epsilon(A[t] * x + B[t] * proposed, t))


def reference_pian(epsilon: OfOneImage, x: Array, t: int, seed: int) -> float:
    proposed = epsilon(x, 0)
    # As in PIAN's text: L1 norm, number of pixels, and the mean absolute value of a standard normal.
    proposed = proposed * x.size * math.sqrt(2 / math.pi) / sum(abs(float(value)) for value in proposed.flat)
    return norm4(proposed - epsilon(A[t] * x + B[t] * proposed, t))


def reference_secmi(epsilon: OfOneImage, x: Array, t: int, seed: int) -> float:
    x_t = inversion(epsilon, x, t)
    back = step(epsilon, step(epsilon, x_t, t, t + 10), t + 10, t)
    return sum(float(value) ** 2 for value in (back - x_t).flat)


def reference_band_pass(epsilon: OfOneImage, x: Array, t: int, seed: int) -> float:
    x_t = inversion(epsilon, x, t)
    error = (x_t - B[t] * epsilon(x_t, t)) / A[t] - x
    filtered = np.zeros(x.shape, dtype=complex)
    for k in np.ndindex(x.shape):
        cycles = [index if 2 * index <= size else index - size for index, size in zip(k, x.shape, strict=True)]
        radius = math.sqrt(sum((2 * c / size) ** 2 for c, size in zip(cycles, x.shape, strict=True)))
        if 0.1 <= radius <= 0.5:
            phase = np.indices(x.shape).T @ (np.array(k) / x.shape)
            wave = np.exp(2j * cmath.pi * phase.T)
            filtered += (error * wave.conj()).mean() * wave
    return float((filtered.real**2).mean())


REFERENCES = {
    "loss": reference_loss,
    "sima": reference_sima,
    "pia": reference_pia,
    "pian": reference_pian,
    "secmi": reference_secmi,
    "band_pass": reference_band_pass,
}


@pytest.mark.parametrize("spatial", [(6, 5), (3, 4, 5)])
@pytest.mark.parametrize("name", GREY_BOX)
def test_an_attack_equals_its_slow_reference(name: str, spatial: tuple[int, ...]) -> None:
    batch, timesteps, seeds = images(3, *spatial), (0, 40, 300), (0, 8)
    found = grey_box_scores(one_by_one(wavy), batch, timesteps=timesteps, seeds=seeds, batch_size=2)
    for s, n, i in itertools.product(range(2), range(3), range(3)):
        expected = REFERENCES[name](wavy, batch[n, 0].astype(float), timesteps[i], seeds[s])
        assert found.scores[name][s, n, i] == pytest.approx(expected, rel=1e-4)


def test_every_attack_says_what_it_is() -> None:
    assert set(GREY_BOX) == set(REFERENCES)
    for name, attack in GREY_BOX.items():
        assert attack.name == name
        assert "arXiv:" in attack.paper
        assert attack.statistic.endswith(".")
        assert attack.member_is == "lower"
    assert [name for name, attack in GREY_BOX.items() if attack.draws_noise] == ["loss"]


# --- closed forms: images from N(μ, s² I) and the predictor that is optimal for them ---


@pytest.mark.parametrize("t", [50, 400])
def test_the_loss_of_a_gaussian_has_the_expected_value(t: int) -> None:
    """ε − ε* = (1 − c √(1−ᾱ)) ε − c √ᾱ (x_0 − μ), with c the slope of ε*; its two terms do not correlate."""
    mean, scale = 0.2, 0.5
    batch = np.concatenate([images(2, 8, 8), images(2, 8, 8, scale=2.0)])
    found = score(
        denoiser(lambda x, _: slope(scale, t) * (x - A[t] * mean)),
        batch,
        "loss",
        timesteps=(t,),
        seeds=tuple(range(200)),
    )
    c, distance = slope(scale, t), ((batch - mean) ** 2).mean((1, 2, 3))
    expected = (1 - c * B[t]) ** 2 + c**2 * A[t] ** 2 * distance
    np.testing.assert_allclose(found[:, :, 0].mean(0), expected, rtol=0.03)


@pytest.mark.parametrize("spatial", [(8, 8), (4, 6, 8)])
@pytest.mark.parametrize("t", [0, 100, 700])
def test_sima_of_a_gaussian_is_the_distance_from_its_mean(spatial: tuple[int, ...], t: int) -> None:
    batch = images(5, *spatial)
    norms = np.array([norm4(image - A[t] * 0.2) for image in batch])
    found = score(one_by_one(of_gaussian(0.2, 0.5)), batch, "sima", timesteps=(t,))
    np.testing.assert_allclose(found[0, :, 0], slope(0.5, t) * norms, rtol=1e-5)


def test_pia_of_a_gaussian_is_linear() -> None:
    """With μ = 0: ε_0 = c_0 x_0, and ε* = c_t (√ᾱ_t + √(1−ᾱ_t) c_0) x_0."""
    batch, t = images(5, 8, 8), 300
    first, later = slope(0.5, 0), slope(0.5, t)
    factor = abs(first - later * (A[t] + B[t] * first))
    found = score(one_by_one(of_gaussian(0.0, 0.5)), batch, "pia", timesteps=(t,))
    np.testing.assert_allclose(found[0, :, 0], [factor * norm4(image) for image in batch], rtol=1e-4)


def growth(scale: float, t: int, target: int) -> float:
    """What a deterministic step multiplies x_t with where ε* is linear."""
    c = slope(scale, t)
    return float(A[target] * (1 - B[t] * c) / A[t] + B[target] * c)


@pytest.mark.parametrize("t", [0, 100, 500])
def test_inversion_secmi_and_band_pass_of_a_gaussian_are_exact(t: int) -> None:
    scale, batch = 0.5, images(4, 8, 8)
    model = one_by_one(of_gaussian(0.0, scale))
    grown = math.prod(growth(scale, s, s + STRIDE) for s in range(0, t, STRIDE))
    queries = Queries(model, torch.from_numpy(batch))
    np.testing.assert_allclose(queries.inverted(t).numpy(), grown * batch, rtol=1e-4, atol=1e-6)

    there_and_back = growth(scale, t, t + STRIDE) * growth(scale, t + STRIDE, t)
    expected = (there_and_back - 1) ** 2 * grown**2 * (batch.astype(float) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(score(model, batch, "secmi", timesteps=(t,))[0, :, 0], expected, rtol=2e-3)

    rows, columns = np.indices((8, 8))
    middle, high = np.cos(2 * np.pi * rows / 8), np.cos(2 * np.pi * (3 * rows + 2 * columns) / 8)
    waves = np.stack([middle, high, middle + high, np.ones((8, 8))])[:, None].astype(np.float32)
    shrinkage = (1 - B[t] * slope(scale, t)) / A[t] * grown
    energy = (shrinkage - 1) ** 2 * np.array([0.5, 0.0, 0.5, 0.0])
    np.testing.assert_allclose(score(model, waves, "band_pass", timesteps=(t,))[0, :, 0], energy, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("cycles", "inside"), [((0, 0, 0), 0), ((1, 0, 0), 1), ((2, 1, 1), 0), ((0, 0, 2), 1), ((4, 0, 0), 0)]
)
def test_the_band_is_a_shell_in_3d(cycles: tuple[int, ...], inside: int) -> None:
    """8 voxels along each axis: n cycles are n/4 of Nyquist, and the band ends at a half."""
    assert BAND == (0.1, 0.5)
    phase = sum(2 * np.pi * c * index / 8 for c, index in zip(cycles, np.indices((8, 8, 8)), strict=True))
    wave = np.cos(phase)[None, None].astype(np.float32)
    all_noise = denoiser(lambda x, t: x / math.sqrt(1 - ALPHAS[t[0]]))  # x̂_0 = 0
    assert score(all_noise, wave, "band_pass", timesteps=(0,))[0, 0, 0] == pytest.approx(0.5 * inside, abs=1e-6)


# --- what they are for ---


@pytest.fixture(scope="module")
def population() -> tuple[Array, Array]:
    """200 members and 200 others of one distribution."""
    return images(400, 8, 8, seed=5), np.arange(400) < 200


def auc(found: GreyBoxScores, name: str, member: Array) -> float:
    values = found.scores[name].mean((0, 2))
    sign = 1 if GREY_BOX[name].member_is == "higher" else -1
    return float(roc_auc_score(member, sign * values))


@pytest.fixture(scope="module")
def of_memorizer(population: tuple[Array, Array]) -> GreyBoxScores:
    batch, member = population
    return grey_box_scores(of_memory(batch[member]), batch, timesteps=(100,), seeds=(1,), batch_size=400)


@pytest.fixture(scope="module")
def of_ignorant(population: tuple[Array, Array]) -> GreyBoxScores:
    batch, _ = population
    knows_the_distribution = denoiser(lambda x, t: slope(0.5, int(t[0])) * x)
    return grey_box_scores(knows_the_distribution, batch, timesteps=(100,), seeds=(1,), batch_size=400)


@pytest.mark.parametrize("name", GREY_BOX)
def test_a_model_that_memorized_is_found_out_and_one_that_did_not_is_not(
    name: str, population: tuple[Array, Array], of_memorizer: GreyBoxScores, of_ignorant: GreyBoxScores
) -> None:
    _, member = population
    assert auc(of_memorizer, name, member) > 0.9
    # The AUC of 200 and 200 scores of one distribution has a standard deviation of 0.029.
    assert abs(auc(of_ignorant, name, member) - 0.5) < 0.1


# --- evaluations ---


def counted(epsilon: OfOneImage) -> tuple[Denoiser, list[int]]:
    """A denoiser, and how many images each of its calls had."""
    inner, calls = one_by_one(epsilon).epsilon, []

    def counting(x: Tensor, timesteps: Tensor) -> Tensor:
        calls.append(len(x))
        return inner(x, timesteps)

    return denoiser(counting), calls


@pytest.mark.parametrize("name", GREY_BOX)
@pytest.mark.parametrize("timesteps", [(0,), (10, 60), (0, 20, 60)])
def test_an_attack_takes_the_evaluations_it_states(name: str, timesteps: tuple[int, ...]) -> None:
    model, calls = counted(wavy)
    batch = images(5, 6, 6)
    found = grey_box_scores(model, batch, timesteps=timesteps, seeds=(0, 1, 2), attacks=[name], batch_size=2)
    assert found.evaluations_per_image == {name: sum(calls) / 5}
    assert found.shared_evaluations_per_image == sum(calls) / 5
    assert found.seconds > 0


def test_attacks_share_evaluations() -> None:
    model, calls = counted(wavy)
    batch = images(5, 6, 6)
    found = grey_box_scores(model, batch, timesteps=(0, 20, 60), seeds=(3, 4), batch_size=2)
    assert found.shared_evaluations_per_image == sum(calls) / 5
    # loss: 3 t × 2 seeds × draws; sima, pia, pian: 3 t each, and x_0 at 0, which is sima's; inversion: 10 … 70.
    assert found.shared_evaluations_per_image == 3 * 2 * LOSS_DRAWS + 3 * 3 + 7
    assert found.shared_evaluations_per_image < sum(found.evaluations_per_image.values())
    assert found.settings == dict.fromkeys(GREY_BOX, ("t=0", "t=20", "t=60"))
    for name in GREY_BOX:
        alone = score(one_by_one(wavy), batch, name, timesteps=(0, 20, 60), seeds=(3, 4))
        np.testing.assert_array_equal(found.scores[name], alone)


def test_nothing_is_asked_twice() -> None:
    model, calls = counted(wavy)
    queries = Queries(model, torch.from_numpy(images(2, 6, 6)))
    noise = shared_noise(0, 30, 0, (1, 6, 6))
    for _ in range(2):
        queries.clean(0)
        queries.clean(30)
        queries.diffused("a", noise, 30)
        queries.on_path(30)
        assert queries.evaluations == len(calls) == 6  # x_0 at 0 and 30, with noise, and the path at 10, 20, 30
    queries.diffused("b", 2 * noise, 30)
    queries.diffused("a", noise, 40)
    assert queries.evaluations == 8


def test_only_noise_differs_between_seeds() -> None:
    found = grey_box_scores(one_by_one(wavy), images(3, 6, 6), timesteps=(20, 40), seeds=(0, 1), batch_size=3)
    for name, values in found.scores.items():
        assert values.shape == (2, 3, 2)
        assert values.dtype == np.float64
        assert np.array_equal(values[0], values[1]) == (name != "loss")


# --- independence ---


def network(dims: int) -> Denoiser:
    """A small network that knows the timestep."""
    torch.manual_seed(0)
    convolution = nn.Conv2d if dims == 2 else nn.Conv3d
    layers = nn.Sequential(
        convolution(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), convolution(8, 1, 3, padding=1)
    )

    def epsilon(x: Tensor, timesteps: Tensor) -> Tensor:
        assert timesteps.dtype == torch.int64
        assert timesteps.shape == (len(x),)
        assert x.dtype == torch.float32
        time = (timesteps / T).view(-1, *[1] * (x.ndim - 1)).expand_as(x)
        return layers(torch.cat([x, time], 1))

    return denoiser(epsilon)


@pytest.mark.parametrize("dims", [2, 3])
@settings(max_examples=10, deadline=None)
@given(batch_size=st.integers(1, 9), order=st.permutations(range(7)), alone=st.integers(0, 6))
def test_a_score_depends_on_its_image_alone(dims: int, batch_size: int, order: list[int], alone: int) -> None:
    model, batch = network(dims), images(7, *[6] * dims)
    options: dict[str, Any] = {"timesteps": (0, 50), "seeds": (2, 3)}
    whole = grey_box_scores(model, batch, batch_size=7, **options).scores
    shuffled = grey_box_scores(model, batch[order], batch_size=batch_size, **options).scores
    single = grey_box_scores(model, batch[alone : alone + 1], batch_size=batch_size, **options).scores
    for name in GREY_BOX:
        tolerance: dict[str, float] = {"rtol": 1e-3, "atol": 1e-9}
        np.testing.assert_allclose(shuffled[name], whole[name][:, order], **tolerance)
        np.testing.assert_allclose(single[name], whole[name][:, [alone]], **tolerance)


@settings(max_examples=50, deadline=None)
@given(t=st.integers(0, T - 1), target=st.integers(0, T - 1), seed=st.integers(0, 1000))
def test_a_deterministic_step_is_undone_by_the_same_noise(t: int, target: int, seed: int) -> None:
    x, noise = torch.from_numpy(images(2, 4, 4, seed=seed)).double(), torch.from_numpy(images(2, 4, 4, seed=seed + 1))
    queries = Queries(one_by_one(wavy), x)
    back = queries.ddim(queries.ddim(x, noise.double(), t, target), noise.double(), target, t)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)


def test_noise_differs_between_seeds_timesteps_and_draws_and_is_standard_normal() -> None:
    noises = torch.stack([shared_noise(*which, (1, 50, 50)) for which in itertools.product((0, 1), (10, 20), (0, 1))])
    assert noises.shape == (8, 1, 1, 50, 50)
    correlations = torch.corrcoef(noises.flatten(1))
    assert (correlations - torch.eye(8)).abs().max() < 0.1
    assert noises.mean().abs() < 0.03
    assert (noises.std() - 1).abs() < 0.03


def test_no_gradients_and_no_writing_to_the_images() -> None:
    graphs: list[bool] = []
    weight = nn.Parameter(torch.ones(()))

    def epsilon(x: Tensor, _: Tensor) -> Tensor:
        y = weight * x
        graphs.append(y.requires_grad)
        return y

    batch = images(3, 6, 6)
    batch.setflags(write=False)
    grey_box_scores(denoiser(epsilon), batch, timesteps=(20,), seeds=(0,), batch_size=2)
    assert graphs
    assert not any(graphs)


def test_all_that_is_kept_is_single_precision() -> None:
    queries = Queries(denoiser(lambda x, t: (0.5 * x).to(torch.bfloat16)), torch.from_numpy(images(3, 6, 6)).double())
    for kept in (queries.images, queries.clean(0), queries.inverted(20), queries.on_path(20)):
        assert kept.dtype == torch.float32


def test_the_bar_is_shown_where_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (False, True):
        grey_box_scores(
            one_by_one(wavy),
            images(3, 6, 6),
            timesteps=(20,),
            seeds=(0,),
            attacks=["sima"],
            batch_size=2,
            progress=progress,
        )
        assert ("grey-box attacks" in capsys.readouterr().err) == progress


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_go_where_the_schedule_is() -> None:
    on_gpu = Denoiser(epsilon=lambda x, t: torch.sin(x) + t.view(-1, 1, 1, 1) / T, alphas_cumprod=ALPHAS.cuda())
    on_cpu = denoiser(lambda x, t: torch.sin(x) + t.view(-1, 1, 1, 1) / T)
    options: dict[str, Any] = {"timesteps": (0, 50), "seeds": (2, 3), "batch_size": 2}
    found, expected = (grey_box_scores(model, images(5, 6, 6), **options).scores for model in (on_gpu, on_cpu))
    for name in GREY_BOX:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3)


# --- refusals ---

NAN = float("nan")


def with_nan(array: Array) -> Array:
    array = array.copy()
    array[0, 0, 0, 0] = NAN
    return array


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"timesteps": ()}, "timesteps"),
        ({"timesteps": (T,)}, "timesteps"),
        ({"timesteps": (T,), "attacks": ["sima"]}, "timesteps"),
        ({"timesteps": (-10,)}, "timesteps"),
        ({"timesteps": (20, 10)}, "timesteps"),
        ({"timesteps": (20, 20)}, "timesteps"),
        ({"timesteps": (20.0,)}, "timesteps"),
        ({"timesteps": (True,), "attacks": ["sima"]}, "timesteps"),
        ({"timesteps": (15,), "attacks": ["secmi"]}, "secmi needs multiples of 10 up to 989"),
        ({"timesteps": (15, 20), "attacks": ["sima", "band_pass"]}, "band_pass needs multiples of 10 up to 999"),
        ({"timesteps": (990,), "attacks": ["secmi"]}, "timesteps"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"seeds": (-1,)}, "seeds"),
        ({"seeds": (1.0,)}, "seeds"),
        ({"attacks": ()}, "attacks"),
        ({"attacks": ("loss", "loss")}, "attacks"),
        ({"attacks": ("unheard",)}, "attacks"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"images": images(3, 6, 6).astype(np.float64)}, "images"),
        ({"images": images(3, 6, 6)[:, 0]}, "images"),
        ({"images": images(3, 6)}, "images"),
        ({"images": images(6, 6, 6, 6, 6)}, "images"),
        ({"images": images(0, 6, 6)}, "images"),
        ({"images": with_nan(images(3, 6, 6))}, "images = 'not finite'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_first_evaluation(changes: dict[str, Any], named: str) -> None:
    model, calls = counted(wavy)
    good: dict[str, Any] = {"images": images(3, 6, 6), "timesteps": (20,), "seeds": (0,), "batch_size": 2}
    grey_box_scores(model, **good)
    calls.clear()
    with pytest.raises(Unattackable, match=named):
        grey_box_scores(model, **{**good, **changes})
    assert not calls


def test_the_last_timesteps_are_not_refused() -> None:
    for name, last in (("sima", 999), ("band_pass", 990), ("secmi", 980)):
        assert np.isfinite(score(denoiser(lambda x, t: 0.1 * x), images(2, 6, 6), name, timesteps=(last,))).all()


@pytest.mark.parametrize(
    ("epsilon", "named"),
    [
        (lambda x, t: x * NAN, "epsilon = 'not finite at t=20'"),
        (lambda x, t: x / 0, "epsilon"),
        (lambda x, t: torch.cat([x, x], 1), "epsilon"),
        (lambda x, t: x[:1], "epsilon"),
        (lambda x, t: x.mean((2, 3), keepdim=True), "epsilon"),
    ],
)
def test_a_prediction_that_is_none_is_refused(epsilon: Callable[[Tensor, Tensor], Tensor], named: str) -> None:
    with pytest.raises(Unattackable, match=named):
        grey_box_scores(denoiser(epsilon), images(3, 6, 6), timesteps=(20,), seeds=(0,), batch_size=3)


def test_a_score_that_is_no_number_is_refused() -> None:
    sees_no_noise = denoiser(lambda x, t: torch.zeros_like(x))
    assert score(sees_no_noise, images(3, 6, 6), "pia").max() == 0
    with pytest.raises(Unattackable, match="pian has no value"):
        score(sees_no_noise, images(3, 6, 6), "pian")


def test_images_without_middle_frequencies_are_refused() -> None:
    with pytest.raises(Unattackable, match="Nyquist"):
        score(one_by_one(wavy), images(3, 2, 2), "band_pass")
    assert score(one_by_one(wavy), images(3, 2, 2), "secmi").shape == (1, 3, 1)


@pytest.mark.parametrize("t", [-10, 15, T])
def test_the_inversion_has_its_points_only(t: int) -> None:
    queries = Queries(one_by_one(wavy), torch.from_numpy(images(2, 4, 4)))
    with pytest.raises(Unattackable, match="timestep"):
        queries.inverted(t)


@pytest.mark.parametrize("t", [-1, T])
def test_a_timestep_that_the_model_does_not_know_is_refused(t: int) -> None:
    queries = Queries(one_by_one(wavy), torch.from_numpy(images(2, 4, 4)))
    for ask in (queries.clean, lambda t: queries.diffused("a", torch.zeros(()), t)):
        with pytest.raises(Unattackable, match="timestep"):
            ask(t)
    assert queries.evaluations == 0


@pytest.mark.parametrize(
    "alphas",
    [
        ALPHAS.flip(0),
        ALPHAS[None],
        ALPHAS[:0],
        torch.tensor([0.9, 0.9]),
        torch.tensor([0.9, NAN]),
        torch.tensor([1.1, 0.9]),
        torch.tensor([0.9, 0.0]),
        torch.tensor([1]),
    ],
)
def test_what_is_no_noise_schedule_is_refused(alphas: Tensor) -> None:
    with pytest.raises(Unattackable, match="alphas_cumprod"):
        Denoiser(epsilon=lambda x, t: x, alphas_cumprod=alphas)
