"""How a run that does not meet its end says so."""

from __future__ import annotations


class RunFailed(RuntimeError):
    """The run did not meet its end; the message is the one line that says why.

    Args:
        message: What happened, and where to look.
        exit_status: The launcher's exit status: 130 for an interruption, 1 for anything else.
    """

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status
