"""The table of ``oscar-kv demo``, recorded.

python -m benchmarks.demo
"""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console

from benchmarks import record
from oscar_kv.demo import Demo
from oscar_kv.generation import quiet
from oscar_kv.render import demo_table


def main() -> None:
    """Runs the demo, prints its table and records it."""
    quiet()
    demo = Demo()
    result = asdict(found := demo.evaluate(demo.generate()))
    console = Console(width=80)
    console.print(demo_table(found))
    rows = result.pop("caches")
    console.print(f"written: {record.write('demo', result, rows)}")


if __name__ == "__main__":
    main()
