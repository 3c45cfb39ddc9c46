"""Tensors that outlive the call that made them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def owns_tensors(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs ``method`` without gradients and outside inference mode.

    What is allocated under ``torch.inference_mode`` could not be written to outside of it, and
    what remembers its gradient would keep every tensor it came from.
    """

    @wraps(method)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run
