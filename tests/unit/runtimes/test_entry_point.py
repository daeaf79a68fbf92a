"""The entry point of the children: what it hears before it is ready, and what it says when it fails."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc.errors import Refused, ServerLost, WireError, WorkerBanned
from ormo_rpc.runtimes.distributed import entry_point as child
from ormo_rpc.runtimes.distributed.launcher.supervisor import EXIT_NO_RESTART, Supervisor
from ormo_rpc.runtimes.distributed.server_process import server_process
from tests.support.processes import PATIENCE_SECONDS


class Ear:
    """In the place of a host: keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    def hear(self, message: dict[str, Any]) -> None:
        """Keep it."""
        self.heard.append(message)


def test_what_the_server_is_told_while_it_starts_is_heard_when_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    ear, tell = Ear(), list[Callable[[dict[str, Any]], None]]()
    monkeypatch.setattr(child, "listen_to_supervisor", lambda _control, on_message: tell.append(on_message))  # pyright: ignore[reportUnknownArgumentType,reportUnknownLambdaType] # a stand-in
    monkeypatch.setenv("ORMO_RPC_SECRET", "0123456789abcdef" * 4)

    def serve(place: server_process.ServerArgs, on_ready: Callable[[Ear], None]) -> None:
        place.listener.close()
        tell[0]({"abandoned": "all have left"})
        assert ear.heard == []
        on_ready(ear)
        tell[0]({"stop": {"status": "interrupted"}})

    monkeypatch.setattr(server_process, "serve", serve)
    ours, theirs = socket.socketpair()
    with ours:
        given = {"control": 0, "listener": theirs.detach(), "secret_file": None, "run_dir": Path(), "life": 0}
        child._serve(argparse.Namespace(**given, terminal=None, store=None), lambda _: None)  # pyright: ignore[reportPrivateUsage] # no process
    assert ear.heard == [{"abandoned": "all have left"}, {"stop": {"status": "interrupted"}}]


@pytest.mark.parametrize(
    ("error", "status"),
    [(Refused("no"), EXIT_NO_RESTART), (WorkerBanned("no"), EXIT_NO_RESTART), (WireError("what?"), 1), (ServerLost("gone"), 1)],
)
def test_who_would_be_refused_again_is_not_to_be_started_again(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        raise error

    def leave(code: int) -> None:
        raise SystemExit(code)

    reading, writing = os.pipe()
    arguments = argparse.Namespace(role="worker", report=writing, control=reading, heartbeat=60.0, log=False)
    monkeypatch.setattr(child, "_parse", lambda: arguments)
    monkeypatch.setattr(child, "_work", work)
    monkeypatch.setattr(child, "_log_to", lambda *_, **__: None)  # pyright: ignore[reportUnknownArgumentType,reportUnknownLambdaType] # a stand-in
    monkeypatch.setattr(os, "_exit", leave)
    try:
        with pytest.raises(SystemExit) as ended:
            child.main()
        assert ended.value.code == status
    finally:
        os.close(reading)


@pytest.mark.live
@pytest.mark.timeout(90)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_does_not_hide_the_reason(tmp_path: Path) -> None:
    with socket.socket() as listener, Supervisor() as supervisor:
        command = [
            sys.executable,
            "-m",
            "ormo_rpc.runtimes.distributed.entry_point",
            "server",
            "--log",
            "--run-dir",
            str(tmp_path),
        ]
        env = {**os.environ, "ORMO_RPC_SECRET": "0123456789abcdef" * 4, "PYTHONPATH": os.pathsep.join(sys.path)}
        server = supervisor.start(
            "server",
            [*command, "--listener", str(listener.fileno())],
            env=env,
            log=Path("/dev/full"),
            pass_fds=[listener.fileno()],
        )
        assert supervisor.wait(lambda: not server.running, PATIENCE_SECONDS)
        supervisor.reap(server)
        missing = f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path / 'config.yaml'}' (see /dev/full)"
        assert server.exit_reason() == f"server (pid {server.process.pid}) exited with status 1: {missing}"
