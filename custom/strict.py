"""JSON values become frozen dataclasses, or an error that says what to mend."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be meant; the message names argument, value and remedy."""


def require(condition: bool, *, argument: str, value: object, remedy: str) -> None:
    """Raise :class:`ConfigError` naming argument, value and remedy unless the condition holds."""
    if not condition:
        raise ConfigError(f"{argument} = {value!r}: {remedy}")


def build(cls: type[T], values: Any, name: str) -> T:
    """Build a (nested) frozen dataclass from JSON values, refusing unknown keys and wrong types.

    Args:
        cls: the dataclass.
        values: mapping from field name to JSON value.
        name: how the value is called in errors.

    Raises:
        ConfigError: an unknown, missing, mistyped or impossible value, by name.
    """
    require(isinstance(values, Mapping), argument=name, value=values, remedy="give a JSON object")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    for key in values:
        require(
            key in fields,
            argument=f"{name}.{key}",
            value=values[key],
            remedy=f"unknown; known are {sorted(fields)}",
        )
    for key, spec in fields.items():
        optional = spec.default is not dataclasses.MISSING or spec.default_factory is not dataclasses.MISSING
        require(optional or key in values, argument=f"{name}.{key}", value=None, remedy="missing; give it")
    arguments = {key: _typed(hints[key], value, f"{name}.{key}") for key, value in values.items()}
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def _typed(hint: Any, value: Any, name: str) -> Any:
    """Check one JSON value against a type hint, turning lists into tuples and objects into dataclasses."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type[Any], hint), value, name)
    if origin is Literal:
        require(value in options, argument=name, value=value, remedy=f"give one of {list(options)}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        (inner,) = (option for option in options if option is not type(None))
        return _typed(inner, value, name)
    if origin is tuple:
        require(isinstance(value, list | tuple), argument=name, value=value, remedy="give a JSON array")
        kinds = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        require(len(kinds) == len(value), argument=name, value=value, remedy=f"give {len(kinds)} values")
        return tuple(_typed(kind, item, name) for kind, item in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(right, argument=name, value=value, remedy=f"give a {hint.__name__}")
    require(
        not isinstance(value, float) or math.isfinite(value),
        argument=name,
        value=value,
        remedy="give a finite number",
    )
    return value
