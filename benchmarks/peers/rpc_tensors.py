"""PyTorch's RPC parameter server with a tensor for each parameter: 65 of them, in the proportions of ResNet-20."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from benchmarks.peers.harness import RoundTrip, main, shapes
from benchmarks.peers.measurement import Job
from benchmarks.peers.rpc_flat import serve, work


def server(job: Job, publish: Callable[[Any], None]) -> None:
    """Serve with many tensors."""
    serve(job, shapes(job.parameters), publish)


def worker(job: Job, number: int, address: Any) -> contextlib.AbstractContextManager[RoundTrip]:
    """Work with many tensors."""
    return work(job, shapes(job.parameters), number, address)


if __name__ == "__main__":
    main("rpc_tensors", server, worker)
