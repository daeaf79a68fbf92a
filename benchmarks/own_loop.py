"""Compare a loop of one's own with the built-in task: ``python -m benchmarks.own_loop``.

Both train the same model of 10 million parameters on the same batches, live with one worker. Runs take turns. What is compared
is the time from the end of a backward pass to the next forward pass: pushing, waiting for the reply, the next batch. Of all
updates of a run the lower quartile counts, so that a machine with other work tells something, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import in_words, load
from benchmarks.measuring import RESULTS, ROOT, conditions, exit_on_sigterm, spread
from benchmarks.own_loop_script import BATCH, GAPS
from ormo_rpc.report.table import as_markdown

TARGET = 1.1
WARM_UP = 20
"""Updates of a run that do not count."""
RUN_SECONDS = 600.0
_COMMON = ("logger=none", "logger.progress=false", "checkpoint.every_seconds=0", "workers=1", "algorithm=ormo")
_CLOCKS = ("wall", "processor")


def own_loop(folder: Path, updates: int) -> dict[str, float]:
    """Run the script; return the milliseconds beyond the passes by clock."""
    return _run(folder, "launch", *_COMMON, "--run-dir", str(folder / "run"), "-m", "benchmarks.own_loop_script", str(updates))


def built_in(folder: Path, updates: int) -> dict[str, float]:
    """Run the built-in task; return the milliseconds beyond the passes by clock."""
    return _run(
        folder,
        *(*_COMMON, f"hydra.run.dir={folder / 'run'}", "train.lr=1e-4", f"train.batch_size={BATCH}"),
        *("model._target_=benchmarks.own_loop_script.Timed", "dataset._target_=benchmarks.own_loop_script.data"),
        *("train.epochs=1000000", f"train.max_iterations={updates}", f"evaluate.every={updates}"),
    )


def _run(folder: Path, *words: str) -> dict[str, float]:
    gaps = folder / "gaps"
    gaps.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), GAPS: str(gaps)}
    command = [sys.executable, "-m", "ormo_rpc", *words]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit status {ended.returncode}: {ended.stderr.strip()[-500:]}")
    worker = max((file.read_text().splitlines() for file in gaps.iterdir()), key=len)  # another process tries one batch
    columns = zip(*(map(float, line.split()) for line in worker[WARM_UP:]), strict=True)
    return {clock: 1e3 * statistics.quantiles(column, n=4)[0] for clock, column in zip(_CLOCKS, columns, strict=True)}


def measure(rounds: int, updates: int) -> list[dict[str, dict[str, float]]]:
    """Let both run in turns; return the milliseconds of each round."""
    found: list[dict[str, dict[str, float]]] = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="own_loop_") as folder:
            systems = {"own loop": own_loop, "built-in task": built_in}
            names = sorted(systems, reverse=bool(number % 2))
            row = {name: systems[name](Path(folder) / str(at), updates) for at, name in enumerate(names)}
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return found


def as_text(content: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows = content["rounds"]
    table: list[tuple[str, ...]] = [("beyond the passes, ms/update", *_CLOCKS)]
    table += [
        (name, *(spread([row[name][clock] for row in rows]) for clock in _CLOCKS)) for name in ("own loop", "built-in task")
    ]
    ratios = {clock: [row["own loop"][clock] / row["built-in task"][clock] for row in rows] for clock in _CLOCKS}
    table.append(("ratio", *(spread(ratios[clock]) for clock in _CLOCKS)))
    reached = statistics.median(ratios["wall"]) <= TARGET
    loads = {"load at start": content["load_at_start"], "load at end": content["load_at_end"]}
    text = [
        *(f"# A loop of one's own against the built-in task, {content['date'][:10]}", ""),
        *(in_words({**content["machine"], **content["versions"], **loads}), ""),
        f"The time from the end of a backward pass to the next forward pass: {len(rows)} rounds, {content['updates']} updates",
        "of each in turn, one worker, 10 million parameters. Medians, with the lowest and the highest round; of the updates",
        "of a run the lower quartile. The processor's time is that of the worker's thread.",
        *("", as_markdown(table), ""),
        f"Target: a ratio of at most {TARGET:g} by the wall clock, which is {'reached' if reached else 'not reached'}.",
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--into", type=Path, default=RESULTS / "own_loop", metavar="FILE", help="write FILE.json and FILE.md")
    a = parser.parse_args()
    exit_on_sigterm()
    content: dict[str, Any] = {**conditions(), "updates": a.updates}
    content["rounds"] = measure(a.rounds, a.updates)
    content["load_at_end"] = load()
    a.into.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    a.into.with_suffix(".md").write_text(as_text(content))
    print(as_text(content))


if __name__ == "__main__":
    main()
