"""audit.json: evidence, rule and verdict, in a form that other programs can read and that nobody can quietly change.

The verdict is a pure function of evidence and rule, so that whoever reads the file computes it again and refuses a file
that says otherwise.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonschema import Draft202012Validator

from privacy.audit.decision import Decision, DecisionRule, decide
from privacy.audit.errors import BrokenReport
from privacy.audit.evidence import Evidence, Roc
from privacy.errors import PrivacyError

VERSION = 1

_RATE = {"minimum": 0, "maximum": 1}
_NOT_NEGATIVE = {"minimum": 0}

# What numbers may be, by the name of their field; integers not named here must not be negative.
_LIMITS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("estimate", "low", "high", "tpr", "fpr"), _RATE),
    **dict.fromkeys(("p_value", "adjusted_p", "level", "tuning_auc", "target_fpr", "held_out_above_95th"), _RATE),
    **dict.fromkeys(("delta", "confidence", "ceiling_auc", "ceiling_tpr_at_1_percent"), _RATE),
    **dict.fromkeys(("epsilon", "seconds", "evaluations_per_image"), _NOT_NEGATIVE),
    **dict.fromkeys(("flagged_expected", "copies_matched", "control_matched"), _NOT_NEGATIVE),
    "trim": {"minimum": 0, "exclusiveMaximum": 0.5},
    "sign": {"enum": [-1, 1]},
}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """All of audit.json.

    Attributes:
        evidence: what was found.
        rule: the cut-offs.
        decision: what follows from the two.

    Raises:
        BrokenReport: a decision that does not follow, or evidence that contradicts itself.
    """

    evidence: Evidence
    rule: DecisionRule
    decision: Decision

    def __post_init__(self) -> None:
        for argument, value, remedy in _contradictions(self.evidence):
            raise BrokenReport(argument=argument, value=value, remedy=remedy)
        if self.decision != decide(self.evidence, self.rule):
            remedy = "it does not follow from evidence and rule: take the file from whoever made it, or audit again"
            raise BrokenReport(argument="decision", value=self.decision.verdict, remedy=remedy)


def audit_of(evidence: Evidence, rule: DecisionRule) -> Audit:
    """Evidence, rule and the verdict that follows.

    Raises:
        BrokenReport: evidence that contradicts itself.
    """
    for argument, value, remedy in _contradictions(evidence):
        raise BrokenReport(argument=argument, value=value, remedy=remedy)
    return Audit(evidence=evidence, rule=rule, decision=decide(evidence, rule))


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of audit.json, read from the dataclasses; docs/audit.schema.json is a copy."""
    definitions: dict[str, Any] = {}
    properties = {
        "version": {"const": VERSION},
        **{name: _schema_of(hint, name, definitions) for name, hint in get_type_hints(Audit).items()},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Privacy audit of a federated CT diffusion model",
        **_object(properties),
        "$defs": dict(sorted(definitions.items())),
    }


def write_json(file: Path, audit: Audit) -> None:
    """Write audit.json whole or not at all: sorted keys, two spaces, no NaN.

    Raises:
        BrokenReport: numbers out of range.
    """
    document = {"version": VERSION, **asdict(audit)}
    try:
        text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except ValueError as error:
        remedy = "the audit holds a number that is not finite"
        raise BrokenReport(argument=file.name, value="NaN or infinity", remedy=remedy) from error
    _validate(json.loads(text), file.name)
    write_whole(file, text.encode("ascii"))


def load_audit(file: Path) -> Audit:
    """Read audit.json and reach its verdict again.

    Raises:
        BrokenReport: no such JSON, another version, numbers out of range, or a verdict that does not follow.
    """
    document = _parse(file)
    version = document.get("version") if isinstance(document, dict) else None
    if type(version) is not int or version != VERSION:
        remedy = f"read it with the program that wrote it; this one knows version {VERSION}"
        raise BrokenReport(argument=f"{file.name}: version", value=str(version)[:20], remedy=remedy)
    _validate(document, file.name)
    try:
        built = {name: _build(hint, document[name]) for name, hint in get_type_hints(Audit).items()}
        return Audit(**built)
    except BrokenReport:
        raise
    except PrivacyError as error:
        argument = f"{file.name}: {error.argument}"
        raise BrokenReport(argument=argument, value=error.value, remedy=error.remedy) from error


def write_whole(file: Path, content: bytes) -> None:
    """Write a file whole or not at all: a reader sees the old one or the new one."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _contradictions(evidence: Evidence) -> Iterator[tuple[str, object, str]]:
    try:
        datetime.fromisoformat(evidence.created)
    except ValueError:
        yield "created", evidence.created[:40], "give a date as in ISO 8601"
    if not 0 <= evidence.strongest < len(evidence.attacks):
        yield "strongest", evidence.strongest, f"give the index of one of {len(evidence.attacks)} attacks"
    for attack in evidence.attacks:
        if not 0 <= attack.reported < len(attack.seeds):
            yield f"{attack.name}: reported", attack.reported, f"give the index of one of {len(attack.seeds)} seeds"
        if not _is_curve(attack.roc):
            remedy = "give as many of each, rates in [0, 1], fpr ascending and low ≤ tpr ≤ high"
            yield f"{attack.name}: roc", "no curve", remedy
    for copies in evidence.copies:
        if not all(0 <= sample < copies.samples for sample in copies.withhold):
            yield "withhold", copies.withhold, f"give indices below samples = {copies.samples}"


def _is_curve(roc: Roc) -> bool:
    alike = len({len(getattr(roc, field.name)) for field in fields(roc)}) == 1
    ascending = all(before <= after for before, after in pairwise(roc.fpr))
    points = zip(roc.fpr, roc.low, roc.tpr, roc.high, strict=alike)
    return alike and ascending and all(0 <= x <= 1 and 0 <= low <= y <= high <= 1 for x, low, y, high in points)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }


def _schema_of(hint: Any, name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    if is_dataclass(hint):
        title = hint.__name__  # type: ignore[union-attr]
        if title not in definitions:
            definitions[title] = {}
            hints = get_type_hints(hint)
            definitions[title] = _object({key: _schema_of(hints[key], key, definitions) for key in hints})
        return {"$ref": f"#/$defs/{title}"}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return {"anyOf": [_schema_of(argument, name, definitions) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _schema_of(arguments[0], name, definitions)}
    if origin is tuple:
        items = [_schema_of(argument, name, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    kind = {str: "string", bool: "boolean", int: "integer", float: "number", NoneType: "null"}[hint]
    if hint is int:
        return {"type": kind, **_LIMITS.get(name, _NOT_NEGATIVE)}
    return {"type": kind, **_LIMITS.get(name, {})} if hint is float else {"type": kind}


def _build(hint: Any, value: Any) -> Any:
    """A valid JSON value as what the type hint says."""
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{name: _build(hints[name], value[name]) for name in hints})  # type: ignore[operator]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None:
            return None
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return _build(inner, value)
    if origin is tuple:
        repeated = arguments[-1] is Ellipsis
        inners = arguments[:1] * len(value) if repeated else arguments
        return tuple(_build(inner, item) for inner, item in zip(inners, value, strict=True))
    return hint(value) if hint in (int, float) else value


def _parse(file: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError("a number that is not finite")
        return number

    def whole(text: str) -> int:
        finite(text)
        return int(text)

    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_int=whole, parse_constant=finite)
    except OSError as error:
        remedy = "name the audit.json of an audit that ended"
        raise BrokenReport(argument=file.name, value=type(error).__name__, remedy=remedy) from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        remedy = "it is no JSON with unique keys and finite numbers: take the file from whoever made it"
        raise BrokenReport(argument=file.name, value=type(error).__name__, remedy=remedy) from error


def _validate(document: Any, name: str) -> None:
    error = next(Draft202012Validator(schema()).iter_errors(document), None)
    while error is not None and error.context:  # of a union, the branch that is meant
        error = max(error.context, key=lambda inner: len(inner.path))
    if error is not None:
        argument = f"{name}: {error.json_path}"
        limit = error.validator_value if error.validator not in ("required", "properties") else "its fields"
        raise BrokenReport(argument=argument, value=error.validator, remedy=f"the schema asks for {limit}")
