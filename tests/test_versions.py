"""A Transformers that is newer than the tested ones is said to be, once; which ones are is said in
several places, alike."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from support_matrix import documented_version

from oscar_kv.integrations.versions import NEWEST_TESTED, OLDEST_TESTED, warn_if_untested

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("version", ["5.17.0", "5.20.2", "5.24.0", "5.24.7", "5.24.0.dev0"])
def test_tested_versions(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested(version)


@pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "5.100.1", "6.0.0rc1"])
def test_newer_versions(version: str) -> None:
    with pytest.warns(
        UserWarning, match=f"5.17 to 5.24, and this is {re.escape(version)}: .*<5.25"
    ):
        warn_if_untested(version)


@pytest.mark.parametrize("newest", [NEWEST_TESTED, (5, 16)])
def test_it_is_said_once_when_imported(newest: tuple[int, int]) -> None:
    program = (
        f"from oscar_kv.integrations import versions; versions.NEWEST_TESTED = {newest}\n"
        "from oscar_kv import OscarCache, OscarEncoderDecoderCache, load_cache, quantize"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.count("oscar-kv is tested with") == (newest == (5, 16))


def test_all_places_name_the_same_versions() -> None:
    oldest, newest = (f"{major}.{minor}" for major, minor in (OLDEST_TESTED, NEWEST_TESTED))
    makefile, project, readme = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("Makefile", "pyproject.toml", "README.md")
    )
    assert f"OLDEST_TRANSFORMERS := {oldest}." in makefile
    assert f"NEWEST_TRANSFORMERS := {newest}." in makefile
    assert f'"transformers>={oldest}"' in project
    assert f"Transformers {oldest} to {newest} are tested" in readme
    assert documented_version().startswith(f"{newest}.")
