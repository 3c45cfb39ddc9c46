"""Names with parameters: ``"kivi"``, ``"kivi:recent_tokens=128"``, ``"recall:keys=1"``."""

from __future__ import annotations

import json
import re
from typing import Any

_COMMAS = re.compile(r",(?![^\[]*\])")  # those outside of brackets


def parse_name(name: str) -> tuple[str, dict[str, Any]]:
    """Splits ``name:parameter=value,...`` into the name and its parameters.

    Values are JSON, lists become tuples; what is no JSON is a string.

    Raises:
        ValueError: if there is no such list of parameters behind the colon.
    """
    base, _, changes = name.partition(":")
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
