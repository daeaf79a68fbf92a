"""Saved and loaded state, and restarts of the server."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ormo_rpc.errors import StaleSession
from ormo_rpc.server import parameter_server as server_module
from ormo_rpc.server.events import Kind
from ormo_rpc.server.parameter_server import Status
from tests.support.buffers import averages
from tests.support.contract import same
from tests.support.schedule import answer
from tests.support.trial import ONE, Trial, begin, brief, tensor


@pytest.mark.parametrize("end", ["finish", "stop", "complete"])
@pytest.mark.parametrize("more", [0, 4])
def test_a_run_that_was_ended_early_completes_when_its_state_is_loaded(end: str, more: int) -> None:
    # Ticket 1 has come back when the end is asked for: it must not be forgotten.
    trial = begin(num_workers=3, tickets=6)
    trial.server.leave(1)
    if end != "complete":
        trial.note(getattr(trial.server, end)())
    work(trial)
    assert trial.server.status is {"finish": Status.completed, "stop": Status.stopped, "complete": Status.completed}[end]
    fresh = begin(num_workers=2, tickets=6 + more, start=False)
    fresh.server.load_state_dict(trial.server.state_dict())
    fresh.note(fresh.server.start())
    work(fresh)
    done = [event.data["ticket"] for event in [*trial.events, *fresh.events] if event.kind is Kind.apply]
    assert sorted(done) == list(range(6 + more))
    assert (fresh.server.status, fresh.server.iteration) == (Status.completed, 6 + more)


def work(trial: Trial) -> None:
    """Push for every outstanding ticket, in turns, until there is none."""
    while busy := list(trial.server.assignments.holding):
        for worker in busy:
            trial.push(worker)


def test_a_state_with_more_gradients_than_total_tickets_is_refused() -> None:
    trial = begin(tickets=10)
    for _ in range(3):
        trial.push(0)
    fresh = begin(tickets=2)
    before = fresh.server.state_dict()
    with pytest.raises(ValueError, match=r"^state of a server: iteration: got 3, expected at most 2$"):
        fresh.server.load_state_dict(trial.server.state_dict())
    assert same(fresh.server.state_dict(), before)


def test_a_diverged_run_stays_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FINITE_CHECK_INTERVAL", 1)
    trial = begin(num_workers=1, lr=10.0)
    trial.push(0, 1e308 * ONE)
    fresh = begin(num_workers=1, start=False)
    fresh.server.load_state_dict(trial.server.state_dict())
    assert brief(fresh.server.start()) == [(0, None, 1)]
    assert fresh.server.status is Status.diverged


@pytest.mark.parametrize("scheduler", ["async", "sync"])
def test_a_restarted_server_reissues_outstanding_tickets(scheduler: str) -> None:
    trial = begin(scheduler=scheduler)
    trial.push(1)
    stale = trial.work(2)
    fresh = begin(scheduler=scheduler, start=False)
    fresh.server.load_state_dict(trial.server.state_dict())
    fresh.note(fresh.server.start())
    # async: tickets 0 and 2, and the 3 that worker 1 had got; sync: 0 and 2, and the 3 that is new.
    assert sorted(reply.ticket for reply in fresh.held.values() if reply.ticket is not None) == [0, 2, 3]
    assert {(reply.stamp, reply.incarnation) for reply in fresh.held.values()} == {(1, 1)}
    assert fresh.kinds == ["resume", *{"async": ["reissue"] * 3, "sync": ["reissue", "reissue", "issue"]}[scheduler]]
    text = r"^push of worker 2 for ticket 2: incarnation: got 0, expected 1; the server has restarted: rejoin$"
    with pytest.raises(StaleSession, match=text):
        fresh.server.receive(stale)
    while fresh.server.status is Status.running:
        for worker in [worker for worker, reply in fresh.held.items() if reply.ticket is not None]:
            fresh.push(worker)
    done = [event.data["ticket"] for event in [*trial.events, *fresh.events] if event.kind is Kind.apply]
    assert sorted(done) == list(range(10))


def test_each_restart_increments_the_incarnation() -> None:
    server = begin().server
    for incarnation in (1, 2, 3):
        fresh = begin(start=False).server
        fresh.load_state_dict(server.state_dict())
        assert {reply.incarnation for reply in fresh.start()} == {incarnation}
        server = fresh


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"algorithm": "naive"}, r"algorithm: got naive, expected ormo"),
        ({"scheduler": "sync"}, r"scheduler: got sync, expected async"),
        ({"params": torch.zeros(3)}, r".*got .*torch\.float32.*, expected .*torch\.float64.*"),
        ({"params": tensor(0, 0)}, r".*got .*\(2,\).*, expected .*\(3,\).*"),
        ({"buffers": averages({"mean": ONE}, {"mean": 0.1})}, r"buffers: got .*mean.*, expected .*"),
    ],
)
def test_the_state_of_another_kind_of_server_is_refused(other: dict[str, Any], text: str) -> None:
    server = begin().server
    before = server.state_dict()
    end = "; build this server as that one was"
    with pytest.raises(ValueError, match=f"^state of a server: {text}{end}$"):
        server.load_state_dict(begin(**other).server.state_dict())
    assert same(server.state_dict(), before)


def test_a_state_of_another_format_or_with_other_buffers_changes_nothing() -> None:
    trial = begin(buffers=averages({"mean": torch.zeros(2)}, {"mean": 0.1}))
    before = trial.server.state_dict()
    trial.push(0, buffers={"mean": torch.ones(2)})
    other = trial.server.state_dict()
    other["buffers"]["mean"] = torch.ones(5)
    now = trial.server.state_dict()
    version = "version: got .*, expected .*; load it with the ormo_rpc that saved it"
    buffers = "buffers: got .*; build this server as that one was"
    for state, message in (({**before, "version": 0}, version), ({}, version), (other, buffers)):
        with pytest.raises(ValueError, match=f"^state of a server: {message}$"):
            trial.server.load_state_dict(state)
        assert same(trial.server.state_dict(), now)


@pytest.mark.parametrize(("former", "moved"), [(False, 0.2), (True, 0.1)], ids=["present", "of version 6"])
def test_a_push_in_flight_has_the_rate_that_was_sent_though_the_schedule_is_another_one(former: bool, moved: float) -> None:
    options: dict[str, Any] = {"algorithm": "mla", "momentum": 0.0, "momentum_correction": True, "local_steps": 1}
    options |= {"outer_lr": 1.0, "look_ahead": False}
    trial = begin(num_workers=1, lr=0.1, **options)
    state = trial.server.state_dict(replies=True)
    if former:  # which says nothing of it: it is taken from the new schedule
        state["version"] = 6
        for each in state["assignments"]["outstanding"]:
            del each["lr"]
    again = begin(num_workers=1, lr=0.2, **options)
    again.server.load_state_dict(state)
    start = again.server.params.clone()
    (reply,) = trial.held.values()
    again.server.receive(answer(reply, reply.lr * ONE))  # one local step with a gradient of 1
    assert torch.allclose(start - again.server.params, moved * ONE)


def test_replies_whose_buffers_lie_at_other_places_are_refused() -> None:
    # Until version 6 the bytes of a reply had the buffers in the order of the model.
    with_buffers, without = begin(buffers=averages({"mean": torch.zeros(2)}, {"mean": 0.1})), begin()
    former = [{**trial.server.state_dict(replies=True), "version": 5} for trial in (with_buffers, without)]
    with pytest.raises(ValueError, match=r"^state of a server: version: got 5, expected \d+; load it with the ormo_rpc that"):
        with_buffers.server.load_state_dict(former[0])
    with_buffers.server.load_state_dict({**former[0], "replies": []})
    without.server.load_state_dict(former[1])
