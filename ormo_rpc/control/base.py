"""The calls of the control plane, as the worker makes them and as the server handles them; the same over each carrier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ormo_rpc.control.memberships import Membership
from ormo_rpc.control.messages import JoinRequest, JoinResponse


class Control(Protocol):
    """The server as a worker's control plane sees it; may be used by several threads.

    Each call ends within `Admission.call_timeout_seconds`, and raises:
        ServerLost: the server has not answered by then, cannot be reached, or could not do it.
        StaleSession: the session is not valid any more.
        Refused: the server refuses, with its reason.
    """

    def join(self, request: JoinRequest) -> JoinResponse:
        """Become a member of the run, for as long as the lease is held; `RunEnded` where it is over."""
        ...

    def ask(self, session_id: str, transport: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Ask the server's half of a transport (`ServerSide.answer`); both values are of JSON's types."""
        ...

    def present_state(self) -> tuple[int, torch.Tensor, torch.Tensor] | None:
        """Fetch the server's iteration, its parameters, shape (D,), and the bytes of its buffers; one need not be a member.

        None where the carrier brings no tensors.
        """
        ...

    def request_leave(self, session_id: str) -> None:
        """Ask to leave: after the ticket that this worker computes, or at once where it waits for one."""
        ...

    def leave(self, session_id: str) -> None:
        """End the membership, at the end of the run."""
        ...


class ControlHandler(Protocol):
    """Decides about memberships in the server's process; called from several threads at once."""

    def join(self, request: JoinRequest) -> Membership:
        """Give an authenticated process a membership.

        Raises:
            ValueError: it is refused; the message, which says why, is sent to it. `RunEnded` where the run is over.
        """
        ...

    def is_member(self, session_id: str) -> bool:
        """Tell whether a session is valid."""
        ...

    def evict(self, membership: Membership, reason: str) -> None:
        """End the membership of a process that has died or does not answer; without an effect where it has ended."""
        ...

    def request_leave(self, membership: Membership) -> None:
        """Let a worker leave, as it has asked to, as soon as it holds no ticket."""
        ...

    def leave(self, session_id: str) -> None:
        """End a membership, as its worker asks at the end of the run."""
        ...
