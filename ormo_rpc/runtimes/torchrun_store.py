"""The store of torchrun's agents, where they share one: what the ranks tell one another.

It belongs to the agent of rank 0's node, so it outlives the ranks.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ormo_rpc.errors import ServerLost
from ormo_rpc.rendezvous.addresses import parse_address
from ormo_rpc.rendezvous.connecting import NoConnection, NothingListens, Patience, open_connection

if TYPE_CHECKING:
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public

PREFIX = "ormo_rpc"
"""Of our keys."""
ADDRESS, SECRET_FILE, RESULT = "address", "secret_file", "result"
"""The server's address and secret, and how the run ended."""
RETRY_SECONDS = 0.5
"""The pause between two attempts to reach it."""
CONNECT_SECONDS = 10.0
"""The store is there before the ranks are."""


def connect(address: str, timeout_seconds: float, *, silent: bool = False) -> PrefixStore:
    """Connect to the store at HOST:PORT, trying again while it does not answer; where nothing listens, its agent has ended.

    Args:
        address: Of the store.
        timeout_seconds: For the connection, and for each value that is waited for.
        silent: Another process tells people where it cannot be reached.

    Raises:
        ServerLost: it cannot be reached.
    """
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] # as above; loads torch

    host, port = parse_address(address)
    with Patience(f"torchrun's store at {address} cannot be reached", timeout_seconds, silent=silent) as patience:
        # torch's own attempts would take long, and would not say why they fail.
        while True:
            try:
                open_connection((host, port), patience.attempt_seconds).close()
                break
            except NoConnection as error:
                patience.failed(error)
                if patience.left_seconds <= 0 or (isinstance(error, NothingListens) and patience.seconds > CONNECT_SECONDS):
                    raise ServerLost(patience.given_up()) from None
            time.sleep(RETRY_SECONDS)
        timeout = timedelta(seconds=timeout_seconds)
        try:
            return PrefixStore(PREFIX, TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))
        except RuntimeError as error:
            patience.failed(error)
            raise ServerLost(patience.given_up()) from None


def wait_for(store: PrefixStore, keys: Sequence[str], timeout_seconds: float) -> list[str]:
    """Wait for values that rank 0 leaves in the store.

    Raises:
        ServerLost: they do not come, or the store has ended.
    """
    with Patience("rank 0 has not told the address of the server", timeout_seconds) as patience:
        patience.waits_for("it may load data and model")
        try:
            return [store.get(key).decode() for key in keys]
        except RuntimeError as error:
            patience.failed(
                RuntimeError("torchrun's store has ended" if patience.left_seconds > 0 else str(error).splitlines()[0])
            )
            raise ServerLost(patience.given_up()) from None


def read(store: PrefixStore, key: str) -> str | None:
    """Read a value without waiting for it.

    Raises:
        RuntimeError: the store has ended.
    """
    return store.get(key).decode() if store.check([key]) else None


def tell_result(address: str, summary: Mapping[str, Any]) -> None:
    """Tell the other ranks by the store at HOST:PORT how the run ended."""
    result = {key: summary.get(key) for key in ("status", "gradients_computed", "pushes_per_worker")}
    with contextlib.suppress(RuntimeError):  # the store has ended with its agent, and nobody waits for the result
        connect(address, CONNECT_SECONDS, silent=True).set(RESULT, json.dumps(result))
