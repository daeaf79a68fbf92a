"""Torchrun's store: one that is there, one whose agent has died, and one behind a firewall."""

from __future__ import annotations

import re
import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public

from ormo_rpc.errors import ServerLost
from ormo_rpc.rendezvous import connecting
from ormo_rpc.rendezvous.addresses import written
from ormo_rpc.runtimes import torchrun_store
from ormo_rpc.runtimes.torchrun_store import ADDRESS, SECRET_FILE, connect, wait_for
from tests.support.rendezvous import silent_port


def test_a_run_that_is_over_needs_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun's agents start their store before the ranks, so one that refuses connections does not come any more."""
    monkeypatch.setattr(torchrun_store, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(torchrun_store, "RETRY_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"127.0.0.1:{port}"
    said = (
        rf"\Atorchrun's store at 127\.0\.0\.1:{port} cannot be reached: refused: nothing listens there; gave up after 0\.\d s\Z"
    )
    with pytest.raises(ServerLost, match=said):
        connect(address, 180.0)
    torchrun_store.tell_result(address, {"status": "completed"})


def test_a_store_behind_a_firewall_is_tried_again_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("CONNECT_SECONDS", "TELL_AFTER_SECONDS"):
        monkeypatch.setattr(connecting, name, 0.1)
    monkeypatch.setattr(torchrun_store, "RETRY_SECONDS", 0.01)
    with silent_port() as (host, port):
        line = rf"torchrun's store at {host}:{port} cannot be reached: no answer within 0\.1 s, as behind a firewall; "
        with pytest.raises(ServerLost, match=rf"\A{line}gave up after 0\.\d s\Z"):
            connect(f"{host}:{port}", 0.7)
    assert re.fullmatch(rf"{line}trying for another [01] s", caplog.messages[0])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ranks_wait_for_what_rank_0_leaves_in_the_store(host: str) -> None:
    master = TCPStore(host, 0, is_master=True, timeout=timedelta(seconds=10), wait_for_workers=False)
    address = written(host, master.port)
    connect(address, 5.0).set(ADDRESS, "10.0.0.5:29600")
    store = connect(address, 0.5)
    assert wait_for(store, [ADDRESS], 0.5) == ["10.0.0.5:29600"]
    with pytest.raises(ServerLost, match=r"\Arank 0 has not told the address of the server: .+; gave up after 0\.\d s\Z"):
        wait_for(store, [ADDRESS, SECRET_FILE], 0.5)
