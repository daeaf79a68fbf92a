"""The launcher's way to stop the server; the processes are real and small."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from ormo_rpc.composing import compose
from ormo_rpc.errors import RunInterrupted
from ormo_rpc.runtimes.distributed.launcher import processes
from ormo_rpc.runtimes.distributed.launcher import run as launcher
from ormo_rpc.runtimes.distributed.launcher.child import EXIT_DONE
from ormo_rpc.runtimes.distributed.launcher.process_monitor import ProcessMonitor, ProcessSlot, if_killed
from ormo_rpc.runtimes.distributed.launcher.supervisor import ChildProcess, Supervisor
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading
from tests.support.processes import wait_until

LISTENER = """
import os, sys
words = os.read(int(sys.argv[sys.argv.index("--control-fd") + 1]), 1000).decode()
print(words, end="", flush=True)
os._exit(64)
"""
supervise_server = launcher._supervise_server  # pyright: ignore[reportPrivateUsage] # without the processes of a run


DEATH = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
DEATH_WHEN_TOLD = f"""
import os, sys
os.read(int(sys.argv[sys.argv.index("--control-fd") + 1]), 1)
{DEATH}
"""


def end_when(killed: str, log: Path, *overrides: str) -> list[str]:
    """Interrupt a run whose server is killed; return what the next one was told."""
    scripts = [DEATH_WHEN_TOLD if killed == "when it is told" else DEATH, LISTENER]

    with Supervisor() as supervisor:
        monitor = ProcessMonitor(supervisor, max_restarts=5, backoff_seconds=1000.0, report=lambda _: None)

        def start(restart_count: int) -> ChildProcess:
            return supervisor.start("server", [sys.executable, "-c", scripts[restart_count]], env=dict(os.environ), log=log)

        server = monitor.add("server", start, should_restart=if_killed, essential=True)
        child = server.child
        assert child is not None
        if killed == "before":
            wait_until(lambda: _reaped(monitor, server), "the end of the first server")
        elif killed == "just now":
            os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOWAIT)
        supervisor.signals.append(signal.SIGTERM)
        failure = supervise_server(monitor, server, compose(["workers=2", *overrides]))
    assert isinstance(failure, RunInterrupted)
    assert (str(failure), failure.exit_status) == ("interrupted by SIGTERM", 143)
    return log.read_text().splitlines()


def _reaped(monitor: ProcessMonitor, server: ProcessSlot) -> bool:
    monitor.poll()
    return server.child is None


@pytest.mark.parametrize("killed", ["before", "just now", "when it is told"])
@pytest.mark.parametrize("journal", [True, False])
def test_a_run_interrupted_between_two_servers_has_what_its_journal_has_in_a_checkpoint(
    journal: bool, killed: str, tmp_path: Path
) -> None:
    told = end_when(killed, tmp_path / "log", f"checkpoint.journal={str(journal).lower()}")
    expected = [{"stop": {"status": "interrupted", "reason": "SIGTERM"}}] if journal else []
    assert [json.loads(line) for line in told] == expected


def test_an_elastic_worker_says_that_its_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def of_worker(supervisor: Supervisor, *_: object, **__: object) -> MagicMock:
        words = [sys.executable, "-c", f"import os; os._exit({EXIT_DONE})"]
        start: Callable[[int], ChildProcess] = lambda _: supervisor.start(  # noqa: E731 - one line
            "worker", words, env=dict(os.environ), log=tmp_path / "log"
        )
        return MagicMock(**{"worker.return_value": start})

    monkeypatch.setattr(launcher, "reach", lambda *_: True)
    monkeypatch.setattr(processes, "Launcher", of_worker)
    monkeypatch.setenv("ORMO_RPC_SECRET", "0" * 64)
    launcher.join(compose(["role=worker", "server.address=127.0.0.1:7"]), MagicMock(spec=Preloading))
    assert capsys.readouterr().err == "launch.py: the run at 127.0.0.1:7 has ended\n"


def test_a_run_that_is_over_does_not_wait_for_a_worker_that_has_not_joined(tmp_path: Path) -> None:
    """A replacement that comes too late looks for a server as long as it may."""
    began = time.monotonic()
    with Supervisor() as supervisor:
        monitor = ProcessMonitor(supervisor, max_restarts=5, backoff_seconds=1.0, report=lambda _: None)

        def start(name: str, script: str) -> ProcessSlot:
            command = [sys.executable, "-S", "-c", script]
            return monitor.add(name, lambda _: supervisor.start(name, command, env=dict(os.environ), log=tmp_path / name))

        server = start("server", "import os; os._exit(64)")
        start("worker 0", "import time; time.sleep(60)")
        assert supervise_server(monitor, server, compose(["workers=1", "runtime.stop_timeout_seconds=50"])) is None
    assert time.monotonic() - began < 40
