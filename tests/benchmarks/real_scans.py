"""The main job, unchanged, on the real scans of ../shared/ct: three sites, DICOM and NIfTI mixed.

    python tests/benchmarks/real_scans.py OUT [--threads N]

Splits the patients among three sites (links, no copies), runs `nvflare simulator jobs/ct_ddpm` and compares the
model's samples with the pooled held-out patients. OUT gets runs/, sites/, a table and a picture (which shows patients).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from custom.run_folder import check_receipt, newest_run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from policies import policy_toml

REPOSITORY = Path(__file__).resolve().parents[2]
SCANS = REPOSITORY.parent / "shared" / "ct"
SITES = ("site-1", "site-2", "site-3")


def main() -> None:
    """Split, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that this leaves")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads of a site (default: %(default)s)")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    patients = sorted(folder for folder in SCANS.iterdir() if folder.name.startswith(("STS", "TCGA")))
    text = '[server]\nruns = "runs"\n'
    for number, site in enumerate(SITES):
        folder = out / "scans" / site
        folder.mkdir(parents=True, exist_ok=True)
        for patient in patients[number :: len(SITES)]:
            if not (folder / patient.name).exists():
                (folder / patient.name).symlink_to(patient)
        text += f'\n[sites.{site}]\nhome = "sites/{site}"\ndata = {{ folder = "scans/{site}" }}\n'
        text += f"hardware = {{ threads = {options.threads} }}\n{policy_toml()}\n"
    site_file = out / "sites.toml"
    site_file.write_text(text, encoding="utf-8")
    binaries = Path(sys.executable).parent
    subprocess.run(
        [binaries / "nvflare", "simulator", "jobs/ct_ddpm"],
        cwd=REPOSITORY,
        env=os.environ | {"FEDCT_SITE_FILE": str(site_file)},
        check=True,
    )
    run = newest_run(out / "runs", "ct_ddpm")
    check_receipt(run)
    command = [binaries / "fedct", "evaluate", run / "model.safetensors", "--site-file", site_file, "--count", "128"]
    for site in SITES:
        command += ["--site", site]
    subprocess.run([*command, "--picture", out / "real_and_generated.png"], check=True)


if __name__ == "__main__":
    main()
