"""The command line of the report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

from ormo_rpc import console
from ormo_rpc.config.paths import typed
from ormo_rpc.errors import ConfigError
from ormo_rpc.report import pictures
from ormo_rpc.report.page import page
from ormo_rpc.report.runs import differing_keys, group_by_setting, load_runs
from ormo_rpc.report.table import BEST, BEST_NOTE, as_text, in_common, notes, rows

MAX_SINGLE_RUNS = 12
"""Groups whose first run the page shows with delays and timeline."""


def main() -> None:
    """Print the table, and write the page and a picture."""
    console.install()
    parser = argparse.ArgumentParser(
        prog="python -m ormo_rpc.report",
        description="Compare runs: a table with mean and spread over seeds, curves, delays and timelines.",
    )
    parser.add_argument("paths", type=typed, nargs="+", metavar="PATH", help="run directories, or folders with some below")
    parser.add_argument("--out", type=typed, help="where report.html and the pictures go; by default the first path")
    arguments = parser.parse_args()
    out: Path = arguments.out or arguments.paths[0]
    matplotlib.use("agg")
    try:
        runs, left_out = load_runs(arguments.paths)
    except ConfigError as error:
        console.say(f"report: {error}")
        sys.exit(2)
    groups = group_by_setting(runs)
    table, keys = rows(groups), differing_keys(groups)
    marks = [BEST_NOTE] if any(cell.endswith(f" {BEST}") for row in table for cell in row) else []
    above, below = in_common(groups), [*marks, *notes(groups), *left_out]
    figures = {"Losses and metrics": pictures.comparison(groups)}
    figures |= {
        f"{group.label(keys)}: delays and timeline": pictures.single(group.runs[0]) for group in groups[:MAX_SINGLE_RUNS]
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(page(table, figures, above, below), encoding="utf-8")
    if len(groups) == 1 and len(groups[0].runs) == 1:
        pictures.single(groups[0].runs[0]).savefig(out / "report.png", dpi=100)
    else:
        pictures.comparison(groups).savefig(out / "report.png", dpi=100)
    print("\n".join(filter(None, (above, as_text(table), *below))))
    print(f"{out / 'report.html'}\n{out / 'report.png'}")


if __name__ == "__main__":
    main()
