"""The patients of a study: a pool that is spread over simulated sites, and test patients that no site ever has.

Three kinds of sources: public collections of small images (Fashion-MNIST, CIFAR-10, SVHN), where every image is a
patient of its own; the embedded cohort of three hospitals; and a folder of CT scans. What a study compares is then done
to the same patients.

Source of Fashion-MNIST: Xiao et al. 2017 (arXiv:1708.07747), as Debian's package ``dataset-fashion-mnist`` installs it.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from custom.strict import ConfigError, require
from medical_data.cohort import Cohort, DataLimits, EmbeddedSource, FolderSource, prepare_cohort
from medical_data.partition import PartitionRefused, dirichlet, iid
from medical_data.preprocess import BODY_THRESHOLD_HU, PreprocessConfig

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
FASHION_EDGE, COLOUR_EDGE = 28, 32  # pixels
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# The public collections, and where to get them.
WHERE = {
    "fashion_mnist": "apt-get install dataset-fashion-mnist, or name one with its four .gz files",
    "cifar10": "unpack CIFAR-10's binary version, and name the folder with data_batch_1.bin",
    "svhn": "name one with SVHN's train_32x32.mat and test_32x32.mat",
}
IDX_BYTES = 0x08  # the type of an IDX file's values: unsigned bytes
HOSPITALS = 3
EMBEDDED_SEED = 20_240_607  # another cohort than the simulator's
CHOICE_SEED = 20_240_608  # who is in the pool and who is tested: the same in every study
# A partition that leaves a site one patient, who cannot both train and be held out, is drawn again this many times.
REDRAWS = 100
REDRAW_STRIDE = 1 << 32  # between the seeds of those draws, so that neighbouring seeds of studies share none
FEWEST_PATIENTS = 2

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Where a study's patients come from.

    Attributes:
        kind: a public collection, in greys; ``embedded`` (the made-up patients of hospitals 0, 1 and 2); or ``folder``
            (CT scans).
        train: patients of the pool. Of a public collection these are images of its training files.
        test: patients that no site has. Of a public collection these are images of its test files.
        folder: of the scans or of the collection's files; None for Debian's Fashion-MNIST, and for the embedded cohort.
        patients_per_hospital: of the embedded cohort; None for the others.
        slices: of a series of the embedded cohort; None for the others.
    """

    kind: Literal["fashion_mnist", "cifar10", "svhn", "embedded", "folder"]
    train: int
    test: int
    folder: str | None = None
    patients_per_hospital: int | None = None
    slices: int | None = None

    def __post_init__(self) -> None:
        remedy = "give at least 2: one trains, one is held out"
        require(self.train >= FEWEST_PATIENTS, argument="dataset.train", value=self.train, remedy=remedy)
        require(self.test >= 1, argument="dataset.test", value=self.test, remedy="give at least 1")
        embedded = self.kind == "embedded"
        for name, least in (("patients_per_hospital", 1), ("slices", 2)):
            value = getattr(self, name)
            fits = value is not None and value >= least if embedded else value is None
            remedy = f"give at least {least}" if embedded else f"leave it out for {self.kind}"
            require(fits, argument=f"dataset.{name}", value=value, remedy=remedy)
        if self.kind not in ("fashion_mnist", "embedded"):
            remedy = WHERE.get(self.kind, "name a folder with scans")
            require(bool(self.folder), argument="dataset.folder", value=self.folder, remedy=remedy)
        if embedded:
            remedy = "leave it out: the embedded cohort is made, not read"
            require(self.folder is None, argument="dataset.folder", value=self.folder, remedy=remedy)
            found = HOSPITALS * (self.patients_per_hospital or 0)
            remedy = f"{HOSPITALS} hospitals have {found} patients in all: raise patients_per_hospital"
            asked = self.train + self.test
            require(asked <= found, argument="dataset.train + dataset.test", value=asked, remedy=remedy)


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyData:
    """Patients, their images and their labels.

    Attributes:
        images: float32 [N, 1, *spatial] in [-1, 1], grouped by patient.
        patient: int32 [N], ascending, 0 … P-1; every patient has an image.
        label: int64 [P], 0 … L-1.
        test: bool [P], true for patients that no site ever has.

    Raises:
        ValueError: shapes that contradict each other, or no pool.
    """

    images: Images
    patient: NDArray[np.int32]
    label: Labels
    test: NDArray[np.bool_]

    def __post_init__(self) -> None:
        count = len(self.label)
        shaped = self.patient.shape == (len(self.images),) and self.test.shape == self.label.shape == (count,)
        shapes = (self.images.shape, self.patient.shape, self.label.shape, self.test.shape)
        require(shaped, argument="study data", value=shapes, remedy="give [N, 1, *spatial], [N], [P], [P]")
        steps = np.diff(self.patient, prepend=-1, append=count)
        whole = bool(((steps == 0) | (steps == 1)).all()) and steps[0] == steps[-1] == 1
        require(whole, argument="patient", value=self.patient, remedy="give 0 … P-1, ascending, none without images")
        require(not self.test.all(), argument="test", value="all patients", remedy="leave a pool")

    def rows(self, patients: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Indices of these patients' images, ascending; ``patients`` is bool [P]."""
        return np.flatnonzero(patients[self.patient])

    @property
    def image_label(self) -> Labels:
        """The label of each image's patient, int64 [N]."""
        return self.label[self.patient]


def load(config: DatasetConfig, preprocess: PreprocessConfig, home: Path) -> StudyData:
    """The patients of a study: the same configuration gives the same data on every machine.

    Who is tested is chosen by a fixed permutation, of each label in proportion. A smaller pool is a part of a larger
    one with equally many test patients.

    Labels: Fashion-MNIST's ten classes; the hospital of the embedded cohort; for scans :func:`natural_labels`.

    Args:
        config: which patients.
        preprocess: how scans become images. Fashion-MNIST is taken as it is and needs ``size`` = 28 in 2D.
        home: folder for what preparing scans leaves behind; Fashion-MNIST leaves nothing.

    Raises:
        ConfigError: a missing or malformed file, another size than 28, or fewer patients than asked for.
        CohortRefused: scans that cannot serve.
    """
    if config.kind in WHERE:
        return _public(config, preprocess)
    parts = _embedded(config, preprocess, home) if config.kind == "embedded" else [_folder(config, preprocess, home)]
    owners = [owner for images, owner in parts]
    offsets = np.cumsum([0, *(int(owner[-1]) + 1 for owner in owners)])
    images = np.concatenate([images for images, _ in parts])
    patient = np.concatenate([owner + offset for owner, offset in zip(owners, offsets, strict=False)])
    if config.kind == "embedded":
        label = np.repeat(np.arange(len(parts)), np.diff(offsets))
    else:
        label = natural_labels(images, patient, preprocess)
    asked, found = config.train + config.test, len(label)
    remedy = f"there are {found} usable patients: ask for fewer or add some"
    require(asked <= found, argument="dataset.train + dataset.test", value=asked, remedy=remedy)
    order = _stratified(label, np.random.default_rng(CHOICE_SEED))
    test, chosen = np.zeros(found, np.bool_), np.zeros(found, np.bool_)
    test[order[: config.test]] = chosen[order[:asked]] = True
    kept = chosen[patient]
    renumbered = (np.cumsum(chosen) - 1)[patient[kept]].astype(np.int32)
    return StudyData(images=images[kept], patient=renumbered, label=label[chosen].astype(np.int64), test=test[chosen])


def natural_labels(images: Images, patient: NDArray[np.int32], preprocess: PreprocessConfig) -> Labels:
    """What kind of scan each patient has, from the images alone and without identifiers: int64 [P].

    0 has a single image. The others have series: 1 of slim bodies and 2 of bodies that fill the frame, divided at the
    median of the share of pixels above ``BODY_THRESHOLD_HU``. In collections that mix examinations these differ as
    hospitals do: single chest slices from one archive, series of limbs and trunks from another. Labels that nobody has
    are left out, the others numbered on.

    Args:
        images: float32 [N, 1, *spatial] in [-1, 1].
        patient: int32 [N], 0 … P-1, each with an image.
        preprocess: whose window the images went through.
    """
    low, high = preprocess.window_hu
    threshold = max(2 * (BODY_THRESHOLD_HU - low) / (high - low) - 1, -1.0)
    shares = (images > threshold).reshape(len(images), -1).mean(axis=1)
    counts = np.bincount(patient)
    body = np.bincount(patient, weights=shares) / counts
    series = counts > 1
    median = float(np.median(body[series])) if series.any() else 0.0
    kinds = np.where(series, np.where(body <= median, 1, 2), 0)
    return np.unique(kinds, return_inverse=True)[1].astype(np.int64)


def sites_of(
    data: StudyData, *, sites: int, alpha: float | None, seed: int, held_out_fraction: float = 0.2
) -> tuple[Cohort, ...]:
    """The pool spread over sites: whole patients, every one once, at least two a site.

    A partition that leaves a site with one patient is drawn again, at most ``REDRAWS`` times, with the seeds
    seed + k 2³².

    Args:
        data: whose pool; test patients go nowhere.
        sites: S.
        alpha: concentration of the labels' Dirichlet draw (:func:`medical_data.partition.dirichlet`); None spreads
            patients uniformly.
        seed: of the partition and of who is held out; not negative.
        held_out_fraction: share of a site's patients that never train there, rounded; at least one, and one trains.

    Returns:
        One cohort a site. Pseudonyms are numbers in ``data``; images are copies, read-only.

    Raises:
        PartitionRefused: too few patients, an impossible ``alpha``, or no draw that gave every site two patients.
        ConfigError: an impossible fraction or seed.
    """
    share, remedy = 0 < held_out_fraction < 1, "give a number between 0 and 1"
    require(share, argument="held_out_fraction", value=held_out_fraction, remedy=remedy)
    require(seed >= 0, argument="seed", value=seed, remedy="give 0 or more")
    pool = np.flatnonzero(~data.test)
    if sites >= 1 and len(pool) < FEWEST_PATIENTS * sites:
        remedy = f"{sites} sites of at least {FEWEST_PATIENTS} need {FEWEST_PATIENTS * sites}: take fewer sites"
        raise PartitionRefused(attribute="patients", value=len(pool), remedy=remedy)
    labels: Sequence[Hashable] = data.label[pool].tolist()
    for draw in range(REDRAWS + 1):
        drawn = seed + draw * REDRAW_STRIDE
        if alpha is None:
            site = iid(len(pool), sites=sites, seed=drawn)
        else:
            site = dirichlet(labels, sites=sites, alpha=alpha, seed=drawn)
        if np.bincount(site, minlength=sites).min() >= FEWEST_PATIENTS:
            break
    else:
        remedy = f"{REDRAWS + 1} draws left one of {sites} sites with a single patient: raise alpha or take fewer sites"
        raise PartitionRefused(attribute="alpha", value=alpha, remedy=remedy)
    return tuple(
        _cohort(data, pool[site == index], _held_out(int((site == index).sum()), held_out_fraction, [seed, index]))
        for index in range(sites)
    )


def central(cohorts: Sequence[Cohort]) -> Cohort:
    """All sites' patients in one place, each held out as at its site.

    Raises:
        ConfigError: no cohort, or a patient at two sites.
    """
    require(len(cohorts) > 0, argument="cohorts", value=0, remedy="give at least one")
    names = [name for cohort in cohorts for name in cohort.pseudonyms]
    twice = len(names) - len(set(names))
    require(twice == 0, argument="cohorts", value=f"{twice} patients at two sites", remedy="give each patient one site")
    offsets = np.cumsum([0, *(len(cohort.pseudonyms) for cohort in cohorts)])
    order = np.array(sorted(range(len(names)), key=names.__getitem__))
    place = np.argsort(order)
    patient = np.concatenate([place[c.patient + offset] for c, offset in zip(cohorts, offsets, strict=False)])
    rows = np.argsort(patient, kind="stable")
    return _sealed(
        images=np.concatenate([cohort.images for cohort in cohorts])[rows],
        patient=patient[rows],
        pseudonyms=tuple(names[index] for index in order),
        held_out=np.concatenate([cohort.held_out for cohort in cohorts])[order],
    )


def test_cohort(data: StudyData) -> Cohort:
    """The test patients, all of them held out.

    Raises:
        ConfigError: there is none.
    """
    patients = np.flatnonzero(data.test)
    require(patients.size > 0, argument="data.test", value="no patient", remedy="give test patients")
    return _cohort(data, patients, np.ones(patients.size, dtype=np.bool_))


def _held_out(count: int, fraction: float, seed: list[int]) -> NDArray[np.bool_]:
    held_out = np.zeros(count, dtype=np.bool_)
    held_out[np.random.default_rng(seed).permutation(count)[: min(max(round(fraction * count), 1), count - 1)]] = True
    return held_out


def _cohort(data: StudyData, patients: NDArray[np.int64], held_out: NDArray[np.bool_]) -> Cohort:
    """These patients, ascending, with their images."""
    chosen = np.zeros(len(data.label), dtype=np.bool_)
    chosen[patients] = True
    rows = data.rows(chosen)
    return _sealed(
        images=data.images[rows],
        patient=np.searchsorted(patients, data.patient[rows]),
        pseudonyms=tuple(f"patient-{index:07d}" for index in patients),
        held_out=held_out,
    )


def _sealed(
    *, images: Images, patient: NDArray[np.int64], pseudonyms: tuple[str, ...], held_out: NDArray[np.bool_]
) -> Cohort:
    """A cohort of these arrays, which nobody writes to from here on, named by the hash of all of them."""
    owner = patient.astype(np.int32)
    digest = hashlib.sha256("\0".join(pseudonyms).encode())
    for array in (images, owner, held_out):
        array.flags.writeable = False
        digest.update(np.ascontiguousarray(array).data)
    return Cohort(
        images=images, patient=owner, pseudonyms=pseudonyms, held_out=held_out, manifest_sha256=digest.hexdigest()
    )


def _stratified(label: Labels, rng: np.random.Generator) -> NDArray[np.int64]:
    """A permutation, int64 [P], of which every beginning has the labels in the proportions that all patients have."""
    position = np.empty(len(label))
    for value in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == value))
        position[members] = (np.arange(members.size) + rng.random()) / members.size
    return np.argsort(position, kind="stable")


# --- Fashion-MNIST ---


def _public(config: DatasetConfig, preprocess: PreprocessConfig) -> StudyData:
    """Images of a public collection, each a patient of its own, in the greys that a CT has."""
    edge = FASHION_EDGE if config.kind == "fashion_mnist" else COLOUR_EDGE
    fits, remedy = preprocess.size == edge and preprocess.spatial_dims == 2, f"give {edge}, in 2D: nothing is resized"
    require(fits, argument="preprocess.size", value=preprocess.size, remedy=remedy)
    folder = Path(FASHION_MNIST if config.folder is None else config.folder)
    remedy = f"no such folder: {WHERE[config.kind]}"
    require(folder.is_dir(), argument="dataset.folder", value=str(folder), remedy=remedy)
    read = {"fashion_mnist": _fashion_mnist, "cifar10": _cifar10, "svhn": _svhn}[config.kind]
    parts = [
        _balanced(*read(folder, name), count, name, folder)
        for name, count in (("train", config.train), ("test", config.test))
    ]
    levels = np.concatenate([images for images, _ in parts])[:, None]
    count = config.train + config.test
    return StudyData(
        images=levels.astype(np.float32) / np.float32(127.5) - np.float32(1),
        patient=np.arange(count, dtype=np.int32),
        label=np.concatenate([label for _, label in parts]),
        test=np.arange(count) >= config.train,
    )


def _balanced(
    images: NDArray[np.uint8], label: Labels, count: int, part: str, folder: Path
) -> tuple[NDArray[np.uint8], Labels]:
    """``count`` images in their order, and their labels, as many of each as possible."""
    fits = images.ndim == 3 and len(images) == len(label)
    remedy = "give as many labels as images: install the data set again"
    require(fits, argument=str(folder), value=(images.shape, label.shape), remedy=remedy)
    rng = np.random.default_rng([CHOICE_SEED, part == "test"])
    values = np.unique(label)
    members = [rng.permutation(np.flatnonzero(label == value)) for value in values]
    quota, rest = divmod(count, max(len(values), 1))
    wanted = [quota + (index < rest) for index in range(len(values))]
    most = min((len(one) for one in members), default=0) * len(values)
    enough = len(values) > 0 and all(len(one) >= need for one, need in zip(members, wanted, strict=True))
    remedy = f"{folder} has about {most} images with as many of each label: ask for fewer"
    require(enough, argument=f"dataset.{part}", value=count, remedy=remedy)
    chosen = np.sort(np.concatenate([one[:need] for one, need in zip(members, wanted, strict=True)]))
    return images[chosen], label[chosen]


def _fashion_mnist(folder: Path, part: str) -> tuple[NDArray[np.uint8], Labels]:
    prefix = "train" if part == "train" else "t10k"
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", dims=3)
    fits, remedy = images.shape[1:] == (FASHION_EDGE, FASHION_EDGE), f"give images of {FASHION_EDGE} pixels"
    require(fits, argument=str(folder / prefix), value=images.shape, remedy=remedy)
    return images, read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", dims=1).astype(np.int64)


def _cifar10(folder: Path, part: str) -> tuple[NDArray[np.uint8], Labels]:
    """The binary version: records of a label and 3 x 32 x 32 bytes, red first (A. Krizhevsky's page on CIFAR-10)."""
    files = sorted(folder.glob("data_batch_*.bin" if part == "train" else "test_batch.bin"))
    record = 1 + 3 * COLOUR_EDGE**2
    content = b"".join(file.read_bytes() for file in files)
    fits, remedy = len(content) > 0 and len(content) % record == 0, f"no whole records in it: {WHERE['cifar10']}"
    require(fits, argument="dataset.folder", value=str(folder), remedy=remedy)
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return _grey(records[:, 1:].reshape(-1, 3, COLOUR_EDGE, COLOUR_EDGE)), records[:, 0].astype(np.int64)


def _svhn(folder: Path, part: str) -> tuple[NDArray[np.uint8], Labels]:
    """Cropped digits: ``X`` [32, 32, 3, N] and ``y`` [N, 1] with 10 for zero (Netzer et al. 2011)."""
    from scipy.io import loadmat

    file = folder / f"{part}_32x32.mat"
    require(file.is_file(), argument="dataset.folder", value=str(file), remedy=f"no such file: {WHERE['svhn']}")
    content = loadmat(file, variable_names=("X", "y"))
    label: Labels = content["y"].ravel().astype(np.int64) % 10
    return _grey(content["X"].transpose(3, 2, 0, 1)), label


def _grey(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luma (ITU-R BT.601), uint8 [N, H, W], of red, green and blue [N, 3, H, W]."""
    grey: NDArray[np.uint8] = np.rint(np.tensordot(LUMA, colours, axes=(0, 1))).astype(np.uint8)
    return grey


def read_idx(file: Path, *, dims: int) -> NDArray[np.uint8]:
    """A gzipped IDX file of bytes: magic number 0, 0, 8, dims; sizes as big-endian uint32; then the values.

    Source: Y. LeCun's page on MNIST, "the IDX file format".

    Args:
        file: the ``.gz`` file.
        dims: number of dimensions that it must have.

    Raises:
        ConfigError: no such file, or not of this format.
    """
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        remedy = "give the .gz files of Fashion-MNIST: apt-get install dataset-fashion-mnist"
        raise ConfigError(f"dataset.folder: {file}: {type(error).__name__}: {remedy}") from error
    start = 4 + 4 * dims
    headed = len(content) >= start and content[:4] == bytes((0, 0, IDX_BYTES, dims))
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", count=dims, offset=4)) if headed else ()
    fits = headed and len(content) - start == int(np.prod(shape, dtype=np.int64))
    remedy = f"not an IDX file of bytes in {dims} dimensions, or cut short: install the data set again"
    require(fits, argument="dataset.folder", value=str(file), remedy=remedy)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# --- scans ---


def _embedded(
    config: DatasetConfig, preprocess: PreprocessConfig, home: Path
) -> list[tuple[Images, NDArray[np.int32]]]:
    """Images and owners of each hospital."""
    patients, slices = config.patients_per_hospital, config.slices
    assert patients is not None  # noqa: S101 - DatasetConfig requires it
    assert slices is not None  # noqa: S101 - DatasetConfig requires it
    # Twice the size: the body fills about half of the scanner's field, and is scaled to the frame.
    matrix = min(max(64, 2 * preprocess.size), 512)
    found = []
    for hospital in range(HOSPITALS):
        source = EmbeddedSource(hospital=hospital, patients=patients, slices=slices, matrix=matrix, seed=EMBEDDED_SEED)
        found.append(_prepared(source, preprocess, home))
    return found


def _folder(config: DatasetConfig, preprocess: PreprocessConfig, home: Path) -> tuple[Images, NDArray[np.int32]]:
    """Images and owners of a folder.

    Pseudonyms depend on the home's secret, so patients are ordered by the hash of their images instead.
    """
    assert config.folder is not None  # noqa: S101 - DatasetConfig requires it
    images, patient = _prepared(FolderSource(folder=Path(config.folder)), preprocess, home)
    own = [images[patient == index] for index in range(int(patient[-1]) + 1)]
    own.sort(key=lambda one: hashlib.sha256(one.tobytes()).digest())
    return np.concatenate(own), np.repeat(np.arange(len(own), dtype=np.int32), [len(one) for one in own])


def _prepared(
    source: FolderSource | EmbeddedSource, preprocess: PreprocessConfig, home: Path
) -> tuple[Images, NDArray[np.int32]]:
    cohort = prepare_cohort(source=source, preprocess=preprocess, limits=DataLimits(), home=home)
    return np.array(cohort.images), cohort.patient
