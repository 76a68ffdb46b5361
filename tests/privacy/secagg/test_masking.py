from __future__ import annotations

import random
import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from federation import SESSION, Sent, aggregate, client, names
from scipy import stats

from privacy.secagg.encoding import Block, Encoding, Vector
from privacy.secagg.keys import self_mask
from privacy.secagg.masking import CipherName, add_masks
from privacy.secagg.messages import Advert
from privacy.secagg.rules import Rules

SIZE = 200_003
SIGNIFICANCE = 1e-6
STREAMS = 2**17


def looks_uniform(vector: Vector) -> bool:
    """Bytes at each place of a word, runs of words, and correlation of neighbours: none more unlikely than 1e-6."""
    words = np.ascontiguousarray(vector)
    by_place = words.view(np.uint8).reshape(len(words), words.itemsize)
    chances = [stats.chisquare(np.bincount(by_place[:, i], minlength=256)).pvalue for i in range(words.itemsize)]
    chances += [1 - chance for chance in chances]  # too even is no chance either
    reals = words.astype(np.float64) / 2.0 ** (8 * words.itemsize) - 0.5
    correlation = np.mean(reals[:-1] * reals[1:]) * 12  # of neighbours; the variance of a uniform number is 1/12
    chances.append(2 * stats.norm.sf(abs(correlation) * np.sqrt(len(reals) - 1)))
    chances.append(stats.kstest(reals + 0.5, "uniform").pvalue)
    return min(chances) > SIGNIFICANCE


def unrelated(one: Vector, other: Vector) -> bool:
    """Neither their difference nor their correlation shows that they have anything in common."""
    a, b = (v.astype(np.float64) for v in (one, other))
    correlation = abs(np.corrcoef(a, b)[0, 1]) * np.sqrt(len(a))
    return looks_uniform(one - other) and 2 * stats.norm.sf(correlation) > SIGNIFICANCE


def congruential(seed: int, size: int) -> Vector:
    """A linear congruential generator modulo 2^32: its low bits repeat after a few numbers."""
    out, state = np.empty(size, np.uint32), seed
    for i in range(size):
        state = (1_103_515_245 * state + 12_345) % 2**32
        out[i] = state
    return out


def alike(beginnings: Iterable[bytes]) -> int:
    """Streams that begin like another one; of 2^17 with 32-bit seeds two are expected, with 256-bit keys none."""
    count = Counter(beginnings)
    return sum(count.values()) - len(count)


def encoded(seed: int, parties: int = 3) -> Vector:
    encoding = Encoding(blocks=(Block(name="a", shape=(SIZE - 1,), bound=1.0),), parties=parties)
    values = np.zeros(SIZE - 1) if seed < 0 else np.random.default_rng(seed).normal(0, 0.01, SIZE - 1)
    return encoding.encode({"a": values}, weight=1.0)


def masked(vector: Vector) -> Vector:
    """Under two masks with keys of the operating system."""
    out = vector.copy()
    add_masks(out, [(secrets.token_bytes(32), "aes", 1), (secrets.token_bytes(32), "aes", -1)])
    return out


@pytest.mark.parametrize("cipher", ["aes", "chacha"])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_blocks_give_the_cipher_s_own_stream(cipher: CipherName, dtype: type) -> None:
    key = bytes(range(32))
    size = 70_001
    algorithm = (
        Cipher(algorithms.AES256(key), modes.CTR(bytes(16)))
        if cipher == "aes"
        else Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None)
    )
    wanted = np.frombuffer(algorithm.encryptor().update(bytes(size * np.dtype(dtype).itemsize)), dtype)
    vector = np.zeros(size, dtype)
    add_masks(vector, [(key, cipher, 1)])
    np.testing.assert_array_equal(vector, wanted)
    add_masks(vector, [(key, cipher, 1), (key, cipher, -1), (key, cipher, -1)])
    assert not vector.any()


def test_masked_uploads_of_zeros_and_of_an_update_look_alike() -> None:
    for seed in (-1, 1, 2):
        assert looks_uniform(masked(encoded(seed)))
        assert not looks_uniform(encoded(seed)), "a test that everything passes says nothing"


def test_uploads_of_a_real_session_look_uniform_and_the_two_of_one_vector_have_nothing_in_common() -> None:
    parties = names(3)
    vectors = dict.fromkeys(parties, encoded(1))
    first, second = Sent(), Sent()
    aggregate(vectors, rules=Rules(min_survivors=2), sent=first)
    aggregate(vectors, rules=Rules(min_survivors=2), sent=second, session=replace(SESSION, nonce="again"))
    for party in parties:
        assert looks_uniform(first.masked[party])
        assert unrelated(first.masked[party], second.masked[party])
    assert unrelated(first.masked[parties[0]], first.masked[parties[1]])
    assert not unrelated(first.masked[parties[0]], first.masked[parties[0]] + encoded(1)), "a mask used twice is seen"


def test_a_weak_generator_fails_the_same_test() -> None:
    assert not looks_uniform(encoded(-1) + congruential(12_345, SIZE))


def test_no_two_sessions_share_a_stream_and_32_bit_seeds_do() -> None:
    """A good generator with a short seed looks uniform, and repeats itself all the same."""
    seeds = random.Random(0)
    weak = (random.Random(seeds.getrandbits(32)).getrandbits(64).to_bytes(8, "big") for _ in range(STREAMS))
    assert alike(weak) > 0
    owner, binding = identity_advert(), secrets.token_bytes(32)

    def beginning() -> bytes:
        vector = np.zeros(2, np.uint32)
        add_masks(vector, [self_mask(secrets.token_bytes(32), binding=binding, owner=owner)])
        return vector.tobytes()

    assert alike(beginning() for _ in range(STREAMS)) == 0


def identity_advert() -> Advert:
    return client("site-01", names(2), rules=Rules(min_survivors=2)).advert
