"""A gloo group of two, server and worker, for each worker: the design of torchft's parameter server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public

from benchmarks.peers.harness import HOST, START_TIMEOUT_SECONDS, RoundTrip, Step, main
from benchmarks.peers.measurement import Job

_TIMEOUT = timedelta(seconds=START_TIMEOUT_SECONDS)


def group(store: TCPStore, number: int, rank: int) -> Any:  # torch's annotations leave out send and recv
    """The group of the server, rank 0, and one worker, rank 1."""
    return ProcessGroupGloo(PrefixStore(f"worker{number}", store), rank, 2, _TIMEOUT)


def server(job: Job, publish: Callable[[Any], None]) -> None:
    """Serve each worker in a thread: receive, step and copy under the lock, send."""
    step = Step(job.parameters)
    store = TCPStore(HOST, 0, is_master=True, timeout=_TIMEOUT, wait_for_workers=False)

    def serve(number: int) -> None:
        with_worker = group(store, number, 0)
        grad, reply = torch.zeros(job.parameters), torch.zeros(job.parameters)
        while True:
            with_worker.recv([grad], 1, 0).wait()
            step(grad, reply)
            with_worker.send([reply], 1, 0).wait()

    for number in range(job.workers):
        threading.Thread(target=serve, args=(number,), daemon=True).start()
    publish(store.port)
    threading.Event().wait()


@contextlib.contextmanager
def worker(job: Job, number: int, address: Any) -> Generator[RoundTrip]:
    """Send the gradient, receive the parameters."""
    with_server = group(TCPStore(HOST, address, timeout=_TIMEOUT, wait_for_workers=False), number, 1)
    grad, params = torch.randn(job.parameters), torch.zeros(job.parameters)

    def round_trip() -> None:
        with_server.send([grad], 0, 0).wait()
        with_server.recv([params], 0, 0).wait()

    yield round_trip


if __name__ == "__main__":
    main("gloo", server, worker)
