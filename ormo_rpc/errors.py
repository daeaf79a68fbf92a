"""Every exception of the package. A refused push has changed nothing.

Those that cross to a worker (`BY_NAME`) are built from one string, so that they can be raised again on the other side.
"""

from __future__ import annotations

from signal import Signals


class ConfigError(ValueError):
    """The configuration is wrong; the message has the full key, the given value, and the expected one."""


class ModelRefused(ConfigError):
    """A forward pass changes what it must not change; the message has its name and what to do. It would come again."""


class LoopMisused(ConfigError):
    """A script's own loop does what it must not do; the message has its line and what to do. It would come again."""


class EvaluationFailed(RuntimeError):
    """A script's own evaluation has failed; the message has its line."""


class RunFailed(RuntimeError):
    """The run did not complete; the message is one line that says why.

    Args:
        message: What happened, and where to look.

    Attributes:
        exit_status: The launcher's exit status.
    """

    exit_status = 1


class RunInterrupted(RunFailed):
    """A signal has ended the run.

    Args:
        number: The signal. The exit status is 128 and its number, as a shell says of a program that a signal has ended.
        advice: What to do next.
    """

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__(f"interrupted by {Signals(number).name}{f'; {advice}' if advice else ''}")
        self.number = number
        self.exit_status = 128 + number


class Interrupted(KeyboardInterrupt):
    """A signal that is not Ctrl-C has ended this program, or asks it to end.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class ServerLost(RuntimeError):
    """The server, or the connection to it, was lost; it may come back."""


class RunEnded(ValueError):
    """Raised to a process that wants to join a run that has ended."""


class WireError(Exception):
    """The peer violates the protocol; the connection must be closed."""


class Refused(WireError):
    """The peer has refused and given its reason; do not try again."""


class TransportRefused(Refused):
    """Worker and server cannot use a transport between them.

    Args:
        transport: Its name.
        reason: The reason, in the words of a user.
    """

    def __init__(self, transport: str, reason: str) -> None:
        super().__init__(f"transport={transport}: {reason}; take transport=auto, or another one")
        self.reason = reason


class PushRefused(ValueError):
    """The push does not fit the server's assignments or parameters; the message has its sender, the value, and what to do."""


class NonFiniteGradient(PushRefused):
    """The gradient, the loss or a buffer holds NaN or infinity."""


class GradientTooLarge(NonFiniteGradient):
    """The gradient is finite, but its norm exceeds the limit; it is treated like one that is not finite."""


class GradientOverflow(NonFiniteGradient):
    """The gradient of a scaled loss is not finite: the scale may be too large, and nobody is to blame."""


class StaleSession(PushRefused):
    """The sender is not a member of this incarnation of the server; it must join again to get new work."""


class WorkerBanned(PushRefused):
    """Raised after `max_not_finite` consecutive non-finite gradients of a worker; the worker must not rejoin."""


def one_line(error: BaseException) -> str:
    """Type and message of an error, such as a user's own code may raise, on one line of at most about 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


BY_NAME: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (PushRefused, NonFiniteGradient, GradientTooLarge, GradientOverflow, StaleSession, WorkerBanned, TimeoutError)
}
"""The exceptions that cross to a worker, by name."""
