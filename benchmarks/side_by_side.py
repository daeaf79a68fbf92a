"""Compare our throughput with that of the peers, in one run on one machine: ``make bench``, or ``make bench-nodes``.

The systems take turns, in another order in each round; the figures are medians over the rounds, with the lowest and the
highest, and ratios are taken within each round, since the machine may be busier in another one. Writes
``results/throughput-DATE-K*.json``, ``.md`` and ``.png`` after every round, so that a run that is interrupted leaves what it
has; ``--resume`` goes on from there. A system that is not installed, or fails, is left out, and the result says why.

``--namespaces`` (``make bench-nodes``) puts the server and its workers into two network namespaces of this machine
(`benchmarks.namespaces`), and writes ``results/throughput-DATE-K*-namespaces``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import load
from benchmarks.measuring import RESULTS, SIZES, conditions, exact, exit_on_sigterm, rotated
from benchmarks.namespaces import two_hosts, why_not
from benchmarks.side_by_side_report import as_text, stem, write
from benchmarks.systems import BETWEEN_HOSTS, DEFAULT, OWN_ENVIRONMENTS, SYSTEMS, System, run

SECONDS_PER_PARAMETER = 3e-7
"""Further time that a measurement takes for each parameter, roughly: making vectors and warming up."""
Measure = Callable[[System, int, int, float], dict[str, Any] | str]
"""From system, D, K and S to a measurement, or to the reason why there is none."""


def estimated_seconds(names: Sequence[str], sizes: Sequence[int], workers: Sequence[int], seconds: float, rounds: int) -> float:
    """Estimate the time of everything; what is not installed takes none."""
    installed = [SYSTEMS[name] for name in names if SYSTEMS[name].python.exists()]
    starts = sum(system.overhead_seconds for system in installed)
    large = len(installed) * SECONDS_PER_PARAMETER * sum(sizes)
    return rounds * len(workers) * (len(sizes) * (len(installed) * seconds + starts) + large)


def measure(
    names: Sequence[str],
    sizes: Sequence[int],
    workers: Sequence[int],
    seconds: float,
    rounds: int,
    measure_one: Measure = run,
    earlier: Sequence[Mapping[str, Any]] = (),
    **about: Any,
) -> Iterator[dict[str, Any]]:
    """Measure all systems in turn, for all rounds; yield the results so far of one K after each round of it.

    A system that fails at a size is not tried there again, and keeps the measurements it has.

    Args:
        names: The systems.
        sizes: Each D.
        workers: Each K.
        seconds: Of each measurement.
        rounds: Of all of them.
        measure_one: Measures a system once.
        earlier: Measurements that are taken over, not repeated.
        about: Further values of the results.
    """
    common = {**conditions(OWN_ENVIRONMENTS), **about, "seconds": seconds, "rounds": 0}
    contents: dict[int, dict[str, Any]] = {
        k: {**common, "workers": k, "measurements": [each for each in earlier if each["workers"] == k], "failures": {}}
        for k in workers
    }
    with tqdm(total=rounds * len(workers) * len(sizes) * len(names), unit="run") as bar:
        for number in range(rounds):
            for k, content in contents.items():
                for parameters in sizes:
                    for name in rotated(names, number):
                        bar.set_description(f"round {number + 1} of {rounds}, K = {k}, D = {parameters:,}, {name}")
                        _add(content, SYSTEMS[name], parameters, number, measure_one, bar)
                        bar.update()
                yield {**content, "rounds": number + 1, "load_at_end": load()}


def _add(content: dict[str, Any], system: System, parameters: int, number: int, measure_one: Measure, bar: Any) -> None:
    """Add one measurement to the results."""
    key = f"{system.name}, D = {parameters:,}"
    place = (system.name, parameters, number)
    done = {(each["system"], each["parameters"], each["round"]) for each in content["measurements"]}
    if key in content["failures"] or place in done:
        return
    began = time.monotonic()
    found = measure_one(system, parameters, content["workers"], content["seconds"])
    if isinstance(found, str):
        content["failures"][key] = found
        bar.write(f"{key}: {found}")
        return
    about = {"system": system.name, "round": number, "wall_seconds": round(time.monotonic() - began, 2)}
    content["measurements"].append({**found, **about})


def kept(content: Mapping[str, Any], workers: Sequence[int], seconds: float, folder: Path) -> list[dict[str, Any]]:
    """The measurements of the same day, commit and length that the files in a folder have; none of a commit with changes."""
    found, commit = list[dict[str, Any]](), content["versions"]["commit"]
    if not exact(commit):
        return found
    for file in (stem({**content, "workers": k}, folder).with_suffix(".json") for k in workers):
        earlier = json.loads(file.read_text()) if file.is_file() else None
        if earlier and (earlier["versions"]["commit"], earlier["seconds"]) == (commit, seconds):
            found += earlier["measurements"]
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], metavar="K")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="for each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), metavar="NAME")
    parser.add_argument("--namespaces", action="store_true", help="server and workers in two network namespaces; needs root")
    parser.add_argument(
        "--resume", action="store_true", help="keep today's measurements of this commit, and take the missing ones"
    )
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER")
    a = parser.parse_args()
    exit_on_sigterm()
    reason = why_not() if a.namespaces else None
    if reason:
        sys.exit(f"side_by_side: --namespaces: {reason}")
    a.systems = a.systems or (BETWEEN_HOSTS if a.namespaces else DEFAULT)
    minutes = estimated_seconds(a.systems, a.parameters, a.workers, a.seconds, a.rounds) / 60
    until = datetime.fromtimestamp(time.time() + 60 * minutes).astimezone()
    print(f"{', '.join(a.systems)}\nabout {minutes:.0f} minutes, up to {until:%H:%M}", flush=True)
    about: dict[str, Any] = {"namespaces": True} if a.namespaces else {}
    earlier = kept({**conditions(), **about}, a.workers, a.seconds, a.into) if a.resume else []
    newest: dict[int, dict[str, Any]] = {}
    with two_hosts() if a.namespaces else contextlib.nullcontext() as hosts:
        measure_one = functools.partial(run, hosts=hosts)
        for content in measure(a.systems, a.parameters, a.workers, a.seconds, a.rounds, measure_one, earlier, **about):
            newest[content["workers"]] = content
            write(content, a.into)
    for content in newest.values():
        print(as_text(content))


if __name__ == "__main__":
    main()
