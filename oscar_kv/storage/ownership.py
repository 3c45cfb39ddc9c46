"""Tensors that outlive the call that made them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def owns_tensors(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs ``method`` without gradients and outside inference mode and autocast.

    What is allocated under ``torch.inference_mode`` could not be written to outside of it, and
    what remembers its gradient would keep every tensor it came from.
    """

    @wraps(method)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.inference_mode(False), torch.no_grad(), without_autocast():
            return method(*args, **kwargs)

    return run


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leaves inference mode, and keeps gradients as they are on or off."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Computes in the dtypes at hand: a page is not made, nor read, in half precision."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
