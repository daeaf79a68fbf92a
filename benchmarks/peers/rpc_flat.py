"""PyTorch's RPC parameter server with gradient and parameters as one flat tensor each."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed.rpc as rpc
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public

from benchmarks.peers.harness import HOST, LEARNING_RATE, MOMENTUM, RoundTrip, free_port, main
from benchmarks.peers.measurement import Job

ONLY_TCP = "BENCHMARK_ONLY_TCP"
"""Environment variable that keeps torch's agents off shared memory, as between machines."""
_server: Parameters | None = None


class Parameters:
    """Parameters and momentum, as tensors of the given sizes, under one lock."""

    def __init__(self, sizes: list[int]) -> None:
        self.w = [torch.zeros(size) for size in sizes]
        self.u = [torch.zeros(size) for size in sizes]
        self.lock = threading.Lock()

    def update(self, grads: list[Tensor]) -> list[Tensor]:
        """Apply the gradients and return copies of the parameters."""
        with self.lock:
            for w, u, grad in zip(self.w, self.u, grads, strict=True):
                u.mul_(MOMENTUM).add_(grad)
                w.sub_(u, alpha=LEARNING_RATE)
            return [w.clone() for w in self.w]


def update(grads: list[Tensor]) -> list[Tensor]:
    """Apply the gradients; workers call this by name."""
    assert _server is not None
    return _server.update(grads)


def serve(job: Job, sizes: list[int], publish: Callable[[Any], None]) -> None:
    """Serve as rank 0."""
    global _server  # `update`, called by name, finds it there
    _server = Parameters(sizes)
    port = free_port()
    publish(port)
    join(job, 0, port)
    threading.Event().wait()


@contextlib.contextmanager
def work(job: Job, sizes: list[int], number: int, port: int) -> Generator[RoundTrip]:
    """Work by synchronous calls, which return the parameters."""
    grads = [torch.randn(size) for size in sizes]
    join(job, number + 1, port)

    def round_trip() -> None:
        rpc.rpc_sync("rank0", update, args=(grads,))

    yield round_trip


def join(job: Job, rank: int, port: int) -> None:
    """Join the group; nobody leaves it, as the processes are killed."""
    only_tcp: dict[str, Any] = {"_transports": ["uv"], "_channels": ["basic"]} if ONLY_TCP in os.environ else {}
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://{HOST}:{port}", rpc_timeout=120, **only_tcp)
    if rank > 0:  # wait for the server
        TCPStore(HOST, port, timeout=timedelta(seconds=60), wait_for_workers=False)
    rpc.init_rpc(f"rank{rank}", rank=rank, world_size=job.workers + 1, rpc_backend_options=options)


def server(job: Job, publish: Callable[[Any], None]) -> None:
    """Serve with one tensor."""
    serve(job, [job.parameters], publish)


def worker(job: Job, number: int, address: Any) -> contextlib.AbstractContextManager[RoundTrip]:
    """Work with one tensor."""
    return work(job, [job.parameters], number, address)


if __name__ == "__main__":
    main("rpc_flat", server, worker)
