"""The store of torchrun's agents, where they share one: what the ranks tell one another.

It belongs to the agent of rank 0's node, so it outlives the ranks.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ormo_rpc.runtimes.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public

PREFIX = "ormo_rpc"
"""Of our keys."""
ADDRESS, SECRET_FILE, RESULT = "address", "secret_file", "result"
"""The server's address and secret, and how the run ended."""
CONNECT_SECONDS = 10.0
"""The store is there before the ranks are."""


def connect(address: str, timeout_seconds: float) -> PrefixStore:
    """Connect to the store at HOST:PORT.

    Args:
        address: Of the store.
        timeout_seconds: For the connection, and for each value that is waited for.

    Raises:
        RuntimeError: it cannot be reached.
    """
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] # as above; loads torch

    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_seconds)
    return PrefixStore(PREFIX, TCPStore(host, int(port), is_master=False, timeout=timeout, wait_for_workers=False))


def read(store: PrefixStore, key: str) -> str | None:
    """Read a value without waiting for it.

    Raises:
        RuntimeError: the store has ended.
    """
    return store.get(key).decode() if store.check([key]) else None


def tell_result(ranks: Ranks, summary: Mapping[str, Any]) -> None:
    """Tell the other ranks how the run ended."""
    if ranks.agent_store:
        result = {key: summary.get(key) for key in ("status", "gradients_computed", "pushes_per_worker")}
        with contextlib.suppress(RuntimeError):  # the store has ended with its agent, and nobody waits for the result
            connect(ranks.master, CONNECT_SECONDS).set(RESULT, json.dumps(result))
