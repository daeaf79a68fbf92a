"""Signals of people and managers: SIGINT, SIGTERM and SIGHUP ask for an orderly end, SIGUSR1 for a checkpoint.

A manager (systemd, Slurm, the agent of torchrun) may send one to every process of a run at the same moment, more than once, at
any time. `blocked` keeps it from a process that is starting, `follow` is for children, `withstand` for preloaders,
`SignalWatch` for the one that drives a run, and `interrupting` for a program around it. SIGHUP has no effect where it was
inherited as ignored (nohup).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from signal import Signals
from types import FrameType
from typing import Any, Self

from ormo_rpc.errors import Interrupted

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Those that ask for an orderly end."""
REPEAT_SECONDS = 1.0
"""A Ctrl-C within this time after the first signal counts as a part of it, as a launcher passes on what all have got."""


def ending_signal(exit_status: int | None) -> Signals | None:
    """The signal that ended a process, at once (a negative status) or in order (128 and its number); None for none of ours."""
    number = 0 if exit_status is None else -exit_status if exit_status < 0 else exit_status - 128
    return Signals(number) if number in ENDING else None


@contextlib.contextmanager
def blocked() -> Generator[None]:
    """Block the signals in this thread; a process that is started meanwhile has them blocked until it calls `follow`.

    So those that come while it imports and loads are not lost, and do not kill it.
    """
    former = block()
    try:
        yield
    finally:
        restore(former)


def block() -> set[Any]:
    """Block the signals in this thread, for `restore`; return those that were blocked before."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, (*ENDING, signal.SIGUSR1))


def restore(former: set[Any]) -> None:
    """Block these signals alone, as before a `block`."""
    signal.pthread_sigmask(signal.SIG_SETMASK, former)


def follow(on_end: Callable[[Signals], None], on_checkpoint: Callable[[], None] = lambda: None) -> None:
    """Follow the signals of this process, a child whose launcher has Ctrl-C, from now on; those that came before are not lost.

    The functions are called by a thread of its own, also while the main thread waits within torch, where no handler of Python's
    would run. To be called once, by the main thread.

    Args:
        on_end: Called for each SIGTERM and SIGHUP.
        on_checkpoint: Called for each SIGUSR1.
    """
    receiver, sender = os.pipe()  # open for as long as this process
    os.set_blocking(sender, False)
    followed = [number for number in (*ENDING[1:], signal.SIGUSR1) if not _ignored(number)]
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in followed:
        signal.signal(number, _no_effect)

    def listen() -> None:
        while True:
            for number in os.read(receiver, 64):
                if number == signal.SIGUSR1:
                    on_checkpoint()
                elif number in followed:
                    on_end(Signals(number))

    threading.Thread(target=listen, name="signals", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*ENDING, signal.SIGUSR1))
    _forget_in_forked(followed)


@contextlib.contextmanager
def exit_statuses() -> Generator[None]:
    """Learn the exit statuses of children, which the system forgets where SIGCHLD was inherited as ignored (a few daemons).

    Python changes signals in the main thread only.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGCHLD) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def withstand() -> None:
    """Give the signals no effect on this process from now on, which ends with another one; those that it forks have them.

    Were they ignored, or blocked, a program that a user's module starts could not be terminated. A process that is forked
    within `blocked`, and does not leave it, gets none until it calls `follow`. It learns how those end (`exit_statuses`).
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    withstood = [number for number in (*ENDING, signal.SIGUSR1) if not _ignored(number)]
    for number in withstood:
        signal.signal(number, _no_effect)
    _forget_in_forked(withstood)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*ENDING, signal.SIGUSR1))


def _forget_in_forked(followed: Sequence[Signals]) -> None:
    """Give the processes that this one forks the default handlers: a data loader terminates its own by SIGTERM."""
    former = threading.local()

    def block() -> None:
        former.mask = signal.pthread_sigmask(signal.SIG_BLOCK, followed)

    def restore() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, former.mask)

    def forget() -> None:
        signal.set_wakeup_fd(-1)
        for number in followed:
            signal.signal(number, signal.SIG_DFL)
        restore()

    os.register_at_fork(before=block, after_in_parent=restore, after_in_child=forget)


class SignalWatch:
    """Notes signals while its context lasts, if that is the main thread's, and gives the former handlers back.

    Attributes:
        ends: The signals that ask for an end: the first one, and each later Ctrl-C. Managers repeat the others, and kill where
            they do not want to wait.
    """

    answered = False
    """An end was asked for in this process; for `interrupting`, which leaves the repetitions alone."""

    def __init__(self) -> None:
        self.ends: list[Signals] = []
        self._checkpoint_asked = False
        self._first_at = 0.0
        self._handlers: dict[Signals, Any] = {}

    def __enter__(self) -> Self:
        # Python handles signals in the main thread only; elsewhere they are left to the calling program.
        if _in_main_thread():
            for number in ENDING:
                if number == signal.SIGINT or not _ignored(number):
                    self._handlers[number] = signal.signal(number, self._note_end)
            self._handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._note_checkpoint)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def take_checkpoint(self) -> bool:
        """Tell whether a checkpoint was asked for since the last call."""
        asked, self._checkpoint_asked = self._checkpoint_asked, False
        return asked

    def _note_end(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of a signal handler
        now = time.monotonic()
        if not self.ends:
            self._first_at = now
        elif number != signal.SIGINT or now - self._first_at < REPEAT_SECONDS:
            return
        SignalWatch.answered = True
        self.ends.append(Signals(number))

    def _note_checkpoint(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of a signal handler
        self._checkpoint_asked = True


@contextlib.contextmanager
def interrupting() -> Generator[None]:
    """Raise `Interrupted` at SIGTERM and SIGHUP, as Python does at Ctrl-C, where no run has its own answer to them."""
    former = {number: signal.getsignal(number) for number in (*ENDING[1:], signal.SIGUSR1)}
    SignalWatch.answered = False
    raise_interrupted()
    try:
        yield
    finally:
        if _in_main_thread():
            for number, handler in former.items():
                signal.signal(number, handler)


def interrupting_signal(error: KeyboardInterrupt) -> Signals:
    """The signal that has ended this program; Python's own exception is that of Ctrl-C."""
    return Signals(error.number) if isinstance(error, Interrupted) else signal.SIGINT


def raise_interrupted() -> None:
    """Set the handlers of `interrupting`, for as long as this process; SIGUSR1 then has no effect where there is no run.

    What has started this process may have had them blocked.
    """
    if not _in_main_thread():
        return
    for number in ENDING[1:]:
        if not _ignored(number):
            signal.signal(number, _interrupt)
    signal.signal(signal.SIGUSR1, _no_effect)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*ENDING, signal.SIGUSR1))


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a signal handler
    if not SignalWatch.answered:
        raise Interrupted(number)


def _no_effect(number: int, frame: FrameType | None) -> None:
    pass


def _ignored(number: Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
