"""Models of lmms-eval over a cache of our choice: ``oscar-llava-hf``, ``oscar-qwen3-vl`` and
``oscar-qwen3-omni``.

lmms-eval finds them by the entry point ``lmms_eval.models`` once this package is installed. Each is
the harness's own class, whose ``generate`` gets a cache; prompts, images and answers stay its own.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from oscar_kv.evaluation.harness import CacheChoice, take_cache_arguments
from oscar_kv.integrations.models import cache_argument

_CLASSES = {
    "OscarLlava": ("lmms_eval.models.chat.llava_hf", "LlavaHf"),
    "OscarQwen3VL": ("lmms_eval.models.chat.qwen3_vl", "Qwen3_VL"),
    "OscarQwen3Omni": ("lmms_eval.models.chat.qwen3_omni", "Qwen3_Omni"),
}


class OverCache:
    """Goes in front of a model class of lmms-eval.

    Args:
        arguments: those of :class:`CacheChoice`, and of that class.

    Raises:
        ValueError: for a cache that does not exist, or that the model cannot have.
    """

    model: Any

    def __init__(self, *positional: Any, **arguments: Any) -> None:
        self.cache_choice = CacheChoice(**take_cache_arguments(arguments))
        super().__init__(*positional, **arguments)
        config, writes, prefix = self.model.config, self.model, ""
        if hasattr(config, "thinker_config"):  # a model that speaks: its half that writes
            config, writes, prefix = config.thinker_config, self.model.thinker, "thinker_"
        name = prefix + cache_argument(writes)
        make_cache, generate = self.cache_choice.maker(config), self.model.generate
        self.model.generate = lambda *given, **named: generate(
            *given, **named, **{name: make_cache()}
        )
        if self.cache_choice.config is not None:
            self.model.set_attn_implementation("oscar")


@functools.cache
def __getattr__(name: str) -> type:
    """The classes by name; each needs what its base class in lmms-eval needs."""
    if name not in _CLASSES:
        raise AttributeError(name)
    module, base = _CLASSES[name]
    bases = (OverCache, getattr(importlib.import_module(module), base))
    return type(name, bases, {"__module__": __name__})


def manifests() -> list[Any]:
    """What the entry point gives: names, and where their classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest("oscar-llava-hf", chat_class_path=f"{__name__}.OscarLlava"),
        ModelManifest("oscar-qwen3-vl", chat_class_path=f"{__name__}.OscarQwen3VL"),
        ModelManifest("oscar-qwen3-omni", chat_class_path=f"{__name__}.OscarQwen3Omni"),
    ]
