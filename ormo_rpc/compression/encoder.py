"""The worker's side of the wire form, with the state of each worker between two pushes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ormo_rpc.compression.format import PushFormat
from ormo_rpc.compression.wire_buffers import WholeBuffers
from ormo_rpc.seeding import generator
from ormo_rpc.server.validation import all_finite

Allocate = Callable[[int], "torch.Tensor"]
"""Allocates memory of that many bytes: a uint8 tensor of zeros, whose address is a multiple of 64."""


@dataclass
class EncoderState:
    """The state of one worker.

    Attributes:
        compressor: The compressor's state for each vector.
        residual: ``e``, the sum of what compression and rounding have dropped so far, shape (length,); None for zero.
    """

    compressor: list[torch.Tensor | None]
    residual: torch.Tensor | None = None


class Encoder:
    """Encode pushes for the wire, for any number of workers: each has a state of its own, which is empty when it joins.

    A push that is not finite leaves the state as it was, so that one bad batch spoils no later push.

    On a GPU the wire form is made there, in `staged`, and copied to `wire` once.

    Args:
        format: The wire form.
        allocate: Allocates the memory of the wire form; by default torch does, on the device.
        device: The device of the push; by default the CPU.

    Attributes:
        wire: The bytes, shape (size,), which each push writes over.
        staged: The bytes on the device; `wire` itself where that is there.
        payload: The same, as it is sent: values of the model's dtype where the format is exact, else bytes.
        push: Buffer for the push to encode, shape (length,), on the device; in `staged` where the format is exact.
        buffers: The buffers of the model among the bytes of `staged`, which the next push writes over as well.
        metrics: The metrics among the bytes of `wire`: what was written stays until it is written over.
    """

    def __init__(
        self,
        format: PushFormat,  # noqa: A002 - the word for it
        allocate: Allocate | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.format = format
        self.device = device or torch.device("cpu")
        zeros = torch.zeros(format.size, dtype=torch.uint8, device=self.device) if allocate is None else allocate(format.size)
        self.wire = zeros
        assert self.wire.dtype == torch.uint8, "the memory of a wire form is bytes"
        assert self.wire.shape == (format.size,), "as many as were asked for"
        self.staged = self.wire if self.wire.device == self.device else torch.zeros_like(self.wire, device=self.device)
        self.buffers = format.wire_buffers(self.staged)
        self.metrics = format.wire_metrics(self.wire)
        self._delivered = format.wire_buffers(self.wire)
        self.push = (
            format.whole(self.staged) if format.exact else torch.zeros(format.length, dtype=format.dtype, device=self.device)
        )
        self.payload = self.wire.view(format.dtype) if format.exact else self.wire
        # A push is decoded here as on the server where it is compressed, or where errors are fed back.
        decodes = not format.plain or (format.compression.error_feedback and not format.exact)
        self._decoded = torch.zeros_like(self.push) if decodes else None
        self._states: dict[int, EncoderState] = {}
        self._copies: torch.cuda.Stream | None = None
        """The stream of copies that are not waited for (`defer_copy`)."""
        self._copied: torch.cuda.Event | None = None

    def defer_copy(self) -> None:
        """Have `make` begin the copy from a GPU to `wire` on a stream of its own, and `wait_for_copy` wait for its end.

        Until then the results of `make` are not to be read. Without effect where nothing is copied.
        """
        if self.device.type == "cuda" and self.wire.device.type == "cpu" and not self._delivered.has_bools:
            self._copies, self._copied = torch.cuda.Stream(self.device), torch.cuda.Event()

    def wait_for_copy(self) -> None:
        """Wait until what `make` has made lies in `wire`."""
        if self._copied is not None:
            self._copied.synchronize()

    def make(
        self, worker: int, reported: Mapping[str, torch.Tensor] | WholeBuffers
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Make the whole wire form: the content of `push`, and the buffers that its passes report, by name.

        Returns:
            The push as the server will decode it, and the buffers: views of `wire`, but for a push that is compressed, which
            is on the device.
        """
        grad, buffers = self.encode(worker), self.buffers.write(reported)
        if self.staged is self.wire:
            return grad, buffers
        self._copy()
        return self.format.whole(self.wire) if self.format.plain else grad, self._delivered.views(buffers)

    def _copy(self) -> None:
        end = self.format.metrics_start
        if self._copies is None or self._copied is None:
            self.wire[:end].copy_(self.staged[:end])
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            self.wire[:end].copy_(self.staged[:end], non_blocking=True)
            self._copied.record()

    def encode(self, worker: int) -> torch.Tensor:
        """Make the wire form of the content of `push` in `staged`; return the push as the server will decode it.

        `push` is written to. The result, shape (length,), holds until the next call; see `PushFormat.unpack` for its dtype.
        """
        if self.format.exact:
            return self.push
        state = self._states.get(worker) or self._fresh(worker)
        if state.residual is not None:
            self.push.add_(state.residual)
        vectors = self.push.split(self.format.dimension)
        compressed = [self.format.compressor.compress(*each) for each in zip(vectors, state.compressor, strict=True)]
        for number, each in enumerate(compressed):
            self.format.write(number, each, self.staged)
        if self._decoded is not None:
            self._remember(worker, state, [each.state for each in compressed], self._decoded)
        if self.format.plain:
            return self.format.whole(self.staged)
        assert self._decoded is not None, "what is compressed is decoded, too"
        return self._decoded

    def _remember(self, worker: int, state: EncoderState, states: list[torch.Tensor | None], decoded: torch.Tensor) -> None:
        """Decode a push as the server will, and update the state of its worker."""
        for number, vector in enumerate(decoded.split(self.format.dimension)):
            self.format.read(number, self.staged, vector)
        if not all_finite(decoded):
            return
        state.compressor = states
        if self.format.compression.error_feedback:
            residual = torch.empty_like(self.push) if state.residual is None else state.residual
            state.residual = torch.sub(self.push, decoded, out=residual)
        self._states[worker] = state

    def _fresh(self, worker: int) -> EncoderState:
        """The state of a worker that has pushed nothing."""
        if self._decoded is None:  # rounding alone has no state, so that this is asked for with each push
            return EncoderState([None] * self.format.vectors)
        draws = generator(self.format.seed, "compression", worker)
        first = [self.format.compressor.start(draws, self.format.dtype) for _ in range(self.format.vectors)]
        return EncoderState([each if each is None else each.to(self.device) for each in first])

    def reset(self, worker: int | None = None) -> None:
        """Drop the state of a worker, or of each of them."""
        if worker is None:
            self._states.clear()
        else:
            self._states.pop(worker, None)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """The state of each worker, a private copy on the CPU that `torch.load` reads with weights_only."""
        return {
            worker: {"compressor": [_copy(each) for each in state.compressor], "residual": _copy(state.residual)}
            for worker, state in self._states.items()
        }

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Restore what `state_dict` returned."""
        self._states = {
            worker: EncoderState(
                [_copy(each, self.device) for each in saved["compressor"]], _copy(saved["residual"], self.device)
            )
            for worker, saved in state.items()
        }


def _copy(values: torch.Tensor | None, device: torch.device | str = "cpu") -> torch.Tensor | None:
    return None if values is None else values.to(device, copy=True)
