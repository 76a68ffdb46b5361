"""What to compute on."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from custom.site_file import HardwareConfig


def use(hardware: HardwareConfig) -> torch.device:
    """Set PyTorch's threads for this process and return the device.

    Raises:
        RuntimeError: CUDA was asked for and is not there.
    """
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    if hardware.device == "cpu" or (hardware.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError('hardware.device = "cuda": no CUDA device here; give "auto" or "cpu" in the site file')
    return torch.device("cuda")


def mixed_precision(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 autocast on CUDA; float32 on the CPU, where bfloat16 was ten times slower."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
