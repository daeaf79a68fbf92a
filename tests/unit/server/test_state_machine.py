"""Calls of the server in random order, compared with a model of the assignments."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ormo_rpc.errors import PushRefused, StaleSession
from ormo_rpc.messages import Push, Reply
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.loss_scale import LossScale
from ormo_rpc.server.parameter_server import ParameterServer, Status
from tests.support.contract import same
from tests.support.examples import examples
from tests.support.schedule import answer, normal

PICK = st.integers(0, 99)


class ServerMachine(RuleBasedStateMachine):
    """The model: the reply that each worker works on, its newest push with what that was answered, and the tickets committed.

    Attributes:
        working: The reply that each worker has not answered yet.
        answered: The newest push of each member since it joined, and the reply to it, or None while it waits.
        late: Pushes that will never be accepted: of workers that left, of an older incarnation of the server.
        committed: The tickets whose gradients were applied, in order.
        given_up: Tickets that `finish` put aside.
        total: The number of gradients to apply; after `finish` fewer than ``tickets``.
    """

    server: ParameterServer

    @initialize(
        workers=st.integers(1, 4),
        tickets=st.integers(1, 12),
        rule=st.sampled_from(
            [("ormo", "async"), ("ormo", "sync"), ("ormo_da", "async"), ("ormo_da", "sync"), ("m_sync", "async")]
        ),
        loss_scale=st.sampled_from([None, LossScale(initial=4.0, interval=2)]),
    )
    def begin(self, workers: int, tickets: int, rule: tuple[str, str], loss_scale: LossScale | None) -> None:
        algorithm, scheduler = rule
        self.options = {"num_workers": workers, "total_tickets": tickets, "scheduler": scheduler, "algorithm": algorithm}
        self.options |= {"loss_scale": loss_scale}
        if algorithm == "ormo_da":
            self.options |= {"rule": "drop", "threshold": 1}
        if algorithm == "m_sync":  # which holds workers, and discards what comes late
            self.options |= {"m": 2}
        self.working: dict[int, Reply] = {}
        self.members = set(range(workers))
        self.answered: dict[int, tuple[Push, Reply | None]] = {}
        self.late: list[Push] = []
        self.events: list[Event] = []
        self.total = self.tickets = tickets
        self.given_up: set[int] = set()
        self.newest: dict[int, Reply] = {}
        self.server = self.build()
        self.take(self.server.start())

    def build(self) -> ParameterServer:
        start = torch.zeros(2, dtype=torch.float64)
        return build_server(params=start, record=self.events.append, **self.options)  # pyright: ignore[reportArgumentType] # a mixed dictionary

    def take(self, replies: list[Reply]) -> None:
        """Deliver replies; only a worker that waits for one may get one."""
        for reply in replies:
            assert reply.worker in self.members
            assert reply.worker not in self.working, "two answers for one push"
            if reply.worker in self.answered:
                push, before = self.answered[reply.worker]
                assert before is None, "two answers for one push"
                self.answered[reply.worker] = (push, reply)
            self.newest[reply.worker] = reply
            if reply.ticket is not None:
                self.working[reply.worker] = reply

    def work(self, pick: int) -> Push:
        worker = sorted(self.working)[pick % len(self.working)]
        reply = self.working[worker]
        assert reply.ticket is not None
        return answer(reply, normal(2, 0, reply.ticket))

    @precondition(lambda self: self.working)
    @rule(pick=PICK)
    def push(self, pick: int) -> None:
        push = self.work(pick)
        iteration, ended = self.server.iteration, self.server.ended
        del self.working[push.worker]
        self.answered[push.worker] = (push, None)
        self.take(self.server.receive(push))
        assert self.server.iteration - iteration in ({0} if ended else {0, 1})

    @precondition(lambda self: self.working)
    @rule(pick=PICK)
    def reject(self, pick: int) -> None:
        push = replace(self.work(pick), grad=torch.full((2,), math.nan, dtype=torch.float64))
        iteration = self.server.iteration
        del self.working[push.worker]
        self.answered[push.worker] = (push, None)
        self.take(self.server.receive(push))
        assert self.server.iteration == iteration

    @precondition(lambda self: self.answered)
    @rule(pick=PICK, rejected=st.booleans())
    def repeat(self, pick: int, rejected: bool) -> None:
        push, reply = self.answered[sorted(self.answered)[pick % len(self.answered)]]
        again = self.working.get(push.worker)
        if again is not None and (again.ticket, again.stamp) == (push.ticket, push.stamp):
            return  # the same work was handed out to it again: this is no repeat but the answer
        before = self.server.state_dict()
        replies = self.server.reject(push) if rejected else self.server.receive(push)
        assert len(replies) == (reply is not None)
        assert all(one is reply for one in replies)
        assert same(self.server.state_dict(), before)

    @precondition(lambda self: self.late)
    @rule(pick=PICK)
    def push_too_late(self, pick: int) -> None:
        push = self.late[pick % len(self.late)]
        again = self.working.get(push.worker)
        if again is not None and (again.ticket, again.stamp, again.incarnation) == (push.ticket, push.stamp, push.incarnation):
            return  # the same work was handed out to it again: this answers it
        before = self.server.state_dict()
        if push.incarnation != self.server.incarnation or push.worker not in self.members:
            with pytest.raises(StaleSession):
                self.server.receive(push)
        else:
            replies = self.server.receive(push)
            # Its sender came back, and gets its present work, if it has any.
            assert all(reply is self.newest[push.worker] for reply in replies)
            assert len(replies) == (push.worker in self.newest)
        assert same(self.server.state_dict(), before)

    @precondition(lambda self: self.working)
    @rule(pick=PICK, what=st.sampled_from(["ticket", "stamp", "worker", "shape", "incarnation"]))
    def push_nonsense(self, pick: int, what: str) -> None:
        push = self.work(pick)
        wrong = {
            "ticket": {"ticket": self.server.assignments.issued + pick},
            "stamp": {"stamp": self.server.iteration + 1 + pick},
            "worker": {"worker": max(self.members) + 1 + pick},
            "shape": {"grad": torch.zeros(3, dtype=torch.float64)},
            "incarnation": {"incarnation": self.server.incarnation + 1},
        }[what]
        before = self.server.state_dict()
        with pytest.raises(PushRefused):
            self.server.receive(replace(push, **wrong))
        assert same(self.server.state_dict(), before)

    @precondition(lambda self: len(self.members) < 5)
    @rule(worker=st.integers(0, 6))
    def join(self, worker: int) -> None:
        if worker in self.members:
            with pytest.raises(ValueError, match=r"^join of worker \d: it is a member already"):
                self.server.join(worker)
            return
        self.members.add(worker)
        self.take(self.server.join(worker))

    @precondition(lambda self: self.members)
    @rule(pick=PICK)
    def leave(self, pick: int) -> None:
        worker = sorted(self.members)[pick % len(self.members)]
        self.members.remove(worker)
        if worker in self.working:
            reply = self.working.pop(worker)
            assert reply.ticket is not None
            self.late.append(answer(reply, normal(2, 0, reply.ticket)))
        self.answered.pop(worker, None)
        self.newest.pop(worker, None)
        self.take(self.server.leave(worker))

    @rule()
    def restart(self) -> None:
        state = self.server.state_dict()
        self.server = self.build()
        self.server.load_state_dict(state)
        if self.total == self.tickets:
            assert same(self.server.state_dict(), state)
        # The tickets that `finish` had put aside are to be done again.
        self.total, self.given_up = self.tickets, set()
        for reply in self.working.values():
            assert reply.ticket is not None
            self.late.append(answer(reply, normal(2, 0, reply.ticket)))
        self.working, self.answered, self.newest = {}, {}, {}
        self.members = set(range(self.options["num_workers"]))  # pyright: ignore[reportArgumentType] # a mixed dictionary
        self.take(self.server.start())

    @precondition(lambda self: len(self.events) > 15)
    @rule()
    def finish(self) -> None:
        if self.server.ended:
            return
        self.given_up |= set(self.server.assignments.returned)
        new = self.server.assignments.issued
        self.take(self.server.finish())
        self.total = self.server.iteration + len(self.working)
        assert self.server.assignments.issued == new, "a new ticket after finish"

    @invariant()
    def every_ticket_is_in_one_place(self) -> None:
        assignments = self.server.assignments
        committed = [event.data["ticket"] for event in self.events if event.kind is Kind.apply]
        places = [*assignments.outstanding, *assignments.returned, *committed, *self.given_up]
        assert sorted(places) == list(range(assignments.issued))
        assert assignments.committed == self.server.iteration == len(committed)
        assert self.server.iteration <= self.total

    @invariant()
    def assignments_agree_with_the_model(self) -> None:
        assignments = self.server.assignments
        held = {(each.ticket, each.worker, each.stamp) for each in assignments.outstanding.values()}
        assert held == {(reply.ticket, reply.worker, reply.stamp) for reply in self.working.values()}
        assert {(ticket, worker) for worker, tickets in assignments.holding.items() for ticket in tickets} == {
            (ticket, worker) for ticket, worker, _ in held
        }
        assert all(ticket == each.ticket for ticket, each in assignments.outstanding.items())

    @invariant()
    def every_member_works_waits_or_was_told_to_stop(self) -> None:
        server = self.server
        stopped = {worker for worker, reply in self.newest.items() if reply.ticket is None}
        waiting = {worker for worker in self.members if worker not in self.working and worker not in stopped}
        assert set(server.members) == self.members
        assert sorted([*server.members.blocked, *server.members.idle]) == sorted(waiting)
        if server.ended:
            assert not waiting
        elif self.members and not self.working:
            raise AssertionError("nobody works, everybody waits, and the run has not ended")

    @invariant()
    def an_ended_run_stays_ended(self) -> None:
        if self.server.status is Status.completed:
            assert self.server.iteration == self.total
            assert not self.working
        if not self.server.ended:
            assert not [worker for worker, reply in self.newest.items() if reply.ticket is None]

    def teardown(self) -> None:
        """Bring the run to its end, which must be possible from any state."""
        if not hasattr(self, "server"):
            return
        if not self.members:
            self.join(0)
        while self.working:
            self.push(0)
        assert self.server.ended
        if self.server.status is Status.completed:
            done = [event.data["ticket"] for event in self.events if event.kind is Kind.apply]
            assert len(done) == len(set(done)) == self.total


ServerMachine.TestCase.settings = settings(examples(10), stateful_step_count=30)
TestServer = ServerMachine.TestCase
