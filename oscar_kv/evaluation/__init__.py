"""What a quantized cache costs a model, measured."""

from __future__ import annotations

from oscar_kv.evaluation.runner import evaluate

__all__ = ["evaluate"]
