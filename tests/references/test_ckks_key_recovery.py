"""Why noise lies over an opened sum: an exact decryption betrays the key (Li and Micciancio 2021, eprint 2020/1533).

The server holds the ciphertext (c0, c1) of the sum. If it learns the decryption c0 + c1·s mod q exactly, s solves a
linear equation. TenSEAL returns real parts, so it takes two ciphertexts: at a root ζ of the ring,
c1(ζ)·s(ζ) + c1(ζ⁻¹)·s(ζ⁻¹) = r(ζ) - c0(ζ) - c0(ζ⁻¹) with r twice the real part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from custom.he_contexts import new_context
from custom.he_packing import FLOOD_STD
from privacy.rng import SecureRandomness, with_gaussian_noise

ts = pytest.importorskip("tenseal")

DEGREE, SLOTS = 8192, 4096
Numbers = NDArray[np.float64]


@pytest.fixture(scope="module")
def nvflares() -> Any:
    """A context of NVFlare's HEBuilder with its defaults."""
    made = ts.context(
        ts.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=[60, 40, 40], encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC
    )
    made.global_scale = 2.0**40
    return made


def recovered(context: Any, total: Any, opened: Numbers) -> list[int]:
    """The secret key at every root modulo the first prime, in SEAL's order, as the server would compute it.

    Args:
        context: for its public parameters.
        total: the encrypted sum, of two ciphertexts.
        opened: its decryption [2 · SLOTS].
    """
    import tenseal.sealapi as seal

    parameters = context.seal_context().data
    prime = parameters.first_context_data().parms().coeff_modulus()[0].value()
    encoder, equations = seal.CKKSEncoder(parameters), []
    for part, slots in zip(total.ciphertext(), opened.reshape(2, SLOTS), strict=True):
        twice = seal.Plaintext()
        encoder.encode((2 * slots).tolist(), context.global_scale, twice)
        primes = part.coeff_modulus_size()
        c0 = [part[i] for i in range(DEGREE)]
        c1 = [part[primes * DEGREE + i] for i in range(DEGREE)]
        right = [
            (twice[i] - c0[i] - c0[DEGREE - 1 - i]) % prime for i in range(DEGREE)
        ]  # ζ⁻¹ stands at the mirrored place
        equations.append((c1, right))
    (a, r), (b, t) = equations
    key = []
    for i in range(DEGREE):
        j = DEGREE - 1 - i
        determinant = (a[i] * b[j] - a[j] * b[i]) % prime
        key.append((r[i] * b[j] - t[i] * a[j]) * pow(determinant, -1, prime) % prime)
    return key


def share_of_key(context: Any, told: Callable[[Numbers], Numbers], *, size: float) -> float:
    """The part of the true key's values that the server finds.

    Args:
        context: of the sites.
        told: what the server is told of a decryption.
        size: standard deviation of an update's numbers.
    """
    rng = np.random.default_rng(0)
    first, *others = (ts.ckks_vector(context, rng.normal(0, size, 2 * SLOTS)) for _ in range(3))
    total = first + others[0] + others[1]
    found = recovered(context, total, told(np.asarray(total.decrypt())))
    secret = context.secret_key().data.data()
    return sum(found[i] == secret[i] for i in range(DEGREE)) / DEGREE


def exact(numbers: Numbers) -> Numbers:
    return numbers


def in_float32(numbers: Numbers) -> Numbers:
    return numbers.astype(np.float32).astype(np.float64)


def flooded(numbers: Numbers) -> Numbers:
    noisy = with_gaussian_noise(torch.from_numpy(numbers), std=FLOOD_STD, randomness=SecureRandomness())
    return in_float32(noisy.numpy())


@pytest.mark.parametrize(("told", "size"), [(exact, 1e-2), (in_float32, 1e-4)])
def test_with_nvflares_defaults_the_server_finds_the_sites_key(
    told: Callable[[Numbers], Numbers], size: float, nvflares: Any
) -> None:
    assert share_of_key(nvflares, told, size=size) == 1
    assert share_of_key(nvflares, flooded, size=size) < 0.01


def test_with_our_parameters_it_finds_the_key_in_the_layers_that_are_not_trained() -> None:
    """Their sum is the error of the ciphertext and nothing else; float32 tells it exactly, however fine the scale."""
    context = new_context()
    assert share_of_key(context, in_float32, size=0.0) == 1
    assert share_of_key(context, flooded, size=0.0) < 0.01
