"""A worker's loops against a real listener, in process: when they leave."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from ormo_rpc.composing import compose
from ormo_rpc.control.joining import Joined, joined
from ormo_rpc.errors import ConfigError, Refused, ServerLost
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.rendezvous import connecting
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.runtimes.distributed.server_process.serving import served as served_at
from ormo_rpc.runtimes.distributed.worker_process import worker_loop
from ormo_rpc.runtimes.distributed.worker_process.worker_process import WorkerProcess
from ormo_rpc.runtimes.job import Job
from ormo_rpc.transports.gloo import client as gloo
from ormo_rpc.transports.gloo.pair import PairLost
from ormo_rpc.worker.worker import Worker
from tests.support import changing
from tests.support.processes import wait_until
from tests.support.rendezvous import serving, worker_args

SECRET = Secret("a secret that only we two know")
TICKETS = 6
MODEL = ("model.hidden=4",)


@contextmanager
def served(
    *overrides: str, model: Sequence[str] = MODEL, server_fingerprint: Fingerprint | None = None
) -> Generator[tuple[Service, WorkerProcess]]:
    """The service of a short run, and a worker's process, in this one, that has not begun."""
    job = Job(compose(["workers=1", *model, f"train.max_iterations={TICKETS}", *overrides]))
    service = Service(job.server(lambda _: None, lambda: 0.0), lambda _: None, push_format=job.push_format())
    side = job.config.transport.server_side()
    fingerprint = (server_fingerprint or job.fingerprint()).to_dict()
    what = serving(job.config.transport.name, config=job.config.yaml, fingerprint=fingerprint)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(listener.shutdown, socket.SHUT_RDWR)  # wakes the thread that accepts
        stack.enter_context(served_at(listener, SECRET, service, side, what))
        args = worker_args(listener.getsockname()[:2], SECRET)
        yield service, WorkerProcess(args)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_process_works_to_the_end(prefetch: int) -> None:
    with served(f"worker.prefetch={prefetch}") as (service, work):
        work.run()
        assert (service.server.iteration, len(service.memberships)) == (TICKETS, 0)


@pytest.mark.timeout(60)
def test_a_worker_that_is_asked_to_leave_while_it_joins_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as (service, work):

        @contextmanager
        def join_and_be_asked_to_leave(*arguments: Any, **options: Any) -> Generator[Joined]:
            with joined(*arguments, **options) as membership:
                work.leave()  # before anybody knows of the membership
                yield membership

        monkeypatch.setattr(worker_loop, "joined", join_and_be_asked_to_leave)
        work.run()
        assert (service.server.iteration, len(service.memberships)) == (0, 0)
        assert work.loops[0]._worker is None, "a worker was made for nothing"  # pyright: ignore[reportPrivateUsage] # where it would be


@pytest.mark.timeout(60)
def test_a_worker_that_is_asked_to_leave_while_it_warms_up_does_not_connect(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with served() as (service, work):
        monkeypatch.setattr(Worker, "warm_up", lambda _: work.leave())
        work.run()
        assert (service.server.iteration, len(service.memberships), service.transports) == (0, 0, {})
    assert "refused a connection" not in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("what", ["frozen", "order", "samples"])
def test_a_worker_whose_model_or_data_set_is_not_the_servers_gives_up(what: str, prefetch: int) -> None:
    own = Job(compose(["workers=1", "model.hidden=4"])).fingerprint()
    name = next(iter(own.parameters))
    others = {
        "frozen": (
            replace(own, frozen={"x": "float32 (1,)"}, sha256={"x": "0"}),
            "model: frozen parameters: the server: x float32",
        ),
        "order": (
            replace(own, parameters=dict(reversed(list(own.parameters.items())))),
            f"model: parameters: .*this worker: {name} ",
        ),
        "samples": (
            replace(own, data={"training samples": 5}),
            "dataset: training samples: the server: 5; this worker: 1437; ",
        ),
    }
    server, said = others[what]
    with served(f"worker.prefetch={prefetch}", server_fingerprint=server) as (service, work):
        with pytest.raises(Refused, match=rf"\A{said}"):
            work.run()
        wait_until(lambda: len(service.memberships) == 0, "its leaving")
        assert (service.server.started, service.evictions) == (False, [])


@pytest.mark.timeout(60)
def test_buffers_that_differ_at_the_start_are_no_reason_to_give_up() -> None:
    """A reply has those of the server."""
    model = (f"model._target_={changing.HERE}.net", f"dataset._target_={changing.HERE}.data")
    own = Job(compose(["workers=1", *model])).fingerprint()
    assert own.buffers
    server = replace(own, sha256={**own.sha256, **dict.fromkeys(own.buffers, "another")})
    with served(model=model, server_fingerprint=server) as (service, work):
        work.run()
        assert service.server.iteration == TICKETS


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            IndexError("Target 12\nis out of bounds"),
            ConfigError,
            "before the first ticket: IndexError: Target 12 is out of bounds",
        ),
        (
            ValueError("Expected more than 1 value"),
            ConfigError,
            "before the first ticket: ValueError: Expected more than 1 value",
        ),
        (OSError("the share is away"), OSError, "the share is away"),  # may be back when it is tried again
        (MemoryError("1 GB"), MemoryError, "1 GB"),  # as may the memory
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            RuntimeError,
            "DefaultCPUAllocator: can't allocate memory",
        ),
    ],
)
def test_a_first_gradient_that_fails_is_not_tried_again(
    error: Exception, raised: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warm_up(_: Worker) -> None:
        raise error

    monkeypatch.setattr(Worker, "warm_up", warm_up)
    with served() as (_, work), pytest.raises(raised) as caught:
        work.run()
    assert (type(caught.value), str(caught.value)) == (raised, message)


@pytest.mark.timeout(60)
def test_a_worker_that_can_open_no_path_for_pushes_says_so_and_gives_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It reaches the server and joins, again and again, where a firewall drops all but the rendezvous."""

    def make_pair(*_: object) -> None:
        raise PairLost("no connection within 10 s")

    monkeypatch.setattr(gloo, "make_pair", make_pair)
    monkeypatch.setattr(connecting, "TELL_AFTER_SECONDS", 0.2)
    failed = r"no path for pushes can be opened: gloo: no connection within 10 s; "
    with served("transport=gloo") as (_, work), pytest.raises(ServerLost, match=rf"\A{failed}gave up after \d\.\d s\Z"):
        WorkerProcess(replace(work.args, timeout_seconds=0.8)).run()
    assert any(re.fullmatch(rf"{failed}trying for another 1 s", line) for line in caplog.messages)


def _burn(seconds: float) -> None:
    """Take this much processor time of the calling thread."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@pytest.mark.timeout(60)
@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_slow_worker_sleeps_for_what_it_computed_and_not_for_what_it_waited(
    prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor is busy and data is waited for, so the wall time of a ticket is several times its own processor time."""
    burnt, compute, slept = 0.02, Worker.compute, list[float]()
    over = threading.Event()

    def spin() -> None:
        while not over.is_set():
            pass

    def slowly(worker: Worker, reply: Reply) -> Push:
        began = time.thread_time()
        push = compute(worker, reply)
        over.wait(0.05)
        _burn(burnt - (time.thread_time() - began))
        return push

    others = [threading.Thread(target=spin) for _ in range(2)]
    slow = ("heterogeneity=one_slow", "heterogeneity.factor=3", f"worker.prefetch={prefetch}")
    with served(*slow) as (service, work):
        monkeypatch.setattr(Worker, "compute", slowly)
        monkeypatch.setattr(time, "sleep", slept.append)
        for thread in others:
            thread.start()
        try:
            work.run()
        finally:
            over.set()
            for thread in others:
                thread.join()
        assert service.server.iteration == TICKETS
    of_tickets = [each for each in slept if each >= 2 * burnt]  # others of this process sleep as well
    assert len(of_tickets) == TICKETS
    assert sum(of_tickets) < TICKETS * 2 * (burnt + 0.015), "(f - 1) times what was computed, and not 0.05 s more"
