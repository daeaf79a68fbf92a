"""A worker's calls without a network: repeated ones, those that are given up, and the detection of a lost server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from torch.futures import Future

from ormo_rpc.control.torch_rpc.client import RpcControl
from ormo_rpc.errors import ServerLost
from ormo_rpc.messages import Push, Reply
from ormo_rpc.transports.codec import PUSH, REPLY
from ormo_rpc.transports.rpc.client import TorchRpcClient

REPLIED = Reply(worker=3, ticket=None, stamp=6, params=torch.ones(2), lr=0.5, steps=1, incarnation=2)


class Wire:
    """A substitute for `rpc.rpc_sync` and, by `begin`, for `rpc.rpc_async`.

    Each call fails with the next of the texts, or is answered where that is None.
    """

    def __init__(self, *failures: str | None) -> None:
        self.failures = list(failures)
        self.called: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []

    def __call__(self, _to: str, function: Callable[..., Any], args: tuple[Any, ...] = (), *, timeout: float) -> Any:
        """Note the call, then fail or answer."""
        self.called.append(function.__name__)
        self.arguments.append((*args, timeout))
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise RuntimeError(failure)
        return Remote() if function.__name__ == "published" else (REPLY.pack(REPLIED), REPLIED.params)

    def begin(self, to: str, function: Callable[..., Any], *, timeout: float) -> Future[Any]:
        """Make a call, whose result is there at once."""
        future = Future[Any]()
        try:
            future.set_result(self(to, function, timeout=timeout))
        except RuntimeError as error:
            future.set_exception(error)
        return future


class Remote:
    """The RRef at a worker."""

    def owner(self) -> str:
        """The name of the server."""
        return "server"

    def owner_name(self) -> str:
        """The same."""
        return "server"


TIMEOUT = "RPCErr:1:RPC ran for more than set timeout (1000 ms) and will now be marked with an error"
EOF = "eof (this error originated at tensorpipe/transport/shm/connection_impl.cc:259)"


def delivered(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(rpc, "rpc_sync", wire)
    monkeypatch.setattr(rpc, "rpc_async", wire.begin)
    payload = torch.arange(4.0)
    push = Push(worker=3, ticket=7, stamp=5, grad=payload, loss=0.5, samples=8, incarnation=2)
    return TorchRpcClient(RpcControl("admission", ("127.0.0.1", 9), 9.0), "session_id", payload).push(push)


def test_a_push_that_timed_out_is_repeated_unchanged_while_the_server_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(None, TIMEOUT, None, TIMEOUT, None)
    reply = delivered(wire, monkeypatch)
    assert (reply.worker, reply.ticket, reply.stamp, reply.lr, reply.params) == (3, None, 6, 0.5, REPLIED.params)
    assert wire.called == ["published", "push", "published", "push", "published", "push"]
    pushes = wire.arguments[1::2]
    numbers = {"worker": 3, "ticket": 7, "stamp": 5, "loss": 0.5, "samples": 8, "incarnation": 2, "loss_scale": 1.0}
    assert all((push[0], PUSH.unpack(push[1]), push[3]) == ("session_id", numbers, 9.0) for push in pushes)
    assert all(torch.equal(push[2], torch.arange(4.0)) for push in pushes)


@pytest.mark.parametrize(
    ("failures", "called"),
    [
        ((None, TIMEOUT, TIMEOUT), ["published", "push", "published"]),  # a server that hangs
        ((None, TIMEOUT, EOF), ["published", "push", "published"]),
        ((None, EOF), ["published", "push"]),
        ((EOF,), ["published"]),
    ],
)
def test_a_push_is_given_up_when_the_server_has_ended(
    failures: tuple[str | None, ...], called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(*failures)
    with pytest.raises(ServerLost) as caught:
        delivered(wire, monkeypatch)
    assert str(caught.value) == str(failures[-1]).partition(" (this error")[0]
    assert wire.called == called


def test_leaving_a_lost_server_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(None, EOF)
    monkeypatch.setattr(rpc, "rpc_sync", wire)
    monkeypatch.setattr(rpc, "rpc_async", wire.begin)
    TorchRpcClient(RpcControl("admission", ("127.0.0.1", 9), 1.0), "session_id", torch.empty(0)).leave()
    assert (wire.called, wire.arguments[1:]) == (["published", "leave"], [('{"session_id": "session_id"}', 1.0)])
