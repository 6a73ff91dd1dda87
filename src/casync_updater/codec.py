"""Frozen dataclasses to JSON and back, strictly.

The state files and the reports of a cycle are written by this program, but they are read after
power cuts, by other versions and from crashed children: what does not fit is refused.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class UnknownFieldError(ValueError):
    """A field that this version does not know: a newer one wrote it."""


def to_json(value: Any) -> Any:
    """What `json.dumps` takes for a value made of dataclasses, tuples, enums and paths."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value


def from_json(kind: type[T], value: Any) -> T:
    """The dataclass that `to_json` made a value of; fields that are not there get defaults.

    Raises:
        UnknownFieldError: a field is unknown.
        ValueError: a field has another type, or is missing and has no default.
    """
    return _decode(kind, value, kind.__name__)  # type: ignore[no-any-return]


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        kind = next(item for item in get_args(kind) if item is not types.NoneType)
        return _decode(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is no list")
        kinds = get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise ValueError(f"{where} has {len(value)} items, not {len(kinds)}")
        return tuple(
            _decode(inner, item, f"{where}[]") for inner, item in zip(kinds, value, strict=True)
        )
    if is_dataclass(kind):
        return _decode_fields(kind, value, where)
    if kind is Path or issubclass(kind, StrEnum):
        if not isinstance(value, str):
            raise ValueError(f"{where} is no string")
        return kind(value)
    if kind is float and type(value) in (int, float):
        return _finite(value, where)
    if type(value) is not kind:
        raise ValueError(f"{where} is {type(value).__name__}, not {kind.__name__}")
    return value


def _finite(value: float, where: str) -> float:
    """A number as JSON has it: Python's reader also takes ``NaN``, and integers of any length."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where} is no number that a float can be")
    return number


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    hints = get_type_hints(kind)
    if unknown := value.keys() - hints.keys():
        raise UnknownFieldError(f"{where} has unknown fields: {', '.join(sorted(unknown))}")
    arguments = {}
    for field in fields(kind):
        if field.name in value:
            name = f"{where}.{field.name}"
            arguments[field.name] = _decode(hints[field.name], value[field.name], name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where}.{field.name} is missing")
    return kind(**arguments)
