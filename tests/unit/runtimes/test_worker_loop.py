"""A worker's loops against a real listener, in process: when they leave."""

from __future__ import annotations

import socket
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import pytest

from ormo_rpc.cli import compose
from ormo_rpc.rendezvous.lease import Lease, connect
from ormo_rpc.rendezvous.listener import Listener
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.runtimes.distributed.worker_process import worker_process
from ormo_rpc.runtimes.distributed.worker_process.worker_process import WorkerArgs, WorkerProcess
from ormo_rpc.runtimes.job import Job
from tests.support.processes import PATIENCE_SECONDS
from tests.support.rendezvous import join_response

SECRET = Secret("a secret that only we two know")
TICKETS = 6


@contextmanager
def served(*overrides: str) -> Generator[tuple[Service, WorkerProcess]]:
    """The service of a short run, and a worker's process, in this one, that has not begun."""
    job = Job(compose(["workers=1", "model.hidden=4", f"train.max_iterations={TICKETS}", *overrides]))
    service = Service(job.server(lambda _: None, lambda: 0.0), lambda _: None, push_format=job.push_format())
    side = job.config.transport.server_side(num_workers=1, timeout_seconds=PATIENCE_SECONDS)
    response_to = join_response(job.config.yaml, transport=side.start(service))
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(listener.shutdown, socket.SHUT_RDWR)  # wakes the thread that accepts
        stack.enter_context(Listener(listener, SECRET, service, response_to, PATIENCE_SECONDS, side.accept))
        args = WorkerArgs(
            address=listener.getsockname()[:2],
            secret=SECRET,
            preferred_worker=0,
            slot_id="here",
            restart_count=0,
            data_root=None,
            timeout_seconds=PATIENCE_SECONDS,
            report=lambda _: None,
        )
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

        def join_and_be_asked_to_leave(*arguments: object, **options: object) -> Lease:
            lease = connect(*arguments, **options)  # pyright: ignore[reportArgumentType] # as they came
            work.leave()  # before anybody knows of the lease
            return lease

        monkeypatch.setattr(worker_process, "connect", join_and_be_asked_to_leave)
        work.run()
        assert (service.server.iteration, len(service.memberships)) == (0, 0)
