"""What to compute on."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from custom.site_file import HardwareConfig, Precision
from privacy.secagg.masking import CipherName

# Pixels or voxels that a network evaluates at once, where nothing is learned: 16 slices of 256², one volume of 96³.
EVALUATED_AT_ONCE = 1 << 20


def use(hardware: HardwareConfig) -> torch.device:
    """Set PyTorch's threads and the allocator for this process, and return the device.

    Raises:
        RuntimeError: CUDA was asked for and is not there.
    """
    keep_freed_memory()
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    if hardware.device == "cpu" or (hardware.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError('hardware.device = "cuda": no CUDA device here; give "auto" or "cpu" in the site file')
    return torch.device("cuda")


def keep_freed_memory() -> None:
    """Tell glibc, where it is the allocator, to keep freed memory instead of returning it to the system.

    Otherwise it returns some after a training step and takes it back page by page in the next.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 25)
        mallopt(trim_threshold, (1 << 31) - 1)


def fast_cipher(processor: Path = Path("/proc/cpuinfo")) -> CipherName:
    """The stream cipher that this machine makes masks with: AES where the processor has it, else ChaCha20.

    Args:
        processor: what Linux says of it.
    """
    if not processor.is_file():  # not Linux: current processors have it
        return "aes"
    flags = (line for line in processor.read_text(encoding="utf-8").splitlines() if line[:5] in ("flags", "Featu"))
    return "aes" if any("aes" in line.split() for line in flags) else "chacha"


def mixed_precision(device: torch.device, precision: Precision = "auto") -> AbstractContextManager[None]:
    """Autocast to bfloat16 inside this context, or nothing.

    Args:
        device: where the tensors are.
        precision: ``auto`` is bfloat16 on CUDA and float32 on the CPU: processors without instructions for bfloat16
            are ten times slower with it.
    """
    low = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=low)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16, with which it takes less time as well as less memory."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def images_at_once(shape: Sequence[int]) -> int:
    """How many images of a shape [C, *spatial] a network evaluates at once, where nothing is learned; at least one."""
    return max(1, EVALUATED_AT_ONCE // math.prod(shape[1:]))
