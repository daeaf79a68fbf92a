"""A worker's calls without a network: what is repeated, what is given up, and when the server is known to be gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc

from ormo_rpc.errors import ServerLost
from ormo_rpc.messages import Push
from ormo_rpc.transports.torch_rpc.client import TorchRpcClient


class Wire:
    """Stands in for `rpc.rpc_sync`: each call fails with the next of the texts, or is answered where that is None."""

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
        return Remote() if function.__name__ == "published" else "reply"


class Remote:
    """The RRef at a worker."""

    def owner(self) -> str:
        """The name of the server."""
        return "server"


TIMEOUT = "RPCErr:1:RPC ran for more than set timeout (1000 ms) and will now be marked with an error"
EOF = "eof (this error originated at tensorpipe/transport/shm/connection_impl.cc:259)"


def delivered(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(rpc, "rpc_sync", wire)
    payload = torch.arange(4.0)
    push = Push(worker=3, ticket=7, stamp=5, grad=payload, loss=0.5, samples=8, incarnation=2)
    return TorchRpcClient("session_id", 9.0).push(push, payload)


def test_a_push_that_timed_out_is_repeated_unchanged_while_the_server_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(None, TIMEOUT, None, TIMEOUT, None)
    assert delivered(wire, monkeypatch) == "reply"
    assert wire.called == ["published", "push", "published", "push", "published", "push"]
    pushes = wire.arguments[1::2]
    assert all(push[:6] == ("session_id", 7, 5, 2, 0.5, 8) and push[7] == 9.0 for push in pushes)
    assert all(torch.equal(push[6], torch.arange(4.0)) for push in pushes)


@pytest.mark.parametrize(
    ("failures", "called"),
    [
        ((None, TIMEOUT, TIMEOUT), ["published", "push", "published"]),  # a server that hangs
        ((None, TIMEOUT, EOF), ["published", "push", "published"]),
        ((None, EOF), ["published", "push"]),
        ((EOF,), ["published"]),
    ],
)
def test_a_push_is_given_up_when_the_server_is_gone(
    failures: tuple[str | None, ...], called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(*failures)
    with pytest.raises(ServerLost) as caught:
        delivered(wire, monkeypatch)
    assert str(caught.value) == failures[-1]
    assert wire.called == called


def test_a_server_that_has_gone_needs_no_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(None, EOF)
    monkeypatch.setattr(rpc, "rpc_sync", wire)
    TorchRpcClient("session_id", 1.0).leave()
    assert (wire.called, wire.arguments[1:]) == (["published", "leave"], [("session_id", 1.0)])
