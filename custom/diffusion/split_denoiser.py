"""Two denoisers that share the timesteps: one for low noise, one for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOW_NOISE = "low_noise."  # of the names of the first one's tensors; the other's are its own


class SplitDenoiser(nn.Module):
    """Called like either of them: ``network(x=[B, C, *spatial], timesteps=[B])`` → [B, C, *spatial].

    Args:
        low_noise: for the timesteps below ``below``.
        high_noise: for the others.
        below: first timestep of the others.
    """

    def __init__(self, *, low_noise: nn.Module, high_noise: nn.Module, below: int) -> None:
        super().__init__()
        for name, child in high_noise.named_children():
            self.add_module(name, child)
        self.low_noise = low_noise
        self._high_noise = (high_noise,)  # a tuple, so that its tensors bear their own names only
        self._below = below

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Each image through the denoiser of its timestep."""
        (high_noise,), low = self._high_noise, timesteps < self._below
        if torch._C._functorch.is_functorch_wrapped_tensor(timesteps):  # under vmap no image can be left out
            return torch.where(
                low.view(-1, *(1,) * (x.ndim - 1)),
                self.low_noise(x=x, timesteps=timesteps),
                high_noise(x=x, timesteps=timesteps),
            )
        for network, chosen in ((self.low_noise, low), (high_noise, ~low)):
            if chosen.all():
                alone: Tensor = network(x=x, timesteps=timesteps)
                return alone
        below = self.low_noise(x=x[low], timesteps=timesteps[low])
        out = torch.empty_like(x, dtype=below.dtype)
        out[low], out[~low] = below, high_noise(x=x[~low], timesteps=timesteps[~low])
        return out
