"""What the switches of an experiment ask of each other and of the rest: what makes no sense together is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from custom.strict import require

if TYPE_CHECKING:
    from custom.config import ExperimentConfig


def require_switches(experiment: ExperimentConfig) -> None:
    """Raise ``ConfigError`` by name of the switch that does not go with another one."""
    _with_privacy(experiment)
    _with_encryption(experiment)
    _robust(experiment)
    _few_bits(experiment)
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


def _few_bits(experiment: ExperimentConfig) -> None:
    federation, masks, updates = experiment.federation, experiment.secure_aggregation, experiment.updates
    bits = None if updates is None else updates.bits
    ring = 32 if masks is None else masks.ring_bits
    said = "give 16 or 32: a ring of 8 bits holds whole numbers of updates.bits = 4 only"
    require(ring != 8 or bits == 4, argument="secure_aggregation.ring_bits", value=ring, remedy=said)
    if bits is None:
        return
    said, weighting = 'give "uniform": whole numbers of few bits are summed as they are', federation.weighting
    require(masks is None or weighting == "uniform", argument="federation.weighting", value=weighting, remedy=said)
    said, variates = "leave it out with updates.bits: drift is too fine for few bits", federation.control_variates
    require(not variates, argument="federation.control_variates", value=variates, remedy=said)
    automatic = experiment.training.local_epochs
    said = "leave it out with updates.bits under secure_aggregation: no loss is sent there"
    require(masks is None or automatic is None, argument="training.local_epochs", value=automatic, remedy=said)


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
