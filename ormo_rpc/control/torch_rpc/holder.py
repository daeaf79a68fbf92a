"""The agent of a worker's process, shared by its loops."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Generator

from ormo_rpc.control.torch_rpc.agent import rpc_agent

_log = logging.getLogger(__name__)
WORKER = "worker"
"""The name of every worker's agent, which nobody calls: replies go through the connection that the call came by."""


class AgentHolder:
    """Starts the agent for the first of those that hold it, and ends it with the last. `_lock` guards all of it.

    A server that was restarted has another address; the agent is then started again for it, also under those that still hold
    the former one: their server is gone, and so their calls fail. So it is for one that cannot reach its server: once torch has
    lost the connection between two agents, it makes no other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._agent: contextlib.ExitStack | None = None
        self._server = ""
        self._holders = 0

    @contextlib.contextmanager
    def hold(self, server: str, *, host: str, timeout_seconds: float) -> Generator[None]:
        """Have an agent that reaches the server at this address, until the context ends.

        Args:
            server: The address of the server's agent.
            host: The address at which to listen.
            timeout_seconds: For calls without a time-out of their own.
        """
        with self._lock:
            if self._agent is None or self._server != server:
                self._end()
                agent = contextlib.ExitStack()
                address = agent.enter_context(rpc_agent(WORKER, host=host, server=server, timeout_seconds=timeout_seconds))
                _log.info("agent of torch.distributed.rpc at %s, for the server's at %s", address, server)
                self._agent, self._server, self._holders = agent, server, 0
            held = self._agent
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                if held is self._agent:
                    self._holders -= 1
                    if self._holders == 0:
                        self._end()

    def replace(self) -> None:
        """Start another agent for the next that holds one, as this one does not reach the server."""
        with self._lock:
            self._server = ""

    def _end(self) -> None:
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()


AGENT = AgentHolder()
"""The one of this process, as torch has room for one agent."""
