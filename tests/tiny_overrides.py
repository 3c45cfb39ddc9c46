"""What the general rule of ``tiny_config.py`` gets wrong, by model class."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {}
