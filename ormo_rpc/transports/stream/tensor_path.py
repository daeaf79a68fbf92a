"""The ways of tensors that do not follow their frames, such as a window of memory that both sides have.

Each has the same calls on either side. The one that sends makes the tensors ready, sends the frame, and delivers them; the one
that has received the frame fetches them. So a frame announces them, and nobody waits on a GPU for what may not come.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from typing_extensions import override

from ormo_rpc.rendezvous.protocol import LineReader
from ormo_rpc.transports.base import Service

_ALIGNMENT = 256
_TOKEN_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The most bytes that cross at once.

    Attributes:
        push: Of a push, which are always as many.
        params: Of the parameters of a reply.
        buffers: Of the model's buffers in a reply.
    """

    push: int
    params: int
    buffers: int


class TensorPath(ABC):
    """One side of a way for tensors; used by one thread, but for `close`.

    Attributes:
        push: The bytes of a push: on the server's side those that `fetch_push` fills.
        params: Room for the parameters of a reply, as bytes.
        buffers: Room for the model's buffers.
    """

    push: torch.Tensor
    params: torch.Tensor
    buffers: torch.Tensor

    @abstractmethod
    def ready_push(self, payload: torch.Tensor) -> None:
        """Make a push ready; its bytes must stay as they are until it is delivered."""

    @abstractmethod
    def ready_reply(self, params: torch.Tensor, buffers: torch.Tensor) -> None:
        """Make a reply ready, after all that was begun with the push before it; none of either where they are empty."""

    @abstractmethod
    def deliver(self) -> None:
        """Deliver what is ready; its frame has been sent.

        Raises:
            EOFError: the other side is lost.
        """

    @abstractmethod
    def fetch_push(self) -> None:
        """Fill `push`; its frame has come.

        Raises:
            EOFError: the other side is lost.
        """

    @abstractmethod
    def fetch_reply(self, params: int, buffers: int) -> None:
        """Fill that many bytes of `params` and of `buffers`; the frame has come.

        Raises:
            EOFError: the other side is lost.
        """

    def close(self) -> None:
        """Wake whoever waits in a call; from any thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """A way that the server offers to one worker.

    Attributes:
        answer: What the worker needs to open it, of JSON's types.
        open: Opens the server's side, given the connection, once the worker has the answer.
            It raises ValueError where it cannot, and OSError or EOFError where the worker has given up.
    """

    answer: Mapping[str, Any]
    open: Callable[[LineReader], TensorPath]


Way = Callable[[Service, Mapping[str, Any]], Offer]
"""Given the service, and the worker's request, offers a way of tensors; raises `TransportRefused` where it cannot."""


class Memory(Protocol):
    """Memory that two processes share."""

    def make(self, size: int) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """Make that many zero bytes; return them with a handle of JSON's types.

        Raises:
            RuntimeError: there is no room, or others cannot open it.
        """
        ...

    def attach(self, size: int, handle: Mapping[str, Any]) -> torch.Tensor:
        """Open another process's memory, of that many bytes.

        Raises:
            RuntimeError, ValueError, OSError: it cannot be opened.
        """
        ...

    def copying(self) -> AbstractContextManager[None]:
        """Launch copies, behind all that this thread's stream has by now, and wait for their end."""
        ...


class Window(TensorPath):
    """Memory of the server's process that one worker opens: it writes its pushes there, and reads the replies.

    So the end of a worker takes nothing away that the server reads, the server opens nobody's memory, and a reply stays as it
    is until the next push. The price is one copy each way within the GPU.

    Args:
        memory: Its bytes.
        sizes: Of its parts.
        copying: See `Memory`.
    """

    def __init__(self, memory: torch.Tensor, sizes: Sizes, copying: Callable[[], AbstractContextManager[None]]) -> None:
        push_end, params_end, buffers_end, token_end = _ends(sizes)
        self.push = memory[: sizes.push]
        self.params = memory[push_end : push_end + sizes.params]
        self.buffers = memory[params_end : params_end + sizes.buffers]
        self.token = memory[buffers_end:token_end]
        self._copying = copying

    @override
    def ready_push(self, payload: torch.Tensor) -> None:
        with self._copying():
            self.push.copy_(payload.view(torch.uint8), non_blocking=True)

    @override
    def ready_reply(self, params: torch.Tensor, buffers: torch.Tensor) -> None:
        with self._copying():
            for room, sent in ((self.params, params), (self.buffers, buffers)):
                data = sent.detach().view(torch.uint8)
                room[: data.numel()].copy_(data, non_blocking=True)

    @override
    def deliver(self) -> None:
        pass

    @override
    def fetch_push(self) -> None:
        pass

    @override
    def fetch_reply(self, params: int, buffers: int) -> None:
        pass


def make_window(memory: Memory, sizes: Sizes) -> tuple[Window, dict[str, Any]]:
    """Make a window; return it with what `attach_window` needs, of JSON's types.

    Raises:
        RuntimeError: there is no room, or others cannot open it.
    """
    whole, handle = memory.make(_ends(sizes)[-1])
    window = Window(whole, sizes, memory.copying)
    token = secrets.token_bytes(_TOKEN_BYTES)
    with memory.copying():
        window.token[:_TOKEN_BYTES].copy_(torch.frombuffer(bytearray(token), dtype=torch.uint8))
    return window, {"sizes": asdict(sizes), "handle": handle, "token": token.hex()}


def attach_window(memory: Memory, made: Mapping[str, Any]) -> Window:
    """Open a window of the server's, and check that it is the one that was meant.

    Raises:
        RuntimeError, ValueError, OSError: it cannot be opened.
    """
    sizes = Sizes(**made["sizes"])
    window = Window(memory.attach(_ends(sizes)[-1], made["handle"]), sizes, memory.copying)
    if bytes(window.token[:_TOKEN_BYTES].tolist()).hex() != made["token"]:
        raise ValueError("the memory that was opened is not the server's")
    return window


def _ends(sizes: Sizes) -> tuple[int, int, int, int]:
    """The ends of the parts, each of which is aligned, and of the token behind them."""
    ends, end = list[int](), 0
    for size in (sizes.push, sizes.params, sizes.buffers, _TOKEN_BYTES):
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
        ends.append(end)
    return ends[0], ends[1], ends[2], ends[3]
