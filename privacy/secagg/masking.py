"""Key streams as masks: AES-256 in counter mode, or ChaCha20 where AES is slow, added to a vector block by block.

A key serves one stream of one session and is never used again, so a counter that starts at zero is safe. Adding is
modulo 2^16 or 2^32: a uniform mask makes the sum uniform, whatever was in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from privacy.secagg.encoding import Vector

CipherName = Literal["aes", "chacha"]

# Zeros, stream and the part of the vector stay in the cache together; and ``update_into`` holds the interpreter's
# lock: in blocks, heartbeats of other threads get through.
_BLOCK_BYTES = 1 << 16
_ZEROS = memoryview(bytes(_BLOCK_BYTES))

Mask = tuple[bytes, CipherName, int]  # key of 32 bytes, its cipher, +1 or -1


def add_masks(vector: Vector, masks: Iterable[Mask]) -> None:
    """Add or subtract the streams of the keys, in place; memory beyond the vector is one block.

    Args:
        vector: uint16 or uint32, contiguous.
        masks: key, cipher, sign.
    """
    streams = [(_stream(key, cipher), sign) for key, cipher, sign in masks]
    mask = np.empty(_BLOCK_BYTES, np.uint8)
    per_block = _BLOCK_BYTES // vector.itemsize
    for start in range(0, len(vector), per_block):
        part = vector[start : start + per_block]
        room = mask[: part.nbytes]
        words = room.view(vector.dtype)
        for stream, sign in streams:
            stream.update_into(_ZEROS[: part.nbytes], room.data)
            if sign > 0:
                np.add(part, words, out=part)
            else:
                np.subtract(part, words, out=part)


def _stream(key: bytes, cipher: CipherName) -> Any:
    if cipher == "aes":
        return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
