"""A loop whose server is another process, here a listener in this one: leaving, eviction, restarts, faults."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError, LoopMisused, Refused
from ormo_rpc.own_loop.configuring import compose_own_loop
from ormo_rpc.own_loop.elsewhere import LoopProcess
from ormo_rpc.own_loop.job import OwnJob, OwnModel
from ormo_rpc.own_loop.loop import JoinedWorker
from ormo_rpc.own_loop.roles import Role
from ormo_rpc.rendezvous.addresses import parse_address
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.runtimes.distributed.server_process.serving import served as served_at
from ormo_rpc.runtimes.distributed.worker_process.context import WorkerArgs
from ormo_rpc.server.events import Event
from tests.support.own_loops import QUIET, TICKETS, Normed, assert_same, loss_of, net, plain, work_through
from tests.support.processes import wait_until
from tests.support.rendezvous import serving, worker_args

SECRET = "0123456789abcdef" * 4


@contextmanager
def server(
    model: torch.nn.Module, *overrides: str, record: Callable[[Event], None] = lambda _: None
) -> Generator[tuple[Service, Config]]:
    """The service of a run, and the configuration of a worker that was started by hand."""
    words = ("algorithm=asgd", *QUIET, *overrides)
    composed = compose_own_loop(
        words, class_name="Net", total_tickets=TICKETS, tickets_per_epoch=None, lr=0.1, lr_is_function=False
    )
    config = replace(composed.config, workers=1)
    job = OwnJob(config, OwnModel(model))
    service = Service(job.server(record, lambda: 0.0), lambda _: None, push_format=job.push_format())
    what = serving(config.transport.name, config=config.yaml, fingerprint=job.fingerprint().to_dict())
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(listener.shutdown, socket.SHUT_RDWR)  # wakes the thread that accepts
        stack.enter_context(served_at(listener, Secret(SECRET), service, config.transport.server_side(), what))
        address = "{}:{}".format(*listener.getsockname()[:2])
        yield service, replace(config, server=replace(config.server, address=address))


class FirstWorker:
    """A process that a launcher has started as worker 0 (`entry_point.Child`), as far as a loop sees it."""

    serves = False

    def __init__(self, config: Config) -> None:
        self.config = config

    @contextmanager
    def working(self, make: Callable[[WorkerArgs], LoopProcess]) -> Generator[LoopProcess]:
        """Lend a worker."""
        assert self.config.server.address is not None
        yield make(worker_args(parse_address(self.config.server.address), Secret(SECRET)))


def worker_of(config: Config, model: torch.nn.Module) -> JoinedWorker:
    """The worker of a process that a launcher has started."""
    role = Role(config=config, child=FirstWorker(config))  # pyright: ignore[reportArgumentType] # in place of one
    return JoinedWorker(role, OwnModel(model), lr=None, run_dir=None, words=(), began=0.0)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of the run, as the environment has it."""
    monkeypatch.setenv("ORMO_RPC_SECRET", SECRET)


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_the_parameters_are_those_of_plain_pytorch(transport: str) -> None:
    with server(net(), f"transport={transport}") as (service, config):
        model = net(1)  # the server's parameters count
        worker = worker_of(config, model)
        assert not worker.serves
        work_through(worker, model)
        assert service.server.iteration == TICKETS
        expected = plain(net(), lambda model, ticket: loss_of(model, ticket).backward())
        flat = torch.cat([each.detach().reshape(-1) for each in expected.parameters()])
        torch.testing.assert_close(service.server.params, flat)
    before = plain(net(), lambda model, ticket: loss_of(model, ticket).backward(), range(TICKETS - 1))
    assert_same(model, before)  # those of the last ticket, in memory of its own
    model.get_parameter("0.weight").data.zero_()


def test_a_slow_loop_sleeps_for_its_own_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()

    def before(_: int) -> None:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        threading.Event().wait(0.05)  # as for data, or for a core that others have

    with server(net(), "heterogeneity=one_slow", "heterogeneity.factor=3") as (_, config):
        model = net()
        monkeypatch.setattr(time, "sleep", slept.append)
        work_through(worker_of(config, model), model, before)
    of_tickets = [each for each in slept if each >= 2 * 0.02]
    assert len(of_tickets) == TICKETS
    assert sum(of_tickets) < TICKETS * 2 * (0.02 + 0.015)


def test_a_loop_that_is_left_gives_its_ticket_back() -> None:
    with server(net()) as (service, config):
        for _ in worker_of(config, net()):
            break
        wait_until(lambda: not service.memberships, "the eviction")
        assert [eviction["held"] for eviction in service.evictions] == [[{"ticket": 0, "stamp": 0}]]
        model = net()
        work_through(worker_of(config, model), model)
        assert (service.server.iteration, len(service.memberships)) == (TICKETS, 0)


def test_an_error_of_the_script_gives_its_ticket_back() -> None:
    with server(net()) as (service, config):
        model = net()

        def before(ticket: int) -> None:
            if ticket == 2:
                raise IndexError("no such batch")

        with pytest.raises(IndexError, match="no such batch"):
            work_through(worker_of(config, model), model, before)
        wait_until(lambda: not service.memberships, "the eviction")
        assert service.evictions[0]["held"][0]["ticket"] == 2


def test_a_push_that_comes_too_late_is_dropped_and_the_loop_goes_on() -> None:
    with server(net()) as (service, config):
        model, tickets = net(), list[int]()

        def before(ticket: int) -> None:
            tickets.append(ticket)
            if len(tickets) == 4:
                service.evict(service.memberships.by_worker[0], "for a test")

        work_through(worker_of(config, model), model, before)
        assert tickets == [0, 1, 2, 3, *range(3, TICKETS)]
        assert service.server.iteration == TICKETS
        expected = plain(net(), lambda model, ticket: loss_of(model, ticket).backward())
        flat = torch.cat([each.detach().reshape(-1) for each in expected.parameters()])
        torch.testing.assert_close(service.server.params, flat)


def test_a_worker_that_is_asked_to_leave_ends_its_loop() -> None:
    with server(net()) as (service, config):
        model = net()

        def before(ticket: int) -> None:
            if ticket == 3:
                service.request_leave(service.memberships.by_worker[0])

        work_through(worker_of(config, model), model, before)
        assert (service.server.iteration, service.evictions) == (4, [])


def test_buffers_reach_the_server() -> None:
    with server(Normed()) as (service, config):
        model = Normed()
        work_through(worker_of(config, model), model)
        expected = plain(Normed(), lambda model, ticket: loss_of(model, ticket).backward())
        for name, buffer in expected.named_buffers():
            torch.testing.assert_close(service.server.buffers.current[name], buffer)


def test_another_model_is_refused_with_what_to_do() -> None:
    with server(net()) as (_, config):
        model = torch.nn.Linear(4, 3)
        with pytest.raises(
            Refused, match=r"\Amodel: parameters: the server: .*make the model from a seed \(torch\.manual_seed"
        ):
            work_through(worker_of(config, model), model)


@pytest.mark.parametrize(("fault", "event"), [("corrupt@0:2", "discard"), ("drop_reply@0:4", "repeat")])
def test_a_fault_is_injected_into_the_scripts_push(fault: str, event: str) -> None:
    events = list[Event]()
    with server(net(), f"runtime.faults=[{fault}]", record=events.append) as (service, config):
        model = net()
        work_through(worker_of(config, model), model)
        assert service.server.iteration == TICKETS
    assert [each.kind.value for each in events].count(event) == 1


def test_misuse_ends_the_membership() -> None:
    with server(net()) as (service, config):
        worker = worker_of(config, net())
        works = iter(worker)
        next(works)
        with pytest.raises(LoopMisused, match=r"the loop goes on without push\(\) for ticket 0"):
            next(works)
        wait_until(lambda: not service.memberships, "the eviction")


def test_a_worker_by_hand_joins_a_run_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(net()) as (service, config):
        first, model = net(), net()
        worker, more = worker_of(config, first), Role(config=config, elastic=True)
        works = iter(worker)
        tickets = [next(works).ticket]
        by_hand = JoinedWorker(more, OwnModel(model), lr=None, run_dir=None, words=(), began=0.0)
        for work in by_hand:
            tickets.append(work.ticket)
            loss_of(model, work.ticket).backward()
            by_hand.push()
            if work.ticket == 3:
                break
        worker.push()
        for work in works:
            tickets.append(work.ticket)
            worker.push()
        assert sorted(tickets) == list(range(TICKETS))
        assert service.server.iteration == TICKETS
        monkeypatch.delenv("ORMO_RPC_SECRET")
        with pytest.raises(ConfigError, match="ORMO_RPC_SECRET"):
            next(iter(JoinedWorker(more, OwnModel(net()), lr=None, run_dir=None, words=(), began=0.0)))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_push_changes_nothing_in_the_model_of_the_script(transport: str) -> None:
    """It has the parameters of its ticket until the next one, as evaluations between the two expect."""
    wide = torch.nn.Linear(64, 1024)  # large enough for parameters in shared memory
    with server(wide, f"transport={transport}") as (_, config):
        model = torch.nn.Linear(64, 1024)
        worker, before = worker_of(config, model), list[torch.Tensor]()
        for _ in worker:
            before.append(model.weight.detach().clone())
            model(torch.ones(2, 64)).square().mean().backward()
            worker.push()
            assert torch.equal(model.weight, before[-1])
        assert torch.equal(model.weight, before[-1])
    assert len(before) == TICKETS
    assert not torch.equal(before[0], before[-1])
