"""What to compute on."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from custom.site_file import HardwareConfig
from privacy.secagg.masking import CipherName


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


def mixed_precision(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 autocast on CUDA; float32 on the CPU, where bfloat16 was ten times slower."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
