"""A release needs an audit of this very model, over these very patients, that every site accepts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pydicom
import pytest
import torch

from custom import release as module
from custom.audit_evidence import claimed_privacy, model_identity
from custom.cli import main
from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.model_file import ModelFile, load_model, save_checkpoint, save_model
from custom.release import ReleaseRefused, check_release, release
from custom.run_folder import file_sha256
from medical_data.cohort import DataLimits, EmbeddedSource, prepare_cohort
from privacy.audit.decision import DecisionRule
from privacy.audit.evidence import CohortIdentity, CopyOutcome, Evidence
from privacy.audit.policy import AuditPolicy
from privacy.audit.report.document import audit_of, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "privacy" / "audit"))
from evidence_example import claimed, clean, control

CPU = torch.device("cpu")
MANIFEST = "a" * 64
SITES = {"site-1": (MANIFEST, AuditPolicy())}


@dataclass(frozen=True)
class Made:
    model: ModelFile
    file: Path
    evidence: Evidence


@pytest.fixture(scope="module")
def made(experiment: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model and evidence that clears it."""
    weights = dict(build_network(experiment.network, spatial_dims=2, seed=1).state_dict())
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(file, ModelFile(experiment=experiment, rounds_done=2, weights=weights, ema=weights))
    identity = model_identity(load_model(file), file_sha256(file))
    cohort = CohortIdentity(site="site-1", manifest_sha256=MANIFEST, members=500, held_out=500, images=2000)
    copies = CopyOutcome(
        method="embedding",
        samples=6,
        copies=2,
        copies_matched=2.0,
        control_matched=2.0,
        p_value=0.5,
        withhold=(1, 4),
    )
    return Made(load_model(file), file, clean(model=identity, cohorts=(cohort,), copies=(copies,)))


def check(made: Made, evidence: Evidence | None = None, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "model_sha256": made.evidence.model.model_sha256,
        "config_sha256": made.evidence.model.config_sha256,
        "sites": SITES,
    }
    check_release(evidence or made.evidence, **(arguments | changes))


def test_a_cleared_model_passes(made: Made) -> None:
    check(made)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_sha256": "0" * 64}, "audit this very model"),
        ({"config_sha256": "0" * 64}, "audit this very model"),
        ({"sites": {**SITES, "site-2": (MANIFEST, AuditPolicy())}}, "does not cover their patients"),
        ({"sites": {"site-1": ("b" * 64, AuditPolicy())}}, "are others today"),
        (
            {"sites": {"site-1": (MANIFEST, AuditPolicy(rule=DecisionRule(green_auc=0.55)))}},
            "accepts \\['GREEN'\\] by its own cut-offs",
        ),
        ({"sites": {"site-1": (MANIFEST, AuditPolicy(accept=()))}}, "accepts \\[\\]"),
    ],
)
def test_what_does_not_fit_is_refused(made: Made, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ReleaseRefused, match=words):
        check(made, **changes)


def test_every_site_that_the_model_knows_is_asked(made: Made) -> None:
    other = replace(made.evidence.cohorts[0], site="site-2")
    with pytest.raises(ReleaseRefused, match=r"\['site-2'\], too; name every site"):
        check(made, replace(made.evidence, cohorts=(*made.evidence.cohorts, other)))


def test_an_audit_under_masks_knows_no_manifest(made: Made) -> None:
    masked = replace(made.evidence.cohorts[0], manifest_sha256="")
    with pytest.raises(ReleaseRefused, match="summed under masks"):
        check(made, replace(made.evidence, cohorts=(masked,)))


@pytest.mark.parametrize("accept", [("GREEN", "AMBER", "RED")])
def test_an_invalid_audit_releases_nothing_whatever_is_accepted(made: Made, accept: tuple[Any, ...]) -> None:
    sites = {"site-1": (MANIFEST, AuditPolicy(accept=accept))}
    check(made, sites=sites)
    with pytest.raises(ReleaseRefused, match="INVALID"):
        check(made, replace(made.evidence, controls=(control("untrained", False),)), sites=sites)


def test_no_site_is_not_every_site(made: Made) -> None:
    with pytest.raises(ReleaseRefused, match="name every site"):
        check(made, replace(made.evidence, cohorts=()), sites={})


@pytest.mark.parametrize("first", [True, False])
def test_a_site_that_is_covered_twice_must_be_the_same_twice(made: Made, first: bool) -> None:
    now = made.evidence.cohorts[0]
    stale = replace(now, manifest_sha256="b" * 64)
    with pytest.raises(ReleaseRefused, match="are others today"):
        check(made, replace(made.evidence, cohorts=(stale, now) if first else (now, stale)))


def test_no_policy_accepts_an_invalid_audit(made: Made) -> None:
    policy = AuditPolicy()
    object.__setattr__(policy, "accept", ("GREEN", "INVALID"))  # the constructor refuses it
    with pytest.raises(ReleaseRefused, match="no policy can accept"):
        check(made, replace(made.evidence, controls=()), sites={"site-1": (MANIFEST, policy)})


def released(made: Made, out: Path, **changes: Any) -> list[int]:
    arguments: dict[str, Any] = {"sites": SITES, "form": "weights", "count": 6, "device": CPU}
    evidence = changes.pop("evidence", made.evidence)
    model = changes.pop("model", made.model)
    return release(model, made.file, audit_of(evidence, DecisionRule()), out, **(arguments | changes))


def test_weights_leave_with_card_audit_and_hashes(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert released(made, out) == []
    assert file_sha256(out / "model.safetensors") == file_sha256(made.file)
    receipt = json.loads((out / "release.json").read_text())
    assert set(receipt["files"]) == {"model.safetensors", "audit.json", "MODEL_CARD.md"}
    for name, sha256 in receipt["files"].items():
        assert file_sha256(out / name) == sha256
    card = (out / "MODEL_CARD.md").read_text()
    assert "no leakage detected by these attacks at this power" in card.lower()
    assert "anonym" not in card.lower()
    assert made.evidence.model.model_sha256 in card


def test_samples_that_are_too_close_stay(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert released(made, out, form="dicom") == [1, 4]
    files = sorted((out / "samples").rglob("*.dcm"))
    assert len(files) == 4
    names = {pydicom.dcmread(file).SeriesInstanceUID for file in files}
    assert len(names) == 4
    assert all(pydicom.dcmread(file).SyntheticData == "YES" for file in files)
    everything = released(made, tmp_path / "all", form="dicom", evidence=_nothing_withheld(made))
    assert everything == []
    pixels = [pydicom.dcmread(f).PixelData for f in sorted((tmp_path / "all/samples").rglob("*.dcm"))]
    kept = [pydicom.dcmread(f).PixelData for f in files]
    assert kept == [pixels[index] for index in (0, 2, 3, 5)]


def test_a_sample_is_named_by_its_own_index(made: Made, tmp_path: Path) -> None:
    released(made, tmp_path / "out", form="dicom")
    files = sorted((tmp_path / "out").rglob("*.dcm"))
    assert [file.parent.name for file in files] == [f"sample_000{index}" for index in (0, 2, 3, 5)]
    said = [pydicom.dcmread(file).DerivationDescription.rsplit(" ", 1)[-1] for file in files]
    assert said == ["0", "2", "3", "5"]


def test_a_checkpoint_is_not_what_was_attacked(made: Made, tmp_path: Path) -> None:
    raw = {name: tensor + 1 for name, tensor in made.model.weights.items()}
    for number, part in enumerate(({"weights": raw}, {"optimizer": {"step": torch.ones(1)}})):
        file = tmp_path / f"{number}.safetensors"
        save_checkpoint(file, replace(made.model, **part))
        evidence = replace(made.evidence, model=model_identity(load_model(file), file_sha256(file)))
        with pytest.raises(ReleaseRefused, match="it is a checkpoint"):
            released(replace(made, model=load_model(file), file=file), tmp_path / "out", evidence=evidence)


def test_a_file_that_changes_meanwhile_is_not_released(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "copyfile", lambda _, to: to.write_bytes(b"another"))
    with pytest.raises(ReleaseRefused, match="changed while it was copied"):
        released(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda e: replace(e, privacy=claimed(7.9)),
        lambda e: replace(e, model=replace(e.model, rounds_done=3)),
        lambda e: replace(e, model=replace(e.model, schedule_sha256="0" * 64)),
    ],
)
def test_the_card_repeats_no_false_claim(made: Made, tmp_path: Path, spoil: Callable[[Evidence], Evidence]) -> None:
    with pytest.raises(ReleaseRefused, match="the model itself says otherwise"):
        released(made, tmp_path / "out", evidence=spoil(made.evidence))


def test_what_is_claimed_stands_in_the_card(made: Made, private_experiment: ExperimentConfig, tmp_path: Path) -> None:
    released(made, tmp_path / "plain")
    assert "no differential privacy" in (tmp_path / "plain" / "MODEL_CARD.md").read_text()
    file = tmp_path / "private.safetensors"
    save_model(file, replace(made.model, experiment=private_experiment))
    model = load_model(file)
    privacy = claimed_privacy(model, lower_bounds=(), commitment=None)
    assert privacy is not None
    evidence = replace(made.evidence, model=model_identity(model, file_sha256(file)), privacy=privacy)
    private = replace(made, model=model, file=file)
    released(private, tmp_path / "private", evidence=evidence)
    assert f"ε = {privacy.epsilon:.2f}" in (tmp_path / "private" / "MODEL_CARD.md").read_text()
    with pytest.raises(ReleaseRefused, match="the model itself says otherwise"):
        released(private, tmp_path / "less", evidence=replace(evidence, privacy=replace(privacy, epsilon=0.5)))


def test_a_sites_worse_verdict_stands_in_the_card(made: Made, tmp_path: Path) -> None:
    strict = AuditPolicy(accept=("GREEN", "AMBER"), rule=DecisionRule(green_auc=0.55))
    released(made, tmp_path / "out", sites={"site-1": (MANIFEST, strict)})
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "**GREEN.**" in card
    assert "**AMBER**" in card
    assert "at most 0.55" in card


def _nothing_withheld(made: Made) -> Evidence:
    (copies,) = made.evidence.copies
    return replace(made.evidence, copies=(replace(copies, withhold=(), copies=0),))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": 7}, "screened samples 0 … 5"),
        ({"count": 0}, "screened samples 0 … 5"),
        ({"evidence": lambda e: replace(e, copies=())}, "no samples were screened"),
        (
            {"evidence": lambda e: replace(e, copies=(replace(e.copies[0], withhold=tuple(range(6))),))},
            "every one of them is withheld",
        ),
    ],
)
def test_samples_that_were_not_screened_are_refused(
    made: Made, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    spoil: Callable[[Evidence], Evidence] | None = changes.pop("evidence", None)
    evidence = made.evidence if spoil is None else spoil(made.evidence)
    sites = {"site-1": (MANIFEST, AuditPolicy(accept=("GREEN", "AMBER")))}
    with pytest.raises(ReleaseRefused, match=words):
        released(made, tmp_path / "out", form="dicom", evidence=evidence, sites=sites, **changes)
    assert not list(tmp_path.iterdir())


def test_volumes_leave_as_series_of_their_true_size(made: Made, tmp_path: Path) -> None:
    """A model of volumes, of which two samples are withheld."""
    flat = made.model.experiment
    preprocess = replace(flat.preprocess, spatial_dims=3, spacing_mm=(6.5, 13.0, 12.5))
    experiment = replace(flat, preprocess=preprocess)
    weights = dict(build_network(experiment.network, spatial_dims=3, seed=1).state_dict())
    file = tmp_path / "volumes.safetensors"
    save_model(file, ModelFile(experiment=experiment, rounds_done=2, weights=weights, ema=weights))
    model = load_model(file)
    evidence = replace(made.evidence, model=model_identity(model, file_sha256(file)))
    solid = replace(made, model=model, file=file, evidence=evidence)
    out = tmp_path / "out"
    assert released(solid, out, form="dicom") == [1, 4]
    folders = sorted((out / "samples").iterdir())
    assert [folder.name for folder in folders] == [f"sample_000{index}" for index in (0, 2, 3, 5)]
    for folder in folders:
        headers = [pydicom.dcmread(slice_) for slice_ in sorted(folder.iterdir())]
        assert len(headers) == 16
        assert len({header.SeriesInstanceUID for header in headers}) == 1
        assert {header.SyntheticData for header in headers} == {"YES"}
        assert {tuple(header.PixelSpacing) for header in headers} == {(13, 12.5)}
        assert [header.ImagePositionPatient[2] for header in headers] == [6.5 * index for index in range(16)]
    receipt = json.loads((out / "release.json").read_text())
    assert len([name for name in receipt["files"] if name.endswith(".dcm")]) == 4 * 16
    card = (out / "MODEL_CARD.md").read_text()
    assert "Synthetic CT volumes" in card
    assert "16×16×16 voxels" in card
    assert "a voxel is 6.5×13×12.5 mm (D×H×W) and lengths are true" in card
    assert "no body is scaled, a volume shows a patch of one" in card
    assert "lengths mean nothing" not in card


def test_the_card_of_slices_warns_of_lengths(made: Made, tmp_path: Path) -> None:
    released(made, tmp_path / "out", form="dicom")
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "Synthetic CT slices" in card
    assert "16×16 pixels" in card
    assert "every body is scaled to the frame, so lengths mean nothing" in card
    headers = [pydicom.dcmread(file) for file in sorted((tmp_path / "out").rglob("*.dcm"))]
    assert {tuple(header.PixelSpacing) for header in headers} == {(6, 6)}


def test_nothing_is_overwritten(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ReleaseRefused, match="new"):
        released(made, tmp_path)


# ---- the command


@pytest.fixture
def typed(made: Made, tmp_path: Path) -> dict[str, Path]:
    """Model, audit and site file of a real, small cohort."""
    source = EmbeddedSource(hospital=0, patients=8, slices=4, matrix=64, seed=1)
    cohort = prepare_cohort(
        source=source, preprocess=made.model.experiment.preprocess, limits=DataLimits(), home=tmp_path / "home"
    )
    identity = replace(made.evidence.cohorts[0], manifest_sha256=cohort.manifest_sha256)
    audit = tmp_path / "audit.json"
    write_json(audit, audit_of(replace(made.evidence, cohorts=(identity,)), DecisionRule()))
    from policies import policy_toml

    site_file = tmp_path / "sites.toml"
    data = "data = { embedded = { hospital = 0, patients = 8, slices = 4, matrix = 64, seed = 1 } }"
    site_file.write_text(f'[sites.site-1]\nhome = "home"\n{data}\n{policy_toml()}\n')
    return {"audit": audit, "site_file": site_file, "out": tmp_path / "out"}


def command(made: Made, typed: dict[str, Path]) -> int:
    return main(
        [
            "release",
            str(made.file),
            str(typed["out"]),
            "--audit",
            str(typed["audit"]),
            "--site-file",
            str(typed["site_file"]),
            "--site",
            "site-1",
            "--as",
            "weights",
        ]
    )


def test_the_command_releases(made: Made, typed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(made, typed) == 0
    assert (typed["out"] / "MODEL_CARD.md").is_file()


def test_the_command_says_no(made: Made, typed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    text = typed["site_file"].read_text()
    typed["site_file"].write_text(text.replace("policy =", "audit = { rule = { green_auc = 0.55 } }\npolicy ="))
    assert command(made, typed) == 1
    assert "refused: verdict = 'AMBER'" in capsys.readouterr().err
    assert not typed["out"].exists()


def test_a_changed_audit_is_not_read(made: Made, typed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(typed["audit"].read_text())
    content["evidence"]["attacks"][0]["adjusted_p"] = 0.001
    typed["audit"].write_text(json.dumps(content))
    assert command(made, typed) == 2
    assert "does not follow" in capsys.readouterr().err
