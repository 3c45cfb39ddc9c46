"""Whether a model's name leads somewhere, and whether its files hold every weight."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SHOWN = 3
"""Names of weights in a message."""


def local_or_id(model: str | Path) -> str:
    """``model`` as Transformers takes it: a path that exists, or an id of the Hugging Face hub.

    Raises:
        ValueError: if it is neither.
    """
    path = Path(model).expanduser()
    if str(model) and (path.is_dir() or path.is_file()):
        return str(path)
    if not _HUB_ID.fullmatch(str(model)):
        raise ValueError("no such file or folder, and no id of the Hugging Face hub")
    return str(model)


def require_complete(loading_info: dict[str, Any]) -> None:
    """Raises ValueError if weights were missing or had other shapes, and so are random now.

    Args:
        loading_info: what ``from_pretrained(output_loading_info=True)`` returns beside the model.
    """
    if missing := loading_info["missing_keys"]:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of the model's weights ({some(missing)}): get "
            "it again, or correct its config.json"
        )
    if mismatched := loading_info["mismatched_keys"]:
        shapes = [f"{name} {list(found)}, not {list(own)}" for name, found, own in mismatched]
        raise ValueError(
            f"{len(mismatched)} weights of the checkpoint have other shapes than its config.json "
            f"says ({some(shapes)}): get the one that belongs to it"
        )


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _SHOWN
    return ", ".join(ordered[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
