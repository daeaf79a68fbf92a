"""Messages between server and worker: `Reply` (a ticket with parameters), `Push` (its gradient) and `ErrorReply`.

A number that is added to a message crosses every transport, and is kept in the journal, without a change elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch


@functools.cache
def no_buffers() -> torch.Tensor:
    """The buffers of a model without any, and of a reply without a ticket."""
    return torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reply:
    """One unit of work, or the end of the run.

    Attributes:
        worker: The recipient.
        ticket: The unit of work, a counter from 0; None means that there is no more work.
        stamp: The index of the parameters: how many gradients had been applied to them.
        params: The vector that the algorithm sends (`Algorithm.outgoing`), for most algorithms the parameters to work
            on, shape (D,), of the server's dtype or of the one that it rounds them to. It may be the server's own memory, and
            replies of one stamp may share it: never write to it. On the server it never changes after the reply is issued; in
            a worker's process it holds until the next push.
        lr: The learning rate at the moment of issue, for algorithms that take local steps.
        steps: The number of local steps that the worker takes for this ticket.
        incarnation: The incarnation of the server that issued it; goes back with the push.
        loss_scale: The factor by which the worker multiplies its loss, and divides the gradients, for float16; 1 for none.
        buffers: The server's buffers at that stamp as bytes (uint8), shape (B,), such as batch-norm statistics. Replies between
            two changes share them, and they never change.
    """

    worker: int
    ticket: int | None
    stamp: int
    params: torch.Tensor
    lr: float
    steps: int
    incarnation: int
    loss_scale: float = 1.0
    buffers: torch.Tensor = field(default_factory=no_buffers)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Push:
    """The result of a worker's computation for one ticket.

    Attributes:
        worker: The worker that computed it.
        ticket: The ticket of the reply that it answers.
        stamp: The stamp of that reply.
        grad: The vector that the algorithm expects (`Algorithm.local`), for most algorithms the gradient at that reply's
            parameters, shape (VECTORS_PUSHED * D,), on the server's device, of its dtype or of the one that the wire rounds
            pushes to.
        loss: The mean loss of the batch, where it is known; of several batches that by `weighted_mean_loss`.
        samples: The number of samples in the batch.
        buffers: What its passes have to report of the model's buffers by name (`Rule`); those that they left as they were are
            not in it.
        metrics: What its process reports of the batch by name: a number, or the sum and the count of a mean. Only runs whose
            wire form has room for them (`PushFormat`) have any.
        incarnation: That of the reply.
        loss_scale: That of the reply; tells a push at a smaller scale from a repeat of the one that overflowed.
    """

    worker: int
    ticket: int
    stamp: int
    grad: torch.Tensor
    loss: float | None = None
    samples: int = 1
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict[str, "torch.Tensor"])
    metrics: Mapping[str, float | tuple[float, float]] = field(default_factory=dict[str, "float | tuple[float, float]"])
    incarnation: int = 0
    loss_scale: float = 1.0


def weighted_mean_loss(parts: Sequence[tuple[float | None, int]]) -> float | None:
    """Return the mean loss of several batches, given loss and samples of each; None where none has a loss.

    A batch without a loss is left out. The others count by their samples; with equal sizes it is the plain mean.
    """
    known = [(loss, samples) for loss, samples in parts if loss is not None]
    if len({samples for _, samples in known}) > 1:
        return sum(loss * samples for loss, samples in known) / sum(samples for _, samples in known)
    return sum(loss for loss, _ in known) / len(known) if known else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorReply:
    """The server's refusal as a value, since exceptions do not cross a transport.

    Attributes:
        error: The name of the exception's class.
        text: Its message.
    """

    error: str
    text: str


class NumberField(NamedTuple):
    """A field of a message that is a number.

    Attributes:
        name: Its name.
        type: int or float.
        optional: Whether it may be None.
    """

    name: str
    type: type[int] | type[float]
    optional: bool


_NUMBERS: Mapping[Any, tuple[type[int | float], bool]] = {
    "int": (int, False),
    "int | None": (int, True),
    "float": (float, False),
    "float | None": (float, True),
}
"""The kind of number that an annotation stands for, and whether None is one of its values."""


def number_fields(message: type[Push] | type[Reply]) -> tuple[NumberField, ...]:
    """The numbers of a class of messages, in the order of its fields; the other fields are tensors and, of a push, metrics."""
    return tuple(NumberField(each.name, *_NUMBERS[each.type]) for each in fields(message) if each.type in _NUMBERS)
