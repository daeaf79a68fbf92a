"""Does a part from outside of the package save all that its next steps depend on? A trial on a small vector says so.

An algorithm or scheduler that leaves something out of its `state_dict` trains rightly until its run is resumed: then it goes on
with other numbers. A look at its attributes cannot tell what it forgot from a constant or from scratch memory, so two servers
are compared: one that goes on, and one that loads the state of the first.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ormo_rpc.errors import one_line
from ormo_rpc.messages import Push, Reply
from ormo_rpc.options import Part
from ormo_rpc.server.buffer_layout import as_bytes
from ormo_rpc.server.state import load, save

if TYPE_CHECKING:
    from ormo_rpc.server.parameter_server import ParameterServer

DIMENSION = 8
"""Elements of the trial's parameters."""
SHAPES = ((2, 3), (2,))
"""Their tensors."""
WORKERS = 4
POINTS = (0, 3, 10, 25)
"""Numbers of pushes after which the trial saves."""
REST = 20
"""Pushes for which it goes on: a few rounds of the workers."""
RESTORED = ("params", "kernel", "generator")
"""Attributes that the server itself sets or restores."""


def refuse_forgetful(build: Callable[[], ParameterServer]) -> None:
    """Refuse an algorithm or scheduler whose state, loaded into a new server, does not continue to the bit.

    A part that cannot be tried on such a vector, or under the trial's pushes, is not refused.

    Args:
        build: Returns a new server of `WORKERS` workers, always the same.

    Raises:
        ValueError: it goes on with other numbers; the message names the attributes that were not restored.
    """
    with torch.random.fork_rng(devices=[]):
        for pushes in POINTS:
            _try_at(pushes, build)


def _try_at(pushes: int, build: Callable[[], ParameterServer]) -> None:
    """Save after a number of pushes, and compare."""
    original = _Trial(build())
    parts_of = (original.server.algorithm, original.server.scheduler)
    try:
        original.advance(pushes)
        saved = _from_file(save(original.server, replies=True))
        at_save, attributes = original.fork(original.server), [copy.deepcopy(_attributes(part)) for part in parts_of]
        expected = original.advance(REST)
    except Exception:  # the user's own code, which the run itself will show to fail
        return

    def goes_on_alike(*restored: Mapping[str, Any]) -> bool:
        """Load the state into a new server, and give its parts these attributes too."""
        loaded = at_save.fork(build())
        load(loaded.server, saved)
        for part, more in zip((loaded.server.algorithm, loaded.server.scheduler), restored, strict=True):
            vars(part).update(copy.deepcopy(dict(more)))
        try:
            return loaded.advance(REST) == expected
        except Exception:  # it lacks something
            return False

    try:
        if goes_on_alike({}, {}):
            return
    except Exception as error:  # raised by a load_state_dict
        raise ValueError(_refusal(parts_of[0], f"cannot be loaded: {one_line(error)}")) from error
    for number, part in enumerate(parts_of):
        needed = list[str]()
        for name in attributes[number]:
            without = [dict(each) for each in attributes]
            del without[number][name]
            if not goes_on_alike(*without):
                needed.append(name)
        if needed:
            raise ValueError(_refusal(part, f"leaves out {', '.join(needed)}"))
    raise ValueError(_refusal(parts_of[0], "leaves something out"))


def _attributes(part: Part) -> dict[str, Any]:
    """Return the attributes of a part, but for its options and what every server restores."""
    return {name: value for name, value in vars(part).items() if name not in RESTORED and name not in part.declared()}


def _refusal(part: Part, fault: str) -> str:
    return (
        f"{part.PATH}: the state_dict of {part.name} {fault}; expected all that its next steps depend on, as a run that is "
        f"resumed would go on with other numbers"
    )


class _Trial:
    """A server, and the replies that its workers have to answer."""

    def __init__(self, server: ParameterServer) -> None:
        self.server = server
        self.pushes = 0
        self.outstanding = server.start()

    def fork(self, server: ParameterServer) -> _Trial:
        """Return a trial at the same point with another server."""
        other = copy.copy(self)
        other.server, other.outstanding = server, list(self.outstanding)
        return other

    def advance(self, pushes: int) -> bytes:
        """Push random numbers, of an old reply or of a new one, and return the bits of all that workers were sent."""
        torch.manual_seed(self.pushes)
        sent = io.BytesIO()
        for _ in range(pushes):
            if not self.outstanding:
                break
            reply = self.outstanding.pop(self.pushes * 7 % len(self.outstanding))
            for answer in self.server.receive(self._push(reply)):
                sent.write(repr((answer.worker, answer.ticket, answer.stamp)).encode() + _bytes(answer.params))
                # What this worker still has was cancelled.
                self.outstanding = [reply for reply in self.outstanding if reply.worker != answer.worker]
                if answer.ticket is not None:
                    self.outstanding.append(answer)
        return sent.getvalue() + _bytes(self.server.params)

    def _push(self, reply: Reply) -> Push:
        assert reply.ticket is not None, "only replies with a ticket are kept"
        self.pushes += 1
        generator = torch.Generator().manual_seed(self.pushes)
        grad = torch.randn(
            self.server.algorithm.VECTORS_PUSHED * DIMENSION, generator=generator, dtype=self.server.params.dtype
        )
        return Push(worker=reply.worker, ticket=reply.ticket, stamp=reply.stamp, grad=grad, incarnation=self.server.incarnation)


def _from_file(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state as it is read from a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _bytes(tensor: torch.Tensor) -> bytes:
    return as_bytes(tensor).numpy().tobytes()
