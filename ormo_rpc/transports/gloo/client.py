"""The worker's half of ``transport=gloo``."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from typing_extensions import override

from ormo_rpc.errors import ServerLost, StaleSession
from ormo_rpc.kernels.page_locked import zeros
from ormo_rpc.messages import Push, Reply, no_buffers
from ormo_rpc.transports.base import Endpoint, ServerClient, WorkerSide
from ormo_rpc.transports.codec import unpack_error
from ormo_rpc.transports.gloo.addresses import Address
from ormo_rpc.transports.gloo.header import HEADER_BYTES
from ormo_rpc.transports.gloo.pair import WORKER, Pair, PairLost, Transfer, make_pair
from ormo_rpc.transports.gloo.server import ARRIVED, END, NUMBERS, OPEN_SECONDS, PARAMS, UNTIL_CLOSED, small_bytes
from ormo_rpc.transports.lease_watch import closed_with_lease
from ormo_rpc.transports.stream import frames
from ormo_rpc.transports.stream.frames import DTYPES, RESPONSE_BYTES, SAME, Request, Response, bytes_of


class GlooWorkerSide(WorkerSide):
    """Connects by a pair."""

    @override
    def allocate(self, size: int) -> torch.Tensor:
        return super().allocate(HEADER_BYTES + size)[HEADER_BYTES:]

    @override
    @contextlib.contextmanager
    def connect(self, endpoint: Endpoint, payload: torch.Tensor) -> Generator[ServerClient]:
        sizes: dict[str, int] = {}

        def exchange(own: Address) -> Address:
            size = payload.numel() * payload.itemsize
            request = {"address": vars(own), "host": endpoint.address[0], "payload": size, "reason": endpoint.reason}
            answer = endpoint.ask(request)
            sizes.update(params=int(answer["params"]), buffers=int(answer["buffers"]))
            return Address.parse(answer["address"])

        try:
            pair = make_pair(WORKER, endpoint.local_host, exchange, OPEN_SECONDS)
        except PairLost as error:
            raise ServerLost(f"gloo: {error}") from None
        with closed_with_lease(endpoint, pair.close):
            yield GlooClient(endpoint, pair, payload, page_locked=self.page_locked, **sizes)


def message_of(payload: torch.Tensor) -> torch.Tensor:
    """The memory of a payload, with the room for a header in front of it."""
    start = payload.data_ptr() - payload.untyped_storage().data_ptr() - HEADER_BYTES
    assert start >= 0, "the payload lies in memory that `allocate` made"
    whole = torch.empty(0, dtype=torch.uint8).set_(payload.untyped_storage())
    return whole[start : start + HEADER_BYTES + payload.numel() * payload.itemsize]


class GlooClient(ServerClient):
    """Calls the server by a pair.

    Args:
        endpoint: The server.
        pair: The pair.
        payload: The wire form of every push, with room for a header in front.
        params: The most bytes of parameters in a reply.
        buffers: The same for the model's buffers.
        page_locked: See `WorkerSide`.
    """

    def __init__(
        self, endpoint: Endpoint, pair: Pair, payload: torch.Tensor, *, params: int, buffers: int, page_locked: bool = False
    ) -> None:
        self._endpoint = endpoint
        self._pair = pair
        self._message = message_of(payload)
        self._header_only = self._message[:HEADER_BYTES]
        self._header = bytes_of(self._header_only)[: frames.REQUEST_BYTES]
        self._small = torch.zeros(small_bytes(buffers), dtype=torch.uint8)
        self._small_view = bytes_of(self._small)
        self._params = zeros(params, page_locked=page_locked)
        self._params_posted: Transfer | None = None
        """The memory for parameters stays posted until a reply has some."""
        self._sent: list[Transfer] = []
        """The messages that have come once the next response has."""
        self._newest_buffers = no_buffers()

    @override
    def register(self) -> Reply:
        self._header[:] = frames.request(Request.register)
        return self._call(self._header_only)

    @override
    def push(self, push: Push) -> Reply:
        self._header[:] = frames.request(Request.push, push)
        return self._call(self._message)

    @override
    def leave(self) -> None:
        with contextlib.suppress(ServerLost, StaleSession):
            self._endpoint.control.leave(self._endpoint.session_id)

    def _call(self, message: torch.Tensor) -> Reply:
        try:
            small = self._pair.receive(self._small, NUMBERS)
            if self._params_posted is None:
                self._params_posted = self._pair.receive(self._params, PARAMS)
            end = self._pair.receive_empty(END)
            self._sent += [self._pair.send(message, NUMBERS), self._pair.send_empty(END)]
            end.wait(UNTIL_CLOSED)
            for transfer in (small, *self._sent):
                transfer.wait(UNTIL_CLOSED)
            self._sent = [self._pair.send_empty(ARRIVED)]
            return self._reply()
        except PairLost as error:
            raise ServerLost(f"the connection to the server is lost: {error}") from None

    def _reply(self) -> Reply:
        """The response that has arrived.

        Raises:
            PushRefused: it is a refusal.
        """
        kind, dtype, elements, _, buffer_bytes = frames.read_response(self._small_view)
        if kind == Response.error:
            raise unpack_error(self._small_view[RESPONSE_BYTES : RESPONSE_BYTES + elements].tobytes())
        numbers = frames.reply_numbers(self._small_view)
        if numbers["ticket"] is None:
            return Reply(**numbers, params=self._params[:0].view(DTYPES[dtype]))
        if buffer_bytes != SAME:  # in memory of their own, as earlier replies keep theirs
            self._newest_buffers = self._small[RESPONSE_BYTES : RESPONSE_BYTES + buffer_bytes].clone()
        assert self._params_posted is not None, "posted before the call"
        self._params_posted.wait(UNTIL_CLOSED)
        self._params_posted = None
        dtype = DTYPES[dtype]
        return Reply(**numbers, params=self._params[: elements * dtype.itemsize].view(dtype), buffers=self._newest_buffers)
