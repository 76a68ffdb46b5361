"""The blocks of an experiment that say what is trained, how, and what is drawn from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from custom.strict import require

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,80}")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """MONAI DiffusionModelUNet. One entry per resolution level in ``channels`` and ``attention``.

    Attributes:
        channels: feature channels of each level, each a multiple of ``norm_groups``.
        attention: whether the level has self-attention.
        res_blocks: residual blocks per level.
        norm_groups: groups of every group normalisation.
        head_channels: channels per attention head.
    """

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    res_blocks: int = 1
    norm_groups: int = 8
    head_channels: int = 32

    def __post_init__(self) -> None:
        require(
            len(self.channels) >= 2,
            argument="network.channels",
            value=self.channels,
            remedy="give at least two levels",
        )
        require(
            len(self.attention) == len(self.channels),
            argument="network.attention",
            value=self.attention,
            remedy=f"give {len(self.channels)} booleans, one per level",
        )
        require(
            self.res_blocks >= 1,
            argument="network.res_blocks",
            value=self.res_blocks,
            remedy="give at least 1",
        )
        require(
            self.norm_groups >= 1 and all(c > 0 and c % self.norm_groups == 0 for c in self.channels),
            argument="network.channels",
            value=self.channels,
            remedy=f"give positive multiples of norm_groups = {self.norm_groups}",
        )
        require(
            self.head_channels >= 1
            and all(c % self.head_channels == 0 for c, a in zip(self.channels, self.attention, strict=True) if a),
            argument="network.head_channels",
            value=self.head_channels,
            remedy="give a divisor of the channels of every level with attention",
        )


PRESETS: Mapping[str, NetworkConfig] = {
    "tiny": NetworkConfig(channels=(16, 32, 64), attention=(False, False, True)),
    "base": NetworkConfig(
        channels=(64, 128, 256, 256),
        attention=(False, False, True, True),
        res_blocks=2,
        norm_groups=32,
        head_channels=64,
    ),
}


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Forward process of Ho et al. 2020 (arXiv:2006.11239) and what the network predicts.

    Attributes:
        timesteps: number of diffusion steps T.
        noise: MONAI's name of the β schedule; ``cosine`` is arXiv:2102.09672, eq. 17.
        prediction: ``epsilon`` (arXiv:2006.11239, eq. 14) or ``v`` (arXiv:2202.00512, app. D).
    """

    timesteps: int = 1000
    noise: Literal["linear_beta", "scaled_linear_beta", "cosine"] = "cosine"
    prediction: Literal["epsilon", "v"] = "v"

    def __post_init__(self) -> None:
        require(
            self.timesteps >= 10,
            argument="schedule.timesteps",
            value=self.timesteps,
            remedy="give at least 10",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One site's work in one round.

    Attributes:
        steps_per_round: gradient steps a site makes in a round; with ``local_epochs``, in a local epoch.
        batch_size: images per step; patients are drawn uniformly, then one of the patient's images. With differential
            privacy there is none: the sampling rate decides.
        learning_rate: peak of the cosine schedule over the whole run (all rounds).
        warmup_steps: steps of linear warm-up at the start of the run.
        weight_decay: AdamW's.
        gradient_clip: bound on the L2 norm of a step's gradient, or None. With differential privacy there is none:
            each patient's gradient is clipped.
        proximal: μ of FedProx (arXiv:1812.06127, eq. 2), which draws a site's weights to the global ones; 0 is FedAvg.
        local_epochs: ``auto``: rounds get longer as the learning rate falls (:meth:`custom.stages.Stage.span`), and the
            run ends once each site has made rounds × steps_per_round steps; None: each is one epoch.
    """

    steps_per_round: int
    batch_size: int | None = None
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    gradient_clip: float | None = None
    proximal: float = 0.0
    local_epochs: Literal["auto"] | None = None

    def __post_init__(self) -> None:
        remedy = "give ≥ 0"
        require(self.proximal >= 0, argument="training.proximal", value=self.proximal, remedy=remedy)
        require(
            self.steps_per_round >= 1,
            argument="training.steps_per_round",
            value=self.steps_per_round,
            remedy="give at least 1",
        )
        require(
            self.batch_size is None or self.batch_size >= 1,
            argument="training.batch_size",
            value=self.batch_size,
            remedy="give at least 1",
        )
        require(
            0 < self.learning_rate < 1,
            argument="training.learning_rate",
            value=self.learning_rate,
            remedy="give a value in (0, 1)",
        )
        require(
            self.warmup_steps >= 0,
            argument="training.warmup_steps",
            value=self.warmup_steps,
            remedy="give ≥ 0",
        )
        require(
            self.weight_decay >= 0,
            argument="training.weight_decay",
            value=self.weight_decay,
            remedy="give ≥ 0",
        )
        require(
            self.gradient_clip is None or self.gradient_clip > 0,
            argument="training.gradient_clip",
            value=self.gradient_clip,
            remedy="give a positive norm",
        )


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """MONAI AutoencoderKL, on whose latents the denoiser then works (latent diffusion, arXiv:2112.10752).

    Either its first rounds train it, or it is a frozen one; exactly one of ``rounds`` and ``frozen`` is given.

    Attributes:
        channels: feature channels of each level, each a multiple of ``norm_groups``; every level after the first halves
            the image.
        latent_channels: channels of the latents.
        rounds: the first so many of ``federation.rounds`` train it, the others the denoiser.
        frozen: name of a model in the server's folder of models whose autoencoder is used as it is.
        training: a site's work in a round that trains it; None for that of the denoiser.
        res_blocks: residual blocks per level.
        norm_groups: groups of every group normalisation.
        kl_weight: of the Kullback-Leibler divergence beside the mean absolute error.
    """

    channels: tuple[int, ...]
    latent_channels: int = 4
    rounds: int = 0
    frozen: str | None = None
    training: TrainingConfig | None = None
    res_blocks: int = 1
    norm_groups: int = 8
    kl_weight: float = 1e-4

    def __post_init__(self) -> None:
        for name, least in (("latent_channels", 1), ("rounds", 0), ("res_blocks", 1), ("norm_groups", 1)):
            value = getattr(self, name)
            require(value >= least, argument=f"autoencoder.{name}", value=value, remedy=f"give at least {least}")
        fits = len(self.channels) >= 2 and all(c > 0 and c % self.norm_groups == 0 for c in self.channels)
        remedy = f"give at least two positive multiples of norm_groups = {self.norm_groups}"
        require(fits, argument="autoencoder.channels", value=self.channels, remedy=remedy)
        require(self.kl_weight >= 0, argument="autoencoder.kl_weight", value=self.kl_weight, remedy="give ≥ 0")
        named = self.frozen is None or NAME.fullmatch(self.frozen) is not None
        remedy = "give the name of a model, not a path"
        require(named, argument="autoencoder.frozen", value=self.frozen, remedy=remedy)
        remedy = "give rounds that train it, or the name of a frozen one; not both"
        require(
            (self.rounds > 0) == (self.frozen is None), argument="autoencoder.rounds", value=self.rounds, remedy=remedy
        )
        unused = self.frozen is not None and self.training is not None
        remedy = "leave it out: a frozen autoencoder is not trained"
        require(not unused, argument="autoencoder.training", value=self.training, remedy=remedy)

    @property
    def architecture(self) -> tuple[object, ...]:
        """What decides the meaning of its weights."""
        return self.channels, self.latent_channels, self.res_blocks, self.norm_groups

    @property
    def shrink(self) -> int:
        """How much smaller the latents' edge is than the image's."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Pictures and figures that the server makes from the global model.

    Attributes:
        sampler: ``ddpm`` (arXiv:2006.11239, alg. 2), ``ddim`` (arXiv:2010.02502, η = 0) or
            ``dpm_solver`` (DPM-Solver++(2M), arXiv:2211.01095), which needs the fewest steps.
        steps: network evaluations per sample.
        grid_every: rounds between two sample grids; 0 makes only the last one.
        grid_images: samples in a grid.
        evaluation_images: samples that the sites compare with their held-out patients after the last round.
    """

    sampler: Literal["ddpm", "ddim", "dpm_solver"] = "dpm_solver"
    steps: int = 20
    grid_every: int = 1
    grid_images: int = 16
    evaluation_images: int = 64

    def __post_init__(self) -> None:
        require(self.steps >= 2, argument="sampling.steps", value=self.steps, remedy="give at least 2")
        require(self.grid_every >= 0, argument="sampling.grid_every", value=self.grid_every, remedy="give ≥ 0")
        require(
            self.grid_images >= 1,
            argument="sampling.grid_images",
            value=self.grid_images,
            remedy="give at least 1",
        )
        require(
            self.evaluation_images >= self.grid_images,
            argument="sampling.evaluation_images",
            value=self.evaluation_images,
            remedy=f"give at least grid_images = {self.grid_images}",
        )
