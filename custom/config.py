"""The one configuration of an experiment: what all sites and the server must agree on.

``experiment.json`` in a job's ``config`` folder is read into :class:`ExperimentConfig` by server and sites alike; its
SHA-256 travels with every task, and a site with another one refuses to train.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
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
from custom.model_config import (
    NAME,
    PRESETS,
    AutoencoderConfig,
    NetworkConfig,
    SamplingConfig,
    ScheduleConfig,
    TrainingConfig,
)
from custom.privacy_config import PrivacyConfig
from custom.secure_config import SecureAggregationConfig
from custom.strict import ConfigError, build, require
from medical_data.preprocess import PreprocessConfig
from privacy.plan import DPConfig

EXPERIMENT_FILE = "experiment.json"
MOST_ENCRYPTED_NORM = 1000.0  # times a weight of a million and 500 sites is below 2³⁹, see custom.he_contexts


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
        _require_switches(self)
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


def _require_switches(experiment: ExperimentConfig) -> None:
    """What the switches ask of each other and of the rest: what makes no sense together is refused."""
    _with_privacy(experiment)
    _with_encryption(experiment)
    _robust(experiment)
    _updates(experiment)
    _local_epochs(experiment)
    _personal(experiment)


def _with_privacy(experiment: ExperimentConfig) -> None:
    if experiment.privacy is None:
        return
    training, federation, personal = experiment.training, experiment.federation, experiment.personal
    robust, encoder = federation.robust, experiment.autoencoder and experiment.autoencoder.training
    said = "leave it out with privacy: what leaves a site is what its plan noised and charged"
    for name, value in (
        ("training.proximal", training.proximal or None),
        ("autoencoder.training.proximal", encoder and (encoder.proximal or None)),
        ("training.local_epochs", training.local_epochs),
        ("federation.control_variates", federation.control_variates or None),
        ("updates", experiment.updates),
        ("personal.parts", personal and personal.parts),
        ("personal.below_timestep", personal and personal.below_timestep),
        ("federation.robust.clip_norm", robust and robust.clip_norm),
    ):
        require(value is None, argument=name, value=value, remedy=said)
    said = "leave it out with privacy: one noised update would not pass"
    reference = robust is not None and robust.reference
    require(not reference, argument="federation.robust.reference", value=reference, remedy=said)
    if experiment.privacy.dp == "central_secagg":
        said = "leave it out with central_secagg: each round is a step of the server's own optimizer"
        require(robust is None, argument="federation.robust", value=robust, remedy=said)
        server = federation.server_optimizer
        require(server is None, argument="federation.server_optimizer", value=server, remedy=said)


def _with_encryption(experiment: ExperimentConfig) -> None:
    if experiment.encryption is None:
        return
    federation = experiment.federation
    said = "leave it out with encryption: the server adds ciphertexts of one layout and sees none"
    for name, value in (
        ("federation.robust", federation.robust),
        ("updates", experiment.updates),
        ("federation.control_variates", federation.control_variates or None),
    ):
        require(value is None, argument=name, value=value, remedy=said)


def _robust(experiment: ExperimentConfig) -> None:
    federation, masks, robust = experiment.federation, experiment.secure_aggregation, experiment.federation.robust
    if robust is None:
        return
    groups, said = robust.groups, "leave it out without secure_aggregation"
    require(masks is not None or groups is None, argument="federation.robust.groups", value=groups, remedy=said)
    weighted, said = federation.weighting == "patients", 'give "uniform": a malicious site says any number of patients'
    valid = not weighted or robust.rule != "mean"  # other rules leave weights out
    require(valid, argument="federation.weighting", value=federation.weighting, remedy=said)
    if masks is not None:
        said = "missing; give it under secure_aggregation: a rule sees groups' sums only"
        blind = robust.rule != "mean" or robust.reference
        require(not blind or groups is not None, argument="federation.robust.groups", value=groups, remedy=said)
        fewest, least = max(2, masks.min_survivors), federation.min_responses
        each = fewest * (groups or 0)
        said = f"give at least {each}: each of {groups} groups needs {fewest} survivors"
        require(least >= each, argument="federation.min_responses", value=least, remedy=said)
    split = experiment.personal is not None and experiment.personal.below_timestep is not None
    said = "leave it out with personal.below_timestep: the shared denoiser forgets the timesteps below"
    require(not (robust.reference and split), argument="federation.robust.reference", value=True, remedy=said)


def _updates(experiment: ExperimentConfig) -> None:
    federation, masks, updates = experiment.federation, experiment.secure_aggregation, experiment.updates
    bits = None if updates is None else updates.bits
    variates, waits = federation.control_variates, updates is not None and updates.train == "all"
    said = "leave it out with updates.train = all: drift is then of several rounds"
    require(not (variates and waits), argument="federation.control_variates", value=variates, remedy=said)
    said = "leave it out with updates.train = all: a site that misses its part's turn would send what is out of date"
    for name in ("clients_per_round", "availability"):
        value = getattr(federation, name)
        require(value is None or not waits, argument=f"federation.{name}", value=value, remedy=said)
    ring = 32 if masks is None else masks.ring_bits
    said = "give 16 or 32: a ring of 8 bits holds whole numbers of updates.bits = 4 only"
    require(ring != 8 or bits == 4, argument="secure_aggregation.ring_bits", value=ring, remedy=said)
    if bits is None:
        return
    said, weighting = 'give "uniform": whole numbers of few bits are summed as they are', federation.weighting
    require(masks is None or weighting == "uniform", argument="federation.weighting", value=weighting, remedy=said)
    said = "leave it out with updates.bits: drift is too fine for few bits"
    require(not variates, argument="federation.control_variates", value=variates, remedy=said)


def _local_epochs(experiment: ExperimentConfig) -> None:
    encoder, personal = experiment.autoencoder, experiment.personal
    if encoder is not None and encoder.training is not None:
        value, said = encoder.training.local_epochs, "leave it out: only the denoiser's rounds have it"
        require(value is None, argument="autoencoder.training.local_epochs", value=value, remedy=said)
    if experiment.training.local_epochs is not None:
        said = "leave it out with autoencoder.rounds"
        alone = encoder is None or not encoder.rounds
        require(alone, argument="training.local_epochs", value="auto", remedy=said)
        said = "leave it out with personal.parts and personal.below_timestep: rounds are too few to count on"
        whole = personal is None or not personal.split
        require(whole, argument="training.local_epochs", value="auto", remedy=said)


def _personal(experiment: ExperimentConfig) -> None:
    personal = experiment.personal
    if personal is None:
        return
    rounds = experiment.federation.rounds - (experiment.autoencoder.rounds if experiment.autoencoder else 0)
    shared, said = personal.shared_rounds, f"give fewer than the denoiser's {rounds} rounds"
    valid = not personal.split or shared < rounds
    require(valid, argument="personal.shared_rounds", value=shared, remedy=said)
    below, last = personal.below_timestep, experiment.schedule.timesteps
    said = f"give less than schedule.timesteps = {last}"
    require(below is None or below < last, argument="personal.below_timestep", value=below, remedy=said)
