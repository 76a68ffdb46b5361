"""The wheel, installed outside the checkout, is whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("medical_data", "privacy", "custom", "poc")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"  # a build leaves build/ behind, whose old modules would get into the next wheel
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    # --no-isolation: the build uses the setuptools that is installed, and works without a network.
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", base, source],
        check=True,
        capture_output=True,
    )
    (built,) = base.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    modules = {name for name in tracked if name.endswith((".py", "py.typed", ".yml", ".toml"))}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == modules


def test_installed_outside_the_checkout_it_imports_and_its_command_runs(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel],
        check=True,
    )
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        f"import importlib\nfor name in {PACKAGES!r}:\n"
        "    assert importlib.import_module(name).__file__.startswith(sys.argv[1]), name\n"
        "import custom.controllers.diffusion_fedavg, custom.executors.diffusion_trainer, custom.cli\n"
        "assert custom.cli.__file__.startswith(sys.argv[1])\n"
        "try:\n    custom.cli.main(['--help'])\nexcept SystemExit as end:\n    sys.exit(end.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, target], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in ("data", "sample", "evaluate", "receipt"):
        assert command in done.stdout
