"""Two methods in one cache: the layers that need it most get the better one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from oscar_kv.evaluation.methods import Method, method
from oscar_kv.evaluation.names import parse_name

MIXED = "mixed"


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """``mixed:base=compact,better=high,layers=2``: every layer has one of two methods.

    Attributes:
        base, better: names of methods that need no calibration, with one parameter at most.
        layers: how many get ``better``: **calibrated**, those whose keys and values, stored by
            ``base`` with all other layers exact, change the logits most on text that is set aside
            (:func:`~oscar_kv.evaluation.sensitivity.layer_sensitivity`). Or which ones, counted
            among the full-attention layers.
        recent_tokens: newest tokens that stay in full precision, if other than theirs.

    Raises:
        ValueError: for a name that is none, or layers that are no integers.
    """

    base: str = "compact"
    better: str = "high"
    layers: int | tuple[int, ...] = 2
    recent_tokens: int | None = None

    def __post_init__(self) -> None:
        for role in ("base", "better"):
            if not isinstance(name := getattr(self, role), str):
                raise ValueError(f"{role}={name!r}: expected the name of a method")
        layers = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        if any(type(layer) is not int for layer in layers):
            raise ValueError(f"layers={self.layers!r}: expected how many, or which: [0,5]")
        if any(one.needs_calibration for one in self.methods):
            raise ValueError(f"{self}: expected methods without calibration")

    @classmethod
    def called(cls, name: str) -> Mixed | None:
        """What ``name`` says, ``None`` if it is the name of something else.

        Raises:
            ValueError: for an unknown parameter or value.
        """
        base, parameters = parse_name(name)
        if base != MIXED:
            return None
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(parameters) - set(known)):
            raise ValueError(f"{name!r}: unknown parameters {unknown}, expected {known}")
        return cls(**parameters)

    @property
    def methods(self) -> tuple[Method, Method]:
        """``base`` and ``better``."""
        base, better = method(self.base), method(self.better)
        if self.recent_tokens is None:
            return base, better
        window = {"recent_tokens": self.recent_tokens}
        return base.replaced(**window), better.replaced(**window)

    def parameters(self) -> dict[str, Any]:
        """Fields as plain values, those of both methods as well."""
        base, better = (one.parameters() for one in self.methods)
        return {
            "class": type(self).__name__,
            "layers": self.layers,
            "base": base,
            "better": better,
        }

    def fits(self, count: int) -> bool:
        """Whether a model with ``count`` full-attention layers has those that are asked for."""
        if isinstance(self.layers, tuple):
            return set(self.layers) <= set(range(count))
        return 0 <= self.layers <= count

    def choose(
        self, count: int, sensitivity: Callable[[Method], Sequence[float]]
    ) -> tuple[int, ...]:
        """Which of ``count`` full-attention layers get ``better``.

        Args:
            count: of them.
            sensitivity: how much each of them suffers from a method; called if needed.

        Raises:
            ValueError: if there are no such layers.
        """
        wanted = self.layers
        every = set(range(count))
        if not self.fits(count):
            raise ValueError(f"layers={wanted}: the model has {count} full-attention layers")
        if isinstance(wanted, tuple):
            return tuple(sorted(wanted))
        found = sensitivity(self.methods[0])
        ranked = sorted(every, key=lambda layer: -found[layer])
        return tuple(sorted(ranked[:wanted]))
