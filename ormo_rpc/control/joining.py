"""The worker's way into a run: the lease, the control plane on it, and the membership."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from ormo_rpc.control import torch_rpc
from ormo_rpc.control.base import Control
from ormo_rpc.control.lines import LineControl
from ormo_rpc.control.messages import JoinRequest, JoinResponse
from ormo_rpc.errors import Refused, ServerLost, StaleSession
from ormo_rpc.rendezvous.addresses import written
from ormo_rpc.rendezvous.connecting import Patience
from ormo_rpc.rendezvous.lease import Lease, connect, refused_by
from ormo_rpc.rendezvous.secret import Secret

RETRY_SECONDS = 0.2
"""The pause between two attempts to join."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A membership, as its worker holds it.

    Attributes:
        lease: It ends with this.
        control: For its calls.
        response: The server's answer.
    """

    lease: Lease
    control: Control
    response: JoinResponse

    def request_leave(self) -> None:
        """Ask to leave; a lost server is no error, as there is nothing to leave then."""
        with contextlib.suppress(ServerLost, StaleSession):
            self.control.request_leave(self.response.session_id)


@contextlib.contextmanager
def joined(
    address: tuple[str, int],
    secret: Secret,
    request: JoinRequest,
    *,
    timeout_seconds: float,
    stopping: Callable[[], bool] = lambda: False,
) -> Generator[Joined]:
    """Join a run, trying again for as long as its server cannot be reached, and be a member until the context ends.

    Args:
        address: Host and port of the server's listener.
        secret: Of the run.
        request: Of this process.
        timeout_seconds: Give up after this time.
        stopping: Returns True once this worker has been asked to leave; then it gives up.

    Raises:
        ServerLost: no server was reached in time, or the worker is stopping.
        RunEnded: the run is over.
        WireError: the server refuses this worker (`Refused`), or does not know the secret.
    """
    with contextlib.ExitStack() as stack:
        with Patience(f"no server can be joined at {written(*address)}", timeout_seconds) as patience:
            while True:
                try:
                    membership = _attempt(stack, address, secret, request, patience)
                    break
                except (OSError, EOFError, ServerLost, StaleSession) as error:
                    stack.close()
                    patience.failed(error)
                    if patience.left_seconds <= 0 or stopping():
                        raise ServerLost(patience.given_up()) from None
                time.sleep(RETRY_SECONDS)
        yield membership


@contextlib.contextmanager
def admitted(address: tuple[str, int], secret: Secret, *, timeout_seconds: float) -> Generator[Control]:
    """Reach a server by one attempt, without joining its run; the value is its control plane.

    Args:
        address: Host and port of the server's listener.
        secret: Of the run.
        timeout_seconds: For each step of it.

    Raises:
        OSError, EOFError, ServerLost: the server cannot be reached.
        WireError: the server refuses this process (`Refused`), or does not know the secret.
    """
    with contextlib.ExitStack() as stack:
        yield _control(stack, connect(address, secret, timeout_seconds=timeout_seconds))


def _attempt(
    stack: contextlib.ExitStack, address: tuple[str, int], secret: Secret, request: JoinRequest, patience: Patience
) -> Joined:
    """Make one attempt; what is to be closed goes onto the stack, also where it fails."""
    lease = connect(address, secret, timeout_seconds=patience.attempt_seconds, waits_for=patience.waits_for)
    control = _control(stack, lease)
    patience.waits_for("admitted, and not a member yet")
    try:
        return Joined(lease=lease, control=control, response=control.join(request))
    except Refused as error:
        raise refused_by(address, error) from None


def _control(stack: contextlib.ExitStack, lease: Lease) -> Control:
    """Make the control plane of the carrier that the server has named."""
    admission = lease.admission
    if admission.control == "socket":
        control = LineControl(lease)
        stack.enter_context(lease)
        return control
    stack.enter_context(lease)
    if admission.agent is None or torch_rpc.unavailable():
        reason = torch_rpc.unavailable() or "the server names no agent"
        raise Refused(f"runtime.control: the server uses {admission.control}, expected socket on all machines: {reason}")
    from ormo_rpc.control.torch_rpc.agent import agent_address
    from ormo_rpc.control.torch_rpc.client import RpcControl
    from ormo_rpc.control.torch_rpc.holder import AGENT

    timeout_seconds = admission.call_timeout_seconds
    stack.enter_context(AGENT.hold(admission.agent, host=lease.local_host, timeout_seconds=timeout_seconds))
    try:
        return RpcControl(admission.admission_id, agent_address(admission.agent), timeout_seconds)
    except ServerLost as error:
        AGENT.replace()
        raise ServerLost(
            f"the server's agent of torch.distributed.rpc at {written(*agent_address(admission.agent))} does not answer "
            f"({error}); its port has to be open to this machine, or start the run with runtime.control=socket"
        ) from None
