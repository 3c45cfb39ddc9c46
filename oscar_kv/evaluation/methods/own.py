"""Methods that are not part of this package: ``module:Class``, written by whoever evaluates."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from typing import Any

from oscar_kv.evaluation.methods.base import Method

_OURS = __name__.rpartition(".")[0]


def load_class(name: str) -> type[Method]:
    """The class that ``name``, ``module:Class``, says.

    Raises:
        ValueError: if there is none, or it is not derived from :class:`Method`.
    """
    module, _, wanted = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), wanted, None)
    except Exception as error:  # a module of others can fail in any way
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot import {module!r} ({what})") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(
            f"{module!r} has no class {wanted} that is derived from "
            "oscar_kv.evaluation.methods.Method"
        )
    return found


def origin(method: Method) -> dict[str, Any]:
    """Where a method that is not of this package comes from: its class, and a hash of the code
    beside it, so that what was measured with other code is another result."""
    kind = type(method)
    if kind.__module__.startswith(f"{_OURS}."):
        return {}
    try:
        code = inspect.getsource(sys.modules[kind.__module__])
    except (KeyError, OSError, TypeError):  # typed into an interpreter
        code = ""
    digest = hashlib.sha256(code.encode()).hexdigest()[:16]
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "code": digest if code else None}
