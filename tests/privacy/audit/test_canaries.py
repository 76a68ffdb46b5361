from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privacy.audit.canaries import (
    COMMITMENT_FILE,
    HIGHEST_FREQUENCY,
    IMAGES_FILE,
    LOWEST_FREQUENCY,
    NONCE_BYTES,
    SECRET_FILE,
    CanarySet,
    draw_canaries,
    load_canaries,
    random_canaries,
)
from privacy.audit.errors import BrokenCommitment, Unattackable
from privacy.rng import SecureRandomness, SeededRandomnessForTests

IMAGES = random_canaries(6, (16, 16), seed=1)


def canaries(**changes: Any) -> CanarySet:
    values: dict[str, Any] = {
        "images": IMAGES,
        "included": np.array([True, False, True, True, False, False]),
        "nonce": bytes(range(NONCE_BYTES)),
    }
    return CanarySet(**{**values, **changes})


def test_commitment_is_the_documented_hash() -> None:
    header = b'{"images":"<f4","included":"u1","shape":[6,1,16,16]}\n'
    body = IMAGES.astype("<f4").tobytes() + bytes([1, 0, 1, 1, 0, 0])
    expected = hashlib.sha256(b"fedct canaries v1\0" + bytes(range(32)) + header + body).hexdigest()
    assert canaries().commitment() == expected
    canaries().check(expected)


def test_commitment_does_not_depend_on_memory_layout() -> None:
    turned = np.asfortranarray(IMAGES)
    assert not turned.flags.c_contiguous
    assert canaries(images=turned).commitment() == canaries().commitment()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tampering_breaks_the_commitment(data: st.DataObject) -> None:
    original = canaries()
    what = data.draw(st.sampled_from(["pixel", "coin", "nonce", "order", "shape", "fewer"]))
    images, included, nonce = original.images.copy(), original.included.copy(), bytearray(original.nonce)
    if what == "pixel":
        place = data.draw(st.integers(0, images.size - 1))
        bit = data.draw(st.integers(0, 22))  # of the mantissa: the value stays finite
        images.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
    elif what == "coin":
        included[data.draw(st.integers(0, len(included) - 1))] ^= True
    elif what == "nonce":
        nonce[data.draw(st.integers(0, len(nonce) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif what == "order":
        order = data.draw(st.permutations(range(6)).filter(lambda p: p != list(range(6))))
        images = images[order]
    elif what == "shape":
        images = images.reshape(6, 1, 8, 32)
    else:
        images, included = images[:5], included[:5]
    tampered = CanarySet(images=images, included=included, nonce=bytes(nonce))
    with pytest.raises(BrokenCommitment, match="canaries"):
        tampered.check(original.commitment())


@pytest.mark.parametrize("commitment", ["", "0" * 64, "é"])
def test_another_commitment_is_refused(commitment: str) -> None:
    with pytest.raises(BrokenCommitment):
        canaries().check(commitment)


def test_commitment_hides_the_coins() -> None:
    first, second = canaries(), canaries(nonce=bytes(NONCE_BYTES))
    assert first.commitment() != second.commitment()  # same coins
    # Whoever knows the images and tries all coins finds the commitment with the right nonce and with no other.
    coins = [np.array([(number >> bit) & 1 for bit in range(6)], dtype=np.bool_) for number in range(64)]
    tried = {canaries(included=c).commitment() for c in coins}
    assert first.commitment() in tried
    assert second.commitment() not in tried


def test_each_draw_has_a_nonce_of_its_own() -> None:
    drawn = [draw_canaries(IMAGES, randomness=SecureRandomness()) for _ in range(8)]
    assert len({c.nonce for c in drawn}) == 8
    assert len({c.commitment() for c in drawn}) == 8


def test_coins_are_fair_and_independent() -> None:
    flips = 4000
    blank = np.zeros((flips, 1, 1, 1), dtype=np.float32)
    included = draw_canaries(blank, randomness=SeededRandomnessForTests(3)).included
    least, most = stats.binom.interval(1 - 1e-6, flips, 0.5)
    assert least <= included.sum() <= most
    least, most = stats.binom.interval(1 - 1e-6, flips - 1, 0.5)
    assert least <= (included[1:] == included[:-1]).sum() <= most
    again = draw_canaries(blank, randomness=SeededRandomnessForTests(4)).included
    least, most = stats.binom.interval(1 - 1e-6, flips, 0.5)
    assert least <= (included == again).sum() <= most


def test_coins_do_not_depend_on_the_images() -> None:
    one, other = (
        draw_canaries(images, randomness=SeededRandomnessForTests(0)) for images in (IMAGES, np.zeros_like(IMAGES))
    )
    np.testing.assert_array_equal(one.included, other.included)
    assert one.nonce == other.nonce


def test_a_set_cannot_be_changed_and_does_not_show_its_secrets() -> None:
    images = IMAGES.copy()
    kept = canaries(images=images)
    before = kept.commitment()
    images[0] = 0
    assert kept.commitment() == before
    for array in (kept.images, kept.included):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        kept.nonce = bytes(NONCE_BYTES)  # type: ignore[misc]
    assert repr(kept) == "CanarySet()"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": IMAGES.astype(np.float64)}, "images"),
        ({"images": IMAGES.tolist()}, "images"),
        ({"images": IMAGES[:, 0]}, "images"),
        ({"images": np.repeat(IMAGES, 2, axis=1)}, "images"),
        ({"images": IMAGES[:0], "included": np.zeros(0, dtype=np.bool_)}, "images"),
        ({"images": np.where(IMAGES.max() == IMAGES, np.float32(np.nan), IMAGES)}, "not finite"),
        ({"images": np.where(IMAGES.max() == IMAGES, np.float32(np.inf), IMAGES)}, "not finite"),
        ({"included": np.array([1, 0, 1, 1, 0, 0])}, "included"),
        ({"included": [True, False, True, True, False, False]}, "included"),
        ({"included": np.array([True, False, True, True, False])}, "included"),
        ({"included": np.ones((6, 1), dtype=np.bool_)}, "included"),
        ({"nonce": bytes(NONCE_BYTES - 1)}, "nonce"),
        ({"nonce": "0" * NONCE_BYTES}, "nonce"),
    ],
)
def test_impossible_sets_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(Unattackable, match=named):
        canaries(**changes)


def test_refusals_do_not_show_the_nonce() -> None:
    with pytest.raises(Unattackable) as refused:
        canaries(nonce=b"a secret that is too short")
    assert "secret" not in str(refused.value)


def test_draw_refuses_what_is_no_image() -> None:
    with pytest.raises(Unattackable, match="images"):
        draw_canaries(IMAGES.astype(np.float64), randomness=SeededRandomnessForTests(0))


def test_save_and_load(tmp_path: Path) -> None:
    kept = draw_canaries(IMAGES, randomness=SecureRandomness())
    kept.save(tmp_path / "canaries")
    loaded = load_canaries(tmp_path / "canaries")
    np.testing.assert_array_equal(loaded.images, kept.images)
    np.testing.assert_array_equal(loaded.included, kept.included)
    assert loaded.nonce == kept.nonce
    loaded.check(kept.commitment())
    public = json.loads((tmp_path / "canaries" / COMMITMENT_FILE).read_text())
    assert public == {"canaries": 6, "commitment": kept.commitment()}


def test_only_the_owner_reads_the_secret_part(tmp_path: Path) -> None:
    kept = canaries()
    kept.save(tmp_path)
    assert stat.S_IMODE((tmp_path / SECRET_FILE).stat().st_mode) == 0o600
    for name in (IMAGES_FILE, COMMITMENT_FILE):
        content = (tmp_path / name).read_bytes()
        assert kept.nonce not in content
        assert kept.nonce.hex().encode() not in content
        assert b"included" not in content


@pytest.mark.parametrize("name", [IMAGES_FILE, SECRET_FILE, COMMITMENT_FILE])
def test_committed_canaries_are_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("kept")
    with pytest.raises(BrokenCommitment, match="new folder"):
        canaries().save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "kept"


def flip_first_coin(folder: Path) -> None:
    secret = json.loads((folder / SECRET_FILE).read_text())
    secret["included"][0] = 1 - secret["included"][0]
    (folder / SECRET_FILE).write_text(json.dumps(secret))


def other_images(folder: Path) -> None:
    np.save(folder / IMAGES_FILE, IMAGES[::-1])


def pickled_images(folder: Path) -> None:
    (folder / IMAGES_FILE).write_bytes(pickle.dumps(IMAGES))


def objects_in_images(folder: Path) -> None:
    np.save(folder / IMAGES_FILE, np.array([IMAGES, None], dtype=object), allow_pickle=True)


def write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    "damage",
    [
        flip_first_coin,
        other_images,
        pickled_images,
        objects_in_images,
        lambda folder: (folder / SECRET_FILE).unlink(),
        lambda folder: (folder / IMAGES_FILE).write_bytes((folder / IMAGES_FILE).read_bytes()[:-4]),
        write(SECRET_FILE, "{"),
        write(SECRET_FILE, "[]"),
        write(SECRET_FILE, '{"included": [1, 0, 1, 1, 0, 0], "nonce": 3}'),
        write(SECRET_FILE, json.dumps({"included": [2, 0, 1, 1, 0, 0], "nonce": bytes(range(32)).hex()})),
        write(SECRET_FILE, json.dumps({"included": [True, 0, 1, 1, 0, 0], "nonce": bytes(range(32)).hex()})),
        write(SECRET_FILE, json.dumps({"included": [1, 0, 1, 1, 0], "nonce": bytes(range(32)).hex()})),
        write(COMMITMENT_FILE, '{"canaries": 6}'),
        write(COMMITMENT_FILE, json.dumps({"canaries": 6, "commitment": "0" * 64})),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, damage: Any) -> None:
    canaries().save(tmp_path)
    load_canaries(tmp_path)
    damage(tmp_path)
    with pytest.raises(BrokenCommitment):
        load_canaries(tmp_path)


@pytest.mark.parametrize(("count", "shape"), [(40, (32, 32)), (30, (8, 16, 16)), (12, (8, 8))])
def test_patterns_are_orthogonal_in_range_and_within_the_band(count: int, shape: tuple[int, ...]) -> None:
    images = random_canaries(count, shape, seed=5)
    assert images.shape == (count, 1, *shape)
    assert images.dtype == np.float32
    np.testing.assert_allclose(np.abs(images).max(axis=tuple(range(1, images.ndim))), 1)
    flat = images.reshape(count, -1).astype(np.float64)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    assert np.abs(unit @ unit.T - np.eye(count)).max() < 1e-6
    assert flat.std() > 0.2  # as loud as a body, not one bright pixel
    power = np.abs(np.fft.fftn(images[:, 0].astype(np.float64), axes=tuple(range(1, images.ndim - 1)))) ** 2
    frequency = np.linalg.norm(np.stack(np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij")), axis=0)
    outside = (frequency < LOWEST_FREQUENCY) | (frequency > HIGHEST_FREQUENCY)
    assert power[:, outside].sum() < 1e-9 * power.sum()


def test_patterns_are_far_from_a_body() -> None:
    rows, columns = np.mgrid[-1:1:64j, -1:1:64j]
    body = np.full((64, 64), -1.0)  # air, an ellipse of tissue, two lungs and a spine
    body[(rows / 0.6) ** 2 + (columns / 0.85) ** 2 < 1] = 0.1
    for centre in (-0.4, 0.4):
        body[(rows / 0.4) ** 2 + ((columns - centre) / 0.25) ** 2 < 1] = -0.8
    body[(rows - 0.4) ** 2 + columns**2 < 0.01] = 1.0
    flat = random_canaries(50, (64, 64), seed=2).reshape(50, -1)
    cosine = np.abs(flat @ body.ravel()) / np.linalg.norm(flat, axis=1) / np.linalg.norm(body)
    assert cosine.max() < 0.05


def test_patterns_follow_the_seed() -> None:
    np.testing.assert_array_equal(random_canaries(3, (16, 16), seed=7), random_canaries(3, (16, 16), seed=7))
    first, second = (random_canaries(3, (32, 32), seed=seed).reshape(3, -1) for seed in (7, 8))
    cosine = first @ second.T / np.linalg.norm(first, axis=1)[:, None] / np.linalg.norm(second, axis=1)
    assert np.abs(cosine).max() < 0.4  # 188 degrees of freedom: 0.07 in root mean square


@pytest.mark.parametrize(
    ("count", "shape", "named"),
    [
        (0, (16, 16), "count"),
        (True, (16, 16), "count"),
        (2.0, (16, 16), "count"),
        (2, (16,), "shape"),
        (2, (16, 16, 16, 16), "shape"),
        (2, (16, 0), "shape"),
        (2, (16, 16.0), "shape"),
        (1, (2, 2), "0 orthogonal patterns"),
        (13, (8, 8), "12 orthogonal patterns"),
    ],
)
def test_impossible_patterns_are_refused(count: Any, shape: Any, named: str) -> None:
    with pytest.raises(Unattackable, match=named):
        random_canaries(count, shape, seed=0)
