"""Our throughput beside that of the peers, in one run on one machine: ``make bench``.

The contenders take turns, in another order in each round; the figures are medians over the rounds, with the lowest and the
highest, and ratios are taken within each round, since the machine may be busier in another one. Writes
``results/throughput-DATE-K*.json``, ``.md`` and ``.png`` after every round, so that a run that is interrupted leaves what it
has. A contender that is not installed, or fails, is left out, and the result says why.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.contenders import CONTENDERS, DEFAULT, ELSEWHERE, ROOT, Contender, run
from benchmarks.machine import load, machine, versions
from benchmarks.side_by_side_report import as_text, write

RESULTS = ROOT / "results"
SIZES = (272_474, 2_000_000, 25_000_000)
SECONDS_PER_PARAMETER = 3e-7
"""About how much longer a measurement takes to prepare and to warm up for each parameter."""
Measure = Callable[[Contender, int, int, float], dict[str, Any] | str]
"""From contender, D, K and S to a line, or to the reason why there is none."""


def estimated_seconds(names: Sequence[str], sizes: Sequence[int], workers: Sequence[int], seconds: float, rounds: int) -> float:
    """About how long all of it takes; what is not installed takes no time."""
    there = [CONTENDERS[name] for name in names if CONTENDERS[name].python.exists()]
    starts = sum(contender.overhead_seconds for contender in there)
    large = len(there) * SECONDS_PER_PARAMETER * sum(sizes)
    return rounds * len(workers) * (len(sizes) * (len(there) * seconds + starts) + large)


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: the next one begins."""
    shift = number % len(names)
    return [*names[shift:], *names[:shift]]


def measure(
    names: Sequence[str],
    sizes: Sequence[int],
    workers: Sequence[int],
    seconds: float,
    rounds: int,
    measure_one: Measure = run,
) -> Iterator[dict[str, Any]]:
    """All rounds of all contenders, taking turns; what is known so far of one K, after each round of it.

    A contender that fails at a size is not tried there again, and keeps what it has.
    """
    common = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions(ELSEWHERE)}
    contents = {
        k: {**common, "workers": k, "seconds": seconds, "rounds": 0, "load_at_start": load(), "lines": [], "failures": {}}
        for k in workers
    }
    with tqdm(total=rounds * len(workers) * len(sizes) * len(names), unit="run") as bar:
        for number in range(rounds):
            for k, content in contents.items():
                for parameters in sizes:
                    for name in rotated(names, number):
                        bar.set_description(f"round {number + 1} of {rounds}, K = {k}, D = {parameters:,}, {name}")
                        _take(content, CONTENDERS[name], parameters, number, measure_one, bar)
                        bar.update()
                yield {**content, "rounds": number + 1, "load_at_end": load()}


def _take(content: dict[str, Any], contender: Contender, parameters: int, number: int, measure_one: Measure, bar: Any) -> None:
    """Add one measurement to what is known."""
    key = f"{contender.name}, D = {parameters:,}"
    if key in content["failures"]:
        return
    began = time.monotonic()
    found = measure_one(contender, parameters, content["workers"], content["seconds"])
    if isinstance(found, str):
        content["failures"][key] = found
        bar.write(f"{key}: {found}")
        return
    about = {"contender": contender.name, "round": number, "wall_seconds": round(time.monotonic() - began, 2)}
    content["lines"].append({**found, **about})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], metavar="K")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="for each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=DEFAULT, metavar="NAME")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER")
    a = parser.parse_args()
    minutes = estimated_seconds(a.contenders, a.parameters, a.workers, a.seconds, a.rounds) / 60
    until = datetime.fromtimestamp(time.time() + 60 * minutes).astimezone()
    print(f"{', '.join(a.contenders)}\nabout {minutes:.0f} minutes, up to {until:%H:%M}", flush=True)
    newest: dict[int, dict[str, Any]] = {}
    for content in measure(a.contenders, a.parameters, a.workers, a.seconds, a.rounds):
        newest[content["workers"]] = content
        write(content, a.into)
    for content in newest.values():
        print(as_text(content))


if __name__ == "__main__":
    main()
