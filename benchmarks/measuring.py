"""Timing, ratios and tables that several benchmarks share."""

from __future__ import annotations

import json
import signal
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.machine import load, machine, versions
from ormo_rpc.report.table import as_text
from ormo_rpc.storage.environment import environment

ROOT = Path(__file__).parents[1]
"""The checkout."""
RESULTS = ROOT / "results"
SIZES = (272_474, 2_000_000, 25_000_000)
"""The number of parameters of ResNet-20, and more: those at which throughput is compared."""
UNKNOWN = "unknown"
"""The commit of a folder that is none of git's."""
T = TypeVar("T")


def seconds_per_call(function: Callable[[], Any], repeats: int) -> float:
    """Mean seconds of a call."""
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - began) / repeats


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median with the lowest and the highest, such as ``1.02 (0.98 - 1.05)``; a dash if there are none."""
    if not values:
        return "-"
    return f"{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def rotated(items: Sequence[T], number: int) -> list[T]:
    """The order of a round: another item comes first each time."""
    shift = number % len(items)
    return [*items[shift:], *items[:shift]]


def exact(commit: str | None) -> bool:
    """True where a commit names the code that was measured: one with changes equals itself after further ones."""
    return commit not in (None, UNKNOWN) and not commit.endswith("+changes")


def conditions(environments: dict[str, Path] | None = None) -> dict[str, Any]:
    """Everything that figures depend on: date, machine, versions, load."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(environments or {}),
        "load_at_start": load(),
    }


def exit_on_sigterm() -> None:
    """Let SIGTERM, such as of ``timeout``, end this process as an error does, so that contexts end what they have started."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def parser(description: str | None, sizes: Sequence[int]) -> ArgumentParser:
    """The command line of a benchmark that prints a table: sizes, rounds, ``--json``."""
    made = ArgumentParser(description=description)
    made.add_argument("--parameters", type=int, nargs="+", default=sizes, metavar="D")
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return made


def show(rows: Sequence[dict[str, Any]], arguments: Namespace) -> None:
    """Print rows of equal keys as a table, or as JSON with the environment."""
    if arguments.json:
        print(json.dumps({"environment": environment(), "rows": rows}, indent=2))
        return
    cells = [[key.replace("_", " ") for key in rows[0]]]
    cells += [[_cell(value) for value in row.values()] for row in rows]
    print(as_text(cells))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
