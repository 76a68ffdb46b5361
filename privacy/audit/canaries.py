"""Canaries: images that belong to nobody, of which a coin decided before training whether each is trained on.

A lower bound on ε (``privacy.audit.bounds``) rests on coins that are fair, independent and fixed before training. Who
trains and audits could otherwise flip them until the result pleases, so the coins are committed to first: the hash is
published, the coins are shown after training, and whoever has the hash can check them.

The images are outliers on purpose. Differential privacy promises the same ε to the patient with the strangest scan as
to all others, and no other patient's gradient hides the strangest (Carlini et al. 2022, arXiv:2112.03570: outliers are
the easiest to tell as members). A lower bound needs one patient for whom the promise is broken, so the worst case is
the one to try: a pattern that no body shows and that no other canary resembles.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privacy.audit.errors import BrokenCommitment, Unattackable
from privacy.rng import Randomness

NONCE_BYTES = 32

# Band of the patterns in cycles per pixel. Anatomy has most of its power below; above, a network that halves its grid
# twice sees little.
LOWEST_FREQUENCY, HIGHEST_FREQUENCY = 1 / 16, 1 / 4

IMAGES_FILE, SECRET_FILE, COMMITMENT_FILE = "images.npy", "secret.json", "commitment.json"
_DOMAIN = b"fedct canaries v1\0"


@dataclass(frozen=True, kw_only=True, eq=False)
class CanarySet:
    """Canaries and their coins. ``repr`` shows none of them; the arrays are copies that cannot be written.

    Attributes:
        images: float32 [M, 1, *spatial], two or three spatial axes.
        included: the coins, bool [M]: True is trained on.
        nonce: 32 secret bytes; without them the commitment would tell the coins to whoever tries all.

    Raises:
        Unattackable: arrays of another type or shape, an image that is not finite, or a nonce of another length.
    """

    images: NDArray[np.float32] = field(repr=False)
    included: NDArray[np.bool_] = field(repr=False)
    nonce: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _require_images(self.images)
        included, canaries = self.included, len(self.images)
        if not (isinstance(included, np.ndarray) and included.dtype == np.bool_ and included.shape == (canaries,)):
            kind = (included.dtype, included.shape) if isinstance(included, np.ndarray) else type(included).__name__
            raise Unattackable(argument="included", value=kind, remedy=f"give the coins as bool [{canaries}]")
        if not (isinstance(self.nonce, bytes) and len(self.nonce) == NONCE_BYTES):
            found = len(self.nonce) if isinstance(self.nonce, bytes) else type(self.nonce).__name__
            raise Unattackable(argument="nonce", value=found, remedy=f"give {NONCE_BYTES} random bytes")
        for name in ("images", "included"):
            copy = np.array(getattr(self, name), order="C")
            copy.flags.writeable = False
            object.__setattr__(self, name, copy)

    def commitment(self) -> str:
        """SHA-256, in hexadecimal, of what is committed to; it may be published before training.

        Hashed are a domain tag, the nonce, one line of JSON with shape and type, the images as little-endian float32 in
        C order and the coins as bytes 0 and 1. The line fixes all lengths, so that two sets with the same bytes are the
        same set. Binding: two sets with one commitment are a collision of SHA-256. Hiding: the nonce has 256 bits
        of entropy.
        """
        header = {"images": "<f4", "included": "u1", "shape": list(self.images.shape)}
        digest = hashlib.sha256(_DOMAIN)
        digest.update(self.nonce)
        digest.update(json.dumps(header, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        digest.update(self.images.astype("<f4").tobytes())
        digest.update(self.included.astype(np.uint8).tobytes())
        return digest.hexdigest()

    def check(self, commitment: str) -> None:
        """Refuse coins or images that are not those committed to.

        Args:
            commitment: as it was published before training.

        Raises:
            BrokenCommitment: one pixel, one coin or the nonce differs.
        """
        found = self.commitment()
        if found != commitment:
            remedy = f"the commitment is {commitment!r}: bring the canaries that were committed, or audit with new ones"
            raise BrokenCommitment(argument="canaries", value=found, remedy=remedy)

    def save(self, folder: Path) -> None:
        """Write ``images.npy``, ``commitment.json`` (to be published) and ``secret.json`` (coins and nonce, mode 600).

        Raises:
            BrokenCommitment: the folder has canaries already; they may be committed to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in (IMAGES_FILE, SECRET_FILE, COMMITMENT_FILE):
            if os.path.lexists(folder / name):
                raise BrokenCommitment(argument="folder", value=str(folder / name), remedy="save to a new folder")
        secret = {"included": self.included.astype(int).tolist(), "nonce": self.nonce.hex()}
        descriptor = os.open(folder / SECRET_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(secret, stream)
        with (folder / IMAGES_FILE).open("xb") as images:
            np.save(images, self.images.astype("<f4"), allow_pickle=False)
        public = {"canaries": len(self.images), "commitment": self.commitment()}
        with (folder / COMMITMENT_FILE).open("x", encoding="utf-8") as stream:
            json.dump(public, stream)


def load_canaries(folder: Path) -> CanarySet:
    """Canaries that :meth:`CanarySet.save` wrote, checked against the folder's own ``commitment.json``.

    That guards against damage. Against whoever wrote the folder guards only :meth:`CanarySet.check` with a commitment
    that was kept elsewhere.

    Raises:
        BrokenCommitment: a file is missing or damaged, or is not what was committed.
    """
    try:
        public = json.loads((folder / COMMITMENT_FILE).read_text(encoding="utf-8"))
        secret = json.loads((folder / SECRET_FILE).read_text(encoding="utf-8"))
        coins = secret["included"]
        with (folder / IMAGES_FILE).open("rb") as stream:
            images = np.lib.format.read_array(stream, allow_pickle=False)
        if not all(type(coin) is int and coin in (0, 1) for coin in coins):
            raise ValueError("coins that are neither 0 nor 1")
        canaries = CanarySet(
            images=images,
            included=np.array(coins, dtype=np.bool_),
            nonce=bytes.fromhex(secret["nonce"]),
        )
        commitment = public["commitment"]
    except (OSError, ValueError, KeyError, TypeError, Unattackable) as error:
        raise BrokenCommitment(
            argument="folder",
            value=str(folder),
            remedy=f"bring the three files as they were saved ({type(error).__name__})",
        ) from None
    canaries.check(commitment)
    return canaries


def draw_canaries(images: NDArray[np.float32], *, randomness: Randomness) -> CanarySet:
    """Flip an independent fair coin for each image and draw the nonce.

    Args:
        images: float32 [M, 1, *spatial].
        randomness: ``SecureRandomness`` outside tests; whoever predicts it knows the coins.

    Raises:
        Unattackable: images of another type or shape, or not finite.
    """
    _require_images(images)
    return CanarySet(
        images=images,
        included=(randomness.words(len(images)) >> np.uint64(63)).astype(np.bool_),
        nonce=randomness.words(NONCE_BYTES // 8).tobytes(),
    )


def random_canaries(count: int, shape: Sequence[int], *, seed: int) -> NDArray[np.float32]:
    """Band-limited random patterns in [-1, 1], far from any anatomy and from each other.

    White Gaussian noise, cut to frequencies of ``LOWEST_FREQUENCY`` to ``HIGHEST_FREQUENCY`` cycles per pixel, made
    orthogonal (QR) and scaled until the largest pixel is 1 or -1. Without mean and slow change a pattern is all but
    orthogonal to a body too.

    Args:
        count: M.
        shape: of the spatial axes, two or three.
        seed: the same patterns for the same seed; it is no secret, the coins are.

    Returns:
        float32 [M, 1, *shape].

    Raises:
        Unattackable: no such count or shape, or more canaries than the band has orthogonal patterns.
    """
    if type(count) is not int or count < 1:
        raise Unattackable(argument="count", value=count, remedy="give an integer of at least 1")
    sizes = tuple(shape)
    if len(sizes) not in (2, 3) or any(type(size) is not int or size < 1 for size in sizes):
        raise Unattackable(argument="shape", value=sizes, remedy="give the sizes of two or three spatial axes")
    axes = tuple(range(1, len(sizes) + 1))
    noise = np.random.default_rng(seed).standard_normal((count, *sizes))
    per_axis = np.meshgrid(*(np.fft.fftfreq(size) for size in sizes), indexing="ij")
    frequency = np.sqrt(sum(np.square(along) for along in per_axis))
    band = (frequency >= LOWEST_FREQUENCY) & (frequency <= HIGHEST_FREQUENCY)
    if count > band.sum():
        remedy = f"the band has {band.sum()} orthogonal patterns: give larger images or fewer canaries"
        raise Unattackable(argument="count, shape", value=(count, sizes), remedy=remedy)
    patterns = np.fft.ifftn(np.fft.fftn(noise, axes=axes) * band, axes=axes).real
    orthogonal = np.linalg.qr(patterns.reshape(count, -1).T).Q.T
    scaled: NDArray[np.float64] = orthogonal / np.abs(orthogonal).max(axis=1, keepdims=True)
    return scaled.reshape(count, 1, *sizes).astype(np.float32)


def _require_images(images: NDArray[np.float32]) -> None:
    if not (isinstance(images, np.ndarray) and images.dtype == np.float32):
        found = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise Unattackable(argument="images", value=found, remedy="give float32 [M, 1, *spatial]")
    if images.ndim not in (4, 5) or images.shape[1] != 1 or images.size == 0:
        raise Unattackable(argument="images", value=images.shape, remedy="give [M, 1, *spatial], M ≥ 1")
    if not np.isfinite(images).all():
        raise Unattackable(argument="images", value="not finite", remedy="give finite images")
