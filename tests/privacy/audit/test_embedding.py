from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import privacy.audit.embedding as module
from privacy.audit.embedding import DIMENSIONS, TEMPERATURE, Embedding, nt_xent, train_embedding, view
from privacy.audit.errors import Unattackable

SIDE = 16


def bodies(patients: int, slices: int, *, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Ellipses in an ellipse; along a patient's slices the inner ones move."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 2, indexing="ij")
    images = []
    for _ in range(patients):
        half, organs = rng.uniform(0.65, 0.9, 2), rng.uniform(-0.45, 0.45, (5, 2))
        drift, radii, densities = rng.normal(0, 0.03, (5, 2)), rng.uniform(0.1, 0.3, (5, 2)), rng.uniform(-0.6, 0.6, 5)
        for s in range(slices):
            image = np.where((x / half[0]) ** 2 + (y / half[1]) ** 2 < 1, 0.0, -1.0)
            for (cx, cy), (rx, ry), density in zip(organs + s * drift, radii, densities, strict=True):
                image = np.where(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1, density, image)
            images.append(image + rng.normal(0, 0.03, image.shape))
    return np.array(images, dtype=np.float32)[:, None], np.repeat(np.arange(patients), slices)


@pytest.fixture(scope="module")
def trained() -> Embedding:
    images, patient = bodies(40, 4, seed=0)
    return train_embedding(images, patient, steps=150, seed=1)


def patient_recall(embedding: Embedding, images: NDArray[np.float32], patient: NDArray[np.int64]) -> float:
    """Share of views whose nearest image is of their own patient."""
    views = view(torch.from_numpy(images), torch.Generator().manual_seed(2)).numpy()
    nearest = (embedding(views) @ embedding(images).T).argmax(axis=1)
    return float((patient[nearest] == patient).mean())


def test_a_view_is_nearer_to_its_patient_than_to_others(trained: Embedding) -> None:
    images, patient = bodies(40, 4, seed=3)  # of patients that the embedding has not seen
    untrained = train_embedding(images, patient, steps=1, seed=1)
    assert patient_recall(untrained, images, patient) < 0.2
    assert patient_recall(trained, images, patient) > 0.4


@pytest.mark.parametrize("axes", [(2,), (3,), (2, 3)])
def test_a_flipped_copy_is_nearest_to_its_original(trained: Embedding, axes: tuple[int, ...]) -> None:
    images, _ = bodies(40, 1, seed=4)
    nearest = (trained(np.flip(images, axes)) @ trained(images).T).argmax(axis=1)
    assert (nearest == np.arange(40)).mean() > 0.75  # of an untrained encoder: about 0.6


def test_unit_vectors_that_do_not_depend_on_the_batch(trained: Embedding) -> None:
    images, _ = bodies(100, 3, seed=5)
    vectors = trained(images)
    assert vectors.shape == (300, DIMENSIONS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alone = np.concatenate([trained(images[i : i + 1]) for i in (0, 255, 256, 299)])
    np.testing.assert_allclose(vectors[[0, 255, 256, 299]], alone, atol=1e-5)


def test_seed_decides_and_the_global_random_state_neither_matters_nor_changes() -> None:
    images, patient = bodies(6, 2, seed=6)
    state = torch.get_rng_state()
    first = train_embedding(images, patient, steps=3, seed=7)(images)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = train_embedding(images, patient, steps=3, seed=7)(images)
    other = train_embedding(images, patient, steps=3, seed=8)(images)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_training_needs_no_gradient_mode_and_leaves_images_alone() -> None:
    images, patient = bodies(6, 2, seed=6)
    before = images.copy()
    expected = train_embedding(images, patient, steps=3, seed=7)(images)
    with torch.no_grad():
        found = train_embedding(images, patient, steps=3, seed=7)(images)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(images, before)


def test_progress_is_shown_if_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    images, patient = bodies(3, 1, seed=6)
    train_embedding(images, patient, steps=2, seed=7)
    assert capfd.readouterr().err == ""
    train_embedding(images, patient, steps=2, seed=7, progress=True)
    assert "embedding" in capfd.readouterr().err


def test_volumes() -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (6, 1, 8, 12, 20)).astype(np.float32)
    vectors = train_embedding(images, np.arange(6), steps=2, seed=0)(images)
    assert vectors.shape == (6, DIMENSIONS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("side", [8, 16, 40, 128])
def test_sizes(side: int) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (3, 1, side, side + 1)).astype(np.float32)
    embedding = train_embedding(images, np.arange(3), steps=1, seed=0)
    assert embedding(images).shape == (3, DIMENSIONS)
    assert len(embedding.layers) == max(2, round(math.log2(side / 4)))


def unit(rows: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)))


def slow_nt_xent(z: torch.Tensor, patient: list[int]) -> float:
    count, losses = len(patient), []
    for i in range(2 * count):
        j = (i + count) % (2 * count)
        rivals = [j] + [k for k in range(2 * count) if patient[k % count] != patient[i % count]]
        total = sum(math.exp(float(z[i] @ z[k]) / TEMPERATURE) for k in rivals)
        losses.append(-math.log(math.exp(float(z[i] @ z[j]) / TEMPERATURE) / total))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("patient", [[0, 1, 2, 3], [5, 5, 1, 0], [2, 2, 2, 2]])
def test_nt_xent_is_the_sum_over_other_patients(patient: list[int]) -> None:
    z = unit(8)
    assert float(nt_xent(z, torch.tensor(patient))) == pytest.approx(slow_nt_xent(z, patient), abs=1e-4)


def test_nt_xent_of_one_image_a_patient_is_simclr() -> None:
    z = unit(8)
    similar = (z @ z.T / TEMPERATURE).exp()
    others = similar.sum(dim=1) - similar.diag()
    positive = torch.stack([similar[i, (i + 4) % 8] for i in range(8)])
    simclr = -(positive / others).log().mean()
    assert float(nt_xent(z, torch.arange(4))) == pytest.approx(float(simclr), abs=1e-4)


def still(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Views that are flips only, but for the changes."""
    nothing = {"TURN": 0.0, "ZOOM": (1.0, 1.0), "SHIFT": 0.0, "GAIN": 0.0, "OFFSET": 0.0, "NOISE": 0.0}
    for name, value in {**nothing, **changes}.items():
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("spatial", [(8, 9), (5, 6, 7)])
def test_views_flip_every_axis(monkeypatch: pytest.MonkeyPatch, spatial: tuple[int, ...]) -> None:
    still(monkeypatch)
    dims = len(spatial)
    image = torch.rand(1, 1, *spatial, generator=torch.Generator().manual_seed(0))
    views = view(image.repeat(64, *(1,) * (dims + 1)), torch.Generator().manual_seed(1))
    subsets = [[2 + d for d in range(dims) if mask >> d & 1] for mask in range(2**dims)]
    flips = torch.cat([image.flip(axes) for axes in subsets])
    errors = (views[:, None] - flips[None]).abs().flatten(2).amax(2)  # [64, flips]
    assert float(errors.amin(1).max()) < 1e-5
    assert set(errors.argmin(1).tolist()) == set(range(2**dims))


def test_a_turn_keeps_distances_from_the_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    still(monkeypatch, TURN=0.5)
    along = torch.linspace(-1, 1, 41)
    spot = torch.exp(-((along[None, :] - 0.5) ** 2 + along[:, None] ** 2) / 0.01)
    views = view(spot.repeat(32, 1, 1, 1), torch.Generator().manual_seed(0))[:, 0]
    x, y = ((views * place).sum((1, 2)) / views.sum((1, 2)) for place in (along[None, :], along[:, None]))
    torch.testing.assert_close(torch.hypot(x, y), torch.full((32,), 0.5), atol=0.01, rtol=0)
    assert float(y.min()) < -0.1 < 0.1 < float(y.max())


def test_volumes_turn_in_the_plane_of_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    still(monkeypatch, TURN=0.5)
    volume = torch.zeros(16, 1, 6, 9, 9)
    volume[:, :, 1, 1, 4] = 1
    views = view(volume, torch.Generator().manual_seed(0))
    assert float(views[:, :, [0, 2, 3, 5]].abs().max()) < 1e-5
    assert float(views[:, :, [1, 4], 1, 4].sum(dim=2).min()) < 0.9  # it was turned


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"TURN": 0.5}, 0.01),
        ({"ZOOM": (0.6, 0.7)}, 0.01),
        ({"SHIFT": 0.2}, 0.01),
        ({"GAIN": 0.5}, 0.01),
        ({"OFFSET": 0.5}, 0.01),
        ({"NOISE": 0.5}, 0.01),
    ],
)
def test_each_change_of_a_view_changes_it(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], least: float
) -> None:
    images = torch.from_numpy(bodies(8, 1, seed=0)[0])
    still(monkeypatch)
    flipped = view(images, torch.Generator().manual_seed(0))
    still(monkeypatch, **changes)
    changed = view(images, torch.Generator().manual_seed(0))
    assert float((changed - flipped).abs().flatten(1).mean(1).min()) > least


def test_views_come_from_the_generator_alone() -> None:
    images = torch.from_numpy(bodies(3, 1, seed=0)[0])
    first, again, other = (view(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.allclose(first[0] - images[0], first[1] - images[1], atol=0.01)  # each image its own


GOOD = np.zeros((4, 1, 8, 8), dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": GOOD[:0], "patient": np.arange(0)}, "images"),
        ({"images": GOOD[:, 0]}, "images"),
        ({"images": np.zeros((4, 2, 8, 8), dtype=np.float32)}, "images"),
        ({"images": GOOD[..., :7]}, "at least 8 a side"),
        ({"images": np.full_like(GOOD, np.nan)}, "not finite"),
        ({"patient": np.arange(3)}, "patient"),
        ({"patient": np.zeros(4, dtype=np.int64)}, "two patients"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
    ],
)
def test_training_refuses(changes: dict[str, Any], named: str) -> None:
    values: dict[str, Any] = {"images": GOOD, "patient": np.arange(4), "steps": 1, **changes}
    with pytest.raises(Unattackable, match=named):
        train_embedding(values.pop("images"), values.pop("patient"), seed=0, **values)


def test_embedding_refuses(trained: Embedding) -> None:
    for images, named in (
        (np.zeros((2, 1, 16, 16, 16), dtype=np.float32), "2 dimensions"),
        (np.full((2, 1, 16, 16), np.inf, dtype=np.float32), "not finite"),
        (np.zeros((2, 3, 16, 16), dtype=np.float32), "images"),
    ):
        with pytest.raises(Unattackable, match=named):
            trained(images)
