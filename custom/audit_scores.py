"""Every attack of an audit on one population: the same at a site of a federation and on one machine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from custom.audit_config import AuditConfig
from custom.audit_target import denoiser, loss_function
from custom.audit_training import fit, overfit
from custom.config import ExperimentConfig
from custom.device import images_at_once
from custom.diffusion.autoencoder import Autoencoder
from custom.diffusion.schedule import Schedule, build_schedule
from custom.latents import decoded, encoded
from custom.model_file import ModelFile, initial_model
from custom.stages import fresh_weights, model_denoiser
from medical_data.cohort import Cohort, Part
from medical_data.preprocess import evenly
from privacy.audit.attacks import GREY_BOX, GreyBoxScores, grey_box_scores
from privacy.audit.blind import blind_scores
from privacy.audit.calibration import (
    FEWEST_CALIBRATING_PATIENTS,
    difficulty_calibrated,
    difficulty_features,
    offline_rmia,
    quantile_calibrated,
)
from privacy.audit.evidence import Access, Cost
from privacy.audit.gradients import evaluations_per_image, gradient_norms
from privacy.audit.population import FEWEST_PATIENTS, Population
from privacy.audit.protocol import Scored, shuffled
from privacy.audit.queries import STRIDE
from privacy.audit.stacking import stacked_scores

BATCH = 64
# Of the positive control, so that it is learnt by heart: images of each patient, and patients of each kind.
CONTROL_IMAGES, CONTROL_PATIENTS = 2, 20
CONTROL_ATTACKS = ("loss", "sima", "pia")
UNTRAINED_ATTACKS = ("sima", "pia")  # cheap: a network without a memory of anyone has none for any statistic
REFERENCE_ATTACK = "loss"  # the statistic that reference models calibrate

# The groups of patients and models that are scored.
TARGET, OVERFITTED, UNTRAINED, SHUFFLED, BLIND = "target", "overfitted", "untrained", "shuffled", "blind"


class Description(NamedTuple):
    """What an outcome says of its attack."""

    title: str
    paper: str
    access: Access
    statistic: str


_TITLES = {
    "loss": "denoising loss",
    "sima": "SimA",
    "pia": "PIA",
    "pian": "PIAN",
    "secmi": "SecMI",
    "band_pass": "band-pass reconstruction",
}
DESCRIPTIONS = {name: Description(_TITLES[name], a.paper, "api", a.statistic) for name, a in GREY_BOX.items()} | {
    "calibrated": Description(
        "loss against a reference",
        "Watson et al. 2022, arXiv:2111.08440",
        "api",
        "Denoising loss less that of a reference model which never saw the patient.",
    ),
    "rmia": Description(
        "RMIA",
        "Zarifzadeh et al. 2024, arXiv:2312.03262",
        "api",
        "Share of held-out images beside which the image is likelier under the model than under a reference.",
    ),
    "quantile": Description(
        "quantile regression",
        "Tang et al. 2023, arXiv:2312.05140",
        "api",
        "How far the denoising loss lies from what held-out images that look alike would have.",
    ),
    "gradients": Description(
        "gradient norms (GSA)",
        "Pang et al. 2023, arXiv:2308.06405",
        "weights",
        "Cross-fitted log-odds of membership from the norms of the image's gradient in every layer.",
    ),
    "reconstruction": Description(
        "reconstruction by the autoencoder",
        "Hilprecht et al. 2019, arXiv:1906.03006, in its manner",
        "api",
        "Mean absolute error of the image after the model's autoencoder, which needs no denoiser.",
    ),
    "stacked": Description(
        "stacked attacker",
        "nested cross-fitting by patient",
        "api",
        "Cross-fitted log-odds of membership from all other statistics that need no weights.",
    ),
    "blind": Description("blind classifier", "", "samples", "Log-odds of membership from the image alone."),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """One model, or none, attacked with one division of the patients.

    Attributes:
        name: TARGET, OVERFITTED, UNTRAINED, SHUFFLED or BLIND.
        population: whose images, and who counts as a member.
        scored: the attacks' statistics.
    """

    name: str
    population: Population
    scored: tuple[Scored, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoreboard:
    """All of it.

    Attributes:
        groups: by name.
        costs: of the parts.
    """

    groups: dict[str, Group]
    costs: tuple[Cost, ...]


def population_of(cohort: Cohort, site: str, config: AuditConfig) -> Population:
    """A site's members and held-outs as the audit attacks them; raises like :class:`Population`.

    Where the configuration takes only some of the patients they are those with the smallest SHA-256 of their pseudonym.
    """
    chosen = sorted(p for part in ("train", "held_out") for p in _drawn(cohort, part, config.patients))
    rows, owners = [], []
    for index, patient in enumerate(chosen):
        own = np.flatnonzero(cohort.patient == patient)
        own = own[evenly(len(own), config.images_per_patient)]
        rows.append(own)
        owners.append(np.full(len(own), index))
    return Population(
        images=np.asarray(cohort.images[np.concatenate(rows)]),
        patient=np.concatenate(owners).astype(np.int64),
        member=~cohort.held_out[chosen],
        site=np.zeros(len(chosen), dtype=np.int64),
        sites=(site,),
        keys=tuple(cohort.pseudonyms[patient] for patient in chosen),
    )


def _drawn(cohort: Cohort, part: Part, most: int | None) -> list[int]:
    patients = np.unique(cohort.patient[cohort.rows(part)]).tolist()
    ordered = sorted(patients, key=lambda p: hashlib.sha256(f"audit\0{cohort.pseudonyms[p]}".encode()).digest())
    return ordered[:most]


def timesteps(levels: Sequence[float], schedule: Schedule) -> tuple[int, ...]:
    """Noise levels as timesteps that the deterministic inversion passes."""
    steps = schedule.config.timesteps
    return tuple(sorted({max(STRIDE, round(level * steps / STRIDE) * STRIDE) for level in levels}))


class Scorer:
    """Attacks one population on one device.

    Args:
        model: to be attacked.
        config: how.
        device: where to compute.
        progress: show bars on stderr.
    """

    def __init__(self, model: ModelFile, config: AuditConfig, *, device: torch.device, progress: bool) -> None:
        self.model, self.config, self.device, self.progress = model, config, device, progress
        self.network, self.schedule = model.sampling_network()
        self.autoencoder = model.autoencoder()
        self.levels = timesteps(config.noise_levels, self.schedule)
        self.costs: list[Cost] = []

    def scoreboard(self, population: Population) -> Scoreboard:
        """Every group but BLIND; raises ``Unattackable`` where one cannot be scored."""
        target = self._grey_box(self.network, population, tuple(GREY_BOX), "grey box")
        scored = [*target, *self._calibrated(population, target)]
        if self.autoencoder is not None:
            scored.append(self._reconstructed(self.autoencoder, population.images))
        if self.config.gradient_levels:
            scored.append(self._white_box(population))
        scored.append(self._stacked(population, scored))
        of = populations(population, self.model.experiment.seed)
        # Before any training: an autoencoder that has seen the patients could remember them, too.
        fresh = Scorer(initial_model(self.model.experiment), self.config, device=self.device, progress=self.progress)
        untrained = fresh._grey_box(fresh.network, population, UNTRAINED_ATTACKS, "untrained")
        self.costs += fresh.costs
        found: dict[str, tuple[Scored, ...]] = {
            TARGET: tuple(scored),
            SHUFFLED: tuple(s for s in target if s.name in CONTROL_ATTACKS),
            UNTRAINED: untrained,
        }
        if OVERFITTED in of:
            found[OVERFITTED] = self._overfitted(of[OVERFITTED])
        groups = {name: Group(name=name, population=of[name], scored=each) for name, each in found.items()}
        return Scoreboard(groups=groups, costs=tuple(self.costs))

    def _denoised(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the model denoises of images [N, 1, *spatial]: themselves, or their latents."""
        return images if self.autoencoder is None else encoded(self.autoencoder, images, self.device)

    def _asked(self, network: torch.nn.Module, images: NDArray[np.float32], attacks: Sequence[str]) -> GreyBoxScores:
        """Grey-box statistics of images, by what the network says of them."""
        denoised = self._denoised(images)
        return grey_box_scores(
            denoiser(network, self.schedule, self.device),
            denoised,
            timesteps=self.levels,
            seeds=self.config.seeds,
            attacks=attacks,
            batch_size=min(BATCH, images_at_once(denoised.shape[1:])),
            progress=self.progress,
        )

    def _grey_box(
        self, network: torch.nn.Module, population: Population, attacks: Sequence[str], part: str
    ) -> tuple[Scored, ...]:
        found = self._asked(network, population.images, attacks)
        self._cost(part, found.shared_evaluations_per_image, found.seconds)
        return tuple(
            _scored(name, found.scores[name], found.settings[name], found.evaluations_per_image[name])
            for name in attacks
        )

    def _reconstructed(self, autoencoder: Autoencoder, images: NDArray[np.float32]) -> Scored:
        """What the autoencoder itself remembers: it was trained on the patients, too."""
        started = time.monotonic()
        latents = torch.from_numpy(encoded(autoencoder, images, self.device))
        error = np.abs(decoded(autoencoder, latents, self.device) - images).mean(axis=tuple(range(1, images.ndim)))
        self._cost("autoencoder", 0.0, time.monotonic() - started)
        scores = np.repeat(error[None, :, None].astype(np.float64), len(self.config.seeds), axis=0)
        return _scored("reconstruction", scores, ("image",), 0.0)

    def _calibrated(self, population: Population, target: Sequence[Scored]) -> list[Scored]:
        """Attacks that ask how hard an image is: of reference models, or of what it looks like."""
        loss = next(scored for scored in target if scored.name == REFERENCE_ATTACK)
        found = [] if _few(population, self.config.seeds) else [self._quantile(population, loss)]
        return found if not self.config.reference_steps else [*found, *self._referenced(population, loss)]

    def _quantile(self, population: Population, loss: Scored) -> Scored:
        started = time.monotonic()
        features = difficulty_features(population.images)
        quantile = np.stack(
            [
                np.stack(
                    [
                        quantile_calibrated(
                            features,
                            -loss.scores[row, :, column],
                            population.patient,
                            population.member,
                            _calibrating(population, seed),
                            seed=seed,
                        )
                        for column in range(len(loss.settings))
                    ],
                    axis=1,
                )
                for row, seed in enumerate(self.config.seeds)
            ]
        )
        self._cost("quantile regression", 0.0, time.monotonic() - started)
        return _scored("quantile", quantile, loss.settings, loss.evaluations_per_image)

    def _referenced(self, population: Population, loss: Scored) -> list[Scored]:
        """Against reference models: two, each trained on one half of the held-outs.

        Each patient is held against the one that never saw it; for a member, whom neither saw, a hash decides, so that
        members and held-outs are treated alike.
        """
        started = time.monotonic()
        half = population.tuning_half(self.model.experiment.seed)
        reference = np.zeros_like(loss.scores)
        for number, trained_on in enumerate((half, ~half)):
            rows = (trained_on & ~population.member)[population.patient]
            network = fit(
                _fresh(self.model.experiment, self.model.experiment.seed + 1 + number),
                self.schedule,
                self._denoised(population.images[rows]),
                steps=self.config.reference_steps,
                seed=number,
                device=self.device,
                label=f"reference model {number + 1} of 2",
                progress=self.progress,
            )
            out = (~trained_on)[population.patient]
            found = self._asked(network, population.images[out], (REFERENCE_ATTACK,))
            reference[:, out] = found.scores[REFERENCE_ATTACK]
        self._cost("reference models", loss.evaluations_per_image, time.monotonic() - started)
        calibrated = np.stack(
            [
                np.stack(
                    [
                        difficulty_calibrated(-loss.scores[row, :, column], -reference[row, None, :, column])
                        for column in range(len(loss.settings))
                    ],
                    axis=1,
                )
                for row in range(len(self.config.seeds))
            ]
        )
        rmia = self._rmia(population, -loss.scores, -reference)
        evaluations = 2 * loss.evaluations_per_image
        return [
            _scored("calibrated", calibrated, loss.settings, evaluations),
            _scored("rmia", rmia, loss.settings, evaluations),
        ]

    def _rmia(
        self, population: Population, target: NDArray[np.float64], reference: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Each image against the held-outs of the tuning half, with the reference that never saw it."""
        scores = np.empty_like(target)
        out = np.ones((1, target.shape[1]), dtype=np.bool_)
        for row, seed in enumerate(self.config.seeds):
            others = _calibrating(population, seed)
            for column in range(target.shape[2]):
                ours, theirs = target[row, :, column], reference[row, None, :, column]
                scores[row, :, column] = offline_rmia(ours, theirs, out, ours[others], theirs[:, others])
        return scores

    def _white_box(self, population: Population) -> Scored:
        started = time.monotonic()
        levels = timesteps(self.config.gradient_levels, self.schedule)
        loss = loss_function(self.network.to(self.device), self.schedule)
        parameters = {name: tensor.detach() for name, tensor in self.network.named_parameters()}
        norms = gradient_norms(
            loss,
            parameters,
            self._denoised(population.images),
            timesteps=levels,
            seed=0,
            batch_size=16,
            progress=self.progress,
        )
        scores = np.stack([_stack(norms, population, seed) for seed in self.config.seeds])
        cost = evaluations_per_image(levels)
        self._cost("gradient norms", cost, time.monotonic() - started)
        return _scored("gradients", scores[:, :, None], ("all layers",), cost)

    def _stacked(self, population: Population, scored: Sequence[Scored]) -> Scored:
        started = time.monotonic()
        used = [s for s in scored if DESCRIPTIONS[s.name].access == "api"]
        scores = np.stack(
            [
                _stack(np.concatenate([s.scores[row] for s in used], axis=1), population, seed)
                for row, seed in enumerate(self.config.seeds)
            ]
        )
        self._cost("stacking", 0.0, time.monotonic() - started)
        return _scored("stacked", scores[:, :, None], ("all",), sum(s.evaluations_per_image for s in used))

    def _overfitted(self, control: Population) -> tuple[Scored, ...]:
        """The positive control: the model, trained further until it knows the control's members by heart."""
        started = time.monotonic()
        network, _ = self.model.sampling_network()
        learnt = control.member[control.patient]
        overfit(
            network,
            self.schedule,
            self._denoised(control.images[learnt]),
            self._denoised(control.images[~learnt]),
            steps=self.config.control_steps,
            device=self.device,
            progress=self.progress,
        )
        self._cost("overfitting the positive control", 0.0, time.monotonic() - started)
        return self._grey_box(network, control, CONTROL_ATTACKS, "positive control")

    def _cost(self, part: str, evaluations: float, seconds: float) -> None:
        self.costs.append(Cost(part=part, evaluations_per_image=evaluations, seconds=seconds))


def blind_group(population: Population, config: AuditConfig) -> Group:
    """The classifier that sees no model, scored like an attack, so that sites can count it."""
    of_seeds = [
        blind_scores(population.images, population.patient, population.member, seed=seed) for seed in config.seeds
    ]
    scored = _scored("blind", np.stack(of_seeds)[:, :, None], ("image",), 0.0)
    return Group(name=BLIND, population=population, scored=(scored,))


def populations(population: Population, seed: int) -> dict[str, Population]:
    """Whose images each group attacks; no positive control where there are too few held-outs for one.

    Its members are half of the held-outs, or the first few of them by their hash, with a few images each: patients whom
    nothing else has been trained on.
    """
    of = dict.fromkeys((TARGET, UNTRAINED, BLIND), population) | {SHUFFLED: shuffled(population, seed=seed)}
    half = population.tuning_half(seed)
    kinds = [_first(population, np.flatnonzero(~population.member & kind)) for kind in (half, ~half)]
    if min(map(len, kinds)) < FEWEST_PATIENTS:
        return of
    held_out = np.sort(np.concatenate(kinds))
    learnt = half[held_out]
    rows = []
    for patient in held_out:
        own = np.flatnonzero(population.patient == patient)
        rows.append(own[evenly(len(own), CONTROL_IMAGES)])
    control = Population(
        images=population.images[np.concatenate(rows)],
        patient=np.repeat(np.arange(len(held_out)), [len(own) for own in rows]).astype(np.int64),
        member=learnt,
        site=population.site[held_out],
        sites=population.sites,
        keys=tuple(population.keys[patient] for patient in held_out),
    )
    return of | {OVERFITTED: control}


def _first(population: Population, patients: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those with the smallest SHA-256 of site and key, as many as a control takes."""
    names = population.sites_and_keys
    digests = {p: hashlib.sha256("\0".join(("control", *names[p])).encode()).digest() for p in patients.tolist()}
    return np.array(sorted(digests, key=lambda p: digests[p])[:CONTROL_PATIENTS], dtype=np.int64)


def rebuilt(
    of: Mapping[str, Population],
    arrays: Mapping[str, NDArray[np.float64]],
    settings: Mapping[str, Mapping[str, tuple[str, ...]]],
) -> dict[str, Group]:
    """The groups from their populations and, as ``group/attack``, their scores."""
    return {
        name: Group(
            name=name,
            population=of[name],
            scored=tuple(
                _scored(attack, arrays[f"{name}/{attack}"], columns, 0.0) for attack, columns in attacks.items()
            ),
        )
        for name, attacks in settings.items()
    }


def layout(config: AuditConfig, experiment: ExperimentConfig) -> dict[str, dict[str, tuple[str, ...]]]:
    """Groups, their attacks and the attacks' settings, as :meth:`Scorer.scoreboard` fills them."""
    levels = tuple(f"t={t}" for t in timesteps(config.noise_levels, build_schedule(experiment.schedule)))
    target = dict.fromkeys((*GREY_BOX, "quantile"), levels)
    if config.reference_steps:
        target |= {"calibrated": levels, "rmia": levels}
    if experiment.autoencoder is not None:
        target["reconstruction"] = ("image",)
    if config.gradient_levels:
        target["gradients"] = ("all layers",)
    target["stacked"] = ("all",)
    return {
        TARGET: target,
        UNTRAINED: dict.fromkeys(UNTRAINED_ATTACKS, levels),
        SHUFFLED: dict.fromkeys(CONTROL_ATTACKS, levels),
        OVERFITTED: dict.fromkeys(CONTROL_ATTACKS, levels),
        BLIND: {"blind": ("image",)},
    }


def _fresh(experiment: ExperimentConfig, seed: int) -> torch.nn.Module:
    return model_denoiser(experiment, fresh_weights(experiment, seed=seed))


def _few(population: Population, seeds: Sequence[int]) -> bool:
    """Whether some tuning half has too few held-outs for a regression."""
    counts = [int((~population.member & population.tuning_half(seed)).sum()) for seed in seeds]
    return min(counts) < FEWEST_CALIBRATING_PATIENTS


def _calibrating(population: Population, seed: int) -> NDArray[np.bool_]:
    """Images of known non-members: held-outs of the tuning half, bool [N]."""
    return (~population.member & population.tuning_half(seed))[population.patient]


def _stack(features: NDArray[np.float64], population: Population, seed: int) -> NDArray[np.float64]:
    return stacked_scores(features, population.patient, population.member, seed=seed)


def _scored(name: str, scores: NDArray[np.float64], settings: tuple[str, ...], evaluations: float) -> Scored:
    return Scored(
        name=name,
        **DESCRIPTIONS[name]._asdict(),
        evaluations_per_image=evaluations,
        settings=settings,
        scores=scores,
    )
