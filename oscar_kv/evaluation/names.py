"""Names with parameters: ``"kivi"``, ``"kivi:recent_tokens=128"``, ``"recall:keys=1"``."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

_COMMAS = re.compile(r",(?![^\[]*\])")  # those outside of brackets
_CLASS = re.compile(r"[\w.]+:[A-Z]\w*(?=:|$)")
_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    types.NoneType: "null",
}


def parse_name(name: str) -> tuple[str, dict[str, Any]]:
    """Splits ``name:parameter=value,...`` into the name and its parameters.

    Values are JSON, lists become tuples; what is no JSON is a string. The name may be that of a
    class, ``module:Class``, which a capital tells from a parameter.

    Raises:
        ValueError: if there is no such list of parameters behind the colon.
    """
    of_class = _CLASS.match(name)
    base = of_class[0] if of_class else name.partition(":")[0]
    changes = name[len(base) + 1 :]
    parameters: dict[str, Any] = {}
    for change in _COMMAS.split(changes) if changes else ():
        key, equals, value = change.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{name!r}: expected parameter=value, not {change!r}")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        parameters[key] = tuple(parsed) if isinstance(parsed, list) else parsed
    return base, parameters


def require_fields(kind: type, parameters: Mapping[str, Any]) -> None:
    """Raises ValueError for parameters that are no fields of the dataclass ``kind``, or whose
    values are not of the fields' types."""
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"unknown parameters {unknown}: expected {known}")
    types_of = typing.get_type_hints(kind)
    for name, value in parameters.items():
        if not _fits(value, types_of[name]):
            raise ValueError(f"{name}={value!r}: expected {_in_words(types_of[name])}")


def require_at_least(minimum: int, **values: float) -> None:
    """Raises ValueError for the first of ``values`` that is smaller."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name}={value}: expected at least {minimum}")


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, arguments[0]) for one in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _in_words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {arguments}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, arguments))
    if origin is tuple:
        return f"a list as [1,2], each {_in_words(arguments[0])}"
    return _IN_WORDS.get(kind, str(kind))
