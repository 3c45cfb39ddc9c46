"""The cache that users of other evaluation harnesses ask for: ``preset=compact,sink_tokens=4``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from oscar_kv.config import FULL_PRECISION, PRESETS, OscarConfig
from oscar_kv.evaluation.cache import Bits, bits_of, contender, describe
from oscar_kv.evaluation.methods import method as method_called
from oscar_kv.integrations.models import require_usable_cache
from oscar_kv.integrations.transformers import OscarCache


def take_cache_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Removes from a model's arguments those of :class:`CacheChoice`, and returns them."""
    names = {"preset", "method", "offloading", *(field.name for field in fields(OscarConfig))}
    return {name: arguments.pop(name) for name in names & arguments.keys()}


class CacheChoice:
    """One kind of cache, checked before a model is loaded.

    Args:
        preset: of ours, or :data:`FULL_PRECISION` for the cache of Transformers. ``compact`` if
            neither this nor a method is given.
        method: a name of :func:`oscar_kv.evaluation.methods.method`, instead of a preset.
        offloading: keep pages in CPU memory.
        changes: fields of the preset's :class:`OscarConfig` to change.

    Raises:
        ValueError: for an unknown name, field or value, or what has no meaning together.
    """

    def __init__(
        self,
        preset: str | None = None,
        method: str | None = None,
        *,
        offloading: bool = False,
        **changes: Any,
    ) -> None:
        if preset is not None and method is not None:
            raise ValueError(f"preset={preset!r}, method={method!r}: expected one of them")
        if preset is None and method is None:
            preset = "compact"
        ours = preset in PRESETS
        if preset is not None and not ours and preset != FULL_PRECISION:
            raise ValueError(f"preset={preset!r}: expected one of {(*PRESETS, FULL_PRECISION)}")
        if not ours and (changes or offloading):
            names = sorted([*changes, *(["offloading"] if offloading else [])])
            raise ValueError(f"{names}: only for the presets {PRESETS}")
        self.name = str(preset or method)
        self.offloading = offloading
        self.config: OscarConfig | None = None
        if ours:
            preset_fields = OscarConfig.preset(self.name).to_dict()
            self.config = OscarConfig.from_dict({**preset_fields, **changes})
        elif method is not None and method_called(method).needs_calibration:
            raise ValueError(f"method={method!r} needs text to calibrate on: see oscar-kv eval")
        self._largest: tuple[int, Bits] = (0, Bits(0, None, None))

    def maker(self, model_config: PreTrainedConfig) -> Callable[[], Cache]:
        """What makes an empty cache for each batch of prompts.

        Raises:
            ValueError: if that model cannot have this cache.
        """
        require_usable_cache(model_config)
        if self.config is None:
            return contender(self.name, model_config, tuple, lambda method: ()).make_cache

        def make() -> Cache:
            return OscarCache(model_config, self.config, offloading=self.offloading)

        make()  # raises now, not after the first prompt
        return make

    def count(self, cache: Cache) -> None:
        """Notes what ``cache`` holds, if it is the longest one so far."""
        length = cache.get_seq_length()
        if length > self._largest[0]:
            self._largest = length, bits_of(cache)

    def to_dict(self) -> dict[str, Any]:
        """What to record with a result: the cache and, of the longest one counted, its bits."""
        what = describe(self.name) if self.config is None else self.config.to_dict()
        length, bits = self._largest
        return {
            "name": self.name,
            **what,
            "longest": {
                "tokens": length,
                "bits_per_element": bits.all,
                "quantized_bits_per_element": bits.quantized,
            },
        }
