"""A worker's loops against a real door, in process: when they leave."""

from __future__ import annotations

import socket
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import pytest
from omegaconf import OmegaConf

from ormo_rpc.cli import compose
from ormo_rpc.rendezvous.lease import Lease, let_in
from ormo_rpc.rendezvous.listener import Door
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.runtimes.distributed.worker_process import loop
from ormo_rpc.runtimes.distributed.worker_process.loop import Place
from ormo_rpc.runtimes.distributed.worker_process.worker_process import Work
from ormo_rpc.runtimes.job import Job
from ormo_rpc.transports.stream.server import Streams
from tests.support.processes import PATIENCE_SECONDS

SECRET = Secret("a secret that only we two know")
TICKETS = 6


@contextmanager
def served(*overrides: str) -> Generator[tuple[Service, Work]]:
    """The service of a short run, and a worker's process, in this one, that has not begun."""
    job = Job(compose(["workers=1", "model.hidden=4", f"train.max_iterations={TICKETS}", *overrides]))
    service = Service(job.server(lambda _: None, lambda: 0.0), lambda _: None, push_format=job.push_format())
    streams = Streams(service, job.config.wire.transport, None)
    text = OmegaConf.to_yaml(OmegaConf.structured(job.config))
    welcome = {"config": text, "agent": None, "heartbeat_seconds": 1.0, "patience_seconds": PATIENCE_SECONDS}
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(listener.shutdown, socket.SHUT_RDWR)  # wakes the thread that accepts
        stack.enter_context(Door(listener, SECRET, service, welcome, PATIENCE_SECONDS, streams.serve))
        place = Place(
            door=lambda: listener.getsockname()[:2],
            secret=SECRET,
            wanted=0,
            post="here",
            life=0,
            data_root=None,
            timeout_seconds=PATIENCE_SECONDS,
            tell=lambda _: None,
        )
        yield service, Work(place)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_process_works_to_the_end(prefetch: int) -> None:
    with served(f"worker.prefetch={prefetch}") as (service, work):
        work.run()
        assert (service.server.iteration, len(service.seats)) == (TICKETS, 0)


@pytest.mark.timeout(60)
def test_who_is_asked_to_leave_while_it_is_let_in_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as (service, work):

        def let_in_meanwhile(*arguments: object, **options: object) -> Lease:
            lease = let_in(*arguments, **options)  # pyright: ignore[reportArgumentType] # as they came
            work.leave()  # before anybody knows of the lease
            return lease

        monkeypatch.setattr(loop, "let_in", let_in_meanwhile)
        work.run()
        assert (service.server.iteration, len(service.seats)) == (0, 0)
