"""The server's own look at an update: the model's loss with it, on public images, in bands of timesteps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from custom.config import ExperimentConfig
from custom.device import images_at_once
from custom.diffusion.objective import Objective
from custom.latents import encoded
from custom.stages import model_autoencoder, model_shapes, stage_objective, stage_of
from custom.strict import require

BANDS = 4  # an update that breaks only the last steps of sampling does not show in a mean over all timesteps
IMAGES = 32  # in a band
BATCH = 16
SEED = 20_180_301  # the same images, noise and timesteps before and after, so that the losses can be compared


class ReferenceCheck:
    """Refuses an update with which the global model's loss gets worse in a band of timesteps, or is not finite.

    Before the first rounds the loss is near 1, what a network that predicts 0 has, and an honest update only lowers it:
    none is refused. A first update that does harm is refused all the same.

    The check sees what does harm on the server's images: not a backdoor that leaves these as they are.

    Args:
        objective: with the global weights in its network, which is put into eval mode and otherwise left as it is.
        prefix: of the tensors' names in messages.
        images: float32 [N, C, *spatial], what the objective is trained on; as many as :data:`IMAGES` of them, evenly
            spread, are used in every band.
        device: where the network is.
        tolerance: by what share of itself a band's loss may grow.

    Raises:
        ValueError: no image.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        prefix: str,
        images: NDArray[np.float32],
        device: torch.device,
        tolerance: float,
    ) -> None:
        if not len(images):
            raise ValueError("reference images = 0: give the server at least one, or leave out the reference check")
        self._objective = objective
        self._tolerance = tolerance
        self._device = device
        objective.network.eval()
        self._weights = {prefix + name: tensor.detach() for name, tensor in objective.network.named_parameters()}
        self._prefix = prefix
        rows = np.linspace(0, len(images) - 1, min(IMAGES, len(images))).round().astype(int)
        self._x0 = torch.from_numpy(images[rows]).to(device)
        bands = min(BANDS, objective.timesteps)
        generator = torch.Generator().manual_seed(SEED)
        noise_shape = (bands, len(rows), *objective.noise_shape(images.shape[1:]))
        self._noise = torch.randn(noise_shape, generator=generator).to(device)
        spread = (torch.arange(len(rows)) + 0.5) / len(rows)
        mixed = torch.stack([spread[torch.randperm(len(rows), generator=generator)] + band for band in range(bands)])
        self._timesteps = (mixed * objective.timesteps / bands).long().to(device)  # [bands, images]
        self._before = self._losses(self._weights)

    @classmethod
    def of_round(
        cls,
        images: NDArray[np.float32] | None,
        weights: Mapping[str, Tensor],
        experiment: ExperimentConfig,
        round_number: int,
        device: torch.device,
    ) -> ReferenceCheck | None:
        """The check of one round's updates; None in a job that asks for none.

        Args:
            images: the server's, float32 [N, 1, *spatial] in [-1, 1]; None where it has none.
            weights: the global model's at the beginning of the round, or those of them that its stage needs, by name;
                what is beside them is ignored.
            experiment: whose round it is.
            round_number: of the run.
            device: where to compute.

        Raises:
            ConfigError: a job that asks for a check, and no images.
            ValueError: no image among them.
        """
        robust = experiment.federation.robust
        if robust is None or not robust.reference:
            return None
        remedy = "missing; name public scans in the server's table of the site file"
        require(images is not None, argument="server.reference", value=None, remedy=remedy)
        assert images is not None  # noqa: S101 - checked above
        stage = stage_of(experiment, round_number)
        known = {name: weights[name] for name in model_shapes(experiment) if name in weights}
        objective = stage_objective(experiment, stage, known, device)
        if experiment.autoencoder is not None and stage.name == "denoiser" and len(images):
            images = encoded(model_autoencoder(experiment, known), images, device)
        tolerance = robust.reference_tolerance
        return cls(objective, prefix=stage.prefix, images=images, device=device, tolerance=tolerance)

    def __call__(self, update: Mapping[str, NDArray[np.float32]]) -> str | None:
        """Why an update is refused, or None.

        Args:
            update: difference by name; tensors that it leaves out stay as they are, names that the stage does not
                train are ignored.
        """
        moved = {
            name: weight + torch.from_numpy(update[name]).to(self._device)
            for name, weight in self._weights.items()
            if name in update
        }
        after = self._losses({**self._weights, **moved})
        for band, (now, before) in enumerate(zip(after, self._before, strict=True)):
            # Whatever cannot be compared is refused, too.
            if not (math.isfinite(now) and now <= (1 + self._tolerance) * before):
                low, high = band / len(after), (band + 1) / len(after)
                ratio = now / before if before else math.inf
                return (
                    f"reference loss of timesteps {low:g} T to {high:g} T: {ratio:.3g} times what it was, "
                    f"over 1 + federation.robust.reference_tolerance = {1 + self._tolerance:g}"
                )
        return None

    @torch.no_grad()
    def _losses(self, weights: Mapping[str, Tensor]) -> list[float]:
        """Mean loss in each band with these weights."""
        network = self._objective.network
        parameters = {name.removeprefix(self._prefix): tensor for name, tensor in weights.items()}

        def call(**inputs: Tensor) -> object:
            return functional_call(network, parameters, args=(), kwargs=inputs)

        batch = min(BATCH, images_at_once(self._x0.shape[1:]))
        losses = []
        for noise, timesteps in zip(self._noise, self._timesteps, strict=True):
            pieces = [
                self._objective.loss(call, *(t[first : first + batch] for t in (self._x0, noise, timesteps)))
                for first in range(0, len(timesteps), batch)
            ]
            losses.append(float(torch.cat(pieces).mean()))
        return losses
