"""The agent of the server's process, which is started again where it has ceased to listen."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ormo_rpc.control.torch_rpc import server
from ormo_rpc.control.torch_rpc.agent import SERVER, agent_address, rpc_agent
from ormo_rpc.control.torch_rpc.server import Published
from ormo_rpc.rendezvous.addresses import written
from ormo_rpc.rendezvous.connecting import listens

_log = logging.getLogger(__name__)


class ServersAgent:
    """Publishes the server through an agent; a context whose end is that of the agent. `_lock` guards all of it.

    Once a connection has ended before it brought anything, as that of a port scanner, or of a worker that was killed at that
    moment, torch's agent accepts no other one for the rest of its life, and its process goes on. So each worker that is
    admitted is a reason to look; those that are members join again where they use the agent.

    Args:
        published: The server's objects.
        functions: Those that workers may call.
        host: The address at which to listen.
        timeout_seconds: For calls without a time-out of their own.
    """

    def __init__(
        self, published: Published, functions: tuple[Callable[..., Any], ...], *, host: str, timeout_seconds: float
    ) -> None:
        self._published = published
        self._functions = functions
        self._host = host
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._agent = contextlib.ExitStack()
        self._address = ""

    def __enter__(self) -> Self:
        with self._lock:
            self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._agent.close()

    def address(self) -> str:
        """The address of an agent that listens."""
        with self._lock:
            if not listens(agent_address(self._address)):
                _log.warning(
                    "the agent of torch.distributed.rpc at %s has ceased to listen, as it does after a connection that ended "
                    "at once; it is started again, and workers that use it join again",
                    written(*agent_address(self._address)),
                )
                self._agent.close()
                self._start()
            return self._address

    def _start(self) -> None:
        agent = rpc_agent(
            SERVER, host=self._host, server=None, timeout_seconds=self._timeout_seconds, functions=self._functions
        )
        self._address = self._agent.enter_context(agent)
        server.publish(self._published)
        _log.info("agent of torch.distributed.rpc at %s", self._address)
