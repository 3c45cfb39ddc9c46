"""Rows as they come: a line each on the terminal, and a JSON and a CSV file that grow with them."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import record

Row = dict[str, Any]
Columns = Mapping[str, tuple[int, Callable[[Row], Any]]]
"""Header -> (width, what to show of a row); negative widths are flush left."""


class Report:
    """The results of one benchmark.

    Args:
        name: of the files under ``benchmarks/results/``.
        settings: what the rows share.
        columns: what a line on the terminal shows.
        as_json: print the JSON file at the end and nothing else.
    """

    def __init__(self, name: str, settings: Row, columns: Columns, as_json: bool = False) -> None:
        self.name, self.settings, self.columns, self.as_json = name, settings, columns, as_json
        self.rows: list[Row] = []
        self.console = Console(stderr=as_json, width=200, highlight=False)
        self._line(header for header in columns)

    def add(self, row: Row) -> None:
        """Prints and records a row."""
        self.rows.append(row)
        if "failed" in row:
            self.console.print(f"{row['case']}: {row['failed']}", markup=False)
        else:
            self._line(_show(cell(row)) for _, cell in self.columns.values())
        self._save()

    def attempt(self, case: str, measure: Callable[[], Iterable[Row]]) -> None:
        """Adds what ``measure`` yields; an error becomes a row and is not the end."""
        try:
            for row in measure():
                self.add(row)
        except Exception as error:
            traceback.print_exc()
            self.add({"case": case, "failed": f"{type(error).__name__}: {error}".splitlines()[0]})

    def close(self, skipped: list[str]) -> None:
        """Says what was left out for lack of time, and where the files are."""
        self.settings["skipped"] = skipped
        path = self._save()
        if skipped:
            self.console.print(f"no time was left for: {', '.join(skipped)}")
        self.console.print(f"written: {path} and .csv")
        if self.as_json:
            print(json.dumps(json.loads(path.read_text()), indent=1))

    def _save(self) -> Path:
        path = record.write(self.name, self.settings, self.rows)
        record.write_csv(self.name, self.rows)
        return path

    def _line(self, cells: Iterable[str]) -> None:
        widths = (width for width, _ in self.columns.values())
        padded = (c.ljust(-w) if w < 0 else c.rjust(w) for c, w in zip(cells, widths))
        self.console.print("  ".join(padded), markup=False, no_wrap=True, overflow="ignore")


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"
    return str(value)
