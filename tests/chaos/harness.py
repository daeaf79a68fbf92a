"""Inject the planned faults into a live run, wait for its end, and check every guarantee."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ormo_rpc.storage.run_directory import read_trace
from ormo_rpc.storage.summary import read_summary
from tests.chaos import checks
from tests.chaos.checks import Check
from tests.chaos.faults import NETWORK_FAULTS, OWN_FAULTS, inject
from tests.chaos.injector import OWN_FAULT, Fault, FaultInjector, eviction_warning
from tests.chaos.network import Namespace, Network
from tests.chaos.plan import CYCLE, due_iterations, plan, total_iterations
from tests.chaos.recovery_times import recovery_times
from tests.chaos.run import ChaosError, ObservedRun
from tests.support.namespaces import why_none

TIMEOUT_SECONDS = 3.0
"""``runtime.worker_timeout_seconds``."""
STALL_SECONDS = 120.0
"""Time without an update, and without a fault, after which a run is taken to hang."""
EXIT_SECONDS = 30.0
"""Time that elastic workers and other processes have to exit after the run."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The faults to inject, and their timing.

    Attributes:
        faults: Number of faults injected from outside, besides those that the processes inject into themselves.
        seed: Of the order of faults, their iterations and their victims.
        gradients: Number of gradients for each fault.
        seconds: Longest time between two faults, whatever the iteration.
        journal: Set ``checkpoint.journal=true``.
        transport: Of the run, ``transport``.
        kinds: The kinds of faults, repeated as often as needed.
        least: Number of faults that must have fired.
        namespaces: Try to make network namespaces.
    """

    faults: int = 30
    seed: int = 0
    gradients: int = 600
    seconds: float = 15.0
    journal: bool = False
    transport: str = "auto"
    kinds: tuple[str, ...] = CYCLE
    least: int = 30
    namespaces: bool = True


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a run with faults.

    Attributes:
        checks: The guarantees.
        faults: What was injected.
        times: Seconds, see `recovery_times`.
        network: How packets were lost, or why none were.
        seconds: The length of the run.
        summary: Of the run.
    """

    checks: list[Check]
    faults: list[Fault]
    times: dict[str, list[float]]
    network: str
    seconds: float
    summary: dict[str, Any]


def run_with_faults(options: Options, run_dir: Path, *, bar: bool = False) -> Result:
    """Inject the faults into a run, wait for its end, and check it.

    Raises:
        ChaosError: something that had to happen did not, such as a fault before the end of the run.
    """
    rng = random.Random(options.seed)
    with contextlib.ExitStack() as stack:
        network, network_words = _network(stack, options)
        kinds = plan(options.faults, rng, network=network is not None, kinds=options.kinds)
        length = total_iterations(len(kinds), options.gradients)
        namespace = Namespace() if network is None else network.inside
        run = stack.enter_context(ObservedRun(run_dir, namespace, _overrides(options, length, network)))
        injector = FaultInjector(run, rng, TIMEOUT_SECONDS, network)
        began = time.monotonic()
        _wait_for_start(injector)
        due = due_iterations(len(kinds), options.gradients, rng)
        with tqdm(total=len(kinds), unit="fault", disable=None if bar else True) as progress:
            for kind, iteration in zip(kinds, due, strict=True):
                progress.set_postfix_str(f"{kind}, iteration {run.trace.iteration} of {length}")
                _wait_until_due(run, iteration, options.seconds, f"fault {len(injector.faults) + 1} of {len(kinds)}")
                fault = inject(injector, kind, round(time.monotonic() - began, 1))
                progress.update()
                if bar:
                    progress.write(f"{fault.seconds:5.0f} s  {kind}  {fault.target}: {fault.outcome}", file=sys.stderr)
        _wait_for_end(run, length)
        seconds = time.monotonic() - began
        recorded = _check_records(injector, options, kinds, length)
        return Result(
            checks=[*recorded, *_check_remains(run)],
            faults=injector.faults,
            times=recovery_times(injector),
            network=network_words,
            seconds=seconds,
            summary=read_summary(run_dir) or {},
        )


def _network(stack: contextlib.ExitStack, options: Options) -> tuple[Network | None, str]:
    """A network that can be cut, or the reason why there is none."""
    if not options.namespaces or not set(options.kinds) & set(NETWORK_FAULTS):
        return None, "not asked for, so no packet was lost"
    reason = why_none()
    if reason is None:
        network = stack.enter_context(Network())
        how = "tc netem loses all packets" if network.netem else "a link is taken down (no tc netem in this kernel)"
        return network, f"two namespaces; {how}"
    return None, f"{reason}, so no packet was lost"


def _overrides(options: Options, length: int, network: Network | None) -> list[str]:
    """The run: gradients that take some hundredths of a second, so that it lasts as long as the faults need."""
    return [
        *("dataset=digits", "model=mlp", "workers=3", "train.epochs=1000000", f"train.max_iterations={length}"),
        *("heterogeneity=slow_tail", "heterogeneity.fraction=1", "heterogeneity.factor=100"),
        *(f"runtime.worker_timeout_seconds={TIMEOUT_SECONDS:g}", "runtime.regroup_seconds=5", "runtime.max_restarts=1000"),
        *("runtime.restart_backoff_seconds=0.1", "checkpoint.every_seconds=2", "logger.progress=false"),
        f"runtime.faults=[{','.join(OWN_FAULTS)}]",
        f"transport={options.transport}",
        *(["checkpoint.journal=true"] if options.journal else []),
        *([f"server.address={network.address}:0"] if network else []),
    ]


def _wait_for_start(injector: FaultInjector) -> None:
    """Wait until all workers work, and until the processes have injected their own faults."""
    run = injector.run
    run.wait(lambda: run.trace.iteration > 0, "the first gradient")
    run.wait(lambda: _own_faults_fired(run) >= set(OWN_FAULTS), f"the processes' own faults, {', '.join(OWN_FAULTS)}")
    if injector.network is not None:
        injector.add_remote_worker()


def _own_faults_fired(run: ObservedRun) -> set[str]:
    return {found[1] for found in run.launcher.search_log(OWN_FAULT)}


def _wait_until_due(run: ObservedRun, iteration: int, seconds: float, what: str) -> None:
    began = time.monotonic()
    run.wait(lambda: run.trace.iteration >= iteration or time.monotonic() - began > seconds, f"{what} was due", seconds + 60)


def _wait_for_end(run: ObservedRun, length: int) -> None:
    """Wait for the end of the run.

    Raises:
        ChaosError: it hangs.
    """
    while run.launcher.process.poll() is None:
        before = run.trace.iteration
        run.wait(
            lambda before=before: run.trace.iteration > before or run.launcher.process.poll() is not None,
            f"an update after iteration {before} of {length}",
            STALL_SECONDS,
            may_end=True,
        )
    run.poll()


def _check_records(injector: FaultInjector, options: Options, kinds: list[str], length: int) -> list[Check]:
    """Check what the run has recorded."""
    run, evictions = injector.run, injector.evictions
    events, summary = read_trace(run.run_dir)[1], read_summary(run.run_dir) or {}
    own = Counter(word.partition("@")[0] for word in OWN_FAULTS)
    fired = Counter(fault.kind for fault in injector.faults if fault.fired)
    fired += Counter(word.partition("@")[0] for word in _own_faults_fired(run))
    return [
        checks.completed(run.launcher.process.returncode, summary),
        checks.iterations_in_order(events, length),
        checks.tickets_exactly_once(events, length),
        checks.faults_fired(Counter(kinds) + own, fired, options.least),
        checks.evictions_reported(
            [eviction.pid for eviction in evictions],
            [int(found[1]) for found in run.launcher.search_log(eviction_warning())],
            summary,
            [eviction.pid for eviction in evictions if eviction.incarnation == run.trace.incarnation],
        ),
        checks.transports_taken(options.transport, summary),
        checks.incarnations_counted(injector.deaths, summary),
        checks.rolled_back_counted(injector.deaths, summary, journal=options.journal),
    ]


def _check_remains(run: ObservedRun) -> list[Check]:
    """Check that nothing of the run is left."""
    with contextlib.suppress(ChaosError):
        run.wait(lambda: not run.running(), "the exit of all processes", EXIT_SECONDS, may_end=True)
    orphans = [f"{process.pid}: {process}" for process in run.running()]
    family = sum(len(launched.family) for launched in (run.launcher, *run.elastic))
    sockets = run.still_listening()
    found = [
        Check("no process left", "; ".join([f"{len(orphans)} of {family}", *orphans]), not orphans),
        Check("no listening socket left", f"{len(sockets)} of {len(run.sockets)}", not sockets and bool(run.sockets)),
    ]
    if run.elastic:
        killed = [launched.process.poll() for launched in run.elastic if launched.killed]
        others = [launched.process.poll() for launched in run.elastic if not launched.killed]
        figure = f"{len(killed)} killed, exit statuses of the others {', '.join(map(str, others))}"
        holds = set(killed) <= {-signal.SIGKILL} and set(others) <= {0}
        found.append(Check("elastic workers exited cleanly", figure, holds))
    return found
