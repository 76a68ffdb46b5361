from __future__ import annotations

import itertools
import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import fft, ndimage, stats

from privacy.audit.embedding import train_embedding
from privacy.audit.errors import Overlap, Unattackable
from privacy.audit.memorization import (
    GALLERY,
    IMAGE_DRAWS,
    NEAREST,
    PERMUTATIONS,
    CopyScreen,
    _draws,
    copy_screens,
)

SIDE = 16
Images = NDArray[np.float32]


def smooth(rng: np.random.Generator, count: int) -> Images:
    fields = ndimage.gaussian_filter(rng.normal(size=(count, SIDE, SIDE)), (0, 1.5, 1.5), mode="reflect")
    return (0.4 * fields / fields.std(axis=(1, 2), keepdims=True)).astype(np.float32)[:, None]


def cohort(rng: np.random.Generator, patients: int, slices: int) -> Images:
    """Slices of a patient are variations of one field."""
    return np.repeat(smooth(rng, patients), slices, axis=0) + 0.3 * smooth(rng, patients * slices)


def sides(
    rng: np.random.Generator, *, members: int = 14, held_outs: int = 8, slices: tuple[int, int] = (3, 3)
) -> dict[str, Any]:
    return {
        "train": cohort(rng, members, slices[0]),
        "train_patient": np.repeat(np.arange(members), slices[0]),
        "held_out": cohort(rng, held_outs, slices[1]),
        "held_out_patient": np.repeat(np.arange(members, members + held_outs), slices[1]),
    }


def cosine_transform(images: Images) -> Images:
    """Magnitudes of low frequencies: flips change only signs, and a brighter image only the first."""
    coefficients = np.abs(fft.dctn(images[:, 0], axes=(1, 2), norm="ortho"))[:, :6, :6].reshape(len(images), -1)
    return coefficients[:, 1:].astype(np.float32)


def screens(samples: Images, population: dict[str, Any], **changes: Any) -> tuple[CopyScreen, CopyScreen]:
    return copy_screens(samples, **{"embed": cosine_transform, "seed": 0, **population, **changes})


def unlike_anyone(rng: np.random.Generator, count: int) -> Images:
    return rng.normal(0, 0.4, (count, 1, SIDE, SIDE)).astype(np.float32)


@pytest.mark.parametrize("change", ["noise", "shift"])
def test_copies_are_caught_withheld_and_named(change: str) -> None:
    rng = np.random.default_rng(1)
    population = sides(rng)
    rows = rng.choice(len(population["train"]), 30, replace=False)
    copied = population["train"][rows]
    if change == "noise":
        copies = copied + rng.normal(0, 0.05, copied.shape).astype(np.float32)
    else:
        copies = ndimage.shift(copied, (0, 0, 0.4, 0.4), order=1, mode="nearest")
    samples = np.concatenate([unlike_anyone(rng, 10), copies])
    for screen in screens(samples, population):
        assert screen.p_value <= 0.01
        assert screen.withhold == tuple(range(10, 40))
        assert screen.copies_train == 30
        assert screen.samples == 40
        assert screen.copies_train_matched > 10 > 5 > screen.copies_held_out_matched
        assert len(screen.nearest) == GALLERY
        similarities = [neighbour.similarity for neighbour in screen.nearest]
        assert similarities == sorted(similarities, reverse=True)
        for neighbour in screen.nearest:
            assert neighbour.train == rows[neighbour.sample - 10]
            difference = samples[neighbour.sample] - population["train"][neighbour.train]
            assert neighbour.distance == pytest.approx(float(np.sqrt((difference.astype(float) ** 2).mean())), rel=1e-5)
    assert [screen.method for screen in screens(samples, population)] == ["embedding", "pixels"]


def test_flipped_copies_need_an_embedding_that_knows_flips() -> None:
    rng = np.random.default_rng(2)
    population = sides(rng)
    rows = rng.choice(len(population["train"]), 30, replace=False)
    copies = population["train"][rows][..., ::-1] + rng.normal(0, 0.05, (30, 1, SIDE, SIDE)).astype(np.float32)
    by_embedding, by_pixels = screens(copies, population)
    assert by_embedding.p_value <= 0.01
    assert by_embedding.withhold == tuple(range(30))
    assert all(neighbour.train == rows[neighbour.sample] for neighbour in by_embedding.nearest)
    assert by_pixels.copies_train < 15


def test_a_trained_embedding_catches_flipped_copies() -> None:
    rng = np.random.default_rng(3)
    population = sides(rng, members=20, held_outs=20, slices=(2, 2))
    images = np.concatenate([population["train"], population["held_out"]])
    patient = np.concatenate([population["train_patient"], population["held_out_patient"]])
    embedding = train_embedding(images, patient, steps=120, seed=0)
    kept = np.clip(population["train"][::2, :, ::-1] * 1.1 + 0.05, -1, 1)
    copied, _ = screens(kept, population, embed=embedding)
    assert copied.p_value <= 0.01
    assert copied.copies_train_matched > 5 * copied.copies_held_out_matched
    new, _ = screens(cohort(rng, 20, 1), population, embed=embedding)
    assert new.p_value > 0.05


SHAPES = [
    {"members": 14, "held_outs": 14},
    {"members": 24, "held_outs": 4},  # many members, few held-outs
    {"members": 4, "held_outs": 12},
    {"members": 10, "held_outs": 6, "slices": (5, 2)},  # more images of members
]


@pytest.mark.parametrize("shape", SHAPES)
def test_new_samples_are_not_accused(shape: dict[str, Any]) -> None:
    seeds = 200
    p_values, excess = np.empty((2, 2, seeds))
    for seed in range(seeds):
        rng = np.random.default_rng([4, seed])
        found = screens(cohort(rng, 12, 2), sides(rng, **shape), seed=seed, quantile=0.8)
        p_values[:, seed] = [screen.p_value for screen in found]
        excess[:, seed] = [screen.copies_train_matched - screen.copies_held_out_matched for screen in found]
    for level in (0.05, 0.2, 0.5):
        allowed = stats.binom.ppf(0.999, seeds, level)
        assert ((p_values <= level).sum(axis=1) <= allowed).all()
    assert (np.abs(excess.mean(axis=1)) < 3.5 * excess.std(axis=1) / math.sqrt(seeds)).all()
    assert (p_values.mean(axis=1) < 0.75).all()  # nor is the test so cautious that it could never accuse


def test_one_patient_alone_cannot_be_significant() -> None:
    rng = np.random.default_rng(5)
    population = sides(rng)
    copies = population["train"][[0] * 20] + rng.normal(0, 0.02, (20, 1, SIDE, SIDE)).astype(np.float32)
    for screen in screens(copies, population):
        assert screen.p_value > 0.05
        assert screen.copies_train == 20


# The same, slowly: images one by one, draws of patients one by one.


def slow_likeness(method: str, a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) if method == "embedding" else -math.dist(a, b)


def slow_to_patients(
    method: str, query: NDArray[np.float64], references: NDArray[np.float64], patient: list[int], own: int | None
) -> dict[int, float]:
    found: dict[int, float] = {}
    for reference, p in zip(references, patient, strict=True):
        if p != own:
            found[p] = max(found.get(p, -math.inf), slow_likeness(method, query, reference))
    if method == "pixels":
        patients = len(set(patient))
        nearest = sorted((-d for d in found.values()), reverse=False)[: min(NEAREST, patients - 1)]
        mean = sum(nearest) / len(nearest)
        found = {p: 1 + d / mean for p, d in found.items()}
    return found


def slow_screen(method: str, samples: Images, population: dict[str, Any], quantile: float, seed: int) -> dict[str, Any]:
    """Right for patients whose images are all alike, or who have equally many: then no image need be drawn."""
    represent = cosine_transform if method == "embedding" else lambda images: images.reshape(len(images), -1)
    images = np.concatenate([population["train"], population["held_out"]])
    patient = [*population["train_patient"].tolist(), *population["held_out_patient"].tolist()]
    members, held_outs = (sorted(set(population[f"{side}_patient"].tolist())) for side in ("train", "held_out"))
    vectors = represent(images).astype(np.float64)
    of_samples = [slow_to_patients(method, x, vectors, patient, None) for x in represent(samples).astype(np.float64)]
    of_images = [slow_to_patients(method, x, vectors, patient, own) for x, own in zip(vectors, patient, strict=True)]

    nearest_train = sorted(
        max(row[p] for p in members) for row, own in zip(of_images, patient, strict=True) if own in held_outs
    )
    threshold = nearest_train[math.ceil(quantile * (len(nearest_train) - 1))]
    k = min(len(members), len(held_outs))

    # All draws of k others of all images; their nearest, each of equal weight within its image.
    nearest = []
    for row in of_images:
        draws = list(itertools.combinations(row.values(), k))
        nearest += [(max(draw), 1 / len(draws) / len(images)) for draw in draws]
    share, common = 0.0, math.inf
    for value, weight in sorted(nearest):
        share += weight
        if share >= quantile - 1e-9:
            common = value
            break

    def hits(called: list[int]) -> float:
        draws = list(itertools.combinations(called, k))
        return sum(any(row[p] > common + 1e-6 for p in draw) for row in of_samples for draw in draws) / len(draws)

    patients = [*members, *held_outs]
    label = np.array([p in members for p in patients])
    rng, excess = np.random.default_rng([seed, 1]), []
    for _ in range(PERMUTATIONS):
        some = rng.permutation(label)
        called = [p for p, member in zip(patients, some, strict=True) if member]
        others = [p for p, member in zip(patients, some, strict=True) if not member]
        excess.append(hits(called) - hits(others))
    observed = hits(members) - hits(held_outs)
    nearest_of_sample = [max(row[p] for p in members) for row in of_samples]
    return {
        "threshold": threshold,
        "withhold": tuple(i for i, s in enumerate(nearest_of_sample) if s > threshold + 1e-6),
        "copies_train_matched": hits(members),
        "copies_held_out_matched": hits(held_outs),
        "p_value": (1 + sum(e >= observed - 1e-9 for e in excess)) / (1 + PERMUTATIONS),
    }


def assert_as_slow(samples: Images, population: dict[str, Any], quantile: float, seed: int) -> None:
    for screen in screens(samples, population, quantile=quantile, seed=seed):
        slow = slow_screen(screen.method, samples, population, quantile, seed)
        assert screen.threshold == pytest.approx(slow["threshold"], abs=2e-5)
        assert screen.withhold == slow["withhold"]
        for name in ("copies_train_matched", "copies_held_out_matched", "p_value"):
            assert getattr(screen, name) == pytest.approx(slow[name], abs=1e-9)


@pytest.mark.parametrize(("members", "held_outs"), [(4, 2), (3, 3), (2, 4)])
def test_equals_the_slow_screen(members: int, held_outs: int) -> None:
    rng = np.random.default_rng([6, members])
    population = sides(rng, members=members, held_outs=held_outs, slices=(2, 2))
    samples = np.concatenate([cohort(rng, 5, 1), population["train"][:2] + 0.1 * smooth(rng, 2)])
    assert_as_slow(samples, population, quantile=0.6, seed=3)


def test_equals_the_slow_screen_where_patients_have_different_numbers_of_images() -> None:
    rng = np.random.default_rng(7)
    population = sides(rng, members=4, held_outs=3, slices=(1, 1))
    times = np.array([1, 3, 2, 5])
    population["train"] = np.repeat(population["train"], times, axis=0)
    population["train_patient"] = np.repeat(population["train_patient"], times)
    assert_as_slow(cohort(rng, 6, 1), population, quantile=0.7, seed=0)


def test_more_patients_than_the_nearest_that_count() -> None:
    rng = np.random.default_rng(8)
    population = sides(rng, members=NEAREST, held_outs=NEAREST // 2, slices=(1, 1))
    samples = cohort(rng, 3, 1)
    images = np.concatenate([population["train"], population["held_out"]]).reshape(-1, SIDE * SIDE)
    _, by_pixels = screens(samples, population)
    for neighbour in by_pixels.nearest:
        distances = np.linalg.norm(images - samples[neighbour.sample].ravel(), axis=1)
        expected = 1 - distances[:NEAREST].min() / np.sort(distances)[:NEAREST].mean()
        assert neighbour.similarity == pytest.approx(expected, abs=1e-4)
        assert neighbour.train == distances[:NEAREST].argmin()


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 6), min_size=2, max_size=8), seed=st.integers(0, 99))
def test_draws_take_as_many_images_of_each_patient(counts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    patient = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    (rows, starts), *drawn = _draws(patient, rng)
    assert sorted(rows) == list(range(len(patient)))
    for p, block in enumerate(np.split(rows, starts[1:])):
        assert set(block) == set(np.flatnonzero(patient == p))
    assert len(drawn) == (0 if len(set(counts)) == 1 else IMAGE_DRAWS)
    for rows, starts in drawn:
        for p, block in enumerate(np.split(rows, starts[1:])):
            assert len(set(block)) == len(block) == min(counts)
            assert (patient[block] == p).all()


def test_members_with_more_images_are_counted_by_as_many_as_held_outs_have() -> None:
    """Each of 24 images is copied; of each of 6 patients one of 4 is drawn, and only its copy is found."""
    rng = np.random.default_rng(16)
    population = {"train": smooth(rng, 24), "train_patient": np.repeat(np.arange(6), 4)}
    population |= {"held_out": smooth(rng, 6), "held_out_patient": np.arange(6, 12)}
    for screen in screens(population["train"].copy(), population, quantile=0.9999):
        assert screen.copies_train == 24
        assert screen.copies_train_matched == pytest.approx(6)
        assert screen.copies_held_out_matched == 0


def test_every_image_of_a_patient_can_be_drawn() -> None:
    patient = np.repeat([0, 1], [4, 1])
    seen = {int(rows[0]) for seed in range(20) for rows, _ in _draws(patient, np.random.default_rng(seed))[1:]}
    assert seen == {0, 1, 2, 3}


def test_empty_slices_are_nobodys_copies() -> None:
    """Air is on both sides, and in samples: equal up to rounding, and so no nearer than held-outs are."""
    rng = np.random.default_rng(9)
    population = sides(rng, members=6, held_outs=6, slices=(2, 2))
    for side in ("train", "held_out"):
        population[side][::2] = -1.0
    samples = np.full((5, 1, SIDE, SIDE), -1, dtype=np.float32)
    for screen in screens(samples, population, embed=lambda images: images.reshape(len(images), -1)):
        assert screen.withhold == ()
        assert screen.copies_train_matched == screen.copies_held_out_matched == 0
        assert screen.p_value == 1
        assert np.isfinite([screen.threshold, *(n.similarity for n in screen.nearest)]).all()


def test_rounding_errors_of_an_embedding_are_no_likeness() -> None:
    rng = np.random.default_rng(15)
    population = sides(rng, members=3, held_outs=3)

    def all_but_equal(images: Images) -> Images:
        noise = rng.normal(0, 3e-8, (len(images), 100))
        return (np.random.default_rng(0).normal(0, 0.1, 100) + noise).astype(np.float32)

    by_embedding, _ = screens(cohort(rng, 50, 1), population, embed=all_but_equal)
    assert by_embedding.threshold == 1
    assert by_embedding.withhold == ()
    assert by_embedding.copies_train_matched == by_embedding.copies_held_out_matched == 0


def test_patient_numbers_and_the_order_of_images_do_not_matter() -> None:
    rng = np.random.default_rng(10)
    population = sides(rng)
    samples = np.concatenate([cohort(rng, 10, 1), population["train"][:5]])
    order = rng.permutation(len(population["train"]))
    shuffled = {
        **population,
        "train": population["train"][order],
        "train_patient": population["train_patient"][order] * 7 - 500,
    }
    for before, after in zip(screens(samples, population), screens(samples, shuffled), strict=True):
        assert after.withhold == before.withhold
        assert after.threshold == pytest.approx(before.threshold, abs=1e-5)
        assert after.copies_train_matched == pytest.approx(before.copies_train_matched)
        assert [order[n.train] for n in after.nearest] == [n.train for n in before.nearest]


def test_seed_decides() -> None:
    rng = np.random.default_rng(11)
    population = sides(rng, slices=(3, 2))
    samples = cohort(rng, 30, 1)
    assert screens(samples, population, seed=5) == screens(samples, population, seed=5)
    assert screens(samples, population, seed=5)[1] != screens(samples, population, seed=6)[1]
    with pytest.raises(FrozenInstanceError):
        screens(samples, population)[0].p_value = 1.0  # type: ignore[misc]


def test_volumes() -> None:
    rng = np.random.default_rng(12)
    images = rng.normal(0, 0.3, (8, 1, 4, 5, 6)).astype(np.float32)
    population = {"train": images[:4], "held_out": images[4:]}
    population |= {"train_patient": np.arange(4), "held_out_patient": np.arange(4, 8)}
    for screen in screens(images[:4], population, embed=lambda x: x.reshape(len(x), -1)):
        assert screen.withhold == (0, 1, 2, 3)
        assert {(n.sample, n.train) for n in screen.nearest} == {(i, i) for i in range(4)}
        assert all(n.distance == 0 and n.similarity == pytest.approx(1, abs=1e-5) for n in screen.nearest)


NAN = np.full((3, 1, SIDE, SIDE), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"samples": NAN[:0]}, "samples"),
        ({"samples": NAN}, "samples = 'not finite'"),
        ({"samples": np.zeros((3, 1, SIDE, SIDE + 1), dtype=np.float32)}, "samples"),
        ({"samples": np.zeros((3, SIDE, SIDE), dtype=np.float32)}, "samples"),
        ({"train": NAN[:0], "train_patient": np.arange(0)}, "train"),
        ({"train": NAN, "train_patient": np.arange(3)}, "train = 'not finite'"),
        ({"train_patient": np.arange(3)}, "train_patient"),
        ({"train_patient": np.zeros(42, dtype=np.int64)}, "two patients"),
        ({"held_out": NAN[:0], "held_out_patient": np.arange(0)}, "held_out"),
        ({"held_out": NAN, "held_out_patient": np.arange(3)}, "held_out = 'not finite'"),
        ({"held_out_patient": np.full(24, 99)}, "two patients"),
        ({"quantile": 0.0}, "quantile"),
        ({"quantile": 1.0}, "quantile"),
        ({"quantile": float("nan")}, "quantile"),
        ({"embed": lambda images: images}, "embed"),
        ({"embed": lambda images: images[:1].reshape(1, -1)}, "embed"),
        ({"embed": lambda images: np.zeros((len(images), 2))}, "embed"),
        ({"embed": lambda images: np.full((len(images), 2), np.nan)}, "embed"),
    ],
)
def test_refuses(changes: dict[str, Any], named: str) -> None:
    rng = np.random.default_rng(13)
    values = {**sides(rng), "samples": cohort(rng, 3, 1), **changes}
    with pytest.raises(Unattackable, match=named):
        screens(values.pop("samples"), values)


def test_a_patient_on_both_sides_is_refused() -> None:
    rng = np.random.default_rng(14)
    population = sides(rng)
    with pytest.raises(Overlap, match="2 patients"):
        screens(cohort(rng, 3, 1), {**population, "held_out_patient": population["held_out_patient"] - 2})
