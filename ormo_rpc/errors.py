"""What the server answers to a push that it cannot take. A refused push has changed nothing.

Each is built from one string, so that it can be raised again on the other side of the wire.
"""

from __future__ import annotations


class PushRefused(ValueError):
    """The push does not fit the server's ledger or its parameters; the message says what came, from whom, and what to do."""


class NonFiniteGradient(PushRefused):
    """The gradient, the loss or a buffer holds NaN or infinity."""


class GradientTooLarge(NonFiniteGradient):
    """The gradient is finite, but its norm is above a limit that refuses: it is settled as one that is not finite."""


class Rejoin(PushRefused):
    """The sender is not, or no longer, a worker of this life of the server: it has to join again to get new work."""


class Dismissed(PushRefused):
    """The sender's gradients are worthless, again and again; it is a member no longer, and need not come back."""


BY_NAME: dict[str, type[Exception]] = {
    error.__name__: error for error in (PushRefused, NonFiniteGradient, GradientTooLarge, Rejoin, Dismissed, TimeoutError)
}
"""What may be raised again on the other side of the wire."""
