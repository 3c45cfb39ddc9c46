"""``torch.compile`` around a packed cache.

    compile_layers(model)

Next to attention a decoder layer runs dozens of small kernels, which at small batches take as long
as its matrix products. Compiled, they are a few. Dynamo stops where a layer meets its cache: pages,
block tables and lengths are no business of a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LAYER_INDICES = r".*\.layer_idx"
"""What Dynamo calls the number of a layer, as a regular expression."""


def untraced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function``, run as it is where a compiled model calls it."""
    return cast(Callable[_P, _R], torch.compiler.disable(function))


def compile_layers(model: Any, **options: Any) -> None:
    """``torch.compile`` for every decoder layer of a Transformers model, in place.

    Layers of one kind share what is compiled. That happens on first use, and again for other sizes
    of the batch or of the prompt; 1 stays a case of its own, from the third size on all are one.
    Not shared are layers of linear attention, which take their states out of the cache by number:
    beyond Dynamo's limit, eight by default, they run as they are.

    For the whole process, it also tells Dynamo not to take a module's ``layer_idx`` for a constant.

    Args:
        options: of ``torch.compile``.

    Raises:
        ValueError: if the model has no decoder layers.
    """
    layers = [x for x in model.get_decoder().modules() if isinstance(x, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no decoder layers that Transformers marks")
    # As a constant, which it is to Dynamo by default, the number of a layer would mean a
    # compilation per layer, up to the limit.
    config = torch.compiler.config
    if _LAYER_INDICES not in config.dynamic_sources:
        config.dynamic_sources += f",{_LAYER_INDICES}"
    for layer in layers:
        layer.compile(**options)
