"""The command: run what is missing, collect what there is, report it."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

import experiments.race
from experiments.common import RESULTS, at_least_one, folder, in_processes, read_results, row_by_row, write_results
from experiments.race import report
from experiments.race.contenders import CONTENDERS, Unit
from experiments.race.earlier import KEYS, earlier_rows, job_of
from experiments.race.figures import Row
from experiments.race.runs import Missing, Store, finished
from experiments.race.setup import LONG, RACE, SETTINGS, TUNED_MOMENTUM, Race, Setup
from experiments.race.units import MOST_SEEDS, collected, content, lacking, model_of, outcome, planned_runs, units
from ormo_rpc.errors import ConfigError, one_line

MINUTES_OF_A_RUN = 0.17
"""Processor time of a run of 6,000 gradients and its evaluations, before any has been made."""


def parser() -> ArgumentParser:
    """The command line."""
    made = ArgumentParser(
        prog="python -m experiments.race", description=experiments.race.__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    made.add_argument("--root", default="data", help="folder that holds FashionMNIST/raw")
    made.add_argument(
        "--store",
        type=Path,
        default=Path("outputs/race"),
        metavar="FOLDER",
        help="folder of the finished runs; by default outputs/race",
    )
    made.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER", help="folder of the results")
    made.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], metavar="SETTING")
    made.add_argument("--workers", type=int, nargs="+", choices=(4, 16, 64), default=[4, 16, 64], metavar="K")
    made.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS], metavar="NAME")
    made.add_argument(
        "--seeds",
        type=at_least_one,
        default=3,
        metavar="N",
        help="reported seeds, by default 3; results have as many as were run",
    )
    other = made.add_mutually_exclusive_group()
    other.add_argument(
        "--long",
        action="store_true",
        help="the job for 16 epochs with 64 workers and random times, judged by the time to 86%%: results/race_long",
    )
    other.add_argument(
        "--momentum",
        action="store_true",
        help="the job with 4 and 16 workers and train.momentum of each contender tuned too (0.9, 0.95, 0.975; the outer "
        "momentum of DiLoCo is not): results/race_momentum",
    )
    made.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many minutes, and collect")
    made.add_argument(
        "--processes",
        type=at_least_one,
        default=1,
        help="contenders that are run at the same time, by default 1",
    )
    made.add_argument("--replace", action="store_true", help="leave rows out of the results whose job or rule has changed")
    made.add_argument("--plan", action="store_true", help="print what is still to be run, and about how long it takes")
    made.add_argument("--collect", action="store_true", help="run nothing: results of what is finished")
    made.add_argument("--report", action="store_true", help="run and collect nothing: tables and picture of the results")
    return made


def main() -> None:
    """Run, collect and report; a clear line where that cannot be done."""
    try:
        perform(parser().parse_args())
    except ConfigError as error:
        print(f"experiments.race: {error}", file=sys.stderr)
        sys.exit(2)


def perform(a: Any) -> None:
    """Do what the arguments ask for.

    Raises:
        ConfigError: there are no results to report, they cannot be read, there is no data, or there are too many seeds.
    """
    if a.seeds > MOST_SEEDS:
        raise ConfigError(f"--seeds: got {a.seeds}, expected at most {MOST_SEEDS}")
    asked = LONG if a.long else TUNED_MOMENTUM if a.momentum else RACE
    file = a.into / f"{asked.name}.json"
    if a.report:
        if (found := read_results(file, (*job_of(asked.setup), *KEYS))) is None:
            raise ConfigError(f"--report: {file} is not there; make it by --collect, or name its folder by --into")
        report.write(found, a.into, asked)
        return
    setup = dataclasses.replace(asked.setup, seeds=tuple(range(a.seeds)))
    cells = [(setting, workers) for setting, workers in asked.cells if setting in a.settings and workers in a.workers]
    if a.plan or not a.collect:
        print(plan([*units(cells, a.contenders)], setup, a.store, earlier(file, asked, a)))
    if a.plan:
        return
    into, failed = folder(a.into), dict[str, str]()
    if not a.collect:
        failed = race([*units(cells, a.contenders)], setup, a, earlier(file, asked, a))
    found = collect(asked, a.seeds, a.store, earlier(file, asked, a))  # read again, as another command may have written
    write_results(file, row_by_row(found))
    report.write(found, into, asked)
    if failed:
        sys.exit("\n".join(f"experiments.race: {unit}: {error}" for error, unit in failed.items()))


def earlier(file: Path, asked: Race, a: Any) -> dict[Unit, Row]:
    """The rows of earlier results.

    Raises:
        ConfigError: they cannot be read, or some of them do not count.
    """
    results = read_results(file, (*job_of(asked.setup), *KEYS))
    return earlier_rows(file, results, asked.setup, replace=a.replace)


def race(chosen: list[Unit], setup: Setup, a: Any, earlier: Mapping[Unit, Row]) -> dict[str, str]:
    """Run the units, several at a time; return each error, with a unit that has it.

    Raises:
        ConfigError: the data cannot be read.
    """
    until = time.monotonic() + 60 * a.minutes
    run = functools.partial(run_unit, setup=setup, folder=a.store, root=a.root, until=until, earlier=earlier)
    failed = dict[str, str]()
    with tqdm(total=len(chosen), unit=" units") as bar:
        for unit, done in in_processes(run, chosen, a.processes):
            error = done.exception()
            if isinstance(error, ConfigError):
                raise error
            told = done.result() if error is None else one_line(error)
            if error is not None:
                failed.setdefault(told, str(unit))
            bar.update()
            bar.set_postfix_str(f"{unit}: {told}")
    return failed


def run_unit(unit: Unit, *, setup: Setup, folder: Path, root: str, until: float, earlier: Mapping[Unit, Row]) -> str:
    """Run a unit in a process of its own, and say how it went."""
    store = Store(folder, root, until)
    try:
        found = outcome(unit, setup, store, earlier.get(unit), model_of(unit, earlier))
    except Missing:
        return "time is over"
    return f"{store.made} new runs, rate {found['rate']:g}"


def collect(asked: Race, seeds: int, folder: Path, earlier: Mapping[Unit, Row]) -> dict[str, Any]:
    """The content of the results: all contenders in all cells that are finished; a new one has so many seeds, or the job's."""
    setup = dataclasses.replace(asked.setup, seeds=asked.setup.seeds[:seeds])
    return content(units(asked.cells, CONTENDERS), setup, Store(folder, None), earlier)


def plan(chosen: list[Unit], setup: Setup, folder: Path, earlier: Mapping[Unit, Row]) -> str:
    """The units that are not finished, and an estimate of the processor time that they take."""
    rows = collected(chosen, setup, Store(folder, None), earlier)
    missing = [unit for unit in chosen if lacking(rows.get(unit), setup)]
    seconds = [record.cpu_seconds for file in folder.glob("*.json") if (record := finished(file)) is not None]
    minutes = sum(seconds) / len(seconds) / 60 if seconds else MINUTES_OF_A_RUN
    lines, counted = list[str](), set[tuple[object, ...]]()
    for setting, workers in dict.fromkeys((unit.setting, unit.workers) for unit in missing):
        left = [unit for unit in missing if (unit.setting, unit.workers) == (setting, workers)]
        runs = set[tuple[object, ...]]().union(*(planned_runs(unit, setup, rows.get(unit)) for unit in left)) - counted
        counted |= runs
        names = ", ".join(unit.contender for unit in left)
        lines.append(
            f"{setting}, K = {workers}: {len(runs)} further runs, about {len(runs) * minutes:.0f} minutes of a core: {names}"
        )
    lines.append(
        f"{len(missing)} contenders of these cells are not finished: about {len(counted) * minutes:.0f} minutes of a core, "
        f"{60 * minutes:.1f} s for a run{', the mean of those that are' if seconds else ', as a guess'}. It is less where some "
        "of their runs are finished, and more where rates beyond the grid are tried"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
