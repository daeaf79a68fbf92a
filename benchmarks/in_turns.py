"""Compare systems that run at the same time, and are stopped but for one: ``python -m benchmarks.in_turns``.

A system's start takes ten seconds and more, its measurement two. Here every system is started once; then, round by round, each
one runs for a moment while the processes of all others are stopped (SIGSTOP). So the turns of a round are seconds apart, there
are many rounds, and ratios within a round hold on a busy machine, too. The first system is the one that the others are
compared with. ``--checkouts`` adds our own throughput in the folders of other checkouts, such as that of the state before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import in_words, load
from benchmarks.measuring import ROOT, SIZES, conditions, exit_on_sigterm, rotated, spread
from benchmarks.namespaces import Host, two_hosts, why_not
from benchmarks.peers.harness import PROGRESS_VARIABLE
from benchmarks.peers.measurement import cpu_seconds
from benchmarks.systems import KILLED_SECONDS, RAW_SOCKETS, SYSTEMS, System, commands_of, marked, started
from ormo_rpc.report.table import as_markdown

START_SECONDS = 180.0
RUN_SECONDS = 3600.0
"""Longer than any comparison: all are killed in the end."""
PATIENT = (f"runtime.worker_timeout_seconds={RUN_SECONDS}",)
"""Overrides of our runs: a process that is stopped is not dead."""
SETTLE_SECONDS = 0.2
"""From going on to the begin of a turn's measurement."""


class Running:
    """A system that runs, or is stopped.

    Args:
        name: In the table.
        mark: In the environment of its processes.
        counts: The folder of a peer's counts.
        workers: K.
    """

    def __init__(self, name: str, mark: str, counts: Path, workers: int) -> None:
        self.name = name
        self.mark = mark
        self.counts = counts
        self.workers = workers
        self.processes: list[psutil.Process] = []
        """Those that work: the server and the workers, without launchers."""
        self.files: list[Path] = []
        """Each begins with 8 bytes that count updates."""

    def find(self) -> bool:
        """Find its processes and counts; False while it starts."""
        commands = [(each, each.cmdline()) for each in marked(self.mark) if each.is_running()]
        servers = [words for _, words in commands if "server" in words and "--run-dir" in words]
        if servers:
            self.processes = [each for each, words in commands if any(map(is_child, words))]
            self.files = [Path(servers[0][servers[0].index("--run-dir") + 1]) / "progress"]
        else:
            self.processes = [each for each, words in commands if "--multiprocessing-fork" in words]
            self.files = list(self.counts.iterdir())
        complete = len(self.processes) == self.workers + 1 and len(self.files) in (1, self.workers)
        with contextlib.suppress(OSError):
            return complete and self.updates() > 100 * self.workers
        return False

    def alive(self) -> bool:
        """True while all its processes exist."""
        return all(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in self.processes)

    def updates(self) -> int:
        """Gradients applied so far."""
        return sum(int.from_bytes(file.read_bytes()[:8], "little") for file in self.files)

    def send(self, number: signal.Signals) -> None:
        """Stop its processes, or let them go on."""
        for process in self.processes:
            process.send_signal(number)

    def turn(self, seconds: float) -> tuple[float, float]:
        """Run for a moment; return updates per second, and processor seconds of all processes for an update."""
        self.send(signal.SIGCONT)
        time.sleep(SETTLE_SECONDS)
        began, first, cpu = time.perf_counter(), self.updates(), self._cpu()
        time.sleep(seconds)
        elapsed, done = time.perf_counter() - began, self.updates() - first
        cpu = self._cpu() - cpu
        self.send(signal.SIGSTOP)
        if done == 0:
            raise RuntimeError(f"{self.name}: got no update in {seconds:g} s, expected some; take longer turns (--seconds)")
        return done / elapsed, cpu / done

    def _cpu(self) -> float:
        return sum(map(cpu_seconds, self.processes))


@contextlib.contextmanager
def running(
    system: System, folder: Path, name: str, parameters: int, workers: int, hosts: tuple[Host, Host] | None
) -> Generator[Running]:
    """Start a system and stop it at once, until the context ends it.

    Raises:
        RuntimeError: it does not start.
    """
    commands, variables = commands_of(system, parameters, workers, RUN_SECONDS, hosts, folder, PATIENT)
    mark = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="in_turns_") as counts, contextlib.ExitStack() as stack:
        variables |= {PROGRESS_VARIABLE: counts}
        first, *_ = [stack.enter_context(started(command, variables, folder, mark)) for command in commands]
        found = Running(name, mark, Path(counts), workers)
        deadline = time.monotonic() + START_SECONDS
        while not found.find():
            if first.poll() is not None or time.monotonic() > deadline:
                lines = kill_and_read_errors(first, mark) if first.poll() is not None else ["it takes too long"]
                raise RuntimeError(f"{name}: does not start: {(lines or ['no output'])[-1]}")
            time.sleep(0.5)
        found.send(signal.SIGSTOP)
        try:
            yield found
        except psutil.NoSuchProcess as error:
            if found.alive():
                raise  # it was another system's
            raise RuntimeError(f"{name}: has ended: {' / '.join(kill_and_read_errors(first, mark)[-3:])}") from error


def is_child(word: str) -> bool:
    """Tell if a word of a command line is the module of our servers and workers, in this or another checkout."""
    return word.startswith("ormo_rpc.runtimes.") and word.endswith(".entry_point")


def kill_and_read_errors(first: subprocess.Popen[str], mark: str) -> list[str]:
    """Kill the processes of a system that has failed, stopped ones too; return the lines of its first one's stderr."""
    for process in marked(mark):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return first.communicate(timeout=KILLED_SECONDS)[1].strip().splitlines()


def named(checkouts: Sequence[Path], systems: Sequence[str]) -> list[tuple[str, System, Path]]:
    """The name, system and folder of each that is compared: our own in other checkouts first.

    Raises:
        ValueError: two have one name, by which the results are kept.
    """
    folders = [folder.resolve() for folder in checkouts]
    chosen = [(folder.name, SYSTEMS["ormo_rpc"], folder) for folder in folders]
    chosen += [(name, SYSTEMS[name], ROOT) for name in systems]
    names = [name for name, *_ in chosen]
    if len({*names}) < len(names):
        raise ValueError(f"got {', '.join(names)}, expected a name for each: rename the folder of a checkout (--checkouts)")
    return chosen


def compare(systems: Sequence[Running], rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Give every system its turn in each round; return updates per second and processor seconds by system."""
    found: dict[str, dict[str, list[float]]] = {each.name: {"updates_per_second": [], "cpu_seconds": []} for each in systems}
    for number in range(rounds):
        for each in rotated(systems, number):
            rate, cpu = each.turn(seconds)
            found[each.name]["updates_per_second"].append(rate)
            found[each.name]["cpu_seconds"].append(cpu)
    return found


def rows(parameters: int, found: dict[str, dict[str, list[float]]]) -> list[tuple[str, ...]]:
    """A row for each system."""
    baseline, *_ = found.values()
    made: list[tuple[str, ...]] = []
    for name, figures in found.items():
        of = {
            key: spread([one / other for one, other in zip(values, baseline[key], strict=True)])
            for key, values in figures.items()
        }
        cpu = [1e3 * value for value in figures["cpu_seconds"]]
        rates = spread(figures["updates_per_second"], ",.0f")
        made.append((f"{parameters:,}", name, rates, of["updates_per_second"], spread(cpu), of["cpu_seconds"]))
    return made


def as_text(content: dict[str, Any]) -> str:
    """The report as Markdown."""
    place = ", between two network namespaces" if content["namespaces"] else ""
    loads = {"load at start": content["load_at_start"], "load at end": content["load_at_end"]}
    table: list[tuple[str, ...]] = [("D", "system", "updates/s", "ratio", "CPU, ms/update", "ratio of CPU")]
    for parameters, found in content["found"].items():
        table += rows(int(parameters), found)
    text = [
        *(f"# Systems in turns, {content['date'][:10]}, K = {content['workers']}{place}", ""),
        *(in_words({**content["machine"], **content["versions"], **loads}), ""),
        f"{content['rounds']} rounds of {content['seconds']:g} s for each system, all others stopped meanwhile: medians, with",
        "the lowest and the highest. Ratios are to the first system, in each round. CPU is that of server and workers.",
        *("", as_markdown(table)),
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=[RAW_SOCKETS, "ormo_rpc"], metavar="NAME")
    parser.add_argument("--checkouts", nargs="+", type=Path, default=[], metavar="FOLDER", help="come before the systems")
    parser.add_argument("--parameters", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--workers", type=int, default=2, metavar="K")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of each turn")
    parser.add_argument("--namespaces", action="store_true", help="server and workers in two network namespaces; needs root")
    parser.add_argument("--into", type=Path, metavar="FILE", help="write FILE.json and FILE.md after every size")
    a = parser.parse_args()
    exit_on_sigterm()
    reason = why_not() if a.namespaces else None
    if reason:
        sys.exit(f"in_turns: --namespaces: {reason}")
    try:
        chosen = named(a.checkouts, a.systems)
    except ValueError as error:
        parser.error(str(error))
    content: dict[str, Any] = {**conditions(), "workers": a.workers, "rounds": a.rounds, "seconds": a.seconds}
    content |= {"namespaces": a.namespaces, "found": {}}
    for parameters in a.parameters:
        with contextlib.ExitStack() as stack:
            systems: list[Running] = []
            for name, system, folder in chosen:
                print(f"D = {parameters:,}: starting {name}", file=sys.stderr, flush=True)
                # Hosts of its own for each system, as torchrun's port is the same for all.
                hosts = stack.enter_context(two_hosts()) if a.namespaces else None
                each = running(system, folder, name, parameters, a.workers, hosts)
                systems.append(stack.enter_context(each))
            content["found"][str(parameters)] = compare(systems, a.rounds, a.seconds)
        content["load_at_end"] = load()
        if a.into is not None:
            a.into.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
            a.into.with_suffix(".md").write_text(as_text(content))
    print(as_text(content))


if __name__ == "__main__":
    main()
