"""Signals of a run that is alone with a script: at once while the script computes, at the end of what the server does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator
from signal import Signals
from types import FrameType
from typing import Any, Self

from ormo_rpc.errors import Interrupted
from ormo_rpc.signals import ENDING


class Interrupts:
    """Notes the signals that end a program, while its context lasts, if that is the main thread's.

    Attributes:
        number: The first one; None where there was none.
    """

    def __init__(self) -> None:
        self.number: Signals | None = None
        self._at_once = False
        self._checkpoint_asked = False
        self._former: dict[Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._end)
            self._former[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Generator[None]:
        """Raise at once in this context, also for a signal that came before it.

        Raises:
            Interrupted, KeyboardInterrupt: by a signal.
        """
        self._at_once = True
        try:
            if self.number is not None:
                raise self._error()
            yield
        finally:
            self._at_once = False

    def take_checkpoint(self) -> bool:
        """Tell whether a checkpoint was asked for since the last call."""
        asked, self._checkpoint_asked = self._checkpoint_asked, False
        return asked

    def _end(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of a signal handler
        self.number = self.number or Signals(number)
        if self._at_once:
            raise self._error()

    def _ask(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of a signal handler
        self._checkpoint_asked = True

    def _error(self) -> KeyboardInterrupt:
        assert self.number is not None, "there was a signal"
        return KeyboardInterrupt() if self.number is signal.SIGINT else Interrupted(self.number)
