"""The entry point of the children: its command line, messages that come early, and the reasons and statuses of failures."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ormo_rpc.errors import ConfigError, Interrupted, Refused, ServerLost, WireError, WorkerBanned
from ormo_rpc.runtimes.distributed.asking import ServerControl, WorkerControl
from ormo_rpc.runtimes.distributed.launcher.child import EXIT_DONE, EXIT_NO_RESTART, EXIT_SERVER_LOST
from ormo_rpc.runtimes.distributed.launcher.supervisor import Supervisor
from ormo_rpc.runtimes.distributed.server_process import server_process
from ormo_rpc.runtimes.job import Job, LoadedJob
from ormo_rpc.runtimes.programs import entry_point
from tests.support.processes import PATIENCE_SECONDS


class Server:
    """In place of a `ServerProcess`: notes the supervisor's messages."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def handle(self, message: dict[str, Any]) -> None:
        """Note it."""
        self.messages.append(message)


class Reporter:
    """Notes the exit reasons."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def report(self, text: str) -> None:
        """Do nothing."""

    def exit_reason(self, text: str) -> None:
        """Note it."""
        self.reasons.append(text)


def test_a_server_handles_the_messages_that_came_before_it_was_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server, handlers = Server(), list[Callable[[dict[str, Any]], None]]()
    followed: list[Callable[[signal.Signals], None]] = []

    def obey_supervisor(_control_fd: int, on_message: Callable[[dict[str, Any]], None]) -> None:
        handlers.append(on_message)

    def serve(args: server_process.ServerArgs, on_ready: Callable[[Server], None]) -> dict[str, str]:
        args.listening_socket.close()
        handlers[0]({"all_workers_ended": "all have left"})
        assert server.messages == []
        on_ready(server)
        followed[0](signal.SIGTERM)
        return {"status": "interrupted", "reason": "SIGTERM"}

    def follow(on_end: Callable[[signal.Signals], None], on_checkpoint: Callable[[], None]) -> None:
        followed.append(on_end)
        on_checkpoint()

    monkeypatch.setattr(entry_point, "follow", follow)
    monkeypatch.setattr(entry_point, "obey_supervisor", obey_supervisor)
    monkeypatch.setattr(server_process, "serve", serve)
    monkeypatch.setenv("ORMO_RPC_SECRET", "0123456789abcdef" * 4)
    monkeypatch.setattr(entry_point, "Reporter", lambda *_: Reporter())  # pyright: ignore[reportUnknownArgumentType,reportUnknownLambdaType] # in place of it
    quiet(monkeypatch)
    supervisor_end, child_end = socket.socketpair()
    reader, writer = os.pipe()
    with supervisor_end, os.fdopen(reader), os.fdopen(writer):
        command = ["server", "--run-dir", str(tmp_path), "--began", "0", "--listener-fd", str(child_end.detach())]
        child = entry_point.Child([*command, "--control-fd", str(reader), "--report-fd", str(writer)])
        with pytest.raises(Interrupted) as ended:
            child.serve(server_process.serve)
    assert ended.value.number == signal.SIGTERM
    early = [{"checkpoint": True}, {"all_workers_ended": "all have left"}]
    assert server.messages == [*early, {"stop": {"status": "interrupted", "reason": "SIGTERM"}}]


@pytest.mark.parametrize(("incarnation", "ends"), [(0, True), (1, False)])
def test_a_server_that_loads_ends_at_once_unless_it_has_something_to_save(
    incarnation: int, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "_exit", leave)
    server, control = Server(), ServerControl(incarnation)
    if ends:
        with pytest.raises(SystemExit) as ended:
            control.stop(signal.SIGHUP)
        assert ended.value.code == 128 + signal.SIGHUP
    else:
        control.stop(signal.SIGHUP)
        control.connect(server)
        assert server.messages == [{"stop": {"status": "interrupted", "reason": "SIGHUP"}}]


@pytest.mark.parametrize(("number", "status"), [(None, EXIT_DONE), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_worker_that_has_not_begun_leaves_at_once(
    number: signal.Signals | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        WorkerControl().leave(number)
    assert ended.value.code == status


def leave(code: int) -> None:
    """Raise in place of ending this process."""
    raise SystemExit(code)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *((kind("no"), EXIT_NO_RESTART) for kind in (Refused, WorkerBanned, ConfigError)),
        *((kind("gone"), 1) for kind in (WireError, OSError)),
        (ServerLost("gone"), EXIT_SERVER_LOST),
        (Interrupted(signal.SIGHUP), 128 + signal.SIGHUP),
    ],
)
def test_a_banned_or_refused_process_exits_with_the_status_that_forbids_a_restart(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        raise error

    reasons = [] if isinstance(error, Interrupted) else [f"{type(error).__name__}: {error}"]
    assert run_worker(work, monkeypatch) == (status, reasons)


@pytest.mark.parametrize(("loaded", "dtype"), [(None, torch.float32), (LoadedJob("", cast("Job", None)), torch.float64)])
def test_a_process_that_was_forked_with_its_job_keeps_the_dtype_that_this_has_set(
    loaded: LoadedJob | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[torch.dtype] = []
    torch.set_default_dtype(torch.float64)
    try:
        run_worker(lambda *_: found.append(torch.get_default_dtype()), monkeypatch, loaded)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == [dtype]


def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a child change nothing about this process."""
    monkeypatch.setattr(entry_point.console, "install", lambda: None)
    monkeypatch.setattr(entry_point, "_log_to", lambda *_, **__: None)  # pyright: ignore[reportUnknownArgumentType,reportUnknownLambdaType] # in place of it
    monkeypatch.setattr(entry_point.memory, "raise_oom_score", lambda _: None)  # pyright: ignore[reportUnknownArgumentType,reportUnknownLambdaType] # this process would keep it


def run_worker(
    work: Callable[..., None], monkeypatch: pytest.MonkeyPatch, loaded: LoadedJob | None = None
) -> tuple[object, list[str]]:
    """Run the entry point of a worker that does this work; return its exit status and the reasons that it reported."""
    reporter = Reporter()
    monkeypatch.setattr(entry_point, "Reporter", lambda *_: reporter)  # pyright: ignore[reportUnknownArgumentType,reportUnknownLambdaType] # in place of it
    monkeypatch.setattr(entry_point.Child, "working", work)
    monkeypatch.setattr(entry_point, "follow", lambda *_: None)  # pyright: ignore[reportUnknownArgumentType,reportUnknownLambdaType] # this process would keep the handlers
    monkeypatch.setattr(entry_point, "obey_supervisor", lambda *_: None)  # pyright: ignore[reportUnknownArgumentType,reportUnknownLambdaType] # this process would end
    quiet(monkeypatch)
    monkeypatch.setattr(os, "_exit", leave)
    control_fd, report_fd = os.pipe()
    try:
        with pytest.raises(SystemExit) as ended:
            entry_point.main(["worker", "--control-fd", str(control_fd), "--report-fd", str(report_fd)], loaded)
    finally:
        os.close(control_fd)
        os.close(report_fd)
    return ended.value.code, reporter.reasons


@pytest.mark.live
@pytest.mark.timeout(90)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_does_not_hide_the_exit_reason(tmp_path: Path) -> None:
    with socket.socket() as listener, Supervisor() as supervisor:
        command = [
            sys.executable,
            "-m",
            "ormo_rpc.runtimes.programs.entry_point",
            "server",
            "--log",
            "--run-dir",
            str(tmp_path),
        ]
        env = {**os.environ, "ORMO_RPC_SECRET": "0123456789abcdef" * 4, "PYTHONPATH": os.pathsep.join(sys.path)}
        server = supervisor.start(
            "server",
            [*command, "--began", "0"],
            env=env,
            log=Path("/dev/full"),
            descriptors={"--listener-fd": listener.fileno()},
        )
        assert supervisor.wait(lambda: not server.running, PATIENCE_SECONDS)
        supervisor.reap(server)
        missing = f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path / 'config.yaml'}' (see /dev/full)"
        assert server.exit_reason() == f"server (pid {server.process.pid}) exited with status 1: {missing}"
