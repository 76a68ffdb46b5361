"""What the audit says of three models: overfitted on purpose, untrained, and differentially private.

    python tests/benchmarks/audit.py OUT [--cohort embedded|real] [--dp-run RUN] [--threads N]

embedded  overfit and untrained: 44 members and 620 of 846 held-outs of one phantom hospital. dp: the model of
          jobs/ct_ddpm_dp at its three hospitals; RUN is a folder of runs/ct_ddpm_dp in a checkout whose sites/ are
          those that trained it, and without it the job is run first (ten minutes).
real      all three on the 30 patients of ../shared/ct, half of them members; dp by the same plan, at epsilon = 8.

OUT gets a report for each model and what was trained, which a second run takes up again. The last line is one JSON
object: for each model its patient-level AUC with its interval (the strongest attack on tuning data) and its verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from custom.audit import audit_model
from custom.audit_config import AuditConfig
from custom.config import ExperimentConfig
from custom.device import use
from custom.diffusion.networks import build_network
from custom.federation_config import FederationConfig
from custom.job_plan import privacy_plan
from custom.model_file import ModelFile, load_model, save_model
from custom.privacy_config import PrivacyConfig
from custom.private_training import train_private_round
from custom.run_folder import newest_run
from custom.site_file import HardwareConfig, load_site
from custom.training import train_round
from medical_data.cohort import Cohort, DataLimits, EmbeddedSource, FolderSource, prepare_cohort
from privacy.audit.decision import DecisionRule
from privacy.audit.report.document import Audit, audit_of, load_audit, write_json
from privacy.audit.report.html import write_html
from privacy.audit.report.pdf import write_pdf

REPOSITORY = Path(__file__).resolve().parents[2]
SCANS = REPOSITORY.parent / "shared" / "ct"
LARGE = ("large-1", "large-2", "large-3")
OVERFIT_STEPS = 6000
MODELS = ("overfit", "untrained", "dp")


def main() -> None:
    """Train what is not there yet, audit it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that this leaves")
    parser.add_argument("--cohort", choices=("embedded", "real"), default="embedded", help="default: %(default)s")
    parser.add_argument("--dp-run", type=Path, help="a run of jobs/ct_ddpm_dp to audit instead of a new one")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads (default: %(default)s)")
    options = parser.parse_args()
    device = use(HardwareConfig(threads=options.threads))
    out = options.out.resolve() / options.cohort
    out.mkdir(parents=True, exist_ok=True)
    experiment = ExperimentConfig.of_job(REPOSITORY / "jobs/ct_ddpm")
    if options.cohort == "embedded":
        source: EmbeddedSource | FolderSource = EmbeddedSource(hospital=0, patients=890, slices=8, matrix=64, seed=1)
        limits, config = (
            DataLimits(held_out_fraction=0.95),
            AuditConfig(patients=620, images_per_patient=1, reference_steps=0),
        )
    else:
        source = FolderSource(folder=_real_patients(out))
        limits, config = DataLimits(held_out_fraction=0.5), AuditConfig()
    experiment = replace(experiment, preprocess=replace(experiment.preprocess, images_per_patient=4))
    home = out / "home"
    cohort = prepare_cohort(source=source, preprocess=experiment.preprocess, limits=limits, home=home, progress=True)
    targets: dict[str, tuple[Path, Mapping[str, Cohort]]] = {
        "overfit": (_overfitted(out, experiment, cohort, device), {"site-1": cohort}),
        "untrained": (_untrained(out, experiment), {"site-1": cohort}),
    }
    if options.cohort == "embedded":
        run = options.dp_run or _dp_job(out)
        targets["dp"] = (run / "model.safetensors", _large_cohorts(run))
    else:
        targets["dp"] = (_private(out, experiment, cohort, device), {"site-1": cohort})
    # Three hospitals with 89 held-outs each: more members would add nothing to the power.
    configs = {"dp": replace(config, patients=200)} if options.cohort == "embedded" else {}
    audits = {name: _audited(out / name, *targets[name], configs.get(name, config), device) for name in MODELS}
    print(_table(audits))
    print(json.dumps({name: _summary(audit) for name, audit in audits.items()}))


def _audited(
    folder: Path, model: Path, cohorts: Mapping[str, Cohort], config: AuditConfig, device: torch.device
) -> Audit:
    file = folder / "audit.json"
    if not file.is_file():
        folder.mkdir(exist_ok=True)
        print(f"auditing {model}", file=sys.stderr)
        found = audit_model(
            model,
            cohorts,
            config,
            device=device,
            created=datetime.now(timezone.utc).date().isoformat(),
            command="python tests/benchmarks/audit.py OUT",
            progress=True,
        )
        audit = audit_of(found.evidence, DecisionRule())
        write_html(folder / "audit.html", audit)
        write_pdf(folder / "audit.pdf", audit)
        write_json(file, audit)
    return load_audit(file)


def _summary(audit: Audit) -> dict[str, object]:
    found = audit.evidence.attacks[audit.evidence.strongest].outcome.patient_auc
    return {
        "patient_auc": round(found.estimate, 4),
        "patient_auc_low": round(found.low, 4),
        "patient_auc_high": round(found.high, 4),
        "verdict": audit.decision.verdict,
    }


def _table(audits: Mapping[str, Audit]) -> str:
    lines = [
        "| model | members / held-outs reported on | strongest attack | patient-level AUC | TPR at 1 % FPR | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for name, audit in audits.items():
        evidence = audit.evidence
        attack = evidence.attacks[evidence.strongest]
        auc, point = attack.outcome.patient_auc, attack.outcome.points[1]
        tpr = point.note or (
            f"{point.tpr.estimate:.0%} ({point.tpr.low:.0%} to {point.tpr.high:.0%})" if point.tpr else ""
        )
        lines.append(
            f"| {name} | {evidence.report_members} / {evidence.report_held_out} | {attack.title} | {auc.estimate:.3f} "
            f"({auc.low:.3f} to {auc.high:.3f}) | {tpr} | {audit.decision.verdict} |"
        )
    for name, audit in audits.items():
        lines += [f"{name}: {r.verdict}: {r.test}: {r.found}" for r in audit.decision.reasons]
    return "\n".join(lines)


def _overfitted(out: Path, experiment: ExperimentConfig, cohort: Cohort, device: torch.device) -> Path:
    """Few patients, long training."""
    file = out / "overfit.safetensors"
    if file.is_file():
        return file
    rounds = 10
    training = replace(experiment.training, steps_per_round=OVERFIT_STEPS // rounds)
    config = replace(experiment, training=training, federation=FederationConfig(rounds=rounds))
    network = build_network(config.network, spatial_dims=config.preprocess.spatial_dims, seed=config.seed)
    weights = dict(network.state_dict())
    state: Mapping[str, torch.Tensor] = {}
    for number in tqdm(range(rounds), desc="overfitting", unit="round"):
        update = train_round(
            cohort=cohort,
            weights=weights,
            state=state,
            config=config,
            site="site-1",
            round_number=number,
            device=device,
        )
        weights = {name: tensor + update.difference[name] for name, tensor in weights.items()}
        state = update.state
    save_model(file, ModelFile(experiment=config, rounds_done=rounds, weights=weights, ema=weights))
    return file


def _untrained(out: Path, experiment: ExperimentConfig) -> Path:
    file = out / "untrained.safetensors"
    # Another seed than the control's: that is untrained, too.
    network = build_network(experiment.network, spatial_dims=experiment.preprocess.spatial_dims, seed=1)
    weights = dict(network.state_dict())
    save_model(file, ModelFile(experiment=experiment, rounds_done=0, weights=weights, ema=weights))
    return file


def _private(out: Path, experiment: ExperimentConfig, cohort: Cohort, device: torch.device) -> Path:
    """The plan of jobs/ct_ddpm_dp, at the same epsilon, for as many patients as there are."""
    file = out / "dp.safetensors"
    if file.is_file():
        return file
    job = ExperimentConfig.of_job(REPOSITORY / "jobs/ct_ddpm_dp")
    assert job.privacy is not None
    patients = int((~cohort.held_out).sum())
    privacy: PrivacyConfig = replace(job.privacy, patients=patients, delta=0.01, mean_image=None)
    config = replace(
        job, preprocess=experiment.preprocess, privacy=privacy, federation=replace(job.federation, rounds=5)
    )
    plan = privacy_plan(config)
    assert plan is not None
    network = build_network(config.network, spatial_dims=config.preprocess.spatial_dims, seed=config.seed)
    weights = dict(network.state_dict())
    state: Mapping[str, torch.Tensor] = {}
    for number in tqdm(range(config.federation.rounds), desc="training privately", unit="round"):
        update = train_private_round(
            cohort=cohort,
            weights=weights,
            state=state,
            config=config,
            plan=plan,
            round_number=number,
            device=device,
            patients_in_memory=32,
        )
        weights = {name: tensor + update.difference[name] for name, tensor in weights.items()}
        state = update.state
    save_model(file, ModelFile(experiment=config, rounds_done=5, weights=weights, ema=weights))
    return file


def _dp_job(out: Path) -> Path:
    """jobs/ct_ddpm_dp, in a folder of its own."""
    base = out / "dp_job"
    shutil.copytree(REPOSITORY / "simulator_workspace/local", base / "simulator_workspace/local", dirs_exist_ok=True)
    if not list((base / "runs").glob("ct_ddpm_dp/*/receipt.json")):
        command = [Path(sys.executable).with_name("nvflare"), "simulator", REPOSITORY / "jobs/ct_ddpm_dp"]
        subprocess.run(command, cwd=base, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True)
    return newest_run(base / "runs", "ct_ddpm_dp")


def _large_cohorts(run: Path) -> dict[str, Cohort]:
    site_file = run.resolve().parents[2] / "simulator_workspace/local/fedct.toml"
    experiment = load_model(run / "model.safetensors").experiment
    sites = {name: load_site(site_file, name) for name in LARGE}
    return {
        name: prepare_cohort(
            source=site.source, preprocess=experiment.preprocess, limits=site.limits, home=site.home, progress=True
        )
        for name, site in sites.items()
    }


def _real_patients(out: Path) -> Path:
    """Links to the patients' folders, so that what lies beside them is left out."""
    folder = out / "scans"
    folder.mkdir(exist_ok=True)
    for patient in sorted(p for p in SCANS.iterdir() if p.name.startswith(("STS", "TCGA"))):
        if not (folder / patient.name).exists():
            (folder / patient.name).symlink_to(patient)
    return folder


if __name__ == "__main__":
    main()
