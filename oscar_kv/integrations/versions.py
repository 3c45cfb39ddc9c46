"""Which versions of Transformers the tests run with."""

from __future__ import annotations

import warnings

import transformers

OLDEST_TESTED = 5, 17
NEWEST_TESTED = 5, 24


def warn_if_untested(version: str = transformers.__version__) -> None:
    """Warns of a Transformers that came out after ours was tested; it may work all the same."""
    if tuple(int(part) for part in version.split(".")[:2]) > NEWEST_TESTED:
        oldest, newest = (f"{major}.{minor}" for major, minor in (OLDEST_TESTED, NEWEST_TESTED))
        warnings.warn(
            f"oscar-kv is tested with Transformers {oldest} to {newest}, and this is {version}: "
            "if anything looks wrong, look for a newer oscar-kv or install "
            f'"transformers<{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}"',
            stacklevel=2,
        )
