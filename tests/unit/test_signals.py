"""Signals of managers: none is lost or harmful, whenever it comes; the processes and the signals are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import pytest

from ormo_rpc import signals
from ormo_rpc.errors import Interrupted
from ormo_rpc.signals import SignalWatch, blocked, ending_signal, interrupting
from tests.support.processes import ROOT, wait_until

CHILD = """
import ctypes, os, signal, sys, threading, time
{before}
from ormo_rpc.signals import follow
heard = threading.Semaphore(0)
def say(*words):
    print(*words, flush=True)
    heard.release()
follow(lambda number: say(number.name), lambda: say("checkpoint"))
{after}
"""
KILL_ITSELF = "for number in {numbers}: os.kill(os.getpid(), number)"


def output(before: str, after: str, *, keep_hangup: bool = True) -> tuple[int, str]:
    """Run a child that follows its signals; return its exit status and what it has printed."""

    def ignore_hangup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL if keep_hangup else signal.SIG_IGN)

    script = CHILD.format(before=before, after=after)
    with blocked():
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=ignore_hangup
        )
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


@pytest.fixture
def handlers() -> Generator[dict[signal.Signals, Any]]:
    """The handlers of this process, which are given back."""
    former = {number: signal.getsignal(number) for number in (*signals.ENDING, signal.SIGUSR1)}
    yield former
    for number, handler in former.items():
        signal.signal(number, handler)


def test_signals_that_come_before_a_child_follows_them_are_not_lost_and_do_not_kill_it() -> None:
    before = KILL_ITSELF.format(numbers="(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)")
    status, out = output(before, "for _ in range(3): assert heard.acquire(timeout=30)")
    assert (status, sorted(out.split())) == (0, ["SIGHUP", "SIGTERM", "checkpoint"])


def test_a_hangup_that_was_inherited_as_ignored_stays_ignored() -> None:
    after = KILL_ITSELF.format(numbers="(signal.SIGHUP, signal.SIGTERM)") + "\nassert heard.acquire(timeout=30)"
    assert output("", after, keep_hangup=False) == (0, "SIGTERM\n")


def test_a_signal_is_followed_while_the_main_thread_is_within_native_code_and_a_forked_child_can_be_terminated() -> None:
    after = """
pid = os.fork()
if pid == 0:
    time.sleep(60)
os.kill(pid, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM  # and its signal is not this process's
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
threading.Thread(target=lambda: (heard.acquire(), os._exit(7))).start()
mutex = (ctypes.c_char * 64)()
ctypes.CDLL(None).pthread_mutex_lock(mutex)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
    assert output("", after) == (7, "SIGTERM\n")


def test_a_fork_of_a_process_that_withstands_signals_follows_those_that_came_since() -> None:
    everything = KILL_ITSELF.format(numbers="(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)")
    before = f"""
from ormo_rpc.signals import blocked, withstand
withstand()
{everything}
pid = os.fork()
if pid == 0:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
blocking = blocked()
blocking.__enter__()  # which the fork does not leave
pid = os.fork()
if pid > 0:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
{everything}
"""
    status, out = output(before, "for _ in range(3): assert heard.acquire(timeout=30)\nos._exit(5)")
    assert (status, sorted(out.split())) == (5, ["SIGHUP", "SIGTERM", "checkpoint"])


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_was_blocked_at_the_start_interrupts_all_the_same() -> None:
    with blocked(), pytest.raises(Interrupted), interrupting():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("status", "expected"),
    [(None, None), (0, None), (1, None), (64, None), (143, 15), (129, 1), (130, 2), (-15, 15), (-9, None), (137, None)],
)
def test_the_signal_that_ended_a_process_is_told_by_its_status(status: int | None, expected: int | None) -> None:
    assert ending_signal(status) == expected


@pytest.mark.usefixtures("handlers")
def test_a_watch_counts_the_first_signal_and_a_later_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with SignalWatch() as watch:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):  # as managers and torchrun repeat them
            os.kill(os.getpid(), number)
        assert watch.ends == [signal.SIGTERM]
        monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.ends == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.ends == [signal.SIGTERM, signal.SIGINT]
        assert not watch.take_checkpoint()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [watch.take_checkpoint(), watch.take_checkpoint()] == [True, False]


def test_a_watch_leaves_an_ignored_hangup_alone_and_gives_the_handlers_back(handlers: dict[signal.Signals, Any]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with SignalWatch() as watch:
        os.kill(os.getpid(), signal.SIGHUP)
        assert watch.ends == []
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.signal(signal.SIGHUP, handlers[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_outside_of_a_run_sigterm_raises_and_after_an_interrupted_one_it_has_no_effect(
    handlers: dict[signal.Signals, Any],
) -> None:
    with interrupting():
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.number == signal.SIGTERM
        with SignalWatch():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a repetition, while the run's last words are said
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_started_child_has_the_signals_blocked_and_the_parent_has_not() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with blocked():
        read = "next(line for line in open('/proc/self/status') if line.startswith('SigBlk')).split()[1]"
        child = subprocess.Popen([sys.executable, "-c", f"print({read})"], stdout=subprocess.PIPE, text=True)
    out, _ = child.communicate(timeout=60)
    masked = int(out, 16)
    assert all(masked >> (number - 1) & 1 for number in (*signals.ENDING, signal.SIGUSR1))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    wait_until(lambda: child.poll() is not None, "the end of the child")


@pytest.mark.parametrize("number", signals.ENDING)
def test_a_launcher_that_still_imports_ends_on_a_signal_with_its_status_and_without_a_traceback(number: signal.Signals) -> None:
    script = f"""
import os, signal, sys
from ormo_rpc.main import main
class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == "ormo_rpc.cli":
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Finder)
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")
