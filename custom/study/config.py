"""What a study runs: suites of cases, each of which differs from its suite's base in what it names.

A suite has one dataset, one base and its cases; tables say which cases are shown side by side. Everything is resolved
and checked when the file is read: a study that starts asks for nothing impossible.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from custom.config import ExperimentConfig
from custom.model_config import NAME
from custom.strict import ConfigError, build, require
from custom.study.datasets import FEWEST_PATIENTS, DatasetConfig
from medical_data.cache import canonical_json

RESULT_FORMAT = 1  # goes up when the same configuration comes to mean other numbers
BASE = "base"
CASE_NAME = re.compile(r"[^\s|$`]([^\n\r\t|$`]{0,58}[^\s|$`])?")
FIGURE_NAMES = ("frontier", "bands")  # the figures that every suite has


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Sites that do not do as they are told.

    Attributes:
        kind: see :mod:`custom.study.attackers`.
        sites: how many of the sites.
        scale: of what they send.
    """

    kind: Literal["sign_flip", "backdoor", "generated", "nan"]
    sites: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        require(self.sites >= 1, argument="attack.sites", value=self.sites, remedy="give at least 1, or no attack")
        require(self.scale > 0, argument="attack.scale", value=self.scale, remedy="give a positive factor")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training, but for its seed.

    Attributes:
        suite: to which it belongs.
        name: within the suite, as figures show it.
        kind: ``federated``; ``central`` trains on all sites' patients together, ``local`` at each site alone.
        sites: among which the training patients are divided.
        alpha: concentration of the labels' Dirichlet draw over the sites (arXiv:1909.06335); None spreads patients
            uniformly.
        attack: sites that are malicious, or None.
        seeds: of its runs.
        images: samples drawn for the metrics.
        experiment: the training; a run's seed takes the place of ``experiment.seed``.
        dataset: the patients.
    """

    suite: str
    name: str
    kind: Literal["federated", "central", "local"]
    sites: int
    alpha: float | None = None
    attack: AttackConfig | None = None
    seeds: tuple[int, ...]
    images: int = 256
    experiment: ExperimentConfig
    dataset: DatasetConfig

    def __post_init__(self) -> None:
        _require_name(self.suite, "suite")
        remedy = "give 1 to 60 characters without '|', '$' and '`'"
        require(CASE_NAME.fullmatch(self.name) is not None, argument="case", value=self.name, remedy=remedy)
        _require_seeds(self.seeds)
        require(self.images >= 2, argument="images", value=self.images, remedy="give at least 2")
        divided, remedy = self.alpha is None or self.alpha > 0, "give a positive number, or null"
        require(divided, argument="alpha", value=self.alpha, remedy=remedy)
        audit, federation = self.experiment.audit, self.experiment.federation
        require(audit is None, argument="experiment.audit", value=audit, remedy="leave it out: a study trains")
        most = self.dataset.train // FEWEST_PATIENTS
        remedy = f"give 1 to {most}: each of them needs {FEWEST_PATIENTS} of dataset.train = {self.dataset.train}"
        require(1 <= self.sites <= most, argument="sites", value=self.sites, remedy=remedy)
        if self.kind == "federated":
            fewest = max(federation.min_responses, federation.clients_per_round or 0)
            remedy = f"give at least {fewest}: experiment.federation asks for as many in a round"
            require(self.sites >= fewest, argument="sites", value=self.sites, remedy=remedy)
        if self.attack is not None:
            remedy = f"leave it out of a {self.kind} training: nobody sends anything"
            require(self.kind == "federated", argument="attack", value=self.attack.kind, remedy=remedy)
            honest, remedy = self.attack.sites < self.sites, f"give fewer than the {self.sites} sites"
            require(honest, argument="attack.sites", value=self.attack.sites, remedy=remedy)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types of all fields; paths as text."""
        text = json.dumps(dataclasses.asdict(self), default=str, allow_nan=False)
        return typing.cast(dict[str, Any], json.loads(text))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A case with one of its seeds."""

    case: Case
    seed: int

    def __str__(self) -> str:
        return f"{self.case.suite}/{self.case.name}, seed {self.seed}"

    @property
    def experiment(self) -> ExperimentConfig:
        """The case's, with this run's seed."""
        return dataclasses.replace(self.case.experiment, seed=self.seed)

    @property
    def key(self) -> str:
        """Names the result: 16 hexadecimal digits that depend on all that decides the numbers, and on no name of ours.

        Identical cases therefore share a result, and a renamed one keeps its own. Values that are None do not count,
        so that a new optional block of the experiment changes no key.
        """
        values = {name: value for name, value in self.case.to_json().items() if name not in ("suite", "name", "seeds")}
        text = canonical_json({"format": RESULT_FORMAT, "seed": self.seed, "case": _without_none(values)})
        return hashlib.sha256(text).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Cases on one dataset.

    Attributes:
        name: of the suite.
        cases: the base first, then the others as the file has them.
        tables: names of cases by name of the table.
    """

    name: str
    cases: tuple[Case, ...]
    tables: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        known = [case.name for case in self.cases]
        remedy = 'give one case of each name; "base" is there already'
        require(len(set(known)) == len(known), argument=f"{self.name}.cases", value=known, remedy=remedy)
        for table, cases in self.tables.items():
            argument = f"{self.name}.tables.{table}"
            _require_name(table, f"{self.name}.tables")
            remedy = "give another name: every suite has a figure of this one"
            require(table not in FIGURE_NAMES, argument=argument, value=list(cases), remedy=remedy)
            once = len(cases) > 0 and len(set(cases)) == len(cases)
            require(once, argument=argument, value=list(cases), remedy="name at least one case, and each once")
            for name in cases:
                require(name in known, argument=argument, value=name, remedy=f"unknown; known are {known}")

    def case(self, name: str) -> Case:
        """The case of that name."""
        return next(case for case in self.cases if case.name == name)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number of each run of a case."""

    case: str
    metric: str


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One inequality.

    Attributes:
        statement: in words.
        suite: whose cases.
        form: ``ratio``: this / other; ``difference``: this - other; ``closed``: how much of the way from ``start`` to
            other this has gone, (start - this) / (start - other).
        this: what is judged.
        other: against what.
        start: of ``closed``.
        at_most: bound from above, or None.
        at_least: bound from below, or None; one of the two is given.
        significant: whether missing the bound counts only if the 95 % interval over the seeds lies beyond it.
    """

    statement: str
    suite: str
    form: Literal["ratio", "difference", "closed"]
    this: Figure
    other: Figure
    start: Figure | None = None
    at_most: float | None = None
    at_least: float | None = None
    significant: bool = False

    def __post_init__(self) -> None:
        one, remedy = (self.at_most is None) != (self.at_least is None), "give at_most or at_least, and not both"
        require(one, argument="goals.at_most", value=self.at_most, remedy=remedy)
        given, remedy = (self.start is not None) == (self.form == "closed"), "give it with closed, and only there"
        require(given, argument="goals.start", value=self.start, remedy=remedy)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """All that it needs."""
        return (self.this, self.other) if self.start is None else (self.this, self.other, self.start)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Suites that run in one process pool, with results in one folder.

    Attributes:
        name: of the study.
        suites: as the file has them.
        goals: what it is to show.
    """

    name: str
    suites: tuple[Suite, ...]
    goals: tuple[Goal, ...] = ()

    def __post_init__(self) -> None:
        _require_name(self.name, "name")
        names = [suite.name for suite in self.suites]
        once = len(names) > 0 and len(set(names)) == len(names)
        require(once, argument="suites", value=names, remedy="give at least one suite, and one of each name")
        known = {suite.name: [case.name for case in suite.cases] for suite in self.suites}
        for goal in self.goals:
            remedy = f"no such suite; known are {names}"
            require(goal.suite in known, argument="goals.suite", value=goal.suite, remedy=remedy)
            for figure in goal.figures:
                remedy = f"no such case; known are {known[goal.suite]}"
                require(figure.case in known[goal.suite], argument="goals.case", value=figure.case, remedy=remedy)

    def runs(self) -> tuple[Run, ...]:
        """All runs: each case with its first seed, then each with its second, … so that half a study says something."""
        cases = [case for suite in self.suites for case in suite.cases]
        most = max(len(case.seeds) for case in cases)
        return tuple(
            Run(case=case, seed=case.seeds[number])
            for number in range(most)
            for case in cases
            if number < len(case.seeds)
        )

    def select(self, only: Sequence[str]) -> tuple[Run, ...]:
        """The runs of some suites and cases, in the order of :meth:`runs`.

        Args:
            only: ``SUITE`` or ``SUITE/CASE`` each; none selects all.

        Raises:
            ConfigError: there is no such suite or case.
        """
        for each in only:
            name, _, case = each.partition("/")
            suite = next((suite for suite in self.suites if suite.name == name), None)
            remedy = f"no such suite; known are {[suite.name for suite in self.suites]}"
            require(suite is not None, argument="--only", value=each, remedy=remedy)
            known = [] if suite is None else [case.name for case in suite.cases]
            remedy = f"no such case; known are {known}"
            require("/" not in each or case in known, argument="--only", value=each, remedy=remedy)
        return tuple(
            run
            for run in self.runs()
            if not only or run.case.suite in only or f"{run.case.suite}/{run.case.name}" in only
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StudyConfig:
        """Build from plain JSON types, merging each case into its suite's base.

        Raises:
            ConfigError: an unknown, missing, mistyped or impossible value, by name.
        """
        _require_keys(values, "study", needed=("name", "seeds", "suites"), optional=("goals",))
        _require_object(values["suites"], "suites")
        suites = tuple(_suite(name, suite, values["seeds"]) for name, suite in values["suites"].items())
        study = build(_Study, {name: value for name, value in values.items() if name != "suites"}, "study")
        return StudyConfig(name=study.name, suites=suites, goals=study.goals)

    @classmethod
    def load(cls, file: Path) -> StudyConfig:
        """Read a study's JSON file.

        Raises:
            ConfigError: no file, no JSON, a name twice, or a value that cannot be meant.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"study = {str(file)!r}: give a readable JSON file ({error})") from error
        return cls.from_json(values)


@dataclass(frozen=True, kw_only=True)
class _Study:
    """The study's own values, for :func:`custom.strict.build` to check their types."""

    name: str
    seeds: tuple[int, ...]
    goals: tuple[Goal, ...] = ()

    def __post_init__(self) -> None:
        _require_seeds(self.seeds)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A nested JSON object with some of its values changed.

    Args:
        base: stays as it is.
        changes: objects are merged into objects; anything else, null too, takes the old value's place.
    """
    result = dict(base)
    for name, value in changes.items():
        old = result.get(name)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        result[name] = merged(typing.cast(Mapping[str, Any], old), value) if both else value
    return result


def _suite(name: str, values: Any, seeds: Any) -> Suite:
    """A suite of the file; ``seeds`` are the study's."""
    where = f"suites.{name}"
    _require_keys(values, where, needed=("dataset", "base"), optional=("cases", "tables"))
    others, tables = values.get("cases", {}), values.get("tables", {})
    for part, value in (("base", values["base"]), ("cases", others), ("tables", tables)):
        _require_object(value, f"{where}.{part}")
    require(BASE not in others, argument=f"{where}.cases", value=BASE, remedy="give another name: the base is a case")
    cases = []
    for case, changes in {BASE: {}, **others}.items():
        _require_object(changes, f"{where}.cases.{case}")
        resolved = merged({"seeds": seeds, **values["base"]}, changes)
        cases.append(_case(name, case, resolved, values["dataset"]))
    for table, names in tables.items():
        listed = isinstance(names, list | tuple) and all(isinstance(each, str) for each in names)
        require(listed, argument=f"{where}.tables.{table}", value=names, remedy="give a JSON array of case names")
    return Suite(name=name, cases=tuple(cases), tables={table: tuple(names) for table, names in tables.items()})


def _case(suite: str, name: str, values: Mapping[str, Any], dataset: Any) -> Case:
    fields = {field.name for field in dataclasses.fields(Case)} - {"suite", "name", "dataset"}
    try:
        _require_keys(values, BASE, needed=("experiment", "kind", "sites"), optional=tuple(fields))
        _require_object(values["experiment"], "experiment")
        experiment = ExperimentConfig.from_json(values["experiment"]).to_json()  # a network's preset is spelled out
        resolved = {**values, "experiment": experiment, "dataset": dataset, "suite": suite, "name": name}
        return build(Case, resolved, "case")
    except ConfigError as error:
        raise ConfigError(f"{suite}/{name}: {error}") from error


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(each) for name, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name comes twice; JSON itself would keep the last in silence."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        require(name not in values, argument=name, value=value, remedy="is there twice; give it once")
        values[name] = value
    return values


def _require_object(value: Any, argument: str) -> None:
    require(isinstance(value, Mapping), argument=argument, value=value, remedy="give a JSON object")


def _require_keys(values: Any, where: str, *, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    _require_object(values, where)
    known = sorted({*needed, *optional})
    for name in values:
        remedy = f"unknown; known are {known}"
        require(name in known, argument=f"{where}.{name}", value=values[name], remedy=remedy)
    for name in needed:
        require(name in values, argument=f"{where}.{name}", value=None, remedy="missing; give it")


def _require_name(value: str, argument: str) -> None:
    remedy = "give letters, digits, '_' and '-' only: files are named after it"
    require(NAME.fullmatch(value) is not None, argument=argument, value=value, remedy=remedy)


def _require_seeds(seeds: tuple[int, ...]) -> None:
    once = len(seeds) > 0 and len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    require(once, argument="seeds", value=list(seeds), remedy="give at least one in 0 … 2³²-1, and each once")
