"""A worker's calls to the server by torch.distributed.rpc (``wire.transport=uv``); see `handlers` for the other end."""

from __future__ import annotations

import torch.distributed.rpc as rpc
from torch import Tensor

from ormo_rpc.errors import BY_NAME, ServerLost
from ormo_rpc.messages import ErrorReply, Push, Reply
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.transports.torch_rpc import handlers
from ormo_rpc.transports.torch_rpc.agent import SERVER


class TorchRpcClient:
    """`ServerClient` through the RRef that the server hands out.

    Args:
        session_id: Of this worker's membership.
        timeout_seconds: After how long a call that is not answered is taken for lost.

    Raises:
        ServerLost: the server does not answer.
    """

    def __init__(self, session_id: str, timeout_seconds: float) -> None:
        self.session_id = session_id
        self.timeout_seconds = timeout_seconds
        self.service = self._probe()

    def register(self) -> Reply:
        """See `ServerClient.register`."""
        return self._insist(handlers.register, self.session_id)

    def push(self, push: Push, payload: Tensor) -> Reply:
        """See `ServerClient.push`.

        After a time-out the push is repeated, which never applies it twice, as long as the server answers at all: the reply
        may be held back for longer, at a barrier or at the end of the run, by the slowest worker. A server that has not
        answered a question for as long as the time-out is lost.
        """
        place = (push.ticket, push.stamp, push.incarnation, push.loss, push.samples)
        return self._insist(handlers.push, self.session_id, *place, payload)

    def leave(self) -> None:
        """See `ServerClient.leave`."""
        try:
            self._call(handlers.leave, (self.session_id,))
        except (ServerLost, TimeoutError):
            return

    def _probe(self) -> rpc.RRef[Service]:
        """Request for the RRef, which a server that lives answers at once."""
        try:
            return rpc.rpc_sync(SERVER, handlers.published, timeout=self.timeout_seconds)
        except RuntimeError as error:
            raise ServerLost(_first_line(error)) from None

    def _insist(self, function: object, *arguments: object) -> Reply:
        """Call again and again, until it is answered."""
        while True:
            try:
                return self._call(function, arguments)
            except TimeoutError:
                self.service = self._probe()

    def _call(self, function: object, arguments: tuple[object, ...]) -> Reply:
        """Call; a server that is gone is told apart from one that is slow, and from one that refuses."""
        try:
            answer = rpc.rpc_sync(self.service.owner(), function, args=arguments, timeout=self.timeout_seconds)
        except RuntimeError as error:
            if str(error).startswith("RPCErr:1"):  # how torch marks a time-out
                raise TimeoutError(_first_line(error)) from None
            raise ServerLost(_first_line(error)) from None
        if isinstance(answer, ErrorReply):
            raise BY_NAME[answer.error](answer.text)
        return answer


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
