"""The supervisor and its children: messages, exit reasons, time-outs, and no child that outlives it. The children are real."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ormo_rpc import signals
from ormo_rpc.runtimes.distributed.launcher import supervisor as supervisor_module
from ormo_rpc.runtimes.distributed.launcher.supervisor import ChildProcess, Supervisor
from tests.support.children import PRELUDE, descriptors, ended, start
from tests.support.processes import PATIENCE_SECONDS, gone, wait_until

LISTENER = f"""{PRELUDE}
def handle(message):
    print(json.dumps(message), flush=True)
    if "exit" in message:
        os._exit(message["exit"])
child["obey_supervisor"](int(sys.argv[sys.argv.index("--control-fd") + 1]), handle)
print("ready", flush=True)
threading.Event().wait()
"""
STUBBORN = """
import signal, threading
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
threading.Event().wait()
"""


def ready(log: Path) -> None:
    wait_until(lambda: log.exists() and "ready" in log.read_text(), "the start of the child")


def test_a_worker_tells_that_it_has_joined(tmp_path: Path) -> None:
    script = f"""{PRELUDE}
reporter = child["Reporter"](int(sys.argv[sys.argv.index("--report-fd") + 1]), 60)
if os.environ["JOINS"] == "1":
    reporter.joined()
reporter.exit_reason("banned")
"""
    for joins in (True, False):
        with Supervisor() as supervisor:
            child = supervisor.start(
                "child", [sys.executable, "-c", script], env={**os.environ, "JOINS": str(int(joins))}, log=tmp_path / "log"
            )
            ended(supervisor, child)
            supervisor.reap(child)  # its last words may have come after the last look
            assert (child.joined, "banned" in child.exit_reason()) == (joins, True)


def test_messages_arrive_in_order_and_the_exit_code_comes_back(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Supervisor() as supervisor:
        child = start(supervisor, LISTENER, log)
        ready(log)
        assert child.exit_code is None
        child.send(stop={"status": "interrupted", "reason": "a\nb"})
        child.send(exit=7)
        assert ended(supervisor, child) == 7
        child.send(exit=8)  # nothing happens where it has ended
    assert log.read_text().splitlines() == ["ready", '{"stop": {"status": "interrupted", "reason": "a\\nb"}}', '{"exit": 7}']


@pytest.mark.parametrize(
    ("script", "logged", "text"),
    [
        ("import sys; print('first\\nlast line '); sys.exit(3)", True, r"exited with status 3: last line \(see {log}\)"),
        ("import sys; sys.exit('what went wrong')", True, r"exited with status 1: what went wrong \(see {log}\)"),
        ("import sys; sys.exit(4)", True, r"exited with status 4 \(see {log}\)"),
        ("import sys; sys.exit(5)", False, r"exited with status 5"),
        (
            "import os; print('not a reason', flush=True); os.kill(os.getpid(), 9)",
            True,
            r"was killed by SIGKILL \(see {log}\)",
        ),
        ("import os; os.kill(os.getpid(), 14)", False, r"was killed by SIGALRM"),
        ("import os; os.kill(os.getpid(), 40)", False, r"was killed by signal 40"),  # of real time
        (
            "import os, sys; os.write(1, b'\\xff bad bytes'); sys.exit(6)",
            True,
            r"exited with status 6: � bad bytes \(see {log}\)",
        ),
    ],
)
def test_an_exit_reason_says_which_process_ended_how_and_why(script: str, logged: bool, text: str, tmp_path: Path) -> None:
    log = tmp_path / "log" if logged else None
    with Supervisor() as supervisor:
        child = start(supervisor, script, log, "worker 3")
        ended(supervisor, child)
        expected = text.replace("{log}", re.escape(str(log)))
        assert re.fullmatch(rf"worker 3 \(pid {child.process.pid}\) {expected}", child.exit_reason()), child.exit_reason()


@pytest.mark.parametrize("error", [None, KeyError("any")], ids=["normally", "by an error"])
def test_the_end_of_the_context_leaves_no_process_and_no_descriptor(error: Exception | None, tmp_path: Path) -> None:
    before = descriptors()
    logs = [tmp_path / "a", tmp_path / "b"]
    children: list[ChildProcess] = []

    def supervised() -> None:
        with Supervisor() as supervisor:
            children.extend(start(supervisor, STUBBORN, log) for log in logs)
            for log in logs:
                ready(log)
            if error is not None:
                raise error

    if error is None:
        supervised()
    else:
        with pytest.raises(KeyError):
            supervised()
    assert [child.exit_code for child in children] == [-signal.SIGKILL] * 2
    assert descriptors() == before


def test_children_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    """Two of them: were one to inherit the other's pipe, neither would see its end."""
    launcher = f"""{PRELUDE}
supervisor = runpy.run_path({supervisor_module.__file__!r})
import pathlib
with supervisor["Supervisor"]() as s:
    for name in "ab":
        command = [sys.executable, "-c", {LISTENER!r}]
        process = s.start(name, command, env=dict(os.environ), log=pathlib.Path({str(tmp_path)!r}) / name)
        print(process.process.pid, flush=True)
    threading.Event().wait()
"""
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        children = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
        try:
            for name in "ab":
                ready(tmp_path / name)
            assert not gone(children[:1])
            assert not gone(children[1:])
            process.kill()
            wait_until(lambda: gone(children), "the end of the children")
        finally:
            for child in children:
                if child.is_running():
                    child.kill()


@pytest.mark.parametrize("line", [b'{"anything": 1}\n', b"no JSON\n"], ids=["a handler that fails", "a broken message"])
def test_a_child_that_cannot_read_its_messages_ends(line: bytes, tmp_path: Path) -> None:
    script = LISTENER.replace("print(json.dumps(message), flush=True)", "raise RuntimeError('no handler')")
    with Supervisor() as supervisor:
        child = start(supervisor, script, tmp_path / "log")
        ready(tmp_path / "log")
        os.write(child.control_fd, line)
        assert ended(supervisor, child) == 1


def test_ctrl_c_reaches_the_supervisor_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Supervisor() as supervisor:
        child = start(supervisor, LISTENER, log)
        ready(log)
        pid = child.process.pid
        assert os.getsid(pid) == pid != os.getsid(0)  # a session of its own: no terminal's signals
        os.kill(pid, signal.SIGINT)  # and one that is sent to it on purpose is ignored
        child.send(exit=0)
        assert ended(supervisor, child) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_one_wait_and_its_handler_is_restored(number: signal.Signals) -> None:
    def former(*_arguments: Any) -> None:
        raise AssertionError("the supervisor's handler is in place")

    original = signal.signal(number, former)
    try:
        with Supervisor() as supervisor:
            assert supervisor.signals == []
            timer = Signal(number)
            assert supervisor.wait(timer.never, PATIENCE_SECONDS) is False
            assert supervisor.signals == [number]
            # A later wait, for the children to wind up, is not cut short by the same signal.
            assert supervisor.wait(timer.third_time, PATIENCE_SECONDS, signals=1) is True
        assert signal.getsignal(number) is former
    finally:
        signal.signal(number, original)


def test_a_second_signal_ends_the_wait_for_the_children_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
    with Supervisor() as supervisor:
        assert supervisor.wait(Signal(signal.SIGTERM).never, PATIENCE_SECONDS) is False
        assert supervisor.wait(Signal(signal.SIGTERM).third_time, PATIENCE_SECONDS, signals=1) is True  # a manager's, repeated
        assert supervisor.wait(Signal(signal.SIGINT).never, 10 * PATIENCE_SECONDS, signals=1) is False
        assert supervisor.signals == [signal.SIGTERM, signal.SIGINT]
        assert supervisor.wait(lambda: True, signals=1) is True  # what is done is done


class Signal:
    """Conditions to wait for: one sends this process a signal when it is first asked."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number
        self.asked = 0

    def never(self) -> bool:
        """Send the signal once; it is never done."""
        if self.asked == 0:
            os.kill(os.getpid(), self.number)
        self.asked += 1
        return False

    def third_time(self) -> bool:
        """Send the signal once; done when asked a third time."""
        self.never()
        return self.asked > 3


def test_a_wait_times_out() -> None:
    with Supervisor() as supervisor:
        assert supervisor.wait(lambda: False, 0.0) is False
        assert supervisor.wait(lambda: True, 0.0) is True


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system does not tell of the end of a process")
def test_the_end_of_a_child_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "POLL_SECONDS", PATIENCE_SECONDS)
    with Supervisor() as supervisor:
        children = [start(supervisor, f"import time; time.sleep({seconds})", None) for seconds in (0.0, 0.2)]
        assert supervisor.wait(lambda: not any(child.running for child in children), PATIENCE_SECONDS / 2)


def test_outside_of_the_main_thread_signal_handlers_stay() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    inside: list[Any] = []

    def elsewhere() -> None:
        with Supervisor() as supervisor:
            inside.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
            child = start(supervisor, "print('hello')", None)
            inside.append(ended(supervisor, child))

    run_in_thread(elsewhere)
    assert inside == [*handlers, 0]


def run_in_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


def test_a_silent_child_is_killed_after_its_time_out(tmp_path: Path) -> None:
    script = "import os, signal, sys; os.write(int(sys.argv[sys.argv.index('--report-fd') + 1]), b'\"hi\"\\n\\n'); "
    reported: list[str] = []
    with Supervisor(reported.append) as supervisor:
        child = supervisor.start(
            "it",
            [sys.executable, "-c", script + "os.kill(os.getpid(), signal.SIGSTOP)"],
            env=dict(os.environ),
            log=tmp_path / "log",
            timeout_seconds=0.3,
        )
        assert supervisor.wait(lambda: not child.running, PATIENCE_SECONDS)
        assert reported == ["it: hi"]
        assert re.fullmatch(
            r"it \(pid \d+\) was killed after 0\.3 s without a heartbeat \(stopped, or hung\) \(see .*\)", child.exit_reason()
        )


def test_the_time_out_begins_with_the_first_heartbeat(tmp_path: Path) -> None:
    with Supervisor() as supervisor:
        child = supervisor.start(
            "it",
            [sys.executable, "-c", "input()"],  # ends at once: it has no standard input
            env=dict(os.environ),
            log=tmp_path / "log",
            timeout_seconds=1e-9,
        )
        assert supervisor.wait(lambda: not child.running, PATIENCE_SECONDS)
        assert "exited with status 1" in child.exit_reason()
