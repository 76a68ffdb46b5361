"""``fedct release`` as it is typed, over a real small cohort: what it writes, and what it says when it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pydicom
import pytest
import torch
from policies import policy_toml

from custom.audit_evidence import model_identity
from custom.cli import main
from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.model_file import ModelFile, load_model, save_model
from custom.release import Form, ReleaseRefused, release
from custom.run_folder import file_sha256
from medical_data.cohort import DataLimits, EmbeddedSource, prepare_cohort
from privacy.audit.decision import DecisionRule
from privacy.audit.evidence import CohortIdentity, CopyOutcome, Evidence
from privacy.audit.policy import AuditPolicy
from privacy.audit.report.document import audit_of, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "privacy" / "audit"))
from evidence_example import attack, clean, interval

WITHHELD = (0, 3)
MARGIN = (interval(0.51, 0.46, 0.58), interval(0.05, 0.01, 0.2))
SITE = """
[sites.{name}]
home = "home-{name}"
data = {{ embedded = {{ hospital = 0, patients = {patients}, slices = 4, matrix = 64, seed = 1 }} }}
{audit}
{policy}
"""


@dataclass(frozen=True)
class Desk:
    """A model, its audit and a site file in one folder."""

    folder: Path
    model: Path
    evidence: Evidence

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def write_audit(self, evidence: Evidence, name: str = "audit.json") -> Path:
        write_json(self.folder / name, audit_of(evidence, DecisionRule()))
        return self.folder / name

    def write_sites(self, patients: int = 8, audit: str = "", names: tuple[str, ...] = ("site-1",)) -> None:
        tables = [SITE.format(name=name, patients=patients, audit=audit, policy=policy_toml()) for name in names]
        (self.folder / "sites.toml").write_text("".join(tables))

    def run(self, *more: str, form: str = "weights", sites: tuple[str, ...] = ("site-1",)) -> int:
        words = ["release", str(self.model), str(self.out), "--audit", str(self.folder / "audit.json")]
        words += ["--site-file", str(self.folder / "sites.toml"), "--as", form, *more]
        for site in sites:
            words += ["--site", site]
        return main(words)


@pytest.fixture
def desk(experiment: ExperimentConfig, tmp_path: Path) -> Desk:
    model = tmp_path / "model.safetensors"
    weights = dict(build_network(experiment.network, spatial_dims=2, seed=1).state_dict())
    save_model(model, ModelFile(experiment=experiment, rounds_done=2, weights=weights, ema=weights))
    cohort = prepare_cohort(
        source=EmbeddedSource(hospital=0, patients=8, slices=4, matrix=64, seed=1),
        preprocess=experiment.preprocess,
        limits=DataLimits(),
        home=tmp_path / "home-site-1",
    )
    evidence = clean(
        model=model_identity(load_model(model), file_sha256(model)),
        cohorts=(
            CohortIdentity(
                site="site-1", manifest_sha256=cohort.manifest_sha256, members=500, held_out=500, images=2000
            ),
        ),
        copies=(
            CopyOutcome(
                method="pixels",
                samples=5,
                copies=2,
                copies_matched=2.0,
                control_matched=2.0,
                p_value=0.5,
                withhold=WITHHELD,
            ),
        ),
    )
    made = Desk(folder=tmp_path, model=model, evidence=evidence)
    made.write_audit(evidence)
    made.write_sites()
    return made


def test_a_dicom_set_leaves_without_the_samples_that_are_too_close(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.run("--count", "5", form="dicom") == 0
    assert f"withheld: {len(WITHHELD)} samples" in capsys.readouterr().out
    files = sorted((desk.out / "samples").rglob("*.dcm"))
    assert [file.parent.name for file in files] == ["sample_0001", "sample_0002", "sample_0004"]
    assert {pydicom.dcmread(file).SyntheticData for file in files} == {"YES"}
    receipt = json.loads((desk.out / "release.json").read_text())
    there = {file.relative_to(desk.out).as_posix() for file in desk.out.rglob("*") if file.is_file()}
    assert receipt["withheld"] == list(WITHHELD)
    assert set(receipt["files"]) == there - {"release.json"}
    assert all(file_sha256(desk.out / name) == sha256 for name, sha256 in receipt["files"].items())


@pytest.mark.parametrize("form", ["weights", "dicom"])
def test_the_same_release_gives_the_same_bytes(desk: Desk, form: str) -> None:
    folders = []
    for name in ("first", "second"):
        assert desk.run("--count", "5", form=form) == 0
        folders.append(desk.out.rename(desk.folder / name))
    first, second = ({f.relative_to(root): f.read_bytes() for f in root.rglob("*") if f.is_file()} for root in folders)
    assert first == second


@pytest.mark.parametrize("form", ["weights", "dicom"])
@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        (lambda e: e, "GREEN"),
        (lambda e: replace(e, attacks=(attack(MARGIN[0], MARGIN[1]),)), "AMBER"),
        (lambda e: replace(e, attacks=(attack(tpr=interval(0.5, 0.4, 0.6)),)), "RED"),
    ],
)
def test_no_card_calls_a_model_anonymous(
    desk: Desk, form: str, evidence: Callable[[Evidence], Evidence], verdict: str
) -> None:
    audit = audit_of(evidence(desk.evidence), DecisionRule())
    assert audit.decision.verdict == verdict
    desk.write_audit(audit.evidence)
    desk.write_sites(audit='audit = { accept = ["GREEN", "AMBER", "RED"] }')
    assert desk.run("--count", "5", form=form) == 0
    card = (desk.out / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert audit.decision.sentence in card
    assert all(reason.cut_off in card for reason in audit.decision.reasons)
    assert "anonym" not in card.lower()


def other_model(desk: Desk) -> None:
    model = load_model(desk.model)
    other = {name: tensor + 1 for name, tensor in model.weights.items()}
    save_model(desk.model, replace(model, weights=other, ema=other))


def other_config(desk: Desk) -> None:
    identity = replace(desk.evidence.model, config_sha256="0" * 64)
    desk.write_audit(replace(desk.evidence, model=identity))


def invalid(desk: Desk) -> None:
    desk.write_audit(replace(desk.evidence, blind=None))
    desk.write_sites(audit='audit = { accept = ["GREEN", "AMBER", "RED"] }')


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_model, "audit: model_sha256 = "),
        (other_config, "audit: config_sha256 = "),
        (invalid, "verdict = 'INVALID'"),
        (lambda desk: desk.write_sites(patients=9), "the data of site-1 are others today"),
        (lambda desk: desk.write_sites(audit="audit = { rule = { green_auc = 0.55 } }"), "verdict = 'AMBER'"),
        (lambda desk: desk.write_sites(audit="audit = { accept = [] }"), "site-1 accepts []"),
        (lambda desk: desk.out.mkdir(), "out = "),
    ],
)
def test_the_answer_no_is_one_line_and_leaves_nothing(
    desk: Desk, capsys: pytest.CaptureFixture[str], spoil: Callable[[Desk], None], said: str
) -> None:
    spoil(desk)
    before = {path for path in desk.folder.iterdir() if not path.name.startswith("home")}
    assert desk.run() == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refused: ")]
    assert said in line
    assert {path for path in desk.folder.iterdir() if not path.name.startswith("home")} == before


def test_a_site_that_the_audit_does_not_cover_is_no_site_that_accepts(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.write_sites(names=("site-1", "site-2"))
    assert desk.run(sites=("site-1", "site-2")) == 1
    assert "--site = ['site-2']: the audit does not cover" in capsys.readouterr().err
    assert not desk.out.exists()


def test_more_samples_than_were_screened_are_not_drawn(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run("--count", "6", form="dicom") == 1
    assert "--count = 6: the audit screened samples 0 … 4" in capsys.readouterr().err
    assert not desk.out.exists()


def test_of_two_audits_none_is_left_out_of_sight(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    red = replace(desk.evidence, attacks=(attack(tpr=interval(0.5, 0.4, 0.6)),))
    desk.write_audit(red)
    green = desk.write_audit(desk.evidence, "green.json")
    assert desk.run("--audit", str(green)) == 2
    said = capsys.readouterr().err
    assert "--audit = [" in said
    assert "audit.json" in said
    assert "green.json" in said
    assert not desk.out.exists()


@pytest.mark.parametrize("content", [None, "{", '{"version": 1}'])
def test_an_audit_that_cannot_be_read_is_no_audit(
    desk: Desk, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    file = desk.folder / "audit.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    assert desk.run() == 2
    assert capsys.readouterr().err.startswith("fedct: audit.json")
    assert not desk.out.exists()


@pytest.mark.parametrize("form", ["weights", "dicom"])
def test_a_model_in_memory_that_is_not_the_file_is_not_released(desk: Desk, form: Form) -> None:
    model = load_model(desk.model)
    other = {name: tensor + 1 for name, tensor in model.ema.items()}
    with pytest.raises(ReleaseRefused, match="changed after it was loaded"):
        release(
            replace(model, weights=other, ema=other),
            desk.model,
            audit_of(desk.evidence, DecisionRule()),
            desk.out,
            sites={"site-1": (desk.evidence.cohorts[0].manifest_sha256, AuditPolicy())},
            form=form,
            count=5,
            device=torch.device("cpu"),
        )
    assert not desk.out.exists()


def test_a_file_that_changes_after_its_hash_was_taken_is_not_drawn_from(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    audited = file_sha256(desk.model)
    other_model(desk)
    monkeypatch.setattr("custom.release.file_sha256", lambda _: audited)
    with pytest.raises(ReleaseRefused, match="changed after it was loaded"):
        release(
            load_model(desk.model),
            desk.model,
            audit_of(desk.evidence, DecisionRule()),
            desk.out,
            sites={"site-1": (desk.evidence.cohorts[0].manifest_sha256, AuditPolicy())},
            form="dicom",
            count=5,
            device=torch.device("cpu"),
        )
    assert not desk.out.exists()
