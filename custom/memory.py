"""How many bytes the tensors hold that are alive, and the most that they held."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of all tensors that operations inside this context take or give, until they are freed.

    Views and operations in place share a storage and count once. Under ``FakeTensorMode``, entered outside of this
    one, nothing is allocated and the figures are the same. What an operation allocates for itself is not seen.

    Attributes:
        current: bytes alive.
        peak: the most that there were.
        convolution: the most bytes that the tensors of one convolution hold, or of its backward pass: where there is a
            library for it, it holds them a second time, in a layout of its own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self.convolution = 0
        self._sizes: dict[int, int] = {}  # by the storage's address

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._see(tensor)
        if func._overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
            self.convolution = max(self.convolution, sum(tensor.nbytes for tensor in tensors))
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._sizes:
            self._sizes[address] = storage.nbytes()
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.current -= self._sizes.pop(address)
