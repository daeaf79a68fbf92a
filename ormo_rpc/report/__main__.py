"""The command line of the report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

from ormo_rpc.errors import ConfigError
from ormo_rpc.report import pictures
from ormo_rpc.report.page import page
from ormo_rpc.report.runs import Run, differing_keys, group_by_setting, run_directories
from ormo_rpc.report.table import as_text, rows

MAX_SINGLE_RUNS = 12
"""Groups whose first run the page shows with delays and timeline."""


def main() -> None:
    """Print the table, and write the page and a picture."""
    parser = argparse.ArgumentParser(
        prog="python -m ormo_rpc.report",
        description="Compare runs: a table with mean and spread over seeds, curves, delays and timelines.",
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="run directories, or folders with some below")
    parser.add_argument("--out", type=Path, help="where report.html and the pictures go; by default the first path")
    arguments = parser.parse_args()
    out: Path = arguments.out or arguments.paths[0]
    matplotlib.use("agg")
    try:
        groups = group_by_setting(Run.load(path) for path in run_directories(arguments.paths))
    except ConfigError as error:
        print(f"report: {error}", file=sys.stderr)
        sys.exit(2)
    table, keys = rows(groups), differing_keys(groups)
    figures = {"Loss and accuracy": pictures.comparison(groups)}
    figures |= {
        f"{group.label(keys)}: delays and timeline": pictures.single(group.runs[0]) for group in groups[:MAX_SINGLE_RUNS]
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(page(table, figures), encoding="utf-8")
    if len(groups) == 1 and len(groups[0].runs) == 1:
        pictures.single(groups[0].runs[0]).savefig(out / "report.png", dpi=100)
    else:
        pictures.comparison(groups).savefig(out / "report.png", dpi=100)
    print(as_text(table))
    print(f"{out / 'report.html'}\n{out / 'report.png'}")


if __name__ == "__main__":
    main()
