"""Forward and backward of a ticket's batch: its draws are functions of (seed, number) alone, wherever it is computed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

from ormo_rpc.data import Split
from ormo_rpc.data.trees import map_tensors, to_device
from ormo_rpc.seeding import generator, seeded
from ormo_rpc.tasks import Task
from ormo_rpc.worker.accumulation import micro_batches
from ormo_rpc.worker.forward import autocast as under_autocast


def _unscaled(loss: torch.Tensor) -> torch.Tensor:
    return loss


class Backward:
    """Adds the gradients of batches' losses to those of a module.

    Args:
        module: The module, or what wraps it.
        data: The training split.
        task: The loss.
        seed: The seed of the run.
        device: The device of the module, which batches are brought to; by default the CPU.
        accumulate: The number of parts in which each batch goes through the module; see `micro_batches`.
        channels_last: Lay out images, tensors of four dimensions, with their channels last.
        autocast: The dtype of passes under ``torch.autocast``; None for none.
        scaled: Scales a loss before its backward pass.
        into: Add the gradients to these parameters without calling the hooks of their accumulation; None for ``backward()``.
        around: Makes the context of a pass; called with True for the last one of a batch. None for no context.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        data: Split,
        task: Task,
        *,
        seed: int,
        device: torch.device | None = None,
        channels_last: bool = False,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        scaled: Callable[[torch.Tensor], torch.Tensor] = _unscaled,
        into: Sequence[torch.Tensor] | None = None,
        around: Callable[[bool], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.module = module
        self.data = data
        self.task = task
        self.seed = seed
        self.device = device or torch.device("cpu")
        self.accumulate = accumulate
        self._channels_last = channels_last
        self._autocast = autocast
        self._scaled = scaled
        self._into = into
        self._around = around or (lambda _: contextlib.nullcontext())
        self._loaded: dict[int, Any] = {}
        """Batches made ahead by `load`, by their numbers in the run."""

    def load(self, batches: list[tuple[int, torch.Tensor]]) -> None:
        """Make batches now, given by number and sample numbers, where they depend on nothing else."""
        if self.data.PURE:
            made = {number: self.data.batch(indices, self._augmentation(number)) for number, indices in batches}
            self._loaded = {number: self.laid_out(to_device(batch, self.device)) for number, batch in made.items()}

    def give(self, batches: Mapping[int, Any]) -> None:
        """Use batches that were made already, by their numbers in the run, in place of new ones."""
        self._loaded = dict(batches)

    def __call__(self, indices: torch.Tensor, number: int) -> float | None:
        """Add the gradient of the targets' mean loss; return that loss, None where no target counts.

        Args:
            indices: The numbers of the batch's samples.
            number: That of the batch in the run, which seeds its random draws.
        """
        with seeded(self.seed, "forward", number):
            batch = self.batch(indices, number)
            if self.accumulate == 1:
                return self._whole(batch)
        return self._in_parts(batch, number)

    def _whole(self, batch: Any) -> float | None:
        with self._around(True):
            loss = self.loss(batch)
            self._differentiate(self._scaled(loss))
        value = loss.item()
        return None if math.isnan(value) and not self.task.count(batch) else value

    def _in_parts(self, batch: Any, number: int) -> float | None:
        """Do the same part by part; the random draws of each are a function of (seed, number of the batch, part)."""
        value: float | None = None
        parts = list(micro_batches(self.task, batch, self.accumulate))
        for part, samples, weight in parts:
            with seeded(self.seed, f"forward of part {part}", number), self._around(part == parts[-1][0]):
                loss = self.loss(samples) * weight
                self._differentiate(self._scaled(loss))
            value = (value or 0.0) + loss.item()
        return value

    def _differentiate(self, loss: torch.Tensor) -> None:
        if self._into is None:
            loss.backward()
            return
        grads = cast("Sequence[torch.Tensor | None]", torch.autograd.grad(loss, self._into, allow_unused=True))
        for parameter, grad in zip(self._into, grads, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    def loss(self, batch: Any) -> torch.Tensor:
        """Compute the loss of a batch, or of a part of it."""
        with under_autocast(self._autocast, self.device.type):
            return self.task.loss(self.task.forward(self.module, batch), batch)

    def batch(self, indices: torch.Tensor, number: int) -> Any:
        """Make a batch, or take the one that `load` has made."""
        if number in self._loaded:
            return self._loaded.pop(number)
        return self.laid_out(to_device(self.data.batch(indices, self._augmentation(number)), self.device))

    def laid_out(self, batch: Any) -> Any:
        """Give the images of a batch their memory format."""
        if not self._channels_last:
            return batch
        return map_tensors(lambda leaf: leaf.contiguous(memory_format=torch.channels_last) if leaf.dim() == 4 else leaf, batch)

    def _augmentation(self, number: int) -> torch.Generator:
        return generator(self.seed, "augment", number)
