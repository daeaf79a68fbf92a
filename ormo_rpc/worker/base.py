"""The part of a worker that does not compute: from a reply into the model, and from gradients to a push.

It is the same for `Worker`, which computes gradients of a data set, and for a loop of the user's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ormo_rpc.algorithms.base import Algorithm
from ormo_rpc.algorithms.groups import Groups
from ormo_rpc.compression import Allocate, Encoder, PushFormat
from ormo_rpc.compression.wire_buffers import WholeBuffers
from ormo_rpc.compression.wire_metrics import ROOM
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.models.passes import Passes
from ormo_rpc.worker.regularise import regularise


class BaseWorker:
    """Puts parameters and buffers into a model, and makes pushes of its gradients.

    The push and, behind it, the buffers that its passes have changed lie in one flat tensor, `payload`, which the next push
    writes over: of the model's dtype where the wire format is exact, else the bytes of the wire form. `wire` is the same memory
    as bytes. A push is made on the model's device, and copied to that memory where it is elsewhere.

    Args:
        model: The model, for this worker alone.
        algorithm: The server's algorithm.
        groups: Weight decay and learning-rate factor of each range of the parameters: after clipping a gradient gets
            ``+ lambda w`` at the parameters where it is taken, then the factor. Not used where the algorithm `DECAYS_ITSELF`.
        clip_norm: The global norm to which the gradient of the loss is clipped first; None for no clipping.
        wire_format: The wire form of pushes; exact by default.
        allocate: Allocates the memory of `payload`, given its number of bytes.
        passes: Watches the passes of the model.
    """

    def __init__(
        self,
        model: FlatModel,
        algorithm: Algorithm,
        *,
        groups: Groups = (),
        clip_norm: float | None = None,
        wire_format: PushFormat | None = None,
        allocate: Allocate | None = None,
        passes: Passes | None = None,
    ) -> None:
        self.model = model
        self.algorithm = algorithm
        self.groups: Groups = () if algorithm.DECAYS_ITSELF else groups
        self.clip_norm = clip_norm
        exact = PushFormat(
            params=model.params, buffers=model.buffers.layout, dtype=model.dtype, vectors=algorithm.VECTORS_PUSHED
        )
        self._encoder = Encoder(wire_format or exact, allocate, model.device)
        self.wire, self.payload = self._encoder.wire, self._encoder.payload
        self.push = self._encoder.push
        self._passes = passes or Passes(model)
        self._grad_bound = 0
        self.loss_scale = 1.0
        """The scale of the losses of this ticket (`scaled`), which its gradients are divided by; 1 once they are."""
        self._sent = torch.empty(0, dtype=model.dtype, device=model.device)
        """The sent parameters, where they had to be brought to the model's device or cast to its dtype."""

    def warm_up(self) -> None:
        """Do before the first ticket what would take longer in that than in later ones; nothing by default."""

    def defer_copy(self) -> None:
        """Have pushes be copied from a GPU meanwhile: `wait_for_copy` is to be called before one is sent."""
        self._encoder.defer_copy()

    def wait_for_copy(self) -> None:
        """Wait until the push lies in the memory that it is sent from."""
        self._encoder.wait_for_copy()

    @property
    def corruptible(self) -> torch.Tensor:
        """The bytes of a push but for its metrics, which stay readable where a fault writes over all else."""
        form = self._encoder.format
        return self.wire[: form.size - (ROOM if form.metrics else 0)]

    def forget(self, worker: int | None = None) -> None:
        """Reset the compression state of a worker, or of all workers, as when it joins again."""
        self._encoder.reset(worker)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Return the compression state of each worker, copied; empty where nothing is compressed or fed back."""
        return self._encoder.state_dict()

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Restore what `state_dict` returned."""
        self._encoder.load_state_dict(state)

    def _begin_gradient(self, params: torch.Tensor, into: torch.Tensor) -> None:
        """Put parameters, shape (D,), into the model, and have its gradients added up in ``into``, from zero."""
        self.model.bind(params)
        if into.data_ptr() != self._grad_bound:
            self.model.bind_grad(into)
            self._grad_bound = into.data_ptr()
        self.model.zero_grad()
        self._passes.begin_pass()

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Multiply a loss by the ticket's scale, in at least float32."""
        return loss if self.loss_scale == 1.0 else loss * torch.tensor(self.loss_scale, dtype=torch.float32)

    def _end_gradient(self, params: torch.Tensor, into: torch.Tensor) -> None:
        """Complete the gradient in ``into``: what lies elsewhere is brought back, then it is regularised.

        It is divided by the scale of the loss first, so that what clips and decays sees it as it is.

        Raises:
            ModelRefused: the passes have changed what they must not change.
        """
        self.model.collect_grad()
        self._check_passes()
        if self.loss_scale != 1.0:
            into.mul_(1.0 / self.loss_scale)
        regularise(into, params, clip_norm=self.clip_norm, groups=self.groups)

    def _check_passes(self) -> None:
        """Check that the passes have not changed what they must not change."""
        self._passes.end_pass()

    def relay(self, push: Push) -> Push:
        """Encode a push that others have made."""
        self.push.copy_(push.grad)
        grad, buffers = self._encoder.make(push.worker, push.buffers)
        return replace(push, grad=grad, buffers=buffers)

    def _made(
        self,
        reply: Reply,
        *,
        loss: float | None,
        samples: int,
        metrics: Mapping[str, float | tuple[float, float]] | None = None,
        reported: WholeBuffers | None = None,
    ) -> Push:
        """Encode the content of `push`, and the buffers that the passes have changed, as the answer to a reply.

        The metrics are among its bytes already (`WireMetrics.write`).
        """
        grad, buffers = self._encoder.make(reply.worker, self._passes.collect() if reported is None else reported)
        return self._made_of(reply, grad, buffers, loss=loss, samples=samples, metrics=metrics)

    def _made_of(
        self,
        reply: Reply,
        grad: torch.Tensor,
        buffers: Mapping[str, torch.Tensor],
        *,
        loss: float | None,
        samples: int,
        metrics: Mapping[str, float | tuple[float, float]] | None = None,
    ) -> Push:
        """Make the answer to a reply of what is decoded."""
        assert reply.ticket is not None, "a reply without a ticket ends the worker"
        return Push(
            worker=reply.worker,
            ticket=reply.ticket,
            stamp=reply.stamp,
            grad=grad,
            loss=loss,
            samples=samples,
            buffers=buffers,
            metrics=metrics or {},
            incarnation=reply.incarnation,
            loss_scale=reply.loss_scale,
        )

    def _cast(self, sent: torch.Tensor) -> torch.Tensor:
        """Bring the sent parameters to the model's device and dtype."""
        if sent.dtype == self.model.dtype and sent.device == self.model.device:
            return sent
        if self._sent.shape != sent.shape:
            self._sent = torch.empty_like(sent, dtype=self.model.dtype, device=self.model.device)
        # They stay as they are until the push, so that nobody has to wait for the copy.
        return self._sent.copy_(sent, non_blocking=True)
