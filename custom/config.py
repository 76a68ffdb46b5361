"""The one configuration of an experiment: what all sites and the server must agree on.

``experiment.json`` in a job's ``config`` folder is read into :class:`ExperimentConfig` by server and sites alike; its
SHA-256 travels with every task, and a site with another one refuses to train.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from custom.audit_config import AuditConfig
from custom.federation_config import (
    FederationConfig,
    PersonalConfig,
    UpdatesConfig,
)
from custom.privacy_config import PrivacyConfig
from custom.secure_config import SecureAggregationConfig
from custom.strict import ConfigError, build, require
from custom.switch_rules import require_switches
from medical_data.preprocess import PreprocessConfig
from privacy.plan import DPConfig

EXPERIMENT_FILE = "experiment.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,80}")
MOST_ENCRYPTED_NORM = 1000.0  # times a weight of a million and 500 sites is below 2³⁹, see custom.he_contexts


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
        local_epochs: ``auto``: a round has as many local epochs as :mod:`custom.local_epochs` says, few when the model
            is nearly done, and the run ends once each site has made rounds × steps_per_round steps; None: one.
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


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything that server and sites must agree on. Where a site's data lies is not part of it.

    Attributes:
        name: of the experiment; runs and site state lie under it.
        seed: of initial weights, client sampling, every site's local rounds without differential privacy, and the
            samples. The noise of differential privacy has no seed.
        privacy: patient-level differential privacy, or None.
        secure_aggregation: masks under which updates and metrics leave the sites, or None.
        start_from: name of a model in the server's folder of models (see :class:`custom.site_file.ServerConfig`) whose
            weights the run starts with, such as one that was trained on public data; None for fresh weights.
        encryption: ``ckks``: updates leave the sites encrypted and the server adds ciphertexts; None sends them plain.
        audit: attack a finished model, whose preprocess, network and schedule are these; None trains one.
        autoencoder: the network denoises its latents; None: the images themselves.
        updates: rounds that cost fewer bytes; None sends all of it as float32.
        personal: models that the sites keep to themselves; None: the global one only.
    """

    name: str
    seed: int
    preprocess: PreprocessConfig
    network: NetworkConfig
    training: TrainingConfig
    federation: FederationConfig
    privacy: PrivacyConfig | None = None
    secure_aggregation: SecureAggregationConfig | None = None
    start_from: str | None = None
    encryption: Literal["ckks"] | None = None
    audit: AuditConfig | None = None
    autoencoder: AutoencoderConfig | None = None
    updates: UpdatesConfig | None = None
    personal: PersonalConfig | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require(
            NAME.fullmatch(self.name) is not None,
            argument="name",
            value=self.name,
            remedy="give letters, digits, '_' and '-' only: folders are named after it",
        )
        require(0 <= self.seed < 2**32, argument="seed", value=self.seed, remedy="give 0 … 2³²-1")
        halved = len(self.network.channels) - 1
        if self.autoencoder is not None:
            halved += len(self.autoencoder.channels) - 1
            _require_trainable(self, self.autoencoder)
        require(
            self.preprocess.size % 2**halved == 0,
            argument="preprocess.size",
            value=self.preprocess.size,
            remedy=f"give a multiple of {2**halved}: the image is halved {halved}×",
        )
        named = self.start_from is None or NAME.fullmatch(self.start_from) is not None
        require(named, argument="start_from", value=self.start_from, remedy="give the name of a model, not a path")
        if self.privacy is None:
            remedy = "missing; give it"
            require(self.training.batch_size is not None, argument="training.batch_size", value=None, remedy=remedy)
        else:
            _require_private(self)
        if self.encryption is not None:
            _require_encryptable(self)
        require_switches(self)
        if self.audit is not None:
            _require_auditable(self, self.audit)
        require(
            self.sampling.steps <= self.schedule.timesteps,
            argument="sampling.steps",
            value=self.sampling.steps,
            remedy=f"give at most schedule.timesteps = {self.schedule.timesteps}",
        )

    def dp_config(self) -> DPConfig | None:
        """What is wanted of differential privacy, for :func:`privacy.plan.calibrate`; None if nothing is."""
        asked = self.privacy
        if asked is None:
            return None
        return DPConfig(
            delta=asked.delta,
            clip_norm=asked.clip_norm,
            sampling_rate=asked.sampling_rate,
            steps_per_round=self.training.steps_per_round,
            rounds=self.federation.rounds,
            draws_per_patient=asked.draws_per_patient,
            target_epsilon=asked.target_epsilon,
            noise_multiplier=asked.noise_multiplier,
            adaptive_clipping=asked.adaptive_clipping,
            release_noise_multiplier=None if asked.mean_image is None else asked.mean_image.noise_multiplier,
        )

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, [1, *spatial]."""
        return (1, *(self.preprocess.size,) * self.preprocess.spatial_dims)

    @property
    def denoised_shape(self) -> tuple[int, ...]:
        """Shape of what is denoised, [C, *spatial]: an image, or its latents."""
        if self.autoencoder is None:
            return self.image_shape
        edge = self.preprocess.size // self.autoencoder.shrink
        return (self.autoencoder.latent_channels, *(edge,) * self.preprocess.spatial_dims)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_json` gives an equal configuration back."""
        return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(self))))

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON, by which server and sites know that they mean the same."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ExperimentConfig:
        """Build from plain JSON types; ``network`` may be the name of a preset.

        Raises:
            ConfigError: an unknown, missing, mistyped or impossible value, by name.
        """
        preset = values.get("network")
        if isinstance(preset, str):
            remedy = f"give one of {sorted(PRESETS)}, or the fields"
            require(preset in PRESETS, argument="experiment.network", value=preset, remedy=remedy)
            values = {**values, "network": dataclasses.asdict(PRESETS[preset])}
        return build(cls, values, "experiment")

    @classmethod
    def of_job(cls, job: Path) -> ExperimentConfig:
        """The experiment of a job folder, such as ``jobs/ct_ddpm``; raises like :meth:`load`."""
        return cls.load(job / "app" / "config" / EXPERIMENT_FILE)

    @classmethod
    def load(cls, file: Path) -> ExperimentConfig:
        """Read ``experiment.json``.

        Raises:
            ConfigError: no file, no JSON, or a value that cannot be meant.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(f"{file.name} = {type(error).__name__}: give the job a readable JSON file") from error
        return cls.from_json(values)


def _require_private(experiment: ExperimentConfig) -> None:
    """What a job with differential privacy must not ask for, because it would leak or mean nothing."""
    training, federation = experiment.training, experiment.federation
    _require_no_batch(training, "training")
    remedy = 'give "uniform": a patient count would leave the site otherwise'
    require(
        federation.weighting == "uniform", argument="federation.weighting", value=federation.weighting, remedy=remedy
    )
    experiment.dp_config()  # refuses impossible values
    if experiment.privacy is not None and experiment.privacy.dp == "central_secagg":
        masks, steps = experiment.secure_aggregation, training.steps_per_round
        remedy = "missing; give the block: a site's share of the noise is too little by itself"
        require(masks is not None, argument="secure_aggregation", value=None, remedy=remedy)
        bits = 32 if masks is None else masks.ring_bits
        require(bits == 32, argument="secure_aggregation.ring_bits", value=bits, remedy="give 32")
        require(steps == 1, argument="training.steps_per_round", value=steps, remedy="give 1: each step is a sum")


def _require_trainable(experiment: ExperimentConfig, autoencoder: AutoencoderConfig) -> None:
    """What two stages in one run ask for."""
    rounds, privacy, training = experiment.federation.rounds, experiment.privacy, autoencoder.training
    remedy = f"give fewer than federation.rounds = {rounds}: the denoiser needs rounds, too"
    require(autoencoder.rounds < rounds, argument="autoencoder.rounds", value=autoencoder.rounds, remedy=remedy)
    if privacy is None:
        batch = training is None or training.batch_size is not None
        require(batch, argument="autoencoder.training.batch_size", value=None, remedy="missing; give it")
        return
    remedy = "leave it out with an autoencoder: an image warms up no network of latents"
    require(privacy.mean_image is None, argument="privacy.mean_image", value=privacy.mean_image, remedy=remedy)
    if autoencoder.frozen is None:
        remedy = 'give ["*"]: the patterns would have to fit both networks'
        require(privacy.trained == ("*",), argument="privacy.trained", value=privacy.trained, remedy=remedy)
    if training is not None:
        _require_no_batch(training, "autoencoder.training")
        steps, remedy = experiment.training.steps_per_round, "every round of the plan has as many steps"
        alike = training.steps_per_round == steps
        argument = "autoencoder.training.steps_per_round"
        require(alike, argument=argument, value=training.steps_per_round, remedy=f"give {steps}: {remedy}")


def _require_no_batch(training: TrainingConfig, argument: str) -> None:
    for name in ("batch_size", "gradient_clip"):
        value, remedy = getattr(training, name), "leave it out: with differential privacy the privacy block decides"
        require(value is None, argument=f"{argument}.{name}", value=value, remedy=remedy)


def _require_auditable(experiment: ExperimentConfig, audit: AuditConfig) -> None:
    """What an audit must say, and what it must not because nothing would come of it."""
    named = audit.model is not None and NAME.fullmatch(audit.model) is not None
    require(named, argument="audit.model", value=audit.model, remedy="name the experiment whose model is audited")
    for name in ("privacy", "start_from", "encryption", "updates", "personal"):
        value = getattr(experiment, name)
        require(value is None, argument=name, value=value, remedy="leave it out of an audit: nothing is trained")


def _require_encryptable(experiment: ExperimentConfig) -> None:
    """What a sum of ciphertexts needs to hide a site and to fit into its modulus."""
    masks, remedy = experiment.secure_aggregation, "leave it out with encryption, or leave encryption out"
    require(masks is None, argument="secure_aggregation", value=masks, remedy=remedy)
    fewest, norm = experiment.federation.min_responses, experiment.federation.max_update_norm
    remedy = "give at least 2 with encryption: the sum of one update is that update"
    require(fewest >= 2, argument="federation.min_responses", value=fewest, remedy=remedy)
    remedy = f"give at most {MOST_ENCRYPTED_NORM:g} with encryption: a sum over many sites could overflow otherwise"
    require(norm <= MOST_ENCRYPTED_NORM, argument="federation.max_update_norm", value=norm, remedy=remedy)
