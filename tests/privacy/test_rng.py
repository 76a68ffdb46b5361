from __future__ import annotations

import copy
import os
import pickle
import random
import time

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from privacy.errors import InvalidPlan, RandomnessReused
from privacy.rng import SecureRandomness, SeededRandomnessForTests, with_gaussian_noise

# A correct stream fails a test by chance once in a million runs; seeded streams always give the same answer.
RARE = 1e-6


def test_key_stream_is_aes_256_ctr() -> None:
    ours = SeededRandomnessForTests(0)
    theirs = SeededRandomnessForTests(0)
    plain = bytes(8 * 100_000)
    expected = theirs._cipher.update(plain)  # the same key and counter, in one go
    assert ours._words(100_000).tobytes() == expected
    nist = Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(16))).encryptor().update(bytes(16))
    assert nist.hex() == "dc95c078a2408989ad48a21492842087"  # AES-256 of the zero block under the zero key


def test_normals_are_normal_and_independent() -> None:
    z = SecureRandomness().normal((400_000,)).numpy()
    assert stats.kstest(z, "norm").pvalue > RARE
    for lag in (1, 2, 1 << 14, 1 << 15):  # neighbours, and the two halves of a block
        assert stats.pearsonr(z[:-lag], z[lag:]).pvalue > RARE
        assert stats.pearsonr(z[:-lag] ** 2, z[lag:] ** 2).pvalue > RARE
    tail = int((np.abs(z) > 3.5).sum())
    assert stats.binomtest(tail, z.size, 2 * stats.norm.sf(3.5)).pvalue > RARE


def test_the_test_of_normality_can_fail() -> None:
    z = SeededRandomnessForTests(1).normal((400_000,)).numpy()
    assert stats.kstest(z, "norm").pvalue > 0.01
    assert stats.kstest(1.05 * z, "norm").pvalue < RARE


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 32769)])
def test_normals_have_the_shape(shape: tuple[int, ...]) -> None:
    z = SecureRandomness().normal(shape)
    assert z.shape == shape
    assert z.dtype == torch.float64
    assert bool(z.isfinite().all())


def test_radius_reaches_beyond_nine_sigma() -> None:
    class Lowest(SeededRandomnessForTests):
        def _words(self, count: int) -> np.ndarray:
            return np.zeros(count, dtype=np.uint64)

    class Highest(SeededRandomnessForTests):
        def _words(self, count: int) -> np.ndarray:
            return np.full(count, 2**64 - 1, dtype=np.uint64)

    assert float(Lowest(0).normal((1,))) == pytest.approx(9.42, abs=0.01)
    assert float(Highest(0).normal((2,)).abs().max()) < 1e-6


def test_poisson_sample_matches_the_rate_and_is_independent() -> None:
    stream, patients, rate, steps = SecureRandomness(), 40, 0.15, 20_000
    included = np.zeros((steps, patients), dtype=bool)
    for step in range(steps):
        included[step, stream.poisson_sample(patients, rate)] = True
    assert stats.binomtest(int(included.sum()), included.size, rate).pvalue > RARE
    for patient in range(patients):  # each patient, not only all together
        assert stats.binomtest(int(included[:, patient].sum()), steps, rate).pvalue > RARE / patients
    sizes = included.sum(axis=1)  # dependence between patients would change the variance of the sizes
    expected = stats.binom.pmf(np.arange(16), patients, rate) * steps
    observed = np.bincount(np.minimum(sizes, 15), minlength=16)
    expected[15] = steps - expected[:15].sum()
    assert stats.chisquare(observed, expected).pvalue > RARE
    both = int((included[1:, 0] & included[:-1, 0]).sum())  # from step to step
    assert stats.binomtest(both, steps - 1, rate**2).pvalue > RARE
    pair = int((included[:, 3] & included[:, 4]).sum())
    assert stats.binomtest(pair, steps, rate**2).pvalue > RARE


def test_a_sampler_of_fixed_size_would_fail_the_test_of_sizes() -> None:
    sizes = np.full(20_000, 6)
    expected = stats.binom.pmf(np.arange(16), 40, 0.15) * 20_000
    expected[15] = 20_000 - expected[:15].sum()
    assert stats.chisquare(np.bincount(sizes, minlength=16), expected).pvalue < RARE


def test_poisson_sample_at_the_ends() -> None:
    stream = SecureRandomness()
    assert stream.poisson_sample(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert stream.poisson_sample(5, 0.0).tolist() == []
    assert stream.poisson_sample(0, 0.5).tolist() == []
    for rate in (-0.1, 1.1, float("nan"), True):
        with pytest.raises(InvalidPlan, match="rate"):
            stream.poisson_sample(5, rate)


def test_secure_stream_cannot_be_seeded() -> None:
    def draw() -> torch.Tensor:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - the point is that it has no effect
        random.seed(0)
        return SecureRandomness().normal((16,))

    assert not torch.equal(draw(), draw())
    with pytest.raises(TypeError):
        SecureRandomness(0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SecureRandomness(seed=0)  # type: ignore[call-arg]


def test_secure_stream_cannot_be_copied_or_saved() -> None:
    stream = SecureRandomness()
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(RandomnessReused):
            copied(stream)  # type: ignore[operator]


def test_a_child_process_does_not_repeat_the_parents_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = SecureRandomness(), SecureRandomness()
    child._cipher = parent._cipher  # what fork leaves: one state, twice
    mine = parent._process
    monkeypatch.setattr(os, "getpid", lambda: mine + 1)
    child._words(1)
    assert child._cipher is not parent._cipher
    assert child._process == mine + 1


def test_seeded_stream_repeats() -> None:
    one, two, other = (SeededRandomnessForTests(seed).normal((8,)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_noised_sums_lie_on_one_grid_whatever_they_were() -> None:
    """What the floating-point attacks need, digits that depend on the sum, is not there."""
    std = 0.7
    grid = 2.0 ** (-1 - 30)
    for total in (torch.zeros(1000), torch.full((1000,), 1 / 3), torch.full((1000,), 1e-12, dtype=torch.float64)):
        noisy = with_gaussian_noise(total, std=std, randomness=SecureRandomness())
        assert torch.equal(noisy / grid, (noisy / grid).round())
    third = torch.full((1000,), 1 / 3)
    same = [with_gaussian_noise(t, std=std, randomness=SeededRandomnessForTests(5)) for t in (third, torch.zeros(1000))]
    assert torch.unique(same[0] - same[1]).numel() == 1  # the noise itself does not depend on the sum


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_no_noise_is_refused(std: float) -> None:
    with pytest.raises(InvalidPlan, match="std"):
        with_gaussian_noise(torch.zeros(2), std=std, randomness=SecureRandomness())


def test_noise_is_as_fast_as_pytorchs() -> None:
    """The network of the main job has 0.7 M parameters; the noise of a step must not be felt beside a second of it."""
    stream = SecureRandomness()

    def best(work: object) -> float:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            work()  # type: ignore[operator]
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    ours = best(lambda: stream.normal((1_100_000,)))
    theirs = best(lambda: torch.randn(1_100_000, dtype=torch.float64))
    assert ours < 3 * theirs
