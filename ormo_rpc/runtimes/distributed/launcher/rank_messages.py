"""The messages of a rank's launcher: what it does and for whom, and how the run ended.

The launchers read it from torchrun's store, where there is one.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous.addresses import parse_address
from ormo_rpc.rendezvous.interfaces import interface_of, local_address
from ormo_rpc.runtimes import server_address, torchrun_store
from ormo_rpc.runtimes.ranks import TORCHRUN, Ranks

POLL_SECONDS = 0.5
"""The interval at which the store is asked."""


class Rank:
    """One rank's launcher, for messages.

    Args:
        ranks: The ranks, and this one among them.
        report: Called with messages for people.
    """

    def __init__(self, ranks: Ranks, report: Callable[[str], None]) -> None:
        self.ranks = ranks
        found = "" if ranks.launcher == TORCHRUN else f" ({ranks.launcher}: {', '.join(ranks.variables)})"
        self._name = f"rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()}{found}"
        self._report = report

    def say(self, text: str) -> None:
        """Report a message of this rank."""
        self._report(f"{self._name}: {text}")


class WorkerRank(Rank):
    """The launcher of a worker's rank; follows the store in a thread, to the end of its context.

    Args:
        ranks: The ranks, and this one among them.
        report: Called with messages for people.
        config: Of the run.

    Attributes:
        ended: Set once the run has ended by itself.
    """

    def __init__(self, ranks: Ranks, report: Callable[[str], None], config: Config) -> None:
        super().__init__(ranks, report)
        self.ended = threading.Event()
        self._stop = threading.Event()
        self._config = config
        self._result: dict[str, Any] = {}

    def __enter__(self) -> WorkerRank:
        if self.ranks.agent_store:
            threading.Thread(target=self._follow, name="torchrun's store", daemon=True).start()
        else:
            self._say_server(server_address.without_store(self._config, self.ranks))
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def say_end(self, timeout_seconds: float) -> None:
        """Report how the run ended, as soon as rank 0 has told."""
        worker = self.ranks.rank - 1
        if self.ranks.agent_store and self.ended.wait(timeout_seconds):
            pushed = self._result["pushes_per_worker"].get(str(worker), 0)
            gradients = f"{self._result['gradients_computed']} gradients, {pushed} of them by worker {worker}"
            self.say(f"the run {self._result['status']}: {gradients}")
        else:
            self.say(f"worker {worker} has done its work")

    def _follow(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store has ended with its agent
            store = torchrun_store.connect(self.ranks.master, self._config.rpc.start_timeout_seconds, silent=True)
            while (address := torchrun_store.read(store, torchrun_store.ADDRESS)) is None:
                if self._stop.wait(POLL_SECONDS):
                    return
            self._say_server(address)
            while (result := torchrun_store.read(store, torchrun_store.RESULT)) is None:
                if self._stop.wait(POLL_SECONDS):
                    return
            self._result = json.loads(result)
            self.ended.set()

    def _say_server(self, address: str) -> None:
        self.say(f"worker {self.ranks.rank - 1}, for {server_over(address)}")


def server_over(address: str) -> str:
    """The server's address, and the interface of this machine over which it is reached."""
    return f"the server at {address} over {with_interface(local_address(parse_address(address)))}"


def with_interface(host: str) -> str:
    """An address of this machine, with its interface in front where one is found."""
    with contextlib.suppress(ConfigError, ValueError):
        return f"{interface_of(host)} ({host})"
    return host
