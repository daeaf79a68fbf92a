"""Random faults against a live run, and what has to hold afterwards: ``python -m benchmarks.chaos``.

A controller kills, stops and cuts off processes of a run at random moments, then checks the guarantees of
``docs/guarantees.md`` from what the run has recorded, and measures how long it took to notice and to replace what was lost.
Where network namespaces can be made (Linux, root), the run lives in one of its own, and a guest in another one works for it
over a network that fails, too. Results go into ``results/chaos.json`` and ``chaos.md`` (``chaos_journal`` with ``--journal``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.chaos import lineage, measure
from benchmarks.chaos.faults import KINDS, OF_THE_NETWORK, WORDS, Chaos, Fault
from benchmarks.chaos.lineage import Check
from benchmarks.chaos.network import Network, ServerArgs
from benchmarks.chaos.plan import ROUND, SHORT, moments, plan, total
from benchmarks.chaos.watch import ROOT, Failed, Run
from ormo_rpc.report.table import as_markdown
from ormo_rpc.storage.run_directory import environment, read_summary, read_trace

TIMEOUT_SECONDS = 3.0
"""``runtime.worker_timeout_seconds``."""
STALL_SECONDS = 120.0
"""A run that applies nothing for so long, with nothing done to it, hangs."""
EXIT_SECONDS = 30.0
"""How long guests and other processes may take to end after the run."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to do.

    Attributes:
        faults: How many faults are injected from outside, besides those that the processes inject into themselves.
        seed: Of what happens to whom, and when.
        gradients: How many gradients there are for each fault.
        seconds: A fault that is not yet due after so many seconds without one is injected all the same.
        journal: With ``checkpoint.journal=true``.
        only: The kinds of faults, to be repeated as often as it takes.
        least: How many faults have to fire.
        namespaces: Whether to try for a network of our own.
    """

    faults: int = 30
    seed: int = 0
    gradients: int = 350
    seconds: float = 15.0
    journal: bool = False
    only: tuple[str, ...] = ROUND
    least: int = 30
    namespaces: bool = True


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out.

    Attributes:
        checks: What has to hold.
        faults: What was injected.
        times: Seconds, see `measure`.
        network: How packets were lost, or why they were not.
        seconds: The length of the run.
        summary: Of the run.
    """

    checks: list[Check]
    faults: list[Fault]
    times: dict[str, list[float]]
    network: str
    seconds: float
    summary: dict[str, Any]


def main() -> None:
    """Run, check, write the results; exit status 1 where a check fails."""
    options, run_dir = _parse()
    with contextlib.ExitStack() as stack:
        if run_dir is None:
            run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos_"))) / "run"
        try:
            result = chaos(options, run_dir, bar=True)
        except Failed as failure:
            sys.exit(f"chaos: {failure}\nchaos: the seed is {options.seed}; --run-dir DIRECTORY keeps what the run has written")
    for line in (*result.checks, *("  ".join(row) for row in measure.summed_up(result.times))):
        print(line)
    write(result, options, ROOT / "results")
    if not all(check.holds for check in result.checks):
        sys.exit(1)


def chaos(options: Options, run_dir: Path, *, bar: bool = False) -> Result:
    """Inject the faults into a run, to its end, and check it.

    Raises:
        Failed: something did not happen that had to happen, such as a fault before the end of the run.
    """
    chance = random.Random(options.seed)  # noqa: S311 - chance, not secrets
    with contextlib.ExitStack() as stack:
        network, told = _network(stack, options)
        kinds = plan(options.faults, chance, network=network is not None, only=options.only)
        length = total(len(kinds), options.gradients)
        place = ServerArgs() if network is None else network.inside
        run = stack.enter_context(Run(run_dir, place, _overrides(options, length, network)))
        subject = Chaos(run, chance, TIMEOUT_SECONDS, network)
        began = time.monotonic()
        _begin(subject)
        due = moments(len(kinds), options.gradients, chance)
        with tqdm(total=len(kinds), unit="fault", disable=None if bar else True) as progress:
            for kind, iteration in zip(kinds, due, strict=True):
                progress.set_postfix_str(f"{kind}, iteration {run.trace.iteration} of {length}")
                _until_due(run, iteration, options.seconds, f"fault {len(subject.faults) + 1} of {len(kinds)}")
                fault = subject.inject(kind, round(time.monotonic() - began, 1))
                progress.update()
                if bar:
                    progress.write(f"{fault.seconds:5.0f} s  {kind}  {fault.target}: {fault.outcome}", file=sys.stderr)
        _to_the_end(run, length)
        seconds = time.monotonic() - began
        checks = [*_recorded(subject, options, kinds, length), *_left_behind(run, kinds.count("guest_killed"))]
        return Result(
            checks=checks,
            faults=subject.faults,
            times=measure.times(subject),
            network=told,
            seconds=seconds,
            summary=read_summary(run_dir) or {},
        )


def write(result: Result, options: Options, folder: Path) -> None:
    """Write the results, for machines and for people."""
    name = "chaos_journal" if options.journal else "chaos"
    folder.mkdir(exist_ok=True)
    here = environment()
    kept = ("status", "iterations", "server_lives", "rolled_back", "gradients_computed", "repeated", "discarded")
    content = {
        "options": asdict(options),
        "environment": {**here, "cores": os.cpu_count()},
        "network": result.network,
        "seconds": round(result.seconds, 1),
        "checks": [asdict(check) for check in result.checks],
        "faults": [asdict(fault) for fault in result.faults],
        "times": {each: [round(value, 3) for value in values] for each, values in result.times.items()},
        "summary": {key: result.summary.get(key) for key in kept},
    }
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    counted = Counter(fault.kind for fault in result.faults)
    faults = [("fault", "times"), *((kind, str(count)) for kind, count in sorted(counted.items()))]
    checks = [("check", "found", "holds"), *((c.name, c.figure, "yes" if c.holds else "**no**") for c in result.checks)]
    order = [("second", "iteration", "fault", "to", "outcome")]
    order += [(f"{f.seconds:.0f}", str(f.at_iteration), f.kind, f.target, f.outcome) for f in result.faults]
    head = (
        f"# Faults injected into a live run{', with the journal' if options.journal else ''}\n\n"
        f"`python -m benchmarks.chaos --seed {options.seed} --faults {options.faults}"
        f"{' --journal' if options.journal else ''}`: "
        f"digits, MLP, OrMo, 3 workers, {result.summary.get('iterations')} iterations in {result.seconds:.0f} s, time-out "
        f"{TIMEOUT_SECONDS:g} s, a checkpoint every 2 s. Commit {here['commit']}, torch {here['torch']}, Python "
        f"{here['python']}, {here['cpu']}, {os.cpu_count()} cores. Network: {result.network}. 1 run.\n"
    )
    parts = [head, as_markdown(checks), as_markdown(measure.summed_up(result.times)), as_markdown(faults), as_markdown(order)]
    (folder / f"{name}.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


def _network(stack: contextlib.ExitStack, options: Options) -> tuple[Network | None, str]:
    """A network of our own, or why there is none."""
    if not options.namespaces or not set(options.only) & set(OF_THE_NETWORK):
        return None, "not asked for, so no packet was lost"
    reason = Network.why_not()
    if reason is None:
        try:
            network = stack.enter_context(Network())
        except OSError as error:
            reason = str(error)
        else:
            how = "tc netem loses all packets" if network.netem else "an interface is taken down (no tc netem in this kernel)"
            return network, f"two namespaces; {how}"
    return None, f"{reason}, so no packet was lost"


def _overrides(options: Options, length: int, network: Network | None) -> list[str]:
    """The run: gradients that take some hundredths of a second, so that it lasts as long as the faults need."""
    return [
        *("dataset=digits", "model=mlp", "workers=3", "train.epochs=1000000", f"train.max_iterations={length}"),
        *("heterogeneity=slow_tail", "heterogeneity.fraction=1", "heterogeneity.factor=100"),
        *(f"runtime.worker_timeout_seconds={TIMEOUT_SECONDS:g}", "runtime.regroup_seconds=5", "runtime.max_restarts=1000"),
        *("runtime.restart_backoff_seconds=0.1", "checkpoint.every_seconds=2", "logger.progress=false"),
        f"runtime.faults=[{','.join(WORDS)}]",
        *(["checkpoint.journal=true"] if options.journal else []),
        *([f"server.address={Network.ADDRESS}:0"] if network else []),
    ]


def _begin(subject: Chaos) -> None:
    """Wait until everybody works, and until the processes have injected their own faults."""
    run = subject.run
    run.wait(lambda: run.trace.iteration > 0, "the first gradient")
    run.wait(lambda: _told(run) >= set(WORDS), f"the processes' own faults, {', '.join(WORDS)}")
    if subject.network is not None:
        subject.remote_at_work()


def _told(run: Run) -> set[str]:
    """Which of the processes' own faults have happened."""
    return {found[1] for found in run.launcher.find(r"^launch\.py: worker \d+: fault ([^\s,]+)")}


def _until_due(run: Run, iteration: int, seconds: float, what: str) -> None:
    began = time.monotonic()
    run.wait(lambda: run.trace.iteration >= iteration or time.monotonic() - began > seconds, f"{what} was due", seconds + 60)


def _to_the_end(run: Run, length: int) -> None:
    """Wait for the end of the run, as long as it goes on.

    Raises:
        Failed: it hangs.
    """
    while run.launcher.process.poll() is None:
        before = run.trace.iteration
        run.wait(
            lambda before=before: run.trace.iteration > before or run.launcher.process.poll() is not None,
            f"the run goes on after iteration {before} of {length}",
            STALL_SECONDS,
            ends=True,
        )
    run.look()


def _recorded(subject: Chaos, options: Options, kinds: list[str], length: int) -> list[Check]:
    """The checks of what the run has recorded."""
    run = subject.run
    events, summary = read_trace(run.run_dir)[1], read_summary(run.run_dir) or {}
    own = Counter(word.partition("@")[0] for word in WORDS)
    fired = Counter(fault.kind for fault in subject.faults if fault.fired)
    fired += Counter(word.partition("@")[0] for word in _told(run))
    warned = run.launcher.find(r"^launch\.py: server: worker \d+ \(pid (\d+) on \S+\) is lost: ")
    return [
        lineage.completed(run.launcher.process.returncode, summary),
        lineage.iterations_in_order(events, length),
        lineage.tickets_exactly_once(events, length),
        lineage.faults_fired(Counter(kinds) + own, fired, options.least),
        lineage.losses_told(
            [loss.pid for loss in subject.losses],
            [int(found[1]) for found in warned],
            summary,
            [loss.pid for loss in subject.losses if loss.life == run.trace.life],
        ),
        lineage.lives_counted(subject.deaths, summary),
        lineage.rolled_back_counted(subject.deaths, summary, journal=options.journal),
    ]


def _left_behind(run: Run, killed: int) -> list[Check]:
    """The checks of what must not be there any more; so many guests were killed."""
    with contextlib.suppress(Failed):
        run.wait(lambda: not run.left_over(), "the end of all processes", EXIT_SECONDS, ends=True)
    orphans = [f"{process.pid}: {process}" for process in run.left_over()]
    family = sum(len(launched.family) for launched in (run.launcher, *run.guests))
    sockets = run.still_listening()
    checks = [
        Check("no process left", "; ".join([f"{len(orphans)} of {family}", *orphans]), not orphans),
        Check("no listening socket left", f"{len(sockets)} of {len(run.sockets)}", not sockets and bool(run.sockets)),
    ]
    statuses = [guest.process.poll() for guest in run.guests]
    if statuses:
        others = [status for status in statuses if status != -signal.SIGKILL]
        figure = f"{len(statuses) - len(others)} killed, exit statuses of the others {', '.join(map(str, others))}"
        checks.append(
            Check("guests ended well", figure, not any(others) and None not in others and len(others) + killed == len(statuses))
        )
    return checks


def _parse() -> tuple[Options, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description="Random faults against a live run.")
    normal = Options()
    parser.add_argument("--faults", type=int, default=normal.faults, help="how many are injected from outside (%(default)s)")
    parser.add_argument("--seed", type=int, default=normal.seed, help="of what happens to whom, and when (%(default)s)")
    parser.add_argument("--gradients", type=int, default=normal.gradients, help="for each fault (%(default)s)")
    parser.add_argument("--seconds", type=float, default=normal.seconds, help="longest pause between two faults (%(default)s)")
    parser.add_argument("--journal", action="store_true", help="make gradients durable before they are acknowledged")
    parser.add_argument("--short", action="store_true", help=f"{', '.join(SHORT)}, in about a minute")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(KINDS), default=ROUND, metavar="KIND", help=f"of {', '.join(KINDS)}"
    )
    parser.add_argument("--no-network", action="store_true", help="without network namespaces, even where they can be had")
    parser.add_argument("--run-dir", type=Path, help="keep the run directory here (it must not exist)")
    given = parser.parse_args()
    faults = len(SHORT) if given.short else given.faults
    options = Options(
        faults=faults,
        seed=given.seed,
        gradients=given.gradients,
        seconds=given.seconds,
        journal=given.journal,
        only=SHORT if given.short else tuple(given.only),
        least=min(30, faults + len(WORDS)),
        namespaces=not given.no_network,
    )
    return options, given.run_dir


if __name__ == "__main__":
    main()
