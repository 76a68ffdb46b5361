"""CKKS contexts of a federation: the sites share one secret key, the server has none.

A provisioned federation gets them from NVFlare's HEBuilder, simulated sites from ``fedct simulator-keys``. All that is
done with a ciphertext is addition, so no relinearisation or rotation key is made.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from custom.atomic import write_atomically
from custom.strict import ConfigError, require

CLIENT_CONTEXT = "client_context.tenseal"
SERVER_CONTEXT = "server_context.tenseal"

# 128-bit security by the tables of homomorphicencryption.org (at most 218 bits of modulus at this degree). The modulus
# of a ciphertext is the first two primes, 120 bits; the scale leaves 2³⁹ for the size of a sum, and puts the error of a
# ciphertext near 2⁻⁷², far below the noise that hides it when a sum is opened (custom.he_packing). NVFlare's defaults
# (60, 40, 40 and a scale of 2⁴⁰) leave no room for that noise.
POLY_MODULUS_DEGREE = 8192
COEFF_MOD_BIT_SIZES = (60, 60, 60)
SCALE_BITS = 80

REMEDY = (
    "in the simulator fedct simulator-keys (--force replaces what is there); in a provisioned federation HEBuilder "
    f"with args {{poly_modulus_degree: {POLY_MODULUS_DEGREE}, coeff_mod_bit_sizes: {list(COEFF_MOD_BIT_SIZES)}, "
    f"scale_bits: {SCALE_BITS}}} in project.yml"
)


def tenseal() -> ModuleType:
    """TenSEAL, which only encrypted jobs need.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("tenseal")
    except ImportError as error:
        raise ConfigError("tenseal = not installed: pip install 'fedct[he]'") from error


def new_context() -> Any:
    """A fresh TenSEAL context with a secret key."""
    ts = tenseal()
    context = ts.context(
        ts.SCHEME_TYPE.CKKS,
        poly_modulus_degree=POLY_MODULUS_DEGREE,
        coeff_mod_bit_sizes=list(COEFF_MOD_BIT_SIZES),
        encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC,
    )
    context.global_scale = 2.0**SCALE_BITS
    return context


def serialized(context: Any, *, secret_key: bool) -> bytes:
    """A context as bytes, with the secret key or without any key."""
    content: bytes = context.serialize(
        save_public_key=False, save_secret_key=secret_key, save_galois_keys=False, save_relin_keys=False
    )
    return content


def make_contexts(startup: Path, *, force: bool = False) -> list[Path]:
    """Write both contexts of one new key into a folder that NVFlare reads at its start.

    Args:
        startup: the simulator's ``<workspace>/startup``, which is copied to the server and every site.
        force: replace contexts that are there.

    Returns:
        The files written; none if both are there already.

    Raises:
        ConfigError: only one of the two is there: they belong together.
    """
    files = [startup / CLIENT_CONTEXT, startup / SERVER_CONTEXT]
    there = [file.name for file in files if file.exists()]
    if not force and len(there) == len(files):
        return []
    remedy = f"its counterpart in {startup} is missing; make both anew with --force"
    require(force or not there, argument="contexts", value=there, remedy=remedy)
    context = new_context()
    for file, secret in zip(files, (True, False), strict=True):
        write_atomically(file, serialized(context, secret_key=secret))  # readable by its owner only
    return files


def check_context(context: Any, name: str, *, secret_key: bool) -> None:
    """Accept a context that this job can use safely.

    Args:
        context: TenSEAL's.
        name: its file, for errors.
        secret_key: whether it must hold one; otherwise it must not.

    Raises:
        ConfigError: a secret key where none may be, none where one must be, or too small a scale.
    """
    require(
        bool(context.is_private()) == secret_key,
        argument=name,
        value="without a secret key" if secret_key else "with the sites' secret key",
        remedy=f"give the sites {CLIENT_CONTEXT} and the server {SERVER_CONTEXT}; {REMEDY}",
    )
    scale = getattr(context, "global_scale", None)
    require(scale == 2.0**SCALE_BITS, argument=f"{name} scale", value=scale, remedy=f"must be 2^{SCALE_BITS}; {REMEDY}")
