"""Import MONAI's networks without the optional packages that MONAI loads beside them.

``import monai`` imports every optional package it can find (torchvision, scikit-image, matplotlib, …), none of
which a diffusion U-Net uses. A federated task is often a fresh process, so this start-up is paid once per site and
round: ``tests/benchmarks/training.py`` measures it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

NOT_NEEDED = ("torchvision", "skimage", "matplotlib", "sklearn", "tensorboard", "nibabel", "pandas")


@contextmanager
def light_monai() -> Iterator[None]:
    """Import MONAI inside this block as if the packages of :data:`NOT_NEEDED` were not installed.

    Packages that are loaded already stay visible, and all of them can be imported again after the block.
    """
    hidden = [name for name in NOT_NEEDED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # the import system's own sign for "not there"
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
