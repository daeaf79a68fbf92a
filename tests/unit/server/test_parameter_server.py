"""The server core: what it refuses, what it repeats, who gets what when workers come and go, and what it records."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ormo_rpc.errors import NonFiniteGradient, PushRefused, StaleSession
from ormo_rpc.messages import Push, Reply
from ormo_rpc.server import parameter_server as server_module
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import ParameterServer, Status
from tests.support.contract import same
from tests.support.schedule import answer

ONE = torch.ones(3, dtype=torch.float64)


@dataclass
class Trial:
    """A server of three parameters, its events, and every reply that it gave."""

    server: ParameterServer
    events: list[Event] = field(default_factory=list[Event])
    held: dict[int, Reply] = field(default_factory=dict[int, Reply])

    def note(self, replies: list[Reply]) -> list[Reply]:
        """Remember the newest reply of each worker."""
        self.held.update({reply.worker: reply for reply in replies})
        return replies

    def push(self, worker: int, grad: Tensor = ONE, **changes: Any) -> list[Reply]:
        """The worker answers its newest reply."""
        return self.note(self.server.receive(self.work(worker, grad, **changes)))

    def work(self, worker: int, grad: Tensor = ONE, **changes: Any) -> Push:
        """That answer, not sent yet."""
        return replace(answer(self.held[worker], grad), **changes)

    @property
    def kinds(self) -> list[str]:
        """The kinds of the events, in order."""
        return [event.kind.value for event in self.events]


def begin(*, num_workers: int = 3, tickets: int | None = 10, start: bool = True, **options: Any) -> Trial:
    events: list[Event] = []
    settings: dict[str, Any] = {"params": torch.zeros(3, dtype=torch.float64), "lr": 0.5, **options}
    server = build_server(num_workers=num_workers, total_tickets=tickets, record=events.append, **settings)
    trial = Trial(server, events)
    if start:
        trial.note(server.start())
    return trial


def brief(replies: list[Reply]) -> list[tuple[int, int | None, int]]:
    """Worker, ticket and stamp of each reply."""
    return [(reply.worker, reply.ticket, reply.stamp) for reply in replies]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------------ bad pushes

MEAN = {"mean": tensor(1.0, 2.0)}
LIKE = ", as the server's parameters have it"
NOT_FINITE = "values NaN or infinite, expected finite numbers; lower the learning rate"
MODEL = "server and worker must build the same model"
BAD: dict[str, tuple[dict[str, Any], type[PushRefused], str]] = {
    # Worker 1 holds ticket 1 of stamp 0; the server is at iteration 2 with tickets 0 to 4 issued.
    "too long": (
        {"grad": torch.ones(4).double()},
        PushRefused,
        r"1 for ticket 1: gradient: got shape \(4,\), expected \(3,\)" + LIKE,
    ),
    "empty": ({"grad": tensor()}, PushRefused, r"1 for ticket 1: gradient: got shape \(0,\), expected \(3,\)" + LIKE),
    "2-D": ({"grad": ONE.reshape(3, 1)}, PushRefused, r"1 for ticket 1: gradient: got shape \(3, 1\), expected \(3,\)" + LIKE),
    "scalar": ({"grad": torch.tensor(1.0)}, PushRefused, r"1 for ticket 1: gradient: got shape \(\), expected \(3,\)" + LIKE),
    "dtype": (
        {"grad": ONE.float()},
        PushRefused,
        "1 for ticket 1: gradient: got dtype torch.float32, expected torch.float64" + LIKE,
    ),
    "device": ({"grad": ONE.to("meta")}, PushRefused, "1 for ticket 1: gradient: got device meta, expected cpu" + LIKE),
    "nan": ({"grad": tensor(0, math.nan, 1)}, NonFiniteGradient, "1 for ticket 1: gradient: got 1 of 3 " + NOT_FINITE),
    "inf": ({"grad": tensor(0, math.inf, 1)}, NonFiniteGradient, "1 for ticket 1: gradient: got 1 of 3 " + NOT_FINITE),
    "-inf and inf": (
        {"grad": tensor(-math.inf, math.inf, 1)},
        NonFiniteGradient,
        "1 for ticket 1: gradient: got 2 of 3 " + NOT_FINITE,
    ),
    "loss": (
        {"loss": math.nan},
        NonFiniteGradient,
        "1 for ticket 1: loss: got nan, expected a finite number; the learning rate may be too high",
    ),
    "infinite loss": (
        {"loss": math.inf},
        NonFiniteGradient,
        "1 for ticket 1: loss: got inf, expected a finite number; the learning rate may be too high",
    ),
    "no buffer": ({"buffers": {}}, PushRefused, rf"1 for ticket 1: got the buffers \[\], expected \['mean'\]; {MODEL}"),
    "unknown buffer": (
        {"buffers": {**MEAN, "var": tensor(1)}},
        PushRefused,
        rf"1 for ticket 1: got the buffers \['mean', 'var'\], expected \['mean'\]; {MODEL}",
    ),
    "shape of a buffer": (
        {"buffers": {"mean": tensor(1)}},
        PushRefused,
        r"1 for ticket 1: buffer 'mean': got shape \(1,\), expected \(2,\)" + LIKE,
    ),
    "nan in a buffer": (
        {"buffers": {"mean": tensor(1, math.nan)}},
        NonFiniteGradient,
        "1 for ticket 1: buffer 'mean': got 1 of 2 " + NOT_FINITE,
    ),
    "unknown worker": (
        {"worker": 9},
        StaleSession,
        r"9 for ticket 1: it is not a member, members are \[0, 1, 2\]; join \(again\) to get work",
    ),
    "stamp from the future": (
        {"stamp": 3},
        PushRefused,
        "1 for ticket 1: stamp: got 3, expected one from 0 to the server's iteration 2",
    ),
    "negative stamp": (
        {"stamp": -1},
        PushRefused,
        "1 for ticket 1: stamp: got -1, expected one from 0 to the server's iteration 2",
    ),
    "other stamp": ({"stamp": 1}, PushRefused, "1 for ticket 1: stamp: got 1, expected 0, that of the reply"),
    "never issued": ({"ticket": 5}, PushRefused, "1: ticket: got 5, expected one that was issued, below 5"),
    "negative ticket": ({"ticket": -1}, PushRefused, "1: ticket: got -1, expected one that was issued, below 5"),
    "another's ticket": (
        {"ticket": 2},
        PushRefused,
        "1: ticket: got 2, which is held by worker 2; push for a ticket of your own",
    ),
    "another's redeemed ticket": (
        {"ticket": 3, "stamp": 1},
        PushRefused,
        "1: ticket: got 3, which is settled already; only a worker's newest push may be repeated",
    ),
    "own ticket redeemed long ago": (
        {"worker": 0, "ticket": 0},
        PushRefused,
        "0: ticket: got 0, which is settled already; only a worker's newest push may be repeated",
    ),
    "another incarnation": (
        {"incarnation": 1},
        StaleSession,
        "1 for ticket 1: incarnation: got 1, expected 0; the server has restarted: rejoin",
    ),
}


def receive_or_raise(server: ParameterServer, push: Push) -> None:
    """Raise why a push is rejected, which `receive` would settle."""
    rejected = server.validate(push).rejected
    if rejected is not None:
        raise rejected
    server.receive(push)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_push_is_refused_with_its_reason_and_changes_nothing(name: str) -> None:
    changes, error, text = BAD[name]
    trial = begin(buffers=RunningBuffers({"mean": torch.zeros(2, dtype=torch.float64)}, {"mean": 0.25}))
    trial.push(0, buffers=MEAN)
    trial.push(0, buffers=MEAN)
    before, events = trial.server.state_dict(), len(trial.events)
    bad = replace(trial.work(1, buffers=MEAN), **changes)
    with pytest.raises(error, match=f"^push of worker {text}$") as caught:
        receive_or_raise(trial.server, bad)
    assert type(caught.value) is error
    assert type(caught.value)(str(caught.value)).args == caught.value.args, "it cannot be built again from one string"
    assert same(trial.server.state_dict(), before)
    assert len(trial.events) == events
    assert brief(trial.push(1, buffers=MEAN)) == [(1, 5, 3)], "the right push is taken afterwards"


def test_a_finite_gradient_whose_sum_overflows_is_applied() -> None:
    # 1e308 + 1e308 > 1.8e308; w = 0 - 0.5 * 1e308 is finite.
    trial = begin()
    trial.push(0, tensor(1e308, 1e308, 0))
    assert trial.server.params.tolist() == [-0.5e308, -0.5e308, 0]
    assert trial.events[-2].data["grad_sum"] == "inf"


def test_a_gradient_that_still_hangs_on_its_graph_leaves_the_server_free_of_it() -> None:
    trial = begin(buffers=RunningBuffers({"mean": torch.zeros(2, dtype=torch.float64)}, {"mean": 0.25}))
    grad, mean = ONE.clone().requires_grad_(), MEAN["mean"].clone().requires_grad_()
    trial.push(0, grad * 2, buffers={"mean": mean * 2})
    held = [trial.server.params, *trial.server.algorithm.state_dict().values(), *trial.server.buffers.average.values()]
    assert not any(value.requires_grad for value in held if isinstance(value, Tensor))
    assert trial.server.params.tolist() == [-1, -1, -1]  # 0 - 0.5 * 2
    assert trial.server.buffers.average["mean"].tolist() == [0.5, 1.0]  # 0.75 * 0 + 0.25 * 2 * (1, 2)


def test_a_state_and_buffers_that_hang_on_a_graph_leave_the_server_free_of_it() -> None:
    start = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    trial = begin(buffers=RunningBuffers({"mean": start}, {"mean": 0.25}))
    plain = trial.server.state_dict(replies=True)
    graph = {
        **plain,
        "params": plain["params"].clone().requires_grad_(),
        "algorithm_state": {
            k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in plain["algorithm_state"].items()
        },
        "buffers": {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in plain["buffers"].items()},
    }
    for state in (plain, graph):
        trial.server.load_state_dict(state)
        trial.push(0, buffers=MEAN)
        held = [trial.server.params, *trial.server.algorithm.state_dict().values(), *trial.server.buffers.average.values()]
        assert not any(value.requires_grad for value in held if isinstance(value, Tensor))
        assert trial.server.params.tolist() == [-0.5, -0.5, -0.5]  # 0 - 0.5 * 1
        trial.held[0] = next(Reply(**each) for each in plain["replies"] if each["worker"] == 0)


# -------------------------------------------------------------------------------------------------------------------- replies


def test_the_parameters_of_a_reply_are_those_of_its_stamp() -> None:
    # lr(t) = t + 1. Ticket 3 is issued at iteration 1; the parameters are 0 - 1 * 1 = -1.
    trial = begin(algorithm="asgd", lr=lambda t: t + 1.0)
    assert [(r.lr, r.steps, r.incarnation) for r in trial.held.values()] == [(1.0, 1, 0)] * 3
    (reply,) = trial.push(2)
    assert (reply.worker, reply.ticket, reply.stamp, reply.lr) == (2, 3, 1, 2.0)
    assert reply.params.tolist() == [-1.0, -1.0, -1.0]


def test_a_schedule_is_asked_for_the_iterations_of_the_run_only() -> None:
    table = [0.5, 0.25, 0.125]
    trial = begin(num_workers=2, tickets=3, lr=lambda t: table[t], algorithm="asgd")
    trial.push(0)
    trial.push(0)
    assert brief(trial.push(1)) == [(0, None, 3), (1, None, 3)]
    assert trial.server.params.tolist() == [-0.875] * 3  # 0.5 + 0.25 + 0.125


def test_the_start_is_copied() -> None:
    start = torch.zeros(3, dtype=torch.float64)
    begin(params=start).push(0)
    assert start.tolist() == [0, 0, 0]


@pytest.mark.parametrize("scheduler", ["async", "sync"])
def test_a_run_without_total_tickets_continues(scheduler: str) -> None:
    trial = begin(tickets=None, scheduler=scheduler)
    for _ in range(20):
        for worker in range(3):
            trial.push(worker)
    assert (trial.server.iteration, trial.server.status) == (60, Status.running)
    assert sorted(reply.ticket for reply in trial.held.values() if reply.ticket is not None) == [60, 61, 62]


# ------------------------------------------------------------------------------------------------------------ repeated pushes


def test_a_repeated_push_is_applied_once_and_gets_the_identical_reply() -> None:
    trial = begin()
    push = trial.work(1)
    (reply,) = trial.server.receive(push)
    state = trial.server.state_dict()
    trial.push(0)  # others go on in between
    between = trial.server.state_dict()
    (again,) = trial.server.receive(push)
    assert again is reply
    assert same(trial.server.state_dict(), between)
    assert trial.server.iteration == state["iteration"] + 1
    assert trial.kinds[-1] == "repeat"


def test_a_push_repeated_while_its_reply_is_held_at_the_barrier_gets_no_reply_yet() -> None:
    trial = begin(scheduler="sync")
    push = trial.work(1)
    assert trial.server.receive(push) == []
    held = trial.server.state_dict()
    assert trial.server.receive(push) == []
    assert same(trial.server.state_dict(), held)
    trial.push(0)
    replies = trial.push(2)
    assert brief(replies) == [(1, 3, 3), (0, 4, 3), (2, 5, 3)]
    assert trial.server.receive(push) == [replies[0]]
    assert trial.server.receive(push)[0] is replies[0]


def test_a_push_repeated_after_the_end_gets_the_last_reply_again() -> None:
    trial = begin(num_workers=2, tickets=2)
    early, last = trial.work(0), trial.work(1)
    assert trial.server.receive(early) == [], "no ticket is left, but one may come back"
    assert trial.server.receive(early) == []
    replies = trial.server.receive(last)
    assert brief(replies) == [(0, None, 2), (1, None, 2)]
    assert trial.server.receive(last)[0] is replies[1]
    assert trial.server.receive(early)[0] is replies[0]
    assert trial.server.iteration == 2


def test_the_same_push_repeated_by_another_worker_is_refused() -> None:
    trial = begin()
    push = trial.work(1)
    trial.server.receive(push)
    with pytest.raises(PushRefused, match=r"^push of worker 2: ticket: got 1, which is settled already; only a w"):
        trial.server.receive(replace(push, worker=2))


# ------------------------------------------------------------------------------------------------------------------ membership


def test_the_ticket_of_a_worker_that_left_is_reissued_with_the_present_parameters() -> None:
    trial = begin()
    trial.push(0)
    assert trial.note(trial.server.leave(1)) == [], "the others are at work"
    (reply,) = trial.push(2)
    assert brief([reply]) == [(2, 1, 2)]
    assert torch.equal(reply.params, trial.server.params)
    assert brief(trial.push(0)) == [(0, 4, 3)], "then new tickets again"
    assert [event.data for event in trial.events if event.kind is Kind.leave] == [
        {"worker": 1, "concurrency": 2, "tickets": [1]}
    ]


def test_an_idle_worker_gets_the_ticket_of_one_that_left_at_once() -> None:
    trial = begin(num_workers=2, tickets=2)
    assert trial.push(0) == []
    assert brief(trial.note(trial.server.leave(1))) == [(0, 1, 1)]


def test_a_late_push_of_a_worker_that_left_is_refused_and_after_its_return_gets_its_new_ticket() -> None:
    trial = begin()
    late = trial.work(1, 100 * ONE)
    trial.push(0)
    trial.server.leave(1)
    before = trial.server.state_dict()
    with pytest.raises(
        StaleSession, match=r"^push of worker 1 for ticket 1: it is not a member, members are \[0, 2\]; join \(again\) "
    ):
        trial.server.receive(late)
    assert same(trial.server.state_dict(), before)
    (new,) = trial.note(trial.server.join(1))
    assert brief([new]) == [(1, 1, 1)]
    before = trial.server.state_dict()
    assert trial.server.receive(late)[0] is new
    assert same(trial.server.state_dict(), before)
    assert brief(trial.push(1)) == [(1, 4, 2)]


def test_a_late_push_of_a_worker_that_rejoined_counts_for_the_same_ticket_and_stamp() -> None:
    # Nobody pushed in between: same ticket, same parameters, so the same gradient; the first to come is taken, the other not.
    trial = begin()
    late = trial.work(1)
    trial.server.leave(1)
    (new,) = trial.note(trial.server.join(1))
    assert (new.ticket, new.stamp) == (late.ticket, late.stamp) == (1, 0)
    (reply,) = trial.server.receive(late)
    assert trial.server.receive(answer(new, ONE))[0] is reply
    assert trial.server.iteration == 1


def test_a_barrier_does_not_wait_for_a_worker_that_left() -> None:
    trial = begin(scheduler="sync")
    assert (trial.push(0), trial.push(2)) == ([], [])
    # Its ticket 1 goes to the first in the queue, the others get new ones.
    assert brief(trial.note(trial.server.leave(1))) == [(0, 1, 2), (2, 3, 2)]


def test_a_worker_that_leaves_while_blocked_gets_no_reply_and_its_gradient_stays() -> None:
    trial = begin(scheduler="sync")
    trial.push(1)
    assert trial.server.leave(1) == []
    trial.push(0)
    assert brief(trial.push(2)) == [(0, 3, 3), (2, 4, 3)]


def test_a_worker_that_joins_waits_for_the_next_round_and_counts_from_then_on() -> None:
    trial = begin(scheduler="sync", num_workers=2)
    trial.push(0)
    assert trial.server.join(7) == []
    assert brief(trial.push(1)) == [(0, 2, 2), (7, 3, 2), (1, 4, 2)]
    assert (trial.push(0), trial.push(1)) == ([], [])
    assert brief(trial.push(7)) == [(0, 5, 5), (1, 6, 5), (7, 7, 5)]


def test_all_leave_and_the_next_one_to_join_finishes_the_run() -> None:
    trial = begin(num_workers=2, tickets=3)
    assert (trial.server.leave(0), trial.server.leave(1)) == ([], [])
    assert brief(trial.note(trial.server.join(5))) == [(5, 0, 0)]
    assert brief(trial.push(5)) == [(5, 1, 1)]
    assert brief(trial.push(5)) == [(5, 2, 2)]
    assert brief(trial.push(5)) == [(5, None, 3)]
    assert trial.server.status is Status.completed


def test_a_worker_that_joins_after_the_end_is_stopped() -> None:
    trial = begin(num_workers=1, tickets=1)
    trial.push(0)
    assert brief(trial.server.join(3)) == [(3, None, 1)]


def test_invalid_joins_and_leaves_are_refused() -> None:
    server = begin().server
    before = server.state_dict()
    text = r"^join of worker 1: it is a member already; let it leave first, or use another number$"
    with pytest.raises(ValueError, match=text):
        server.join(1)
    with pytest.raises(ValueError, match=r"^join: got worker -1, expected a number >= 0$"):
        server.join(-1)
    with pytest.raises(ValueError, match=r"^leave of worker 7: it is not a member; members are \[0, 1, 2\]$"):
        server.leave(7)
    assert same(server.state_dict(), before)


# --------------------------------------------------------------------------------------------------- not finite, and diverged


def test_a_ticket_with_a_bad_gradient_goes_to_another_worker() -> None:
    trial = begin()
    bad = trial.work(1, math.nan * ONE)
    (reply,) = trial.note(trial.server.receive(bad))
    assert brief([reply]) == [(1, 3, 0)], "the sender gets other work"
    assert trial.server.receive(bad)[0] is reply, "a repeat of it settles nothing twice"
    assert brief(trial.push(0)) == [(0, 1, 1)], "the ticket goes to the next one that asks"
    assert (trial.server.status, trial.server.iteration) == (Status.running, 1)
    (discarded,) = [event.data for event in trial.events if event.kind is Kind.discard]
    assert (discarded["worker"], discarded["ticket"], discarded["reason"]) == (1, 1, "not finite")


def test_the_sender_waits_rather_than_have_the_same_ticket_again() -> None:
    trial = begin(num_workers=2, tickets=2)
    assert trial.server.receive(trial.work(0, math.nan * ONE)) == []
    assert brief(trial.push(1)) == [(1, 0, 1)]
    assert brief(trial.push(1)) == [(0, None, 2), (1, None, 2)]
    assert trial.server.status is Status.completed


def test_the_sender_gets_its_ticket_again_when_all_others_have_left() -> None:
    trial = begin(num_workers=2, tickets=2)
    trial.server.receive(trial.work(0, math.nan * ONE))
    assert brief(trial.note(trial.server.leave(1))) == [(0, 0, 0)]


@pytest.mark.parametrize("scheduler", ["async", "sync"])
def test_a_ticket_with_non_finite_gradients_of_two_workers_ends_the_run(scheduler: str) -> None:
    trial = begin(scheduler=scheduler)
    trial.note(trial.server.receive(trial.work(0, math.nan * ONE)))
    trial.push(1)
    trial.push(2)
    (second,) = [reply.worker for reply in trial.held.values() if reply.ticket == 0 and reply.worker != 0]
    trial.note(trial.server.receive(trial.work(second, math.inf * ONE)))
    assert trial.server.status is Status.diverged
    assert trial.held[second].ticket is None
    before = trial.server.params.clone()
    for worker in {0, 1, 2} - {second}:
        if trial.held[worker].ticket is not None:
            trial.push(worker)
        assert trial.held[worker].ticket is None
    assert torch.equal(trial.server.params, before), "nothing is applied after the end"
    assert not trial.server.assignments.outstanding


def test_two_non_finite_gradients_of_the_only_worker_end_the_run() -> None:
    trial = begin(num_workers=1)
    assert brief(trial.note(trial.server.receive(trial.work(0, math.nan * ONE)))) == [(0, 0, 0)]
    assert trial.server.status is Status.running
    assert brief(trial.server.receive(trial.work(0, math.nan * ONE))) == [(0, None, 0)]
    assert trial.server.status is Status.diverged


def test_parameters_that_are_not_finite_are_at_fault_and_not_the_worker() -> None:
    trial = begin(num_workers=2, lr=10.0)
    trial.push(0, 1e308 * ONE)  # w = -inf, and nobody has looked yet
    assert trial.server.status is Status.running
    assert brief(trial.server.receive(trial.work(0, math.nan * ONE))) == [(0, None, 1)]
    assert trial.server.status is Status.diverged


def test_a_finite_gradient_for_a_reissued_ticket_clears_the_refusal() -> None:
    trial = begin(num_workers=1)
    trial.note(trial.server.receive(trial.work(0, math.nan * ONE)))
    assert brief(trial.push(0)) == [(0, 1, 1)]
    trial.note(trial.server.receive(trial.work(0, math.nan * ONE)))
    assert trial.server.status is Status.running
    assert trial.server.assignments.refused_by == {1: {0}}


@pytest.mark.parametrize("scheduler", ["async", "sync"])
def test_parameters_that_overflow_end_the_run(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # w = 0 - 10 * 1e308 = -inf with the first push; it is seen at the next look.
    monkeypatch.setattr(server_module, "FINITE_CHECK_INTERVAL", 2)
    trial = begin(num_workers=2, scheduler=scheduler, lr=10.0)
    trial.push(0, 1e308 * ONE)
    replies = trial.push(1)
    assert trial.server.status is Status.diverged
    assert {reply.ticket for reply in replies} == {None}
    assert trial.server.iteration == 2
    if scheduler == "async":
        assert brief(trial.push(0)) == [(0, None, 2)]
    assert trial.server.iteration == 2
    assert {reply.ticket for reply in trial.held.values()} == {None}


def test_an_overflow_in_the_last_update_counts_too() -> None:
    trial = begin(tickets=1, lr=10.0)
    trial.push(0, 1e308 * ONE)
    assert trial.server.status is Status.diverged


# ---------------------------------------------------------------------------------------------------------------------- finish


def test_finish_waits_for_what_is_outstanding() -> None:
    trial = begin(num_workers=2, tickets=None)
    trial.push(0)
    assert trial.server.finish() == []
    assert trial.push(0) == []
    assert trial.server.status is Status.running
    assert brief(trial.push(1)) == [(0, None, 3), (1, None, 3)]
    assert trial.server.status is Status.completed


def test_finish_under_a_barrier_ends_with_its_round() -> None:
    trial = begin(num_workers=3, scheduler="sync")
    trial.push(0)
    assert trial.server.finish() == []
    assert trial.push(1) == []
    assert brief(trial.push(2)) == [(0, None, 3), (1, None, 3), (2, None, 3)]


def test_finish_issues_nothing_although_a_ticket_had_come_back() -> None:
    trial = begin(num_workers=3)
    trial.server.leave(1)
    assert trial.server.finish() == []
    assert trial.push(0) == []
    assert brief(trial.push(2)) == [(0, None, 2), (2, None, 2)]
    assert (trial.server.status, trial.server.iteration) == (Status.completed, 2)


def test_a_ticket_lost_after_finish_is_done_by_another() -> None:
    trial = begin(num_workers=2)
    trial.server.finish()
    assert trial.push(0) == []
    assert brief(trial.note(trial.server.leave(1))) == [(0, 1, 1)]
    assert brief(trial.push(0)) == [(0, None, 2)]


def test_finish_with_nothing_outstanding_ends_at_once() -> None:
    trial = begin(num_workers=1)
    trial.server.leave(0)
    trial.server.finish()
    assert trial.server.status is Status.completed
    assert brief(trial.server.join(0)) == [(0, None, 0)]


def test_stop_ends_at_once_and_what_comes_later_is_not_applied() -> None:
    trial = begin(num_workers=3, scheduler="sync")
    trial.push(0)
    assert brief(trial.server.stop()) == [(0, None, 1)]
    before = trial.server.params.clone()
    assert [brief(trial.push(worker)) for worker in (2, 1)] == [[(2, None, 1)], [(1, None, 1)]]
    assert torch.equal(trial.server.params, before)
    assert (trial.server.status, trial.server.iteration) == (Status.stopped, 1)


# ------------------------------------------------------------------------------------------------------- state and incarnation


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
    """All who hold a ticket push, in turns, until nobody does."""
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


def test_incarnations_count_on() -> None:
    server = begin().server
    for life in (1, 2, 3):
        fresh = begin(start=False).server
        fresh.load_state_dict(server.state_dict())
        assert {reply.incarnation for reply in fresh.start()} == {life}
        server = fresh


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"algorithm": "naive"}, r"algorithm: got naive, expected ormo"),
        ({"scheduler": "sync"}, r"scheduler: got sync, expected async"),
        ({"params": torch.zeros(3)}, r".*got .*torch\.float32.*, expected .*torch\.float64.*"),
        ({"params": tensor(0, 0)}, r".*got .*\(2,\).*, expected .*\(3,\).*"),
        ({"buffers": RunningBuffers({"mean": ONE}, {"mean": 0.1})}, r"buffers: got .*average\.mean.*, expected .*"),
    ],
)
def test_the_state_of_another_kind_of_server_is_refused(other: dict[str, Any], text: str) -> None:
    server = begin().server
    before = server.state_dict()
    end = "; build this server as that one was"
    with pytest.raises(ValueError, match=f"^state of a server: {text}{end}$"):
        server.load_state_dict(begin(**other).server.state_dict())
    assert same(server.state_dict(), before)


def test_the_state_of_another_format_or_with_other_buffers_is_refused_whole() -> None:
    trial = begin(buffers=RunningBuffers({"mean": torch.zeros(2)}, {"mean": 0.1}))
    before = trial.server.state_dict()
    trial.push(0, buffers={"mean": torch.ones(2)})
    other = trial.server.state_dict()
    other["buffers"]["average.mean"] = torch.ones(5)
    now = trial.server.state_dict()
    for state in ({**before, "version": 0}, {}, other):
        with pytest.raises(
            ValueError, match=r"^state of a server: (version|buffers): got .*; build this server as that one was$"
        ):
            trial.server.load_state_dict(state)
        assert same(trial.server.state_dict(), now)


# --------------------------------------------------------------------------------------------------------------- build_server


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"algorithm": "sgd"}, r"algorithm: got 'sgd', expected one of asgd, .*ormo.*"),
        ({"algorithm": "base"}, r"algorithm: got 'base', expected one of asgd, .*ormo.*"),
        ({"scheduler": "random"}, r"scheduler: got 'random', expected one of async, partial, ssp, sync"),
        ({"lr": -0.1}, r"lr: got -0\.1, expected a finite number >= 0 or a function of the iteration"),
        ({"lr": math.nan}, r"lr: got nan, expected a finite number >= 0 or a function of the iteration"),
        ({"momentum": 1.0}, r"momentum: got 1\.0, expected a number in \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum: got -0\.1, expected a number in \[0, 1\)"),
        ({"momentum": math.nan}, r"momentum: got nan, expected a number in \[0, 1\)"),
        ({"num_workers": 0}, r"num_workers: got 0, expected at least 1"),
        ({"tickets": 0}, r"total_tickets: got 0, expected at least 1, or None for no end"),
        (
            {"params": torch.zeros(2, 2)},
            r"params: got shape \(2, 2\) of torch\.float32, expected one dimension of float32 or float64",
        ),
        ({"params": torch.zeros(0)}, r"params: got shape \(0,\) of torch\.float32, expected one dimension of .*"),
        ({"params": torch.zeros(2).half()}, r"params: got shape \(2,\) of torch\.float16, expected one dimension of .*"),
        ({"params": tensor(0, math.inf)}, r"params: got NaN or infinity, expected finite numbers"),
        (
            {"treshold": 3},
            r"build_server: got the unknown option 'treshold', expected one of \['momentum_correction'\] for ormo, async",
        ),
        ({"name": "x"}, r"build_server: got the unknown option 'name', expected one of .*"),
        ({"algorithm": "asgd", "momentum_correction": True}, r"build_server: got the unknown option 'momentum_correction', .*"),
        ({"algorithm": "ormo_da", "threshold": -1}, r"algorithm\.threshold: got -1, expected a whole number >= 0"),
        ({"algorithm": "ormo_da", "threshold": 2.5}, r"algorithm\.threshold: got 2\.5, expected a whole number >= 0"),
        ({"algorithm": "ormo_da", "smoothness": 0.0}, r"algorithm\.smoothness: got 0\.0, expected a number > 0"),
        (
            {"algorithm": "ormo_da", "rule": "drip"},
            r"algorithm\.rule: got 'drip', expected one of ormo, mishchenko, koloskova, drop",
        ),
    ],
    ids=str,
)
def test_build_server_says_what_is_wrong(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        begin(**settings)


def test_a_choice_may_be_given_by_its_name() -> None:
    # Threshold 0: the gradient of worker 1 has the delay 1, which "drop" refuses and the default algorithm would not.
    trial = begin(algorithm="ormo_da", rule="drop", threshold=0)
    trial.push(0)
    trial.push(1)
    assert (trial.server.iteration, trial.kinds[-2:]) == (1, ["discard", "reissue"])


# --------------------------------------------------------------------------------------------------------------------- events


def test_the_events_of_a_short_run() -> None:
    clock: Callable[[], float] = iter(range(100)).__next__
    trial = begin(num_workers=2, tickets=3, scheduler="sync", clock=clock)
    trial.push(1, tensor(1, 2, 4), loss=0.25, samples=7)
    trial.server.receive(trial.work(1))
    trial.server.join(2)
    trial.note(trial.server.leave(0))
    trial.push(1, tensor(0.1, 0, 0))
    trial.note(trial.server.leave(2))
    trial.push(1)
    expected = [
        ("issue", {"worker": 0, "ticket": 0, "stamp": 0, "bucket": 0}),
        ("issue", {"worker": 1, "ticket": 1, "stamp": 0, "bucket": 0}),
        # 1 + 2 + 4 = 7 = 1.11 (binary) * 2^2
        (
            "apply",
            {
                "iteration": 0,
                "worker": 1,
                "ticket": 1,
                "stamp": 0,
                "bucket": 0,
                "delay": 0,
                "eta": 0.5,
                "loss": 0.25,
                "samples": 7,
                "grad_sum": "0x1.c000000000000p+2",
            },
        ),
        ("repeat", {"worker": 1, "ticket": 1, "stamp": 0}),
        ("join", {"worker": 2, "concurrency": 3}),
        ("leave", {"worker": 0, "concurrency": 2, "tickets": [0]}),
        ("reissue", {"worker": 1, "ticket": 0, "stamp": 1, "bucket": 1}),
        ("issue", {"worker": 2, "ticket": 2, "stamp": 1, "bucket": 1}),
        (
            "apply",
            {
                "iteration": 1,
                "worker": 1,
                "ticket": 0,
                "stamp": 1,
                "bucket": 1,
                "delay": 0,
                "eta": 0.5,
                "loss": None,
                "samples": 1,
                "grad_sum": (0.1).hex(),
            },
        ),
        ("leave", {"worker": 2, "concurrency": 1, "tickets": [2]}),
        # Bucket 1 was attach with K = 2: indices 1 and 2.
        ("reissue", {"worker": 1, "ticket": 2, "stamp": 2, "bucket": 1}),
        (
            "apply",
            {
                "iteration": 2,
                "worker": 1,
                "ticket": 2,
                "stamp": 2,
                "bucket": 1,
                "delay": 0,
                "eta": 0.5,
                "loss": None,
                "samples": 1,
                "grad_sum": (3.0).hex(),
            },
        ),
        ("end", {"iteration": 3, "status": "completed"}),
    ]
    assert [(event.kind.value, dict(event.data)) for event in trial.events] == expected
    assert [event.seconds for event in trial.events] == list(range(len(expected)))


def test_recording_events_does_not_change_the_update() -> None:
    with_records, without = begin(), build_server(params=torch.zeros(3).double(), num_workers=3, lr=0.5, total_tickets=10)
    silent = Trial(without)
    silent.note(without.start())
    for trial in (with_records, silent):
        for worker in (2, 0, 2, 1):
            trial.push(worker)
    assert same(with_records.server.state_dict(), silent.server.state_dict())
