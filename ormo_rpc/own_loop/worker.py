"""The worker of a loop of the user's own: takes over the gradients that the script's passes have left in the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.algorithms.base import Algorithm
from ormo_rpc.algorithms.groups import Groups
from ormo_rpc.compression import Allocate, PushFormat
from ormo_rpc.errors import LoopMisused
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.models.passes import Guarded, Passes
from ormo_rpc.options.imports import users_line
from ormo_rpc.worker.base import BaseWorker

EMPTY_TICKETS = 3
"""The first tickets of a process, after which it warns where none had a gradient."""
_log = logging.getLogger(__name__)


class OwnWorker(BaseWorker):
    """Puts the parameters of a reply into the script's model, and makes a push of the gradients that are there later.

    Args:
        model: The script's model, in its own train or eval mode.
        algorithm: The server's algorithm.
        groups: As for `BaseWorker`.
        clip_norm: As for `BaseWorker`.
        wire_format: The wire form of pushes.
        allocate: Allocates the memory of `payload`, given its number of bytes.
    """

    def __init__(
        self,
        model: FlatModel,
        algorithm: Algorithm,
        *,
        groups: Groups,
        clip_norm: float | None,
        wire_format: PushFormat,
        allocate: Allocate | None = None,
    ) -> None:
        super().__init__(
            model,
            algorithm,
            groups=groups,
            clip_norm=clip_norm,
            wire_format=wire_format,
            allocate=allocate,
            passes=Passes(model, own_modes=False),
        )
        self._params = torch.empty(0)
        """The parameters of the present ticket, in memory of their own: the script may look at them until the next one."""
        self._has_scaled = False
        """A loss of this ticket was scaled."""
        self._is_unscaled = False
        """The script has divided the gradients of this ticket."""
        self._has_overflowed = False
        """They were not finite then; what the script has made of them since may be."""
        self._empty: int | None = 0
        """Tickets so far, none of which had a gradient; None once there was one, or the warning."""
        self._names = {id(parameter): name for name, parameter in model.trainable.items()}
        self._step_hook = _before_steps(self._refuse_step)

    def begin(self, reply: Reply) -> None:
        """Put the parameters and buffers of a reply into the model, and its gradients to zero."""
        self._passes.begin(reply.buffers)
        self.loss_scale = reply.loss_scale
        self._has_scaled = self._is_unscaled = self._has_overflowed = False
        sent = self._cast(reply.params)
        if self._params.shape != sent.shape:
            self._params = torch.empty_like(sent)
        self._params.copy_(sent)
        self._begin_gradient(self._params, self.push)

    def finish(self, reply: Reply, *, loss: float | None, samples: int, metrics: Mapping[str, Any]) -> Push:
        """Make a push of the gradients that the model has now.

        Raises:
            LoopMisused: something was changed that must not be.
            ValueError: a metric has a wrong name, or is not a number.
        """
        measured = self._encoder.metrics.write(metrics)  # where that is refused, the gradients must be as they were
        self._end_gradient(self._params, self.push)
        if self._has_overflowed:
            self.push[:1].fill_(math.nan)
        return self._made(reply, loss=loss, samples=samples, metrics=measured)

    @override
    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        if self._is_unscaled:
            raise LoopMisused(
                f"{users_line()}: scaled() is called behind unscale(), expected before it: gradients of two scales would add up"
            )
        self._has_scaled = True
        return super().scaled(loss)

    def unscale(self) -> None:
        """Divide the gradients that the model has now by the scale.

        Raises:
            LoopMisused: they were divided already, are not those of a scaled loss, or are of float16.
        """
        if self._is_unscaled:
            raise LoopMisused(
                f"{users_line()}: unscale() is called again, expected once, behind the last backward() of a round"
            )
        self._is_unscaled = True
        if self.loss_scale == 1.0:
            return
        found = {name: each.grad for name, each in self.model.trainable.items() if each.grad is not None}
        half = next((name for name, grad in found.items() if grad.dtype is torch.float16), None)
        if half is not None:
            raise LoopMisused(
                f"{users_line()}: unscale(): the gradient of {half} is float16, in which it may be 0 without the scale, "
                "expected float32; train.clip_norm clips it in that"
            )
        with torch.no_grad():
            values = [grad.coalesce().values() if grad.is_sparse else grad for grad in found.values()]
            self._check_scaled(values)
            self._has_overflowed = not all(each.isfinite().all() for each in values)
            for grad in found.values():
                grad.mul_(1.0 / self.loss_scale)
        self.loss_scale = 1.0

    def close(self) -> None:
        """Leave the model without hooks, and let optimizers step again."""
        self._step_hook()
        self._passes.close()

    @override
    def _check_passes(self) -> None:
        found = self._passes.change()
        if found is not None:
            raise LoopMisused(f"{users_line()}: {_changed(found)}")
        self._check_scaled([self.push])
        self._look_for_gradients()

    def _check_scaled(self, gradients: Sequence[torch.Tensor]) -> None:
        """Refuse gradients, before anything is added to them, of a loss that was not scaled."""
        if self.loss_scale != 1.0 and not self._has_scaled and any(each.any() for each in gradients):
            raise LoopMisused(
                f"{users_line()}: got gradients of a loss that was not scaled, expected worker.scaled(loss).backward(), as "
                "worker.autocast=fp16 has the server scale losses"
            )

    def _look_for_gradients(self) -> None:
        """Warn where the first tickets have none: a loop that computes with another model would train nothing."""
        if self._empty is None:
            return
        self._empty = None if self.push.any() else self._empty + 1
        if self._empty == EMPTY_TICKETS:
            self._empty = None
            _log.warning(
                "%s: the first %d tickets of this process have left no gradient in the model of join(); is backward() called "
                "on a loss of this very model, and are its gradients kept until push()?",
                users_line(),
                EMPTY_TICKETS,
            )

    def _refuse_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a step of an optimizer that would change a parameter of the model."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._names:
                    raise LoopMisused(
                        f"{users_line()}: {type(optimizer).__name__}.step() would change the parameter "
                        f"{self._names[id(parameter)]}; in the loop of ormo_rpc.join the server does the step, so leave it out"
                    )


def _changed(found: Guarded) -> str:
    """Say what was done to a parameter, or to a buffer that is no state, between two tickets."""
    tensor, name = found.tensor, found.name
    if tensor.requires_grad != found.trained:
        got, expected = (str(each).lower() for each in (tensor.requires_grad, found.trained))
        return (
            f"model: {name}: got requires_grad={got} in the loop, expected {expected}, as at join(), where what is trained is "
            "decided"
        )
    if not isinstance(tensor, torch.nn.Parameter) or not found.trained:
        kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
        return f"model: {name}: this {kind}, which is not trained, was changed in the loop, expected its value at join()"
    return (
        f"model: the parameter {name} was changed in the loop, expected what the server has sent: leave out optimizer.step() "
        "and everything else that writes to parameters (nn.Embedding: no max_norm); the server does the steps"
    )


def _before_steps(hook: Callable[[torch.optim.Optimizer], None]) -> Callable[[], None]:
    """Call a function before each step of any optimizer; return the function that ends this."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001 - the signature of torch's hook
        hook(optimizer)

    return register_optimizer_step_pre_hook(before).remove
