"""The one-way order of the rooms, read from the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = ("medical_data", "privacy", "custom", "poc")
GLUE = (
    "custom.executors",
    "custom.controllers",
    "custom.filters",
    "custom.aggregators",
    "custom.launchers",
    "custom.validators",
)

# Module (by prefix) and what it must never import (by prefix). The first prefix that fits a module decides.
FORBIDDEN = {
    "medical_data": ("privacy", "custom", "poc", "nvflare", "opacus"),
    "privacy.accounting": ("medical_data", "custom", "poc", "nvflare", "monai"),  # opacus: ADR 0007
    "privacy.dpsgd": ("medical_data", "custom", "poc", "nvflare", "monai"),
    "privacy": ("medical_data", "custom", "poc", "nvflare", "monai", "opacus"),
    "custom.diffusion": ("custom.training", "custom.codec", "custom.site_file", "poc", "nvflare", "opacus", *GLUE),
    "custom.executors": ("poc", "opacus", "custom.commands", "custom.cli"),
    "custom.controllers": ("poc", "opacus", "custom.commands", "custom.cli"),
    "custom.filters": ("poc", "opacus", "custom.commands", "custom.cli"),
    "custom.aggregators": ("poc", "opacus", "custom.commands", "custom.cli"),
    "custom.launchers": ("poc", "opacus", "custom.commands", "custom.cli"),
    "custom.validators": ("poc", "opacus", "custom.commands", "custom.cli"),
    "custom.codec": ("poc", "opacus", "custom.commands", "custom.cli", *GLUE),
    # Takes the federation apart to put it together again in one process.
    "custom.study": (
        "poc",
        "nvflare",
        "opacus",
        "custom.commands",
        "custom.cli",
        *(set(GLUE) - {"custom.aggregators"}),
    ),
    "custom.cli": ("nvflare", "opacus", *GLUE),
    "custom.commands": ("nvflare", "opacus", *GLUE),
    "custom": ("poc", "nvflare", "opacus", "custom.commands", "custom.cli", "custom.codec", "custom.study", *GLUE),
    "poc": (),
}


def modules() -> Iterator[tuple[str, Path]]:
    for package in OURS:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), file


def imports(source: str) -> Iterator[str]:
    """Every module that is imported anywhere in it, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the order"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def breaches(module: str, source: str) -> list[str]:
    rule = next(rule for rule in FORBIDDEN if below(module, rule))
    return [name for name in imports(source) for never in FORBIDDEN[rule] if below(name, never)]


@pytest.mark.parametrize(("module", "file"), [pytest.param(m, f, id=m) for m, f in modules()])
def test_data_flows_one_way(module: str, file: Path) -> None:
    assert not breaches(module, file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("medical_data.x", "import custom"),
        ("medical_data.x", "def f():\n    from privacy.plan import Plan"),
        ("privacy.x", "import opacus.accountants"),
        ("privacy.dpsgd", "import monai"),
        ("custom.training", "from custom.executors import diffusion_trainer"),
        ("custom.training", "from nvflare.apis.dxo import DXO"),
        ("custom.diffusion.loss", "import custom.training"),
    ],
)
def test_the_rule_can_be_broken(module: str, source: str) -> None:
    assert breaches(module, source)


def test_our_packages_have_no_circles() -> None:
    known = dict(modules())
    graph = {
        module: {name for name in imports(file.read_text(encoding="utf-8")) if name in known and name != module}
        for module, file in known.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module not in done:
            for name in graph[module]:
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
