from __future__ import annotations

from pathlib import Path

import pytest
import torch

from custom.device import EVALUATED_AT_ONCE, fast_bfloat16, fast_cipher, images_at_once, mixed_precision
from custom.site_file import Precision

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_arithmetic_is_as_precise_as_was_asked(precision: Precision, dtype: torch.dtype) -> None:
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with mixed_precision(CPU, precision):
        assert layer(x).dtype == dtype
    assert layer(x).dtype == torch.float32, "outside of it nothing changes"


def test_the_default_on_cuda_is_bfloat16() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = torch.ones(4, 4, device="cuda")
    with mixed_precision(x.device):
        assert (x @ x).dtype == torch.bfloat16


def test_bfloat16_pays_on_any_cuda_device() -> None:
    assert fast_bfloat16(torch.device("cuda"))
    assert isinstance(fast_bfloat16(CPU), bool)


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 256, 256), (1, 96, 96, 96), (4, 24, 24, 24), (1, 512, 512, 512)])
def test_what_is_evaluated_at_once_is_bounded(shape: tuple[int, ...]) -> None:
    count, pixels = images_at_once(shape), torch.Size(shape[1:]).numel()
    assert count >= 1
    assert count == 1 or count * pixels <= EVALUATED_AT_ONCE < (count + 1) * pixels
