"""A job, unchanged but for the voxel size, on the real scans of ../shared/ct: three sites, DICOM and NIfTI mixed.

    python tests/benchmarks/real_scans.py OUT [--job jobs/ct_ddpm_3d] [--spacing-mm 5.5] [--threads N]

Splits the patients among three sites (links, no copies), runs `nvflare simulator` and compares the model's samples
with the pooled held-out patients. OUT gets job/, runs/, sites/, a table and a picture (which shows patients). A job on
volumes takes the patients who have some, crops of thighs and hips mostly, whom other voxels fit than the job's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from custom.config import EXPERIMENT_FILE
from custom.run_folder import check_receipt, newest_run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from policies import policy_toml

REPOSITORY = Path(__file__).resolve().parents[2]
SCANS = REPOSITORY.parent / "shared" / "ct"


def main() -> None:
    """Split, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that this leaves")
    parser.add_argument("--job", type=Path, default=REPOSITORY / "jobs/ct_ddpm", help="default: jobs/ct_ddpm")
    parser.add_argument("--spacing-mm", type=float, help="edge of a voxel, for a job on volumes")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads of a site (default: %(default)s)")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    job = out / "job" / options.job.name
    shutil.copytree(options.job, job, dirs_exist_ok=True)
    file = job / "app" / "config" / EXPERIMENT_FILE
    experiment = json.loads(file.read_text(encoding="utf-8"))
    volumes = experiment["preprocess"]["spatial_dims"] == 3
    if options.spacing_mm is not None:
        experiment["preprocess"]["spacing_mm"] = [options.spacing_mm] * 3
        file.write_text(json.dumps(experiment, indent=2) + "\n", encoding="utf-8")
    _, *sites = json.loads((job / "meta.json").read_text(encoding="utf-8"))["deploy_map"]["app"]
    have = ("STS",) if volumes else ("STS", "TCGA")  # of the latter there is one slice each
    patients = sorted(folder for folder in SCANS.iterdir() if folder.name.startswith(have))
    text = '[server]\nruns = "runs"\n'
    for number, site in enumerate(sites):
        folder = out / "scans" / site
        folder.mkdir(parents=True, exist_ok=True)
        for patient in patients[number :: len(sites)]:
            if not (folder / patient.name).exists():
                (folder / patient.name).symlink_to(patient)
        text += f'\n[sites.{site}]\nhome = "sites/{site}"\ndata = {{ folder = "scans/{site}" }}\n'
        text += f"hardware = {{ threads = {options.threads} }}\n{policy_toml()}\n"
    site_file = out / "sites.toml"
    site_file.write_text(text, encoding="utf-8")
    local = out / "workspace" / "local"
    local.mkdir(parents=True, exist_ok=True)
    shutil.copy(REPOSITORY / "simulator_workspace/local/resources.json", local)
    binaries = Path(sys.executable).parent
    subprocess.run(
        [binaries / "nvflare", "simulator", job, "-w", out / "workspace"],
        env=os.environ | {"FEDCT_SITE_FILE": str(site_file)},
        check=True,
    )
    run = newest_run(out / "runs", experiment["name"])
    check_receipt(run)
    count = "32" if volumes else "128"
    command = [binaries / "fedct", "evaluate", run / "model.safetensors", "--site-file", site_file, "--count", count]
    for site in sites:
        command += ["--site", site]
    subprocess.run([*command, "--picture", out / "real_and_generated.png"], check=True)


if __name__ == "__main__":
    main()
