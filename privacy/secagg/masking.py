"""Key streams as masks: AES-256 in counter mode, or ChaCha20 where AES is slow, added to a vector block by block.

A key serves one stream of one session and is never used again, so a counter that starts at zero is safe. Adding is
modulo 2^8, 2^16 or 2^32: a uniform mask makes the sum uniform, whatever was in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from privacy.secagg.encoding import Vector

CipherName = Literal["aes", "chacha"]

# Zeros, stream and the part of the vector stay in the cache together; and ``update_into`` holds the interpreter's
# lock: in blocks, heartbeats of other threads get through.
_BLOCK_BYTES = 1 << 17
_ZEROS = memoryview(bytes(_BLOCK_BYTES))
_FIRST_BYTES = 2 * 16  # of an AES stream: the blocks of counters 0 and 1

Mask = tuple[bytes, CipherName, int]  # key of 32 bytes, its cipher, +1 or -1


def add_masks(vector: Vector, masks: Iterable[Mask]) -> None:
    """Add or subtract the streams of the keys, in place; memory beyond the vector is one block.

    Args:
        vector: uint8, uint16 or uint32, contiguous.
        masks: key, cipher, sign.
    """
    streams = [(*_streams(key, cipher), sign) for key, cipher, sign in masks]
    first_words = _FIRST_BYTES // vector.itemsize
    _add(vector[:first_words], [(first, sign) for first, _, sign in streams])
    _add(vector[first_words:], [(rest, sign) for _, rest, sign in streams])


def _add(vector: Vector, streams: Sequence[tuple[Any, int]]) -> None:
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


def _streams(key: bytes, cipher: CipherName) -> tuple[Any, Any]:
    """What makes the first bytes of a key's stream, and what makes the rest.

    With twelve zero bytes as nonce, GCM encrypts in the same counter mode, from counter 2 on. OpenSSL makes that with
    vector AES where the processor has it, and its plain counter mode does not. The tag is not used.
    """
    if cipher == "aes":
        algorithm = algorithms.AES256(key)
        first = Cipher(algorithm, modes.CTR(bytes(16))).encryptor()
        return first, Cipher(algorithm, modes.GCM(bytes(12))).encryptor()
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return stream, stream
