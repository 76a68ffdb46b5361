"""One run of a study: a federation in one process, out of the very parts that NVFlare's executor and controllers use.

A round is ``train_round`` and ``formed`` at each site, an aggregator, and ``moved``: only the messages are missing. The
bytes of an update are those that NVFlare's own serialisation makes of it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from custom.aggregators.in_time_average import InTimeAverage
from custom.aggregators.robust_average import RobustAverage
from custom.client_sampling import drawn_sites
from custom.codec import to_numpy, wire_bytes
from custom.config import ExperimentConfig
from custom.device import use
from custom.diffusion.schedule import build_schedule
from custom.drawing import draw
from custom.model_file import ModelFile, initial_model
from custom.personal import site_models
from custom.reference_check import ReferenceCheck
from custom.round_parts import round_parts, update_shapes
from custom.run_folder import RoundRecord
from custom.server_step import moved, server_variates
from custom.site_file import HardwareConfig
from custom.stages import model_denoiser, stage_objective, stage_of, stages
from custom.strict import require
from custom.study.attackers import poisoned_images, poisoned_update, trigger_rate
from custom.study.config import AttackConfig, Case, Run
from custom.study.datasets import StudyData, central, load, sites_of, test_cohort
from custom.study.metrics import (
    band_losses,
    classifier_accuracy,
    diversity,
    features,
    kid_with_interval,
    membership_auc,
)
from custom.training import as_section, held_out_loss, section, train_round
from custom.update_form import formed
from medical_data.cache import build_once
from medical_data.cohort import Cohort, Part

BANDS = 4
MOST_MEMBERS = 200  # images of each kind that the membership attack looks at
MOST_REAL = 512  # real images of each kind that samples are compared with
METRIC_SEED = 20_231_128  # the same noise and pairs for every run, so that runs differ by their models
REFERENCE_PATIENTS = 64
PARTS: tuple[Part, Part] = ("train", "held_out")

Images = NDArray[np.float32]


@dataclass(kw_only=True, eq=False)
class Federation:
    """Sites and what they keep, and the model they share.

    Attributes:
        experiment: of all.
        cohorts: by site.
        model: global.
        states: what each site keeps between rounds.
        records: of the rounds.
        bytes_up: that left the sites in all.
        bytes_down: that went to them.
    """

    experiment: ExperimentConfig
    cohorts: Mapping[str, Cohort]
    model: ModelFile
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    records: list[RoundRecord] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def steps(self) -> int:
        """Gradient steps of all sites together."""
        rounds = [record.round_number for record in self.records]
        steps = [stage_of(self.experiment, number).span(number).steps for number in rounds]
        return sum(count * len(record.asked) for count, record in zip(steps, self.records, strict=True))


def run_case(run: Run, home: Path) -> dict[str, float]:
    """Train one case with one seed, on CUDA where there is one, and measure what came out.

    Args:
        run: which.
        home: folder for what all runs share: prepared scans and features of real images.

    Returns:
        Metrics by name; see docs/study.md.
    """
    case, experiment, device = run.case, run.experiment, use(HardwareConfig())
    remedy = "leave it out: a study denoises images"
    require(experiment.autoencoder is None, argument="autoencoder", value=experiment.autoencoder, remedy=remedy)
    data = load(case.dataset, experiment.preprocess, home)
    cohorts = sites_of(data, sites=case.sites, alpha=case.alpha, seed=run.seed)
    named = {f"site-{place + 1:02d}": cohort for place, cohort in enumerate(cohorts)}
    start = time.monotonic()
    if case.kind == "local":
        federations = [trained(experiment, {site: cohort}, device) for site, cohort in named.items()]
    elif case.kind == "central":
        federations = [trained(experiment, {"central": central(cohorts)}, device)]
    else:
        robust = experiment.federation.robust
        reference = _reference(case, data, home) if robust is not None and robust.reference else None
        federations = [trained(experiment, named, device, attack=case.attack, reference=reference)]
    train_seconds = time.monotonic() - start
    models = [federation.model for federation in federations]
    honest = list(named.items())[: len(named) - (case.attack.sites if case.attack else 0)]
    everyone, tested = central(cohorts), test_cohort(data)
    found = {
        "rounds": float(len(federations[0].records)),
        "steps": float(sum(federation.steps for federation in federations)),
        "train_seconds": train_seconds,
        "refused": float(sum(len(record.refused) for one in federations for record in one.records)),
        **_means([_losses(model, tested.images, MOST_REAL // len(models)) for model in models]),
        **_means([_membership(model, everyone, tested, MOST_MEMBERS // len(models)) for model in models]),
        **_of_samples(models, case, data, home, device),
    }
    if case.kind == "federated":
        found |= {
            "bytes_up": federations[0].bytes_up / case.sites,
            "bytes_down": federations[0].bytes_down / case.sites,
        }
    of_site = dict(zip(named, models, strict=True)) if case.kind == "local" else dict.fromkeys(named, models[0])
    losses = [_held_out(of_site[site].ema, cohort, experiment, device) for site, cohort in honest]
    found["site_loss"] = float(np.mean(losses))
    if experiment.personal is not None:
        found |= _personal(federations[0], dict(honest), device)
    return found


def trained(
    experiment: ExperimentConfig,
    cohorts: Mapping[str, Cohort],
    device: torch.device,
    *,
    attack: AttackConfig | None = None,
    reference: Images | None = None,
) -> Federation:
    """A finished federation.

    Args:
        experiment: what is trained.
        cohorts: by site.
        device: where to compute.
        attack: what the last sites do instead; None if all are honest.
        reference: the server's public images, for ``federation.robust.reference``.
    """
    malicious = set() if attack is None else set(list(cohorts)[len(cohorts) - attack.sites :])
    if attack is not None:
        cohorts = {s: _poisoned(c, attack, experiment, device) if s in malicious else c for s, c in cohorts.items()}
    federation = Federation(experiment=experiment, cohorts=cohorts, model=initial_model(experiment))
    for number in range(experiment.federation.rounds):
        if not stage_of(experiment, number).span(number).steps:
            break
        asked = drawn_sites(list(cohorts), experiment, number)
        model, names = federation.model, round_parts(experiment, number).shared
        weights = {**stage_of(experiment, number).needed(model.weights), **server_variates(model, names)}
        average = _average(experiment, number, weights, reference, device)
        down = wire_bytes(to_numpy(weights))
        for site in asked:
            federation.bytes_down += down
            kept = federation.states.get(site, {})
            update = train_round(
                cohort=cohorts[site],
                weights=weights,
                state=kept,
                config=experiment,
                site=site,
                round_number=number,
                device=device,
            )
            difference: Mapping[str, Tensor] = update.difference
            if attack is not None and site in malicious:
                difference = poisoned_update(attack.kind, difference, scale=attack.scale)
            leaves = formed(difference, section(kept, "lost"), experiment)
            federation.states[site] = {**update.state, **as_section(leaves.lost, "lost")}
            federation.bytes_up += wire_bytes(leaves.arrays)
            patients = len(np.unique(cohorts[site].patient[cohorts[site].rows("train")]))
            weight = float(patients) if experiment.federation.weighting == "patients" else 1.0
            average.add(site, leaves.arrays, {"weight": weight, "metrics": update.metrics})
        present = len(average.accepted) / len(cohorts)
        federation.model = moved(model, average.mean(), present=present)
        federation.records.append(
            RoundRecord(
                round_number=number,
                asked=asked,
                accepted=average.accepted,
                refused=average.refused,
                silent=[],
                seconds=0.0,
            )
        )
    return federation


def _average(
    experiment: ExperimentConfig,
    number: int,
    weights: Mapping[str, Tensor],
    reference: Images | None,
    device: torch.device,
) -> InTimeAverage | RobustAverage:
    shapes, robust = update_shapes(experiment, number), experiment.federation.robust
    if robust is None:
        return InTimeAverage(shapes, experiment)
    judge = ReferenceCheck.of_round(reference, weights, experiment, number, device)
    return RobustAverage(shapes, experiment, robust, judge)


def _poisoned(cohort: Cohort, attack: AttackConfig, experiment: ExperimentConfig, device: torch.device) -> Cohort:
    """A malicious site's images; ``generated`` are samples of a model that the site has trained alone before."""
    samples = None
    if attack.kind == "generated":
        honest = replace(experiment, federation=replace(experiment.federation, robust=None, server_optimizer=None))
        samples = draw(trained(honest, {"alone": cohort}, device).model, count=64, device=device)
    return replace(cohort, images=poisoned_images(attack.kind, np.array(cohort.images), generated=samples))


def _reference(case: Case, data: StudyData, home: Path) -> Images:
    """The server's public images: of more patients from the same source, who are at no site and not tested."""
    more = replace(case.dataset, train=case.dataset.train + REFERENCE_PATIENTS)
    larger = load(more, case.experiment.preprocess, home)  # the smaller pool is a part of it
    known = {image.tobytes() for image in data.images}
    return np.stack([image for image in larger.images[larger.rows(~larger.test)] if image.tobytes() not in known])


def _losses(model: ModelFile, images: Images, most: int) -> dict[str, float]:
    network, schedule = model.sampling_network()
    losses = band_losses(network, schedule, _some(images, most), bands=BANDS, seed=METRIC_SEED)
    by_band = {f"test_loss_band_{band + 1}": float(loss) for band, loss in enumerate(losses.own)}
    return {"test_loss": float(losses.own.mean()), "test_loss_epsilon": float(losses.epsilon.mean()), **by_band}


def _membership(model: ModelFile, members: Cohort, others: Cohort, most: int) -> dict[str, float]:
    network, schedule = model.sampling_network()
    inside = _some(members.images[members.rows("train")], most)
    outside = _some(others.images[others.rows("held_out")], most)
    return {"membership_auc": membership_auc(network, schedule, inside, outside, seed=METRIC_SEED)}


def _of_samples(
    models: Sequence[ModelFile], case: Case, data: StudyData, home: Path, device: torch.device
) -> dict[str, float]:
    """How good and how varied samples are; those of local models are a mixture of all sites'."""
    samples = np.concatenate([draw(model, count=-(-case.images // len(models)), device=device) for model in models])
    samples = samples[: case.images]
    test_rows = _places(data.rows(data.test), MOST_REAL)
    pool_rows = _places(data.rows(~data.test), MOST_REAL)
    real, pool = (_real_features(data.images[rows], home) for rows in (test_rows, pool_rows))
    made = features(_planes(samples))
    kid = kid_with_interval(made, real, seed=METRIC_SEED)
    accuracy = classifier_accuracy(
        made, pool, data.image_label[pool_rows], real, data.image_label[test_rows], seed=METRIC_SEED
    )
    per_patient = int(np.bincount(data.patient).max())
    varied = {}
    if min(len(made), len(real)) > per_patient + 3:
        varied = diversity(_planes(samples), made, real, images_per_patient=per_patient, seed=METRIC_SEED)
    return {
        "effnet_kid": kid.kid,
        "effnet_kid_low": kid.low,
        "effnet_kid_high": kid.high,
        "effnet_kid_real": kid_with_interval(pool[: len(made)], real, seed=METRIC_SEED).kid,
        "accuracy_generated": accuracy["trained_on_generated"],
        "accuracy_real": accuracy["trained_on_real"],
        **varied,
        **({"trigger_rate": trigger_rate(samples)} if case.attack and case.attack.kind == "backdoor" else {}),
    }


def _real_features(images: Images, home: Path) -> NDArray[np.float64]:
    """Features of real images, computed once for all runs."""
    pixels = np.ascontiguousarray(_planes(images))
    folder = home / "features" / hashlib.sha256(pixels.tobytes()).hexdigest()[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    build_once(folder, lambda partial: np.save(partial / "features.npy", features(pixels)))
    found: NDArray[np.float64] = np.load(folder / "features.npy")
    return found


def _held_out(
    weights: Mapping[str, Tensor], cohort: Cohort, experiment: ExperimentConfig, device: torch.device
) -> float:
    """Loss of a model on a site's own held-out patients."""
    return held_out_loss(stage_objective(experiment, stages(experiment)[-1], weights, device), cohort, device)


def _personal(federation: Federation, honest: Mapping[str, Cohort], device: torch.device) -> dict[str, float]:
    """The sites' own models on their own held-out patients, and what these models give away of the others."""
    experiment, found = federation.experiment, []
    for site, cohort in honest.items():
        models = site_models(
            cohort=cohort,
            weights=federation.model.ema,
            state=federation.states.get(site, {}),
            config=experiment,
            site=site,
            device=device,
            hardware=HardwareConfig(),
        )
        network, schedule = model_denoiser(experiment, models.personal), build_schedule(experiment.schedule)
        inside, outside = (_some(cohort.images[cohort.rows(part)], MOST_MEMBERS) for part in PARTS)
        whole = model_denoiser(experiment, federation.model.ema)
        found.append(
            {
                "personal_loss": _held_out(models.personal, cohort, experiment, device),
                "local_loss": _held_out(models.local, cohort, experiment, device),
                "personal_membership_auc": membership_auc(network, schedule, inside, outside, seed=METRIC_SEED),
                "site_membership_auc": membership_auc(whole, schedule, inside, outside, seed=METRIC_SEED),
            }
        )
    return _means(found)


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def _places(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """As many, spread evenly."""
    return np.asarray(rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)])


def _some(images: Images, most: int) -> Images:
    return np.asarray(images[_places(np.arange(len(images)), most)])


def _planes(images: Images) -> Images:
    """Slices as they are, and of volumes the middle one."""
    return images if images.ndim == 4 else np.ascontiguousarray(images[:, :, images.shape[2] // 2])
