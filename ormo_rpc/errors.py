"""What the server answers to a push that it cannot take. A refused push has changed nothing.

Each is built from one string, because that is how an exception crosses torch.distributed.rpc.
"""

from __future__ import annotations


class PushRefused(ValueError):
    """The push does not fit the server's ledger or its parameters; the message says what came, from whom, and what to do."""


class NonFiniteGradient(PushRefused):
    """The gradient, the loss or a buffer holds NaN or infinity."""


class Rejoin(PushRefused):
    """The sender is not, or no longer, a worker of this life of the server: it has to join again to get new work."""
