"""Command line, runs, and the choice of a learning rate of the experiments."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar, cast

from benchmarks.measuring import RESULTS, ROOT
from ormo_rpc import train
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes.linux import die_with_parent
from ormo_rpc.storage.run_directory import read_trace

T = TypeVar("T")
SIMULATED = ("runtime=sim", "worker.device=cpu", "logger=none", "logger.progress=false")
"""The overrides of every simulated run: on the CPU, also where there is a GPU, unless others follow."""
QUIET = (*SIMULATED, "checkpoint.every_seconds=0")
"""The same without checkpoints, where no run goes on from another."""
BEYOND = 3
"""Learning rates that are tried beyond the edges of a grid, at most."""


def parser(description: str | None) -> ArgumentParser:
    """The command line of an experiment, with the option ``--into``."""
    made = ArgumentParser(description=description)
    made.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER", help="folder of the results")
    return made


def folder(into: Path) -> Path:
    """Make the folder of the results, before there are any."""
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--into: {error}; expected a folder, or where one can be made")
    return into


def read_results(file: Path, keys: Collection[str]) -> dict[str, Any] | None:
    """The content of results; None where there are none.

    Args:
        file: Where they are.
        keys: What they must have.

    Raises:
        ConfigError: they cannot be read, or another version of the command has written them.
    """
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); restore it, or name another folder by --into") from None
    missing = sorted({*keys} - {*found}) if isinstance(found, dict) else [*keys]
    if missing:
        raise ConfigError(
            f"{file}: got results without {', '.join(missing)}, expected those of this version of the command; restore "
            "them, or name another folder by --into"
        )
    return cast("dict[str, Any]", found)


def write_results(file: Path, text: str) -> None:
    """Replace results in one step: they may be the only ones, and another process may write the same ones."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def row_by_row(content: Mapping[str, Any]) -> str:
    """Results of the race and its kin as JSON, a row a line."""
    return json.dumps(content, separators=(",", ":")).replace('{"setting"', '\n{"setting"') + "\n"


def pictures(into: Path) -> Path:
    """The folder of pictures: ``docs/`` for the results of the repository, else that of the results."""
    return ROOT / "docs" if into.resolve() == RESULTS.resolve() else into


def at_least_one(text: str) -> int:
    """A whole number >= 1 of the command line.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"got {text}, expected a whole number >= 1")
    return int(text)


def run(overrides: Iterable[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train: the summary, and the applied gradients as the trace has them."""
    with tempfile.TemporaryDirectory(prefix="experiment_") as folder:
        run_dir = Path(folder) / "run"
        summary = train([*overrides], run_dir=run_dir)
        return summary, [event for event in read_trace(run_dir)[1] if event["event"] == "apply"]


def in_processes(call: Callable[[T], str], items: Iterable[T], jobs: int) -> Generator[tuple[T, Future[str]]]:
    """Call a function for each item, several at once, and yield each item with its call when that has ended.

    Each call is in a forked process, which has all imports at once; CUDA must not be in use before. After an error in the loop
    over them no further call is begun.
    """
    forked, waiting, running = multiprocessing.get_context("fork"), iter(items), dict[Future[str], T]()
    with ProcessPoolExecutor(jobs, mp_context=forked, initializer=die_with_parent) as pool:
        while True:
            # No more than run at once: what the pool has been given cannot all be taken back.
            running |= {pool.submit(call, each): each for each in itertools.islice(waiting, jobs - len(running))}
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done


def last_loss(applied: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean loss of the last tenth of the gradients; None for a run without any."""
    losses = [event["loss"] for event in applied]
    return statistics.fmean(losses[-max(1, len(losses) // 10) :]) if losses else None


def best(scores: Mapping[float, float | None]) -> float:
    """The learning rate with the lowest score; None and infinity are out, and nothing is chosen where all are."""
    counted = {lr: score for lr, score in scores.items() if score is not None and math.isfinite(score)}
    if not counted:
        sys.exit(f"no learning rate of {', '.join(map(str, scores))} can be chosen: no run of any of them counts")
    return min(counted, key=counted.__getitem__)


def tuned(score: Callable[[float], float | None], grid: Iterable[float]) -> dict[float, float | None]:
    """Score the learning rates of a grid and, while the best is at an edge, up to `BEYOND` more beyond it.

    The next one continues the grid as it is at this edge: 0.03, 0.1, 0.3 with 1. The lowest score is the best, see `best`.
    """
    rates = sorted({*grid})
    if len(rates) < 3 or rates[0] <= 0:
        sys.exit(f"got the learning rates {rates}, expected at least 3 above 0, so that the grid can be continued at its edges")
    scores = {lr: score(lr) for lr in rates}
    for _ in range(BEYOND):
        chosen, rates = best(scores), sorted(scores)
        if chosen not in (rates[0], rates[-1]):
            break
        edge, second, third = rates[:3] if chosen == rates[0] else rates[:-4:-1]
        further = float(f"{edge * second / third:.6g}")
        scores[further] = score(further)
    return dict(sorted(scores.items()))


def write_table(
    into: Path,
    name: str,
    header: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    keys: Collection[str],
    stated: str,
    table: str,
) -> None:
    """Write what was run, with these keys of each summary, as JSON, and the page; print the table."""
    short = [{**row, "runs": [select(summary, keys) for summary in row["runs"]]} for row in rows]
    (into / f"{name}.json").write_text(json.dumps({**header, "rows": short}, indent=1) + "\n")
    (into / f"{name}.md").write_text(f"{stated}\n\n{table}\n")
    print(table)


def not_completed(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Number of runs that did not complete, such as ``1 of 3``."""
    return f"{sum(summary['status'] != 'completed' for summary in summaries)} of {len(summaries)}"


def select(summary: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """These keys of a summary."""
    return {key: summary[key] for key in keys}
