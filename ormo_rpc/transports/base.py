"""What a worker says to the server, and hears from it: the contract of `stream_calls` and `rpc_calls`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ormo_rpc.messages import Push, Reply


class ServerClient(Protocol):
    """Everything that a worker asks for."""

    def register(self) -> Reply:
        """Be a member, and wait for the first reply.

        Raises:
            ServerLost: the server is gone.
            PushRefused: it refuses us.
        """
        ...

    def push(self, push: Push, payload: Tensor) -> Reply:
        """Deliver a push and wait for the reply, whose parameters may be written over by the next call.

        Raises:
            ServerLost: the server is gone.
            PushRefused: the server refused it.
        """
        ...

    def leave(self) -> None:
        """Leave. A server that has gone already needs no goodbye."""
        ...
