"""Torchrun's store, where its agent has died."""

from __future__ import annotations

import socket

import pytest

from ormo_rpc.runtimes import torchrun_store
from ormo_rpc.runtimes.ranks import Ranks


def test_a_run_that_is_over_needs_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun_store, "CONNECT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    ranks = Ranks(
        launcher="torchrun",
        variables=("RANK", "WORLD_SIZE"),
        job="job",
        rank=0,
        world_size=2,
        master=f"127.0.0.1:{port}",
        agent_store=True,
    )
    with pytest.raises(RuntimeError):
        torchrun_store.connect(ranks.master, 0.1)
    torchrun_store.tell_result(ranks, {"status": "completed"})
