from __future__ import annotations

from pathlib import Path

import pytest

from custom.device import fast_cipher


@pytest.mark.parametrize(
    ("text", "cipher"),
    [
        ("model name\t: x\nflags\t\t: fpu aes avx2\n", "aes"),
        ("Features\t: fp asimd aes pmull\n", "aes"),
        ("flags\t\t: fpu vaes avx2\n", "chacha"),
        ("model name\t: aes\nflags\t\t: fpu\n", "chacha"),
    ],
)
def test_masks_are_made_with_aes_where_the_processor_has_it(tmp_path: Path, text: str, cipher: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert fast_cipher(tmp_path / "cpuinfo") == cipher
    assert fast_cipher(tmp_path / "none") == "aes", "no Linux"
