"""What a study measures of a model: held-out loss, distance, diversity, usefulness and what it gives away.

Pure functions on the CPU: the same arguments give the same figures, and torch's and numpy's random states are left
alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from custom.audit_target import denoiser
from custom.device import images_at_once
from custom.diffusion.loss import denoising_loss
from custom.diffusion.schedule import Schedule
from custom.evaluation import effnet_features, mean_pairwise_ms_ssim, prc_neighbours, precision_recall
from custom.strict import require
from privacy.audit.attacks import grey_box_scores
from privacy.audit.statistics import auc

BATCH = 64
CONFIDENCE = 0.95
MEMBERSHIP_LEVELS = (0.05, 0.1, 0.2)  # timesteps of the loss attack, as shares of T: where it is known to see most
# Of the logistic regression: strong, because there are more features than images.
REGULARISATION_C = 0.01
ITERATIONS = 2000

Images = NDArray[np.float32]
Features = NDArray[np.float64]
Labels = NDArray[np.int64]


class BandLosses(NamedTuple):
    """Loss by noise level, each float64 [bands] from the least noise to the most.

    Attributes:
        own: mean squared error of what the network predicts, ε or v. Comparable between networks of one kind.
        epsilon: mean squared error of the ε that follows from it. Comparable between all networks of one schedule.
    """

    own: NDArray[np.float64]
    epsilon: NDArray[np.float64]


class Kid(NamedTuple):
    """Kernel distance with its 95 % interval."""

    kid: float
    low: float
    high: float


def band_losses(network: nn.Module, schedule: Schedule, images: Images, *, bands: int = 4, seed: int) -> BandLosses:
    """Denoising loss on held-out images in each of equal bands of timesteps.

    Every image is denoised once in every band, at timesteps spread evenly over the band in an order of the seed's. An
    image's noise and timesteps depend on the seed and the number of images, not on the network: differences between
    networks are of the networks.

    The error of ε̂ = √ᾱ v̂ + √(1-ᾱ) x_t (arXiv:2202.00512, app. D) is √ᾱ times that of v̂, so the loss of ε is ᾱ_t times
    that of v.

    Args:
        network: on the CPU.
        schedule: of its training.
        images: float32 [N, C, *spatial] in [-1, 1], N at least 1.
        bands: at most T.
        seed: of noise and timesteps.

    Raises:
        ConfigError: no image, or an impossible number of bands.
    """
    total = schedule.config.timesteps
    require(len(images) > 0, argument="images", value=images.shape, remedy="give at least one")
    require(1 <= bands <= total, argument="bands", value=bands, remedy=f"give 1 … {total}")
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.from_numpy(np.array(images))
    own, epsilon = np.empty(bands), np.empty(bands)
    batch = min(BATCH, images_at_once(x0.shape[1:]))
    with _evaluating(network):
        for band in range(bands):
            noise = torch.randn(x0.shape, generator=generator)
            first, last = total * band // bands, total * (band + 1) // bands
            spread = (torch.randperm(len(x0), generator=generator) + 0.5) / len(x0)
            timesteps = first + (spread.double() * (last - first)).long()
            places = [slice(start, start + batch) for start in range(0, len(x0), batch)]
            losses = torch.cat(
                [denoising_loss(network, schedule, x0[i], noise[i], timesteps[i]) for i in places]
            ).double()
            own[band] = float(losses.mean())
            of_epsilon = schedule.config.prediction == "epsilon"
            factor = 1.0 if of_epsilon else schedule.alphas_cumprod.cpu().double()[timesteps]
            epsilon[band] = float((factor * losses).mean())
    return BandLosses(own, epsilon)


def features(images: Images) -> Features:
    """EfficientNet-Lite0's pooled features of slices, float64 [N, 1280]; see :mod:`custom.evaluation`.

    Args:
        images: float32 [N, 1, H, W] in [-1, 1].

    Raises:
        ValueError: impossible images.
    """
    return np.asarray(effnet_features(images).numpy())


def kid_with_interval(x: Features, y: Features, *, seed: int, resamples: int = 200) -> Kid:
    """Kernel Inception distance: unbiased squared maximum mean discrepancy with the kernel (x·y/d + 1)³.

    Bińkowski et al. 2018 (arXiv:1801.01401), over all pairs instead of random subsets. The interval is the percentile
    bootstrap over both sets. A resample is a count for every image, so the kernel is computed once; a pair of an image
    with its own copy is left out and the sum divided by what is left, which keeps a resample as unbiased as the
    estimate. Near equal distributions, where the estimator is degenerate, the interval is too wide rather than too
    narrow. It takes images as independent: of patients with several images it is too narrow.

    Args:
        x: features float64 [N, d], at least 2.
        y: features float64 [M, d], at least 2.
        seed: of the resamples.
        resamples: how many.

    Raises:
        ConfigError: too few features, different ones, or no resample.
    """
    shaped = x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1] and min(len(x), len(y)) >= 2
    remedy = "give features [N, d] and [M, d], at least 2 of each"
    require(shaped, argument="x, y", value=(x.shape, y.shape), remedy=remedy)
    require(resamples >= 1, argument="resamples", value=resamples, remedy="give at least 1")
    rng = np.random.default_rng(seed)
    inside_x, inside_y, between = _kernel(x, x), _kernel(y, y), _kernel(x, y)

    def distances(of_x: Features, of_y: Features) -> Features:
        """Of weighted sets, weights [R, N] and [R, M]: [R]."""
        across = ((of_x @ between) * of_y).sum(axis=1) / (of_x.sum(axis=1) * of_y.sum(axis=1))
        return np.asarray(_mean_of_pairs(inside_x, of_x) + _mean_of_pairs(inside_y, of_y) - 2 * across)

    kid = float(distances(np.ones((1, len(x))), np.ones((1, len(y))))[0])
    drawn = distances(*(_resampled(len(one), resamples, rng) for one in (x, y)))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Kid(kid, float(low), float(high))


def diversity(
    images: Images,
    features_: Features,
    reference: Features,
    *,
    images_per_patient: int = 1,
    seed: int,
) -> dict[str, float]:
    """How much a set varies by itself, and how much of the reference it covers.

    Args:
        images: float32 [N, 1, H, W] in [-1, 1], at least 11 pixels a side; at 28 pixels MS-SSIM has two scales.
        features_: of these images, float64 [N, d].
        reference: of real images that trained nothing, float64 [M, d].
        images_per_patient: the most that the reference has of one patient; more neighbours are then looked at.
        seed: of the pairs.

    Returns:
        ``ms_ssim`` (mean of random pairs, higher is less diverse), ``precision`` and ``recall`` (Kynkäänniemi et al.
        2019, arXiv:1904.06991), all in [0, 1].

    Raises:
        ValueError: impossible images, or fewer features than neighbours.
    """
    neighbours = prc_neighbours(images_per_patient)
    fewest = min(len(features_), len(reference))
    remedy = f"give more than {neighbours} features of each"
    require(fewest > neighbours, argument="features", value=fewest, remedy=remedy)
    found = precision_recall(torch.from_numpy(features_), torch.from_numpy(reference), neighbours=neighbours)
    return {"ms_ssim": mean_pairwise_ms_ssim(images, seed=seed), "precision": found[0], "recall": found[1]}


def classifier_accuracy(
    generated: Features,
    real_train: Features,
    real_train_labels: Labels,
    test: Features,
    test_labels: Labels,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Whether generated images teach a classifier what real ones do (after Ravuri & Vinyals 2019, arXiv:1905.10887).

    The models here know no labels: a classifier of all real training images labels the generated ones first. Then one
    is trained on generated and one on equally many real images, and both are tested on real ones. Each is a logistic
    regression on standardised features; where its images have a single label it always answers that.

    Args:
        generated: features float64 [N, d].
        real_train: features float64 [M, d].
        real_train_labels: int64 [M].
        test: features float64 [K, d], of patients that trained nothing.
        test_labels: int64 [K].
        seed: decides which images where one set is larger.

    Returns:
        ``trained_on_generated`` and the yardstick ``trained_on_real``: accuracies on the test images.

    Raises:
        ConfigError: an empty set, or labels that do not fit.
    """
    sizes = (len(generated), len(real_train), len(test))
    require(min(sizes) > 0, argument="generated, real_train, test", value=sizes, remedy="give at least one of each")
    labels = (len(real_train_labels), len(test_labels))
    require(labels == sizes[1:], argument="labels", value=labels, remedy=f"give {sizes[1:]}, one for each image")
    count = min(len(generated), len(real_train))
    rng = np.random.default_rng(seed)
    real, made = (np.sort(rng.permutation(size)[:count]) for size in (len(real_train), len(generated)))
    given = _answers(real_train, real_train_labels, generated[made])
    return {
        "trained_on_generated": float((_answers(generated[made], given, test) == test_labels).mean()),
        "trained_on_real": float((_answers(real_train[real], real_train_labels[real], test) == test_labels).mean()),
    }


def membership_auc(network: nn.Module, schedule: Schedule, members: Images, non_members: Images, *, seed: int) -> float:
    """AUC of the loss attack: the probability that a training image has a lower loss than another one.

    :func:`privacy.audit.attacks.loss` at ``MEMBERSHIP_LEVELS``, averaged. The side is the published one (lower loss is
    a member) and not chosen from the data: 0.5 is no leak, what lies below is chance. Sets that differ by themselves
    move it, too: the AUC of the untrained network says by how much.

    Args:
        network: on the CPU.
        schedule: of its training.
        members: float32 [N, C, *spatial] in [-1, 1] that trained the network.
        non_members: [M, C, *spatial], of the same kind, that did not.
        seed: of the noise, the same for all images.

    Raises:
        Unattackable: impossible images, or predictions that are not finite.
    """
    images = np.concatenate([members, non_members])
    timesteps = sorted({int(level * schedule.config.timesteps) for level in MEMBERSHIP_LEVELS})
    with _evaluating(network):
        found = grey_box_scores(
            denoiser(network, schedule, torch.device("cpu")),
            images,
            timesteps=tuple(timesteps),
            seeds=(seed,),
            attacks=("loss",),
            batch_size=min(BATCH, images_at_once(images.shape[1:])),
        )
    return auc(-found.scores["loss"][0].mean(axis=1), np.arange(len(images)) < len(members))


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the network is left as it was found."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)


def _kernel(x: Features, y: Features) -> Features:
    return np.asarray((x @ y.T / x.shape[1] + 1.0) ** 3)


def _mean_of_pairs(kernel: Features, weights: Features) -> Features:
    """Weighted mean over pairs of different images, [R], of a kernel [N, N] and weights [R, N].

    A resample that drew one image only (N = 2 or 3) has no such pair; it gets the mean over all of them.
    """
    pairs = weights.sum(axis=1) ** 2 - (weights**2).sum(axis=1)
    weights = np.where(pairs[:, None] > 0, weights, 1.0)
    pairs = weights.sum(axis=1) ** 2 - (weights**2).sum(axis=1)
    total = ((weights @ kernel) * weights).sum(axis=1) - (weights**2) @ np.diagonal(kernel)
    return np.asarray(total / pairs)


def _resampled(count: int, resamples: int, rng: np.random.Generator) -> Features:
    """How often each image is drawn, [resamples, count]."""
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def _answers(known: Features, labels: Labels, asked: Features) -> Labels:
    """Labels of ``asked`` by a classifier of ``known``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) == 1:
        return np.full(len(asked), labels[0])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=REGULARISATION_C, max_iter=ITERATIONS))
    return np.asarray(classifier.fit(known, labels).predict(asked))
