"""The worker's side of the control plane over torch.distributed.rpc: every call goes to the owner of the server's RRef."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed.rpc as rpc
from typing_extensions import override

from ormo_rpc.control.calls import Calls
from ormo_rpc.control.messages import unpack_result
from ormo_rpc.control.torch_rpc import server
from ormo_rpc.control.torch_rpc.agent import SERVER
from ormo_rpc.errors import ServerLost
from ormo_rpc.rendezvous.connecting import CONNECT_SECONDS, NO_ANSWER, is_unanswered

_log = logging.getLogger(__name__)


class RpcControl(Calls):
    """Makes calls through the RRef that the server hands out; needs this process's agent.

    Args:
        admission_id: Of the lease.
        agent: Host and port of the server's agent.
        timeout_seconds: For each call.

    Raises:
        ServerLost: the server does not answer.
    """

    def __init__(self, admission_id: str, agent: tuple[str, int], timeout_seconds: float) -> None:
        super().__init__(admission_id)
        self._agent = agent
        self.timeout_seconds = timeout_seconds
        self.server = self.probe()
        _log.info("got the server's RRef; calls go to its owner, the agent named %s", self.server.owner_name())

    def probe(self) -> rpc.RRef[server.Published]:
        """Ask for the RRef, which a server that is alive returns at once.

        A connection of ours to its port, to see whether it is open, would end its agent, which has to be spoken to.

        Raises:
            ServerLost: it does not answer, or its port does not, which is known sooner.
        """
        came = threading.Event()
        try:
            answer = rpc.rpc_async(SERVER, server.published, timeout=self.timeout_seconds)
            answer.add_done_callback(lambda _: came.set())
            while not came.wait(CONNECT_SECONDS):
                if is_unanswered(self._agent):
                    raise ServerLost(NO_ANSWER.format(CONNECT_SECONDS))
            self.server = answer.wait()
        except RuntimeError as error:
            raise ServerLost(first_line(error)) from None
        return self.server

    def at_owner(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Call a function in the process that owns the RRef.

        Raises:
            TimeoutError: there was no answer in time.
            ServerLost: there will be none.
        """
        try:
            return rpc.rpc_sync(self.server.owner(), function, args=arguments, timeout=self.timeout_seconds)
        except RuntimeError as error:
            if str(error).startswith("RPCErr:1"):  # how torch marks a time-out
                raise TimeoutError(first_line(error)) from None
            raise ServerLost(first_line(error)) from None

    @override
    def present_state(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        try:
            text, params, buffers = self.at_owner(server.present_state, self._admission_id)
        except TimeoutError as error:
            raise ServerLost(f"present_state: {error}") from None
        return int(unpack_result(text)["iteration"]), params, buffers

    @override
    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        try:
            return self.at_owner(server.FUNCTIONS[name], json.dumps(arguments))
        except TimeoutError as error:
            raise ServerLost(f"{name}: {error}") from None


def first_line(error: Exception) -> str:
    """The first line of an error, as torch adds a traceback of the other process, without the place in its own source."""
    return (str(error) or type(error).__name__).splitlines()[0].partition(" (this error originated at")[0]
