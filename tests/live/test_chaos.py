"""The chaos run: its checks find what is planted, it reads a trace that is cut back, and a short form of it ends well."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import lineage
from benchmarks.chaos.__main__ import Options, chaos
from benchmarks.chaos.faults import KINDS, OF_THE_NETWORK, WORDS
from benchmarks.chaos.lineage import Death
from benchmarks.chaos.network import Network
from benchmarks.chaos.plan import SHORT, moments, plan, total
from benchmarks.chaos.watch import Trace, listening, progress
from ormo_rpc.storage.run_directory import Progress


def applied(tickets: Sequence[int], iterations: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """A lineage, with an event between any two gradients."""
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
    check = lineage.tickets_exactly_once(applied(tickets), 4)
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
    check = lineage.iterations_in_order(applied(iterations, iterations), 3)
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
    check = lineage.faults_fired({"kill": 2, "stop": 1}, fired, least)
    assert (check.figure, check.holds) == (figure, holds)


@pytest.mark.parametrize(
    ("deaths", "told", "journal", "holds"),
    [
        ([Death(120, 100), Death(250, 245)], 25, False, True),
        ([Death(120, 100), Death(250, 245)], 24, False, False),  # one was not counted
        ([Death(120, 100), Death(250, 245)], 25, True, False),  # the journal keeps everything
        ([Death(120, 120), Death(250, 250)], 0, True, True),
        ([Death(120, 121)], -1, False, False),  # it cannot go on beyond what was applied
        ([Death(120, None)], 0, False, False),
        ([], 0, False, True),
        ([], None, False, False),
    ],
)
def test_updates_that_were_rolled_back_uncounted_are_found(deaths: list[Death], told: Any, journal: bool, holds: bool) -> None:
    assert lineage.rolled_back_counted(deaths, {"rolled_back": told}, journal=journal).holds is holds


@pytest.mark.parametrize(("lives", "holds"), [(3, True), (2, False), (4, False), (None, False)])
def test_a_life_of_the_server_that_nobody_knows_of_is_found(lives: Any, holds: bool) -> None:
    assert lineage.lives_counted([Death(1, 0), Death(2, 1)], {"server_lives": lives}).holds is holds


@pytest.mark.parametrize(
    ("told", "listed", "figure"),
    [
        ([11, 12, 12], [12], "3 warnings for 3 losses"),
        ([11, 12], [12], "2 warnings for 3 losses; 12 without a warning"),
        ([11, 12, 12], [], "3 warnings for 3 losses; 12 not in the summary"),
        ([11, 12, 12, 13], [12], "4 warnings for 3 losses; 13 lost though nothing was done to it"),
    ],
)
def test_a_loss_that_is_not_told_or_that_nobody_caused_is_found(told: list[int], listed: list[int], figure: str) -> None:
    summary = {"evictions": [{"process": process} for process in listed]}
    check = lineage.losses_told([11, 12, 12], told, summary, [12])
    assert (check.figure, check.holds) == (figure, figure == "3 warnings for 3 losses")


@pytest.mark.parametrize(
    ("status", "said", "holds"), [(0, "completed", True), (1, "completed", False), (0, "stopped", False), (None, None, False)]
)
def test_a_run_that_did_not_end_well_is_found(status: int | None, said: Any, holds: bool) -> None:
    assert lineage.completed(status, {"status": said}).holds is holds


def test_a_plan_has_as_many_faults_as_wanted_of_every_kind_and_repeats_itself() -> None:
    kinds = plan(30, random.Random(1), network=True)
    assert len(kinds) == 30
    assert set(kinds) == set(KINDS)
    assert sum(Counter(kinds)[kind] for kind in ("kill_server", "kill_server_and_worker")) >= 6
    assert kinds == plan(30, random.Random(1), network=True)
    assert kinds != plan(30, random.Random(2), network=True)
    without = plan(30, random.Random(1), network=False)
    assert len(without) == 30
    assert set(without) == set(KINDS) - set(OF_THE_NETWORK)
    due = moments(30, 100, random.Random(1))
    assert [moment // 100 for moment in due] == list(range(3, 33))  # each in a stretch of its own
    assert max(due) < total(30, 100) - 200


def line(kind: str, seconds: float, **more: Any) -> str:
    """A line of a trace."""
    return json.dumps({"event": kind, "seconds": seconds, **more}) + "\n"


def test_a_trace_is_followed_through_the_lives_of_the_server(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    trace = Trace(file)
    trace.look()  # there is none yet
    head = json.dumps({"event": "header"}) + "\n"
    kept = head + line("apply", 1.0, iteration=0)
    file.write_text(kept + line("apply", 2.0, iteration=1) + line("apply", 3.0, iteration=2)[:20])
    trace.look()
    assert (trace.iteration, trace.life, len(trace.seen)) == (2, 0, 2)  # half a line is none
    longer = "".join(line("apply", 2.5 + place, iteration=place) for place in (1, 2, 3))
    file.write_text(kept + line("resume", 2.25, iteration=1, incarnation=1) + longer)  # cut, and beyond where it was
    trace.look()
    assert (trace.iteration, trace.life) == (4, 1)
    assert [seen.data["iteration"] for seen in trace.seen if seen.life == 1] == [1, 1, 2, 3]
    file.write_text(kept)  # cut to before the former resume
    trace.look()
    assert (trace.life, len(trace.seen)) == (1, 6)
    with file.open("a") as more:
        more.write(line("resume", 1.5, iteration=1, incarnation=2) + line("apply", 2.0, iteration=1))
    trace.look()
    assert (trace.iteration, trace.life, len(trace.seen)) == (2, 2, 8)
    first, *_, last = trace.seen
    assert trace.when(first) <= first.at
    assert trace.when(last) <= last.at


def test_what_the_server_has_applied_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = Progress(tmp_path)
    written.begin(0)
    written.write(1234567)
    assert progress(tmp_path) == 1234567


def test_sockets_that_listen_are_told_from_others() -> None:
    table = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:9A3B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2001 1 0000 100 0 0 10 0
   1: 0100007F:9A3B 0100007F:8D22 01 00000000:00000000 00:00000000 00000000     0        0 2002 1 0000 20 4 30 10 -1
"""
    assert listening(table) == {"2001"}


@pytest.mark.skipif(Network.why_not() is not None, reason="network namespaces cannot be made here")
def test_a_network_of_our_own_is_gone_afterwards() -> None:
    try:
        with Network() as network:
            assert network.outside.namespace is not None
            assert "local_address" in network.outside.table()
            network.lose()
            network.restore()
    except OSError as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    assert network.outside.table() == ""  # nothing can be run in it


@pytest.mark.live
@pytest.mark.timeout(400)
def test_a_short_run_with_faults_keeps_every_promise(tmp_path: Path) -> None:
    options = Options(faults=len(SHORT), only=SHORT, least=len(SHORT) + len(WORDS), gradients=200, seed=3)
    result = chaos(options, tmp_path / "run")
    assert [str(check) for check in result.checks if not check.holds] == []
    assert {fault.kind for fault in result.faults if fault.fired} == {"kill_worker", "pause_worker", "kill_server"}
    assert result.summary["server_lives"] == 2
