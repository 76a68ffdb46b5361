"""Black box: does a generative model give back the patients it was trained on? Asked of its samples alone.

    likeness of each sample to each patient → over a threshold that real, never trained-on images set
    → counted against patients who were trained on and, on equal terms, against patients who were not

Two measures of likeness: an embedding in which flipped, turned or brightened copies are close (in the manner of Dar et
al., arXiv:2402.01054), and pixels (in the manner of Carlini et al., arXiv:2301.13188, section 5.1). What lies over the
threshold is a candidate, not a proof: about one in twenty images of anyone does. The control makes it a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from privacy.audit.errors import Overlap, require

Method = Literal["embedding", "pixels"]

# Embed(images [N, 1, *spatial]) → [N, d], such as `privacy.audit.embedding.Embedding`.
Embed = Callable[[NDArray[np.float32]], NDArray[np.float32]]

PERMUTATIONS = 999
IMAGE_DRAWS = 10  # where patients have different numbers of images
NEAREST = 50  # n of Carlini et al.
GALLERY = 12  # neighbours that are listed
# Where equal images, such as empty slices, would differ by float32's rounding, they are taken for equal.
COSINE_DECIMALS = 6
SAME_IMAGE = 1e-6  # squared distance by the sum of the squared norms
_QUERIES_AT_ONCE = 256
_PERMUTATIONS_AT_ONCE = 100


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A sample and the training image that it is most like: for the eyes of the site alone.

    Attributes:
        sample: index of the sample.
        train: row of the training image.
        similarity: by the screen's measure.
        distance: root mean square difference of their pixels, on the images' scale of [-1, 1].
    """

    sample: int
    train: int
    similarity: float
    distance: float


@dataclass(frozen=True, kw_only=True)
class CopyScreen:
    """What was found by one measure of likeness.

    Attributes:
        method: ``embedding``: cosine similarity. ``pixels``: 1 - ℓ₂ distance / mean ℓ₂ distance to the nearest
            patients; 1 is an exact copy, 0 is no nearer than others.
        samples: number of samples, S.
        threshold: quantile of the held-out images' similarity to their nearest training image.
        copies_train: samples whose nearest training image is more similar than that.
        copies_train_matched: expected number of samples over the common threshold against as many patients who were
            trained on as there are on the smaller side.
        copies_held_out_matched: the same against held-outs. Under the null both have one expectation.
        p_value: one-sided, of the excess of the former over the latter, by permutation of patients.
        withhold: indices of the ``copies_train`` samples, ascending: what a release must leave out.
        nearest: the samples most similar to a training image, most similar first. It is about single patients and
            leaves the site in no form.
    """

    method: Method
    samples: int
    threshold: float
    copies_train: int
    copies_train_matched: float
    copies_held_out_matched: float
    p_value: float
    withhold: tuple[int, ...]
    nearest: tuple[Neighbour, ...]


def copy_screens(
    samples: NDArray[np.float32],
    *,
    train: NDArray[np.float32],
    train_patient: NDArray[np.int64],
    held_out: NDArray[np.float32],
    held_out_patient: NDArray[np.int64],
    embed: Embed,
    seed: int,
    quantile: float = 0.95,
) -> tuple[CopyScreen, CopyScreen]:
    """Screen samples for copies of training patients, by embedding and by pixels.

    **What to withhold.** A sample is a candidate copy if it is more similar to some training image than the given
    quantile of held-out images are to theirs. (Dar et al. take the quantile over training images and their nearest
    held-outs; here held-out images are asked the very question that samples are asked.)

    **The test.** Let A be the S × P matrix of whether a sample is over the common threshold against a patient, with
    equally many images of each patient: m, the fewest that any patient has, drawn at random several times if others
    have more. With c of A's row over members and k patients of the smaller side, a draw of k of n members hits with
    probability 1 - C(n-c, k) / C(n, k). The statistic T is the sum of that over samples, minus the same over
    held-outs, averaged over the draws of images: the number of samples that k members would be found in, minus the
    number that k held-outs would. The common threshold is the quantile of real images' similarity to the nearest of k
    other patients, of either side, and so knows nothing of who was trained on. If the samples know members no better
    than held-outs, all ways to call as many patients members are equally likely, and
    p = (1 + #{T of 999 random ways ≥ T}) / 1000 is valid whatever the samples' dependence on each other.

    Patients are the unit: a model that repeats one patient in all its samples is not significant (one held-out might
    have looked like that too) and with few patients p cannot be small. ``withhold`` and ``nearest`` tell of it.

    Args:
        samples: of the model, float32 [S, 1, *spatial] in [-1, 1].
        train: images that it was trained on, [N, 1, *spatial].
        train_patient: int64 [N], whose they are.
        held_out: images that it was not trained on, [M, 1, *spatial].
        held_out_patient: int64 [M], whose they are, in one numbering with ``train_patient``.
        embed: must treat both sides alike: trained on both together, or on neither.
        seed: of draws and permutations.
        quantile: of the thresholds.

    Returns:
        The screen by embedding and the screen by pixels.

    Raises:
        Unattackable: no images, shapes that do not fit, values that are not finite, fewer than two patients on a side,
            an impossible quantile, or an embedding that is not [N, d] of finite vectors other than 0.
        Overlap: a patient on both sides.
    """
    _require_inputs(samples, train, train_patient, held_out, held_out_patient)
    require(0 < quantile < 1, "quantile", quantile, "give a number between 0 and 1")
    images = np.concatenate([train, held_out])
    _, patient = np.unique(np.concatenate([train_patient, held_out_patient]), return_inverse=True)
    member = np.zeros(int(patient.max()) + 1, dtype=np.bool_)
    member[patient[: len(train)]] = True

    def screen(method: Method, of_samples: NDArray[np.float32], of_images: NDArray[np.float32]) -> CopyScreen:
        measure = _cosines if method == "embedding" else _minus_distances
        draws = _draws(patient, np.random.default_rng([seed, 0]))
        to_samples = _to_patients(of_samples, of_images, draws, measure)
        to_images = _to_patients(of_images, of_images, draws, measure)
        to_images[:, np.arange(len(images)), patient] = -np.inf
        if method == "pixels":
            to_samples, to_images = _normalised(to_samples), _normalised(to_images)

        nearest_train = to_samples[0][:, member].max(axis=1)
        of_held_out = to_images[0][len(train) :, member].max(axis=1)
        threshold = float(np.quantile(of_held_out, quantile, method="higher"))
        over = nearest_train > threshold

        # Draw 0 is of all images: it serves the test only where all patients have equally many.
        matched = slice(1, None) if len(draws) > 1 else slice(None)
        smaller = int(min(member.sum(), (~member).sum()))
        common = [_common_threshold(real, smaller, quantile) for real in to_images[matched]]
        like = np.stack([likeness > t for likeness, t in zip(to_samples[matched], common, strict=True)])
        of_members, of_held_outs, p_value = _permutation_test(like, member, np.random.default_rng([seed, 1]))

        closest = np.argsort(-nearest_train, kind="stable")[:GALLERY].tolist()
        rows = measure(of_samples[closest], of_images[: len(train)]).argmax(axis=1).tolist()
        return CopyScreen(
            method=method,
            samples=len(samples),
            threshold=threshold,
            copies_train=int(over.sum()),
            copies_train_matched=of_members,
            copies_held_out_matched=of_held_outs,
            p_value=p_value,
            withhold=tuple(np.flatnonzero(over).tolist()),
            nearest=tuple(
                Neighbour(
                    sample=sample,
                    train=row,
                    similarity=float(nearest_train[sample]),
                    distance=float(np.sqrt(np.mean(np.square(samples[sample] - train[row], dtype=np.float64)))),
                )
                for sample, row in zip(closest, rows, strict=True)
            ),
        )

    return (
        screen("embedding", _unit_vectors(samples, embed), _unit_vectors(images, embed)),
        screen("pixels", samples.reshape(len(samples), -1), images.reshape(len(images), -1)),
    )


# Of each patient some rows: all rows in a line, and where each patient's begin.
_Draw = tuple[NDArray[np.int64], NDArray[np.int64]]
_Measure = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]


def _draws(patient: NDArray[np.int64], rng: np.random.Generator) -> list[_Draw]:
    """All rows; then, unless patients have equally many, several draws of as many as the patient with the fewest."""
    counts = np.bincount(patient)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    draws = [(np.argsort(patient, kind="stable"), starts)]
    fewest = int(counts.min())
    if fewest < counts.max():
        for _ in range(IMAGE_DRAWS):
            shuffled = np.lexsort((rng.random(len(patient)), patient))
            rows = (starts[:, None] + np.arange(fewest)).ravel()
            draws.append((shuffled[rows], np.arange(len(counts)) * fewest))
    return draws


def _to_patients(
    queries: NDArray[np.float32], references: NDArray[np.float32], draws: Sequence[_Draw], measure: _Measure
) -> NDArray[np.float32]:
    """Each query's likeness to the most similar of each patient's drawn images, [draws, Q, P]."""
    found = np.empty((len(draws), len(queries), len(draws[0][1])), dtype=np.float32)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        rows = slice(start, start + _QUERIES_AT_ONCE)
        likeness = measure(queries[rows], references)
        for of_draw, (drawn, starts) in zip(found, draws, strict=True):
            np.maximum.reduceat(likeness[:, drawn], starts, axis=1, out=of_draw[rows])
    return found


def _cosines(queries: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
    cosines: NDArray[np.float32] = np.round(queries @ references.T, COSINE_DECIMALS)
    return cosines


def _minus_distances(queries: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
    """-ℓ₂(x, y), where ℓ₂(x, y)² = Σ (x - y)² / number of pixels."""
    centre = references.mean(axis=0)  # small numbers: less is lost where the squares cancel
    x, y = queries - centre, references - centre
    norms = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)
    squared = norms - 2 * x @ y.T
    distances: NDArray[np.float32] = np.sqrt(np.where(squared > SAME_IMAGE * norms, squared, 0) / x.shape[1])
    return -distances


def _normalised(minus_distances: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 - ℓ₂ / mean ℓ₂ to the n nearest patients, [draws, Q, P]; -∞ stays and counts for nobody.

    Carlini et al. divide by α times the mean over the n nearest training images; α moves no sample across a quantile.
    Here the n nearest are patients, of either side: neighbouring slices of one patient would pull the mean down with
    the nearest, and a mean that depended on who was trained on could not be held fixed in a permutation.
    """
    n = min(NEAREST, minus_distances.shape[2] - 1)
    mean = -np.sort(minus_distances, axis=2)[:, :, -n:].mean(axis=2, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = 1 + minus_distances / mean
    shared = (minus_distances == 0) & (mean == 0)  # n patients have this very image: nobody's copy
    likeness: NDArray[np.float32] = np.where(shared, np.float32(0), ratio)
    return likeness


def _common_threshold(real: NDArray[np.float32], smaller: int, quantile: float) -> float:
    """Quantile of the similarity of a real image to the nearest of so many other patients, drawn at random.

    Args:
        real: [N, P] with -∞ for the image's own patient.
        smaller: k, at most half of P.
        quantile: share of draws and images whose similarity is at most the threshold.
    """
    others = real.shape[1] - 1
    ranked = -np.sort(-real, axis=1)[:, :others]
    # The j-th most similar (from 0) is the nearest drawn if it is drawn and none before it is.
    misses = _miss_probability(others, smaller)
    weight = misses[:others] - misses[1:]
    order = np.argsort(ranked, axis=None, kind="stable")
    share = np.cumsum(np.tile(weight, len(ranked))[order]) / len(ranked)
    return float(ranked.ravel()[order][np.searchsorted(share, quantile - 1e-9)])


def _miss_probability(population: int, drawn: int) -> NDArray[np.float64]:
    """C(n-c, k) / C(n, k) for c = 0 … n: that k of n hit none of c."""
    whole = math.comb(population, drawn)
    return np.array([math.comb(population - c, drawn) / whole for c in range(population + 1)])


def _permutation_test(
    like: NDArray[np.bool_], member: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[float, float, float]:
    """Expected hits against members and against held-outs, and p of their difference.

    Args:
        like: [draws of images, S, P].
        member: [P].
        rng: of the permutations.
    """
    patients, members = len(member), int(member.sum())
    smaller = min(members, patients - members)
    labels = np.stack([member, *(rng.permutation(member) for _ in range(PERMUTATIONS))], axis=1)
    hit_members = 1 - _miss_probability(members, smaller)
    hit_held_outs = 1 - _miss_probability(patients - members, smaller)
    hits = np.zeros((2, labels.shape[1]))
    for of_draw in like.astype(np.float32):
        for start in range(0, labels.shape[1], _PERMUTATIONS_AT_ONCE):
            some = labels[:, start : start + _PERMUTATIONS_AT_ONCE]
            for side, hit, called in ((0, hit_members, some), (1, hit_held_outs, ~some)):
                counts = (of_draw @ called.astype(np.float32)).astype(np.int64)
                hits[side, start : start + some.shape[1]] += hit[counts].sum(axis=0) / len(like)
    excess = hits[0] - hits[1]
    as_large = int((excess[1:] >= excess[0] - 1e-9 * (1 + abs(excess[0]))).sum())
    return float(hits[0, 0]), float(hits[1, 0]), (1 + as_large) / (1 + PERMUTATIONS)


def _unit_vectors(images: NDArray[np.float32], embed: Embed) -> NDArray[np.float32]:
    vectors = np.asarray(embed(images), dtype=np.float32)
    fits = vectors.ndim == 2 and len(vectors) == len(images)
    require(fits, "embed", vectors.shape, f"give one vector for each of {len(images)} images")
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    usable = bool(np.isfinite(norm).all()) and bool((norm > 0).all())
    require(usable, "embed", "vectors that are 0 or not finite", "give an embedding that is defined on all images")
    unit: NDArray[np.float32] = vectors / norm
    return unit


def _require_inputs(
    samples: NDArray[np.float32],
    train: NDArray[np.float32],
    train_patient: NDArray[np.int64],
    held_out: NDArray[np.float32],
    held_out_patient: NDArray[np.int64],
) -> None:
    for name, images in (("samples", samples), ("train", train), ("held_out", held_out)):
        alike = images.ndim in (4, 5) and images.shape[1:] == train.shape[1:] and images.shape[1] == 1
        require(alike and images.size > 0, name, images.shape, "give images [N, 1, *spatial], all of one size")
        require(bool(np.isfinite(images).all()), name, "not finite", "give finite images")
    for name, patient, images in (
        ("train_patient", train_patient, train),
        ("held_out_patient", held_out_patient, held_out),
    ):
        shape = patient.shape
        require(shape == (len(images),), name, shape, f"give a patient for each of {len(images)} images")
        patients = len(np.unique(patient))
        require(patients >= 2, name, f"{patients} patient", "give images of two patients at least")
    shared = len(np.intersect1d(train_patient, held_out_patient))
    if shared:
        raise Overlap(
            argument="held_out_patient",
            value=f"{shared} patients of train_patient",
            remedy="number patients once for both sides; each is on one side only",
        )
