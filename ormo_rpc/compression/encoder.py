"""The worker's side of the wire form, with all that a worker remembers from one push to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.compression.format import PushFormat
from ormo_rpc.seeding import generator
from ormo_rpc.server.validation import all_finite

Allocate = Callable[[int], Tensor]
"""Makes memory for that many bytes: a uint8 tensor of zeros, whose address is a multiple of 64."""


@dataclass
class Memory:
    """What one worker remembers.

    Attributes:
        kept: For each vector what its compressor keeps.
        error: ``e``, what the wire has dropped so far, shape (length,); None for nothing.
    """

    kept: list[Tensor | None]
    error: Tensor | None = None


class Encoder:
    """Makes wire forms, for any number of workers: each has a memory of its own, which begins empty when it joins.

    A push that is not finite leaves the memory as it was, so that one bad batch spoils no later push.

    Args:
        format: The wire form.
        allocate: Makes the memory of the wire form; torch's own by default.

    Attributes:
        wire: The bytes, shape (size,), which each call of `encode` writes over.
        payload: The same, as it is sent: values of the model's dtype where the format is exact, else bytes.
        push: Where the push to encode is written to, shape (length,); the same memory where the format is exact.
        statistics: Where the batch-norm statistics are written to, flat; always the same memory.
    """

    def __init__(self, format: PushFormat, allocate: Allocate | None = None) -> None:  # noqa: A002 - what it is
        self.format = format
        self.wire = torch.zeros(format.size, dtype=torch.uint8) if allocate is None else allocate(format.size)
        assert self.wire.dtype == torch.uint8, "the memory of a wire form is bytes"
        assert self.wire.shape == (format.size,), "as many as were asked for"
        self.statistics = format.statistics.of(self.wire)
        self.push = format.whole(self.wire) if format.exact else torch.zeros(format.length, dtype=format.dtype)
        self.payload = self.wire.view(format.dtype) if format.exact else self.wire
        # What the server will see of a push is decoded here too where it is compressed, or where errors are fed back.
        decodes = not format.plain or (format.compression.error_feedback and not format.exact)
        self._decoded = torch.zeros_like(self.push) if decodes else None
        self._memories: dict[int, Memory] = {}

    def encode(self, worker: int) -> Tensor:
        """Make the wire form of what lies in `push` and `statistics`; return what the server will see of the push.

        `push` is written to. The result, shape (length,), holds until the next call; see `PushFormat.unpack` for its dtype.
        """
        if self.format.exact:
            return self.push
        memory = self._memories.get(worker) or self._fresh(worker)
        if memory.error is not None:
            self.push.add_(memory.error)
        vectors = self.push.split(self.format.dimension)
        compressed = [self.format.compressor.compress(*each) for each in zip(vectors, memory.kept, strict=True)]
        for number, each in enumerate(compressed):
            self.format.write(number, each, self.wire)
        if self._decoded is not None:
            self._remember(worker, memory, [each.kept for each in compressed], self._decoded)
        if self.format.plain:
            return self.format.whole(self.wire)
        assert self._decoded is not None, "what is compressed is decoded, too"
        return self._decoded

    def _remember(self, worker: int, memory: Memory, kept: list[Tensor | None], decoded: Tensor) -> None:
        """Decode a push as the server will, and keep what the next one of that worker has to know."""
        for number, vector in enumerate(decoded.split(self.format.dimension)):
            self.format.read(number, self.wire, vector)
        if not all_finite(decoded):
            return
        memory.kept = kept
        if self.format.compression.error_feedback:
            error = torch.empty_like(self.push) if memory.error is None else memory.error
            memory.error = torch.sub(self.push, decoded, out=error)
        self._memories[worker] = memory

    def _fresh(self, worker: int) -> Memory:
        """The memory of a worker that has pushed nothing."""
        if self._decoded is None:  # rounding alone remembers nothing, so that this is asked for with each push
            return Memory([None] * self.format.vectors)
        chance = generator(self.format.seed, "compression", worker)
        return Memory([self.format.compressor.start(chance, self.format.dtype) for _ in range(self.format.vectors)])

    def forget(self, worker: int | None = None) -> None:
        """A worker (None: each of them) begins anew: what it remembers is gone."""
        if worker is None:
            self._memories.clear()
        else:
            self._memories.pop(worker, None)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """What each worker remembers, a private copy that `torch.load` reads with weights_only."""
        return {
            worker: {"kept": [_copy(each) for each in memory.kept], "error": _copy(memory.error)}
            for worker, memory in self._memories.items()
        }

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Take over what `state_dict` returned."""
        self._memories = {
            worker: Memory([_copy(each) for each in memory["kept"]], _copy(memory["error"])) for worker, memory in state.items()
        }


def _copy(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.clone()
