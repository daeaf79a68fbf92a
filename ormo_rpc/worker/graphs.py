"""A worker whose gradient is one CUDA graph: a pass is recorded once for each form of batch, and repeated.

The graph holds all that a gradient takes on the device: making the batch where the data is there, forward pass, loss, backward
pass, and what is done to the gradient afterwards. So the host's part of a ticket is a few calls, and it need not wait: `begin`
starts a ticket on a stream of its own, and `compute` takes what has come of it.

A graph freezes Python's control flow, and every number that comes from the host. So a pass that cannot be recorded is refused,
and the results of some tickets are compared with those of passes without a graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
from typing_extensions import override

from ormo_rpc.compression.wire_buffers import WholeBuffers
from ormo_rpc.data import Resident
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.seeding import generator, seeded
from ormo_rpc.worker.backward import Backward
from ormo_rpc.worker.comparing import OF_VALUES, SMALL, difference, tolerance
from ormo_rpc.worker.inputs import Copied, Draws, Inputs, form_of
from ormo_rpc.worker.recording import RecordingStream, refused
from ormo_rpc.worker.regularise import regularise
from ormo_rpc.worker.slots import Slot
from ormo_rpc.worker.static_model import StaticModel
from ormo_rpc.worker.worker import Worker

MAX_FORMS = 8
"""Forms of batches, each with a recording of its own: a full one, the last one of an epoch, those of local steps."""
WARM_UP_SCALE = 1024.0
"""The scale of the loss before the first ticket, where losses are scaled."""


class GraphWorker(Worker):
    """A `Worker` that repeats recorded passes; on the CPU, where there are no graphs, the same passes are done each time.

    Its pushes hold until the next call of `begin` or `compute`.

    Args:
        recorded: The model of the recordings.
        model: Another model of the same construction, for passes that are not recorded.
        arguments: The further ones of `Worker`.
        channels_last: Lay out images and weights with their channels last.
        autocast: The dtype of passes under ``torch.autocast``; None for none.
        options: Those of `Worker`, but for ``accumulate`` and ``compile``.
    """

    AHEAD: ClassVar[int] = 1

    def __init__(
        self,
        recorded: FlatModel,
        model: FlatModel,
        *arguments: Any,
        channels_last: bool = False,
        autocast: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, *arguments, channels_last=channels_last, autocast=autocast, **options)
        self._recorded = Backward(
            recorded.module,
            self.data,
            self._backward.task,
            seed=self.seed,
            device=model.device,
            channels_last=channels_last,
            autocast=autocast,
        )
        self._recorded_model = recorded
        self._channels_last = channels_last
        self._allowed = tolerance(model.module.parameters(), autocast)
        self._scales = autocast is torch.float16 or model.has_half
        self._resident = self.data if isinstance(self.data, Resident) and self.data.device == model.device else None
        self._in_place = options.get("allocate") is None and self._encoder.format.exact
        """A push is handed out in the memory of its ticket, since nobody has said where it is to lie."""
        self._stream = RecordingStream(model.device)
        self._slots: list[Slot] = []
        self._inputs: dict[Hashable, Inputs] = {}
        self._recordings: dict[tuple[Hashable, bool], Callable[[], None]] = {}
        self._kept: list[torch.Tensor] = []
        """Plain attributes of modules, such as masks: recordings read them, also once a pass has put others there."""
        self._scale = 1.0
        """The factor that the recordings scale losses by."""
        self._begun = self._taken = 0

    @functools.cached_property
    def _static(self) -> StaticModel:
        """The model of the recordings, once an eager pass has told what it does with its buffers.

        Raises:
            ModelRefused: no graph can hold it.
        """
        reported, calls = self._first_pass(), self._passes.calls()
        others = [name for name in reported if name not in self.model.buffers.rules]
        if others:
            raise refused(f"got a pass that changes the buffer {others[0]}, expected statistics of batch norms alone")
        for prefix, count in calls.items():
            if count > 1:
                name = prefix.rstrip(".") or "the model"
                raise refused(f"got a pass that calls the batch norm {name} {count} times, expected at most once")
        static = StaticModel(
            self._recorded_model, [prefix for prefix, count in calls.items() if count], channels_last=self._channels_last
        )
        self._slots = [Slot(self._stream, static, self.push.numel()) for _ in range(1 + self.AHEAD)]
        return static

    @override
    def warm_up(self) -> None:
        """Record the first ticket's passes, and compare their result.

        Raises:
            ModelRefused: they cannot be recorded, or the result differs from that of a pass that is not recorded.
        """
        first = self.model.flat_params()
        reply = Reply(
            worker=0,
            ticket=0,
            stamp=0,
            params=torch.cat([first, first.new_zeros((self.algorithm.VECTORS_SENT - 1) * len(first))]),
            lr=0.0,
            steps=self.algorithm.steps,
            incarnation=0,
            loss_scale=WARM_UP_SCALE if self._scales else 1.0,
        )
        self.begin(reply)
        slot = self._slot(reply)
        slot.wait()
        self._compare(slot, reply)
        slot.reply = None

    @override
    def load(self, reply: Reply) -> None:
        if self._resident is None:  # else there is nothing to make
            super().load(reply)

    @override
    def begin(self, *replies: Reply) -> None:
        """Start to compute pushes, in the order in which they will be asked for, and wait for nothing.

        Raises:
            ModelRefused: a pass cannot be recorded.
        """
        _ = self._static
        for reply in replies[: len(self._slots)]:
            if any(slot.answers(reply) for slot in self._slots):
                continue
            others = [slot for slot in self._slots if not any(map(slot.answers, replies))]
            self._start(min(others, key=lambda slot: (slot.reply is not None, slot.begun)), reply)

    @override
    def compute(self, reply: Reply) -> Push:
        self.begin(reply)
        slot = self._slot(reply)
        loss = slot.wait()
        if math.isnan(loss):  # it may be that no target counts
            slot.reply = None
            self._stream.join()
            return super().compute(reply)
        self._taken += 1
        if self._taken & (self._taken - 1) == 0:
            self._compare(slot, reply)
        slot.reply = None
        if self._in_place:
            return self._made_of(reply, slot.push, slot.buffers, loss=loss, samples=slot.samples)
        self.push.copy_(slot.push)
        reported = WholeBuffers(slot.region, self._static.names)
        return self._made(reply, loss=loss, samples=slot.samples, reported=reported)

    def _slot(self, reply: Reply) -> Slot:
        """The slot of a reply that was begun."""
        return next(slot for slot in self._slots if slot.answers(reply))

    def _start(self, slot: Slot, reply: Reply) -> None:
        """Put the work for a reply onto the stream."""
        static = self._static
        self._begun += 1
        slot.take(reply, self._begun)
        with self._stream.entered():
            if static.reads_buffers:
                held = reply.buffers if reply.buffers.numel() else self.model.buffers.initial
                static.held.copy_(held, non_blocking=True)
            _, samples = self._local(reply, functools.partial(self._repeat, slot, reply.loss_scale), slot.push)
            slot.end(samples)

    def _repeat(
        self, slot: Slot, scale: float, params: torch.Tensor, indices: torch.Tensor, number: int, into: torch.Tensor
    ) -> None:
        """Put a gradient onto the stream, as `_gradient` computes it; its loss is read when all is done."""
        static = self._static
        static.params.copy_(params, non_blocking=True)
        if scale not in (1.0, self._scale):
            static.scale.fill_(scale)
            static.unscale.fill_(1.0 / scale)
            self._scale = scale
        if self._resident is not None:
            draws = self._resident.draws(indices, generator(self.seed, "augment", number))
            batch = slot.staged(draws)
        else:
            with seeded(self.seed, "forward", number):
                batch = slot.batches[number] = self._backward.batch(indices, number)
        recording = self._recording(batch, scaled=scale != 1.0)
        with self._stream.seeded(self.seed, "forward", number):
            recording()
        into.copy_(static.grad)
        slot.add(len(indices))

    def _recording(self, batch: Any, *, scaled: bool) -> Callable[[], None]:
        """Put a batch, or the numbers that make it, to its place; return the recording of its form."""
        form: Hashable = batch.shape if self._resident is not None else form_of(batch)
        if form not in self._inputs:
            if len(self._inputs) == MAX_FORMS:
                raise refused(f"got batches of more than {MAX_FORMS} shapes, expected no more, as each has a recording")
            split, device = self._resident, self.model.device
            self._inputs[form] = Copied(batch, device) if split is None else Draws(split, batch, device)
        inputs = self._inputs[form]
        inputs.put(batch)
        if (form, scaled) not in self._recordings:
            with seeded(self.seed, "record", len(self._recordings)):  # of no ticket, so that what it freezes is seen soon
                self._recordings[form, scaled] = self._stream.record(functools.partial(self._pass, inputs, scaled=scaled))
            modules = self._recorded_model.module.modules()
            self._kept += [each for module in modules for each in vars(module).values() if isinstance(each, torch.Tensor)]
            inputs.put(batch)  # the passes so far may have changed it in place
        return self._recordings[form, scaled]

    def _pass(self, inputs: Inputs, *, scaled: bool) -> None:
        """All that is recorded: from a batch to a gradient."""
        static = self._static
        static.begin()
        with torch.enable_grad():
            loss = self._recorded.loss(self._recorded.laid_out(inputs.batch()))
            (loss * static.scale if scaled else loss).backward()
        with torch.no_grad():
            static.end(loss)
            if scaled:
                static.grad.mul_(static.unscale)
            regularise(static.grad, static.params, clip_norm=self.clip_norm, groups=self.groups)

    def _compare(self, slot: Slot, reply: Reply) -> None:
        """Compute the push for a reply without a graph, and compare.

        Raises:
            ModelRefused: they differ by more than rounding.
        """
        self._stream.join()  # both use the memory of parameters that are cast
        self._passes.begin(reply.buffers)
        self.loss_scale = reply.loss_scale
        self._backward.give(slot.batches)
        expected = torch.empty_like(slot.push)
        loss, _ = self._local(reply, self._gradient, expected)
        buffers, allowed = self._passes.collect(), self._allowed
        mean = torch.tensor(slot.wait()), torch.tensor(math.nan if loss is None else loss)
        found = (
            difference("buffers", slot.buffers, buffers, OF_VALUES * allowed)
            or difference("loss", {"": mean[0]}, {"": mean[1]}, OF_VALUES * allowed, SMALL)
            or difference("gradient", {"": slot.push}, {"": expected}, allowed)
        )
        if found is not None:
            raise refused(
                f"the graph of ticket {reply.ticket} differs from a pass without one: {found}; it repeats what the pass did "
                "when it was recorded, so nothing in it may depend on Python's numbers, or on the ticket"
            )
