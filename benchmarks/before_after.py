"""Compare the throughput of two checkouts, interleaved: ``python -m benchmarks.before_after BEFORE AFTER``.

BEFORE and AFTER are folders of checkouts. Each one's own ``benchmarks.throughput`` runs as a process in its folder, with its
own package and options, so the command lines of the two may differ (``--before-options``, ``--after-options``). In each round
both are measured at each size, one directly after the other, and the order alternates. The ratio is AFTER to BEFORE within
each round: its median with the lowest and the highest; that of the processor time for an update, of server and workers, says
more on a busy machine. Exits with status 1 if a median ratio is below ``--least``.
``--into`` writes the results after every round; with ``--resume`` those of the same two commits, with the same options on the
same machine, are kept, and what is missing is measured. None are kept of a commit with changes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import in_words, load
from benchmarks.measuring import SIZES, UNKNOWN, conditions, exact, exit_on_sigterm, spread
from benchmarks.systems import LOOPBACK, started
from ormo_rpc.report.table import as_markdown

WORKERS = 2
TIMEOUT_SECONDS = 240.0
LEAST = 0.97
MEASURED = ("ormo_rpc", "benchmarks")
"""The folders of a checkout whose code runs."""
SETTING = ("options", "workers", "seconds", "machine")
"""Entries of the results on which measurements depend."""


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """A checkout to measure.

    Attributes:
        name: In the results.
        folder: Its root.
        python: The interpreter.
        options: Further arguments of its ``benchmarks.throughput``.
    """

    name: str
    folder: Path
    python: Path
    options: Sequence[str] = ()

    def commit(self) -> str:
        """The commit, with ``+changes`` if files of `MEASURED` differ from it."""

        def git(*words: str) -> str:
            command = ["git", "-C", str(self.folder), *words]
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()

        found = git("describe", "--always", "--abbrev=10") or UNKNOWN
        return found + ("+changes" if git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED) else "")

    def check(self) -> None:
        """Make sure that its own package would be measured.

        Raises:
            RuntimeError: another one would be, or none.
        """
        code = "import importlib.util as u; print(getattr(u.find_spec('ormo_rpc'), 'origin', 'none'))"
        command = [str(self.python), "-c", code]
        found = subprocess.run(
            command, cwd=self.folder, env=self.variables(), capture_output=True, text=True, check=False, timeout=60
        )
        package = found.stdout.strip() or found.stderr.strip()
        if not package.startswith(f"{self.folder}{os.sep}"):
            raise RuntimeError(f"{self.name}: got the package {package}, expected the one in {self.folder}")

    def measure(self, parameters: int, workers: int, seconds: float) -> dict[str, Any]:
        """Run its benchmark once.

        Raises:
            RuntimeError: it failed; the text says why.
        """
        size = ("--parameters", str(parameters), "--workers", str(workers), "--seconds", str(seconds))
        command = [str(self.python), "-m", "benchmarks.throughput", *size, "--json", *self.options]
        with started(command, self.variables(), self.folder) as process:
            try:
                out, err = process.communicate(timeout=TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"{self.name}: no answer within {TIMEOUT_SECONDS:g} seconds") from None
        if process.returncode != 0:
            last = (err.strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"{self.name} at D = {parameters:,}: {last} (exit status {process.returncode})")
        return json.loads(out.strip().splitlines()[-1])

    def variables(self) -> dict[str, str]:
        """The environment of its commands."""
        return {**os.environ, **LOOPBACK, "PYTHONPATH": str(self.folder)}


def measure(
    checkouts: Sequence[Checkout],
    sizes: Sequence[int],
    workers: int,
    seconds: float,
    rounds: int,
    earlier: Sequence[dict[str, Any]] = (),
) -> Iterator[list[dict[str, Any]]]:
    """Measure the checkouts in turn, in each round in the opposite order; yield all measurements after each round.

    Args:
        checkouts: Before and after.
        sizes: Each D.
        workers: K.
        seconds: Of each measurement.
        rounds: Of all of them.
        earlier: Measurements that are taken over, not repeated.
    """
    found = [*earlier]
    done = {(each["checkout"], each["parameters"], each["round"]) for each in earlier}
    with tqdm(total=rounds * len(sizes) * len(checkouts), unit="run") as bar:
        for number in range(rounds):
            for parameters in sizes:
                for checkout in checkouts if number % 2 == 0 else [*reversed(checkouts)]:
                    bar.set_description(f"round {number + 1} of {rounds}, D = {parameters:,}, {checkout.name}")
                    if (checkout.name, parameters, number) not in done:
                        about = {"checkout": checkout.name, "round": number}
                        found.append({**checkout.measure(parameters, workers, seconds), **about})
                    bar.update()
            yield found


Value = Callable[[Mapping[str, Any]], float]
"""From a measurement to one of its figures."""


def updates_per_second(measurement: Mapping[str, Any]) -> float:
    """The rate."""
    return measurement["updates_per_second"]


def cpu_milliseconds(measurement: Mapping[str, Any]) -> float:
    """Processor time of the server and all workers for an update; NaN where no process was sampled twice."""
    times = (measurement.get(f"{name}cpu_seconds_per_update") for name in ("server_", "workers_"))
    return 1e3 * sum(math.nan if each is None else each for each in times)


def values(measurements: Sequence[Mapping[str, Any]], name: str, parameters: int, value: Value) -> list[float]:
    """A figure of a checkout at one D, in the order of rounds."""
    chosen = [each for each in measurements if (each["checkout"], each["parameters"]) == (name, parameters)]
    return [value(each) for each in sorted(chosen, key=lambda each: each["round"])]


def ratios(measurements: Sequence[Mapping[str, Any]], parameters: int, value: Value = updates_per_second) -> list[float]:
    """After to before at one D, round by round."""
    before, after = (values(measurements, name, parameters, value) for name in ("before", "after"))
    return [new / old for old, new in zip(before, after, strict=True)]


def write(content: Mapping[str, Any], into: Path) -> None:
    """Write the two files."""
    into.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    into.with_suffix(".md").write_text(as_text(content))


def earlier(content: Mapping[str, Any], into: Path) -> list[dict[str, Any]]:
    """The measurements that a file has of the same commits and `SETTING`; none without one, or of commits with changes."""
    file = into.with_suffix(".json")
    found = json.loads(file.read_text()) if file.is_file() else {}
    same = all(found.get(key) == content[key] for key in ("before", "after", *SETTING))
    return found["measurements"] if same and exact(content["before"]) and exact(content["after"]) else []


def as_text(content: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    measurements = content["measurements"]
    header = ("D", "before, updates/s", "after, updates/s", "after to before")
    table: list[tuple[str, ...]] = [(*header, "CPU before, ms/update", "CPU after, ms/update", "CPU after to before")]
    for parameters in sorted({each["parameters"] for each in measurements}):
        cells: list[str] = []
        for value, form in ((updates_per_second, ",.0f"), (cpu_milliseconds, ".2f")):
            cells += [spread(values(measurements, name, parameters, value), form) for name in ("before", "after")]
            cells.append(spread(ratios(measurements, parameters, value), ".3f"))
        table.append((f"{parameters:,}", *cells))
    loads = {"load at start": content["load_at_start"], "load at end": content["load_at_end"]}
    text = [
        *(f"# Throughput before and after, {content['date'][:10]}, K = {content['workers']}", ""),
        *(f"Before: {content['before']}. After: {content['after']}.", ""),
        *(in_words({**content["machine"], "torch": content["versions"]["torch"], **loads}), ""),
        f"{content['rounds']} rounds of {content['seconds']:g} s each, interleaved: medians, with the lowest and the highest.",
        *("", as_markdown(table)),
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("before", "after"):
        parser.add_argument(name, type=Path, help=f"folder of the checkout {name} the change")
    for name in ("before", "after"):
        parser.add_argument(f"--{name}-options", default="", metavar="'OPTIONS'", help="of its benchmarks.throughput, quoted")
        parser.add_argument(f"--{name}-python", type=Path, default=sys.executable, metavar="FILE", help="its interpreter")
    parser.add_argument("--parameters", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--workers", type=int, default=WORKERS, metavar="K")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of each measurement")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--least", type=float, default=LEAST, help="smallest median ratio that is accepted (%(default)s)")
    parser.add_argument("--into", type=Path, metavar="FILE", help="write FILE.json and FILE.md")
    parser.add_argument("--resume", action="store_true", help="keep the measurements that FILE.json has of these commits")
    a = parser.parse_args()
    exit_on_sigterm()
    checkouts = [
        Checkout(
            name=name,
            folder=getattr(a, name).resolve(),
            python=Path(getattr(a, f"{name}_python")),
            options=shlex.split(getattr(a, f"{name}_options")),
        )
        for name in ("before", "after")
    ]
    content: dict[str, Any] = {**conditions(), "workers": a.workers, "seconds": a.seconds, "rounds": a.rounds}
    content |= {checkout.name: checkout.commit() for checkout in checkouts}
    content["options"] = {checkout.name: [*checkout.options] for checkout in checkouts}
    kept = earlier(content, a.into) if a.resume and a.into is not None else []
    try:
        for checkout in checkouts:
            checkout.check()
        for measurements in measure(checkouts, a.parameters, a.workers, a.seconds, a.rounds, kept):
            content |= {"measurements": measurements, "load_at_end": load()}
            if a.into is not None:
                write(content, a.into)
    except RuntimeError as error:
        sys.exit(f"before_after: {error}")
    print(as_text(content))
    slow = [d for d in a.parameters if statistics.median(ratios(content["measurements"], d)) < a.least]
    if slow:
        sys.exit(f"before_after: slower than {a.least:g} of before at D = {', '.join(f'{d:,}' for d in slow)}")


if __name__ == "__main__":
    main()
