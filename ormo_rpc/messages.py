"""What crosses between server and worker: `Reply` (work handed out), `Push` (work done) and `Refusal`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reply:
    """One unit of work, or the word to stop.

    Attributes:
        worker: The worker that it is for.
        ticket: The unit of work, a counter from 0; None means that there is no more work.
        stamp: The index of the parameters: how many gradients had been applied to them.
        params: The parameters to work on, shape (D,), of the server's dtype or of the one that it rounds them to. They never
            change after the reply is issued; replies of one stamp may share them, and nobody may write to them.
        lr: The learning rate at the moment of issue, for rules that take local steps.
        steps: The number of local steps that the worker takes for this ticket.
        incarnation: Which life of the server issued it; goes back with the push.
    """

    worker: int
    ticket: int | None
    stamp: int
    params: Tensor
    lr: float
    steps: int
    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Push:
    """The gradient of one ticket.

    Attributes:
        worker: Who computed it.
        ticket: The ticket of the reply that it answers.
        stamp: The stamp of that reply.
        grad: The gradient at that reply's parameters, shape (D,), of the server's dtype and device.
        loss: The mean loss of the batch, where it is known.
        samples: The number of samples in the batch.
        buffers: The batch's own statistics by name (batch norm), for the running average that the server keeps.
        incarnation: That of the reply.
    """

    worker: int
    ticket: int
    stamp: int
    grad: Tensor
    loss: float | None = None
    samples: int = 1
    buffers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    incarnation: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """The server's no, as a value, because an exception that crosses torch.distributed.rpc loses its type on the way.

    Attributes:
        error: The name of the exception's class.
        text: Its message.
    """

    error: str
    text: str
