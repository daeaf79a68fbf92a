"""The chaos harness: its checks find what is planted, it follows a trace that is truncated, and a short run ends well."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc.storage.counters import RunCounters
from tests.chaos import checks
from tests.chaos.checks import ServerDeath
from tests.chaos.faults import KINDS, NETWORK_FAULTS, OWN_FAULTS
from tests.chaos.harness import Options, run_with_faults
from tests.chaos.network import Network
from tests.chaos.plan import SHORT, due_iterations, plan, total_iterations
from tests.chaos.processes import listening
from tests.chaos.run import applied_gradients
from tests.chaos.trace import TraceFollower
from tests.support.namespaces import why_none


def applied(tickets: Sequence[int], iterations: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """The events of a trace that applies these tickets, each issued just before."""
    events: list[dict[str, Any]] = []
    for iteration, ticket in zip(iterations or range(len(tickets)), tickets, strict=True):
        events += [{"event": "issue", "ticket": ticket}, {"event": "apply", "iteration": iteration, "ticket": ticket}]
    return events


@pytest.mark.parametrize(
    ("tickets", "figure", "holds"),
    [
        ([0, 2, 1, 3], "4 of 4", True),
        ([0, 2, 2, 3], "2 of 4; 1 missing; 2 more than once", False),
        ([0, 1, 2], "3 of 4; 3 missing", False),
        ([0, 1, 2, 3, 3], "3 of 4; 3 more than once", False),
        ([0, 1, 2, 3, 4], "4 of 4; 4 never issued", False),
        ([], "0 of 4; 0, 1, 2, 3 missing", False),
    ],
)
def test_a_ticket_that_is_doubled_or_missing_is_found(tickets: list[int], figure: str, holds: bool) -> None:
    check = checks.tickets_exactly_once(applied(tickets), 4)
    assert (check.figure, check.holds) == (figure, holds)


@pytest.mark.parametrize(
    ("iterations", "figure", "holds"),
    [
        ([0, 1, 2], "3 of 3", True),
        ([0, 2, 1], "3 of 3; 2 stands in place of 1", False),
        ([0, 1], "2 of 3", False),
        ([0, 1, 2, 3], "4 of 3", False),
        ([0, 1, 1, 2], "4 of 3; 1 stands in place of 2", False),
    ],
)
def test_iterations_out_of_order_are_found(iterations: list[int], figure: str, holds: bool) -> None:
    check = checks.iterations_in_order(applied(iterations, iterations), 3)
    assert (check.figure, check.holds) == (figure, holds)


@pytest.mark.parametrize(
    ("fired", "least", "figure", "holds"),
    [
        ({"kill": 2, "stop": 1}, 3, "3", True),
        ({"kill": 1, "stop": 1}, 2, "2; kill: 1 of 2", False),
        ({"kill": 2}, 2, "2; stop: 0 of 1", False),
        ({"kill": 2, "stop": 1, "pause": 1}, 3, "4; pause: 1, not planned", False),
        ({"kill": 2, "stop": 1}, 4, "3; expected at least 4", False),
    ],
)
def test_a_fault_that_did_not_fire_is_found(fired: dict[str, int], least: int, figure: str, holds: bool) -> None:
    check = checks.faults_fired({"kill": 2, "stop": 1}, fired, least)
    assert (check.figure, check.holds) == (figure, holds)


@pytest.mark.parametrize(
    ("deaths", "reported", "journal", "holds"),
    [
        ([ServerDeath(120, 100), ServerDeath(250, 245)], 25, False, True),
        ([ServerDeath(120, 100), ServerDeath(250, 245)], 24, False, False),  # one was not counted
        ([ServerDeath(120, 100), ServerDeath(250, 245)], 25, True, False),  # the journal keeps everything
        ([ServerDeath(120, 120), ServerDeath(250, 250)], 0, True, True),
        ([ServerDeath(120, 121)], -1, False, False),  # it cannot resume after what was applied
        ([ServerDeath(120, None)], 0, False, False),
        ([], 0, False, True),
        ([], None, False, False),
    ],
)
def test_updates_that_were_rolled_back_uncounted_are_found(
    deaths: list[ServerDeath], reported: Any, journal: bool, holds: bool
) -> None:
    assert checks.rolled_back_counted(deaths, {"rolled_back": reported}, journal=journal).holds is holds


@pytest.mark.parametrize(
    ("asked", "taken", "holds"),
    [("gloo", ["gloo", "gloo"], True), ("gloo", ["gloo", "tcp"], False), ("auto", ["gloo", "shm"], True), ("auto", [], False)],
)
def test_a_worker_over_another_transport_is_found(asked: str, taken: list[str], holds: bool) -> None:
    transports = {str(worker): {"transport": name, "reason": ""} for worker, name in enumerate(taken)}
    assert checks.transports_taken(asked, {"control": "rpc", "transports": transports}).holds is holds


@pytest.mark.parametrize(("count", "holds"), [(3, True), (2, False), (4, False), (None, False)])
def test_an_incarnation_of_the_server_without_a_death_is_found(count: Any, holds: bool) -> None:
    assert checks.incarnations_counted([ServerDeath(1, 0), ServerDeath(2, 1)], {"incarnations": count}).holds is holds


@pytest.mark.parametrize(
    ("warned", "listed", "figure"),
    [
        ([11, 12, 12], [12], "3 warnings for 3 evictions"),
        ([11, 12], [12], "2 warnings for 3 evictions; 12 without a warning"),
        ([11, 12, 12], [], "3 warnings for 3 evictions; 12 not in the summary"),
        ([11, 12, 12, 13], [12], "4 warnings for 3 evictions; 13 evicted though no fault hit it"),
    ],
)
def test_an_eviction_that_is_not_reported_or_has_no_cause_is_found(warned: list[int], listed: list[int], figure: str) -> None:
    summary = {"evictions": [{"process": process} for process in listed]}
    check = checks.evictions_reported([11, 12, 12], warned, summary, [12])
    assert (check.figure, check.holds) == (figure, figure == "3 warnings for 3 evictions")


@pytest.mark.parametrize(
    ("status", "reported", "holds"),
    [(0, "completed", True), (1, "completed", False), (0, "stopped", False), (None, None, False)],
)
def test_a_run_that_did_not_end_well_is_found(status: int | None, reported: Any, holds: bool) -> None:
    assert checks.completed(status, {"status": reported}).holds is holds


def test_a_plan_has_as_many_faults_as_wanted_of_every_kind_and_repeats_itself() -> None:
    kinds = plan(30, random.Random(1), network=True)
    assert len(kinds) == 30
    assert set(kinds) == set(KINDS)
    assert sum(Counter(kinds)[kind] for kind in ("kill_server", "kill_server_and_worker", "kill_server_that_opens")) >= 6
    assert kinds == plan(30, random.Random(1), network=True)
    assert kinds != plan(30, random.Random(2), network=True)
    without = plan(30, random.Random(1), network=False)
    assert len(without) == 30
    assert set(without) == set(KINDS) - set(NETWORK_FAULTS)
    due = due_iterations(30, 100, random.Random(1))
    assert [moment // 100 for moment in due] == list(range(3, 33))  # each in a stretch of its own
    assert max(due) < total_iterations(30, 100) - 200


def line(kind: str, seconds: float, **more: Any) -> str:
    """A line of a trace."""
    return json.dumps({"event": kind, "seconds": seconds, **more}) + "\n"


def test_a_trace_is_followed_through_the_incarnations_of_the_server(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    trace = TraceFollower(file)
    trace.poll()  # there is none yet
    head = json.dumps({"event": "header"}) + "\n"
    kept = head + line("apply", 1.0, iteration=0)
    file.write_text(kept + line("apply", 2.0, iteration=1) + line("apply", 3.0, iteration=2)[:20])
    trace.poll()
    assert (trace.iteration, trace.incarnation, len(trace.events)) == (2, 0, 2)  # half a line is not read
    longer = "".join(line("apply", 2.5 + place, iteration=place) for place in (1, 2, 3))
    file.write_text(kept + line("resume", 2.25, iteration=1, incarnation=1) + longer)  # cut, and beyond where it was
    trace.poll()
    assert (trace.iteration, trace.incarnation) == (4, 1)
    assert [event.data["iteration"] for event in trace.events if event.incarnation == 1] == [1, 1, 2, 3]
    file.write_text(kept)  # cut to before the former resume
    trace.poll()
    assert (trace.incarnation, len(trace.events)) == (1, 6)
    with file.open("a") as more:
        more.write(line("resume", 1.5, iteration=1, incarnation=2) + line("apply", 2.0, iteration=1))
    trace.poll()
    assert (trace.iteration, trace.incarnation, len(trace.events)) == (2, 2, 8)
    first, *_, last = trace.events
    assert trace.happened_at(first) <= first.read_at
    assert trace.happened_at(last) <= last.read_at


def test_the_number_of_applied_gradients_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = RunCounters(tmp_path)
    written.begin(0, 0.0)
    written.set_iterations(1234567, 0.0)
    assert applied_gradients(tmp_path) == 1234567


def test_listening_sockets_are_distinguished_from_others() -> None:
    table = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:9A3B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2001 1 0000 100 0 0 10 0
   1: 0100007F:9A3B 0100007F:8D22 01 00000000:00000000 00:00000000 00000000     0        0 2002 1 0000 20 4 30 10 -1
"""
    assert listening(table) == {"2001"}


def test_a_network_namespace_is_removed_afterwards() -> None:
    if reason := why_none():
        pytest.skip(reason)
    with Network() as network:
        assert network.outside.name is not None
        assert "local_address" in network.outside.tcp_table()
        network.lose()
        network.restore()
    assert network.outside.tcp_table() == ""  # nothing can be run in it


@pytest.mark.live
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("transport", "kinds", "gradients"),
    [
        ("shm", SHORT, 120),
        # More, since elastic workers take seconds to start, and a killed server no longer does.
        ("gloo", ("sending_worker_killed", "kill_server_that_opens", "sending_worker_stopped"), 240),
    ],
)
def test_a_short_run_with_faults_keeps_every_guarantee(
    transport: str, kinds: tuple[str, ...], gradients: int, tmp_path: Path
) -> None:
    least = len(kinds) + len(OWN_FAULTS)
    options = Options(transport=transport, faults=len(kinds), kinds=kinds, least=least, gradients=gradients, seed=3)
    result = run_with_faults(options, tmp_path / "run")
    assert [str(check) for check in result.checks if not check.holds] == []
    assert {fault.kind for fault in result.faults if fault.fired} == set(kinds)
    assert result.summary["incarnations"] == 2
