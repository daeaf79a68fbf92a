"""Joining the RPC group: the store through which processes find one another, and the agent's options."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed.rpc as rpc
from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
from torch.distributed.rendezvous import register_rendezvous_handler

SERVER = "server"
"""The server's name in the RPC group."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the store is.

    Attributes:
        host: Its host.
        port: Its port.
        listener: A descriptor that is bound and listens there, in the process that keeps the store on this machine.
        hosted: Whether this process keeps the store without such a descriptor.
        prefix: What our keys begin with, where the store is shared.
        timeout_seconds: How long to wait for a key.
    """

    host: str
    port: int
    listener: int | None = None
    hosted: bool = False
    prefix: str = "ormo_rpc"
    timeout_seconds: float = 60.0


def connect_store(address: Address) -> Store:
    """Open the store, or connect to it.

    A store that makes its own socket listens on every interface; one that is given a bound socket listens there alone.
    """
    store = TCPStore(
        address.host,
        address.port,
        is_master=address.listener is not None or address.hosted,
        timeout=timedelta(seconds=address.timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=address.listener,
    )
    return PrefixStore(address.prefix, store)


def say_ready(store: Store, rank: int) -> None:
    """Tell the server that a worker's process has loaded everything and is about to join."""
    store.set(f"ready/{rank}", "ready")


def wait_until_ready(store: Store, world_size: int, timeout_seconds: float) -> None:
    """In the server: wait until every worker is about to join, because the joining itself knows no time-out.

    Raises:
        TimeoutError: one of them is not there in time; the message names it.
    """
    deadline = time.monotonic() + timeout_seconds
    for rank in range(1, world_size):
        try:
            store.wait([f"ready/{rank}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
        except DistStoreError:
            raise TimeoutError(
                f"worker {rank - 1} was not ready within runtime.start_timeout_seconds={timeout_seconds:g}; see its log"
            ) from None


@contextlib.contextmanager
def rpc_group(store: Store, *, rank: int, world_size: int, timeout_seconds: float) -> Generator[None]:
    """Be a member of the RPC group, rank 0 as the server.

    The group is static: `rpc.init_rpc` returns when all are there. Whoever leaves does so without the graceful shutdown,
    which would wait for ever for one that is dead; the goodbye is said by `Service.goodbye` instead.

    Args:
        store: Where the members find one another.
        rank: Of this process.
        world_size: Workers plus one.
        timeout_seconds: How long to wait for the others.
    """

    def rendezvous(url: str, *args: Any, **kwargs: Any) -> Generator[tuple[Store, int, int]]:  # noqa: ARG001 - torch's signature
        yield store, rank, world_size

    register_rendezvous_handler("ormo", rendezvous)
    options = rpc.TensorPipeRpcBackendOptions(
        init_method="ormo://",
        rpc_timeout=timeout_seconds,
        # A handler never waits for another one, but joining and leaving take threads beside the pushes.
        num_worker_threads=max(16, world_size + 4),
    )
    with warnings.catch_warnings():
        # torch's own use of a class that torch deprecates.
        warnings.filterwarnings("ignore", message="You are using a Backend", category=UserWarning)
        rpc.init_rpc(
            SERVER if rank == 0 else f"worker{rank - 1}", rank=rank, world_size=world_size, rpc_backend_options=options
        )
    try:
        yield
    finally:
        rpc.shutdown(graceful=False)
