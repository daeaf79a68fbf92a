"""Synthetic gradients, cheap enough to study schedules of thousands of workers: a noisy quadratic, or noise alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ormo_rpc.algorithms.base import Algorithm, LocalWork
from ormo_rpc.algorithms.groups import Groups
from ormo_rpc.compression import Encoder, PushFormat
from ormo_rpc.messages import Push, Reply
from ormo_rpc.seeding import generator
from ormo_rpc.worker.regularise import regularise


class Quadratic:
    """Gradients of ``f(x) = 1/2 sum_j lambda_j x_j^2`` with additive Gaussian noise, keyed by (seed, ticket).

    The curvatures ``lambda_j`` fall geometrically from 1 to ``1 / condition``; the start is ``x_j = 1``.

    Args:
        dimension: D.
        condition: The condition number; None for noise alone.
        noise: The noise's standard deviation per coordinate.
        algorithm: The server's algorithm.
        momentum: ``beta``, for algorithms with local steps.
        seed: The seed of the run.
        wire_format: The wire form of pushes, whose rounding they get.
        clip_norm: The largest norm of a gradient; None for no clipping.
        groups: Weight decay and learning-rate factors of ranges; unused where the algorithm decays itself.
    """

    AHEAD: ClassVar[int] = 0

    def __init__(
        self,
        dimension: int,
        condition: float | None,
        noise: float,
        algorithm: Algorithm,
        *,
        momentum: float,
        seed: int,
        wire_format: PushFormat,
        clip_norm: float | None = None,
        groups: Groups = (),
    ) -> None:
        self.curvature = torch.zeros(dimension) if condition is None else torch.logspace(0, -1, dimension, base=condition)
        self.noise = noise
        self.algorithm = algorithm
        self.momentum = momentum
        self.seed = seed
        self.clip_norm = clip_norm
        self.groups: Groups = () if algorithm.DECAYS_ITSELF else groups
        self._encoder = Encoder(wire_format)

    def start(self) -> torch.Tensor:
        """Return ``x_0``, shape (D,)."""
        return torch.ones_like(self.curvature)

    def loss(self, params: torch.Tensor) -> float:
        """Return ``f(x)``, without noise."""
        return 0.5 * (self.curvature * params * params).sum().item()

    def begin(self, *replies: Reply) -> None:
        """Do nothing: it is computed when it is asked for."""

    def compute(self, reply: Reply) -> Push:
        """Compute the push for a reply, as the server receives it; the next call overwrites its tensor."""
        assert reply.ticket is not None
        sent = reply.params.to(self.curvature.device, self.curvature.dtype)
        dimension = self.curvature.numel()
        randomness = generator(self.seed, "noise", reply.ticket) if self.noise else None

        def gradient(params: torch.Tensor, step: int, into: torch.Tensor) -> None:  # noqa: ARG001 - noise is drawn in the order of steps
            torch.mul(params, self.curvature, out=into)
            if randomness is not None:
                into.add_(torch.randn(dimension, generator=randomness), alpha=self.noise)
            regularise(into, params, clip_norm=self.clip_norm, groups=self.groups)

        work = LocalWork(
            sent=sent,
            dimension=dimension,
            lr=reply.lr,
            momentum=self.momentum,
            steps=reply.steps,
            gradient=gradient,
        )
        self.algorithm.local(work, self._encoder.push)
        loss = self.loss(sent[:dimension])
        return Push(
            worker=reply.worker,
            ticket=reply.ticket,
            stamp=reply.stamp,
            grad=self._encoder.encode(reply.worker),
            loss=loss,
            incarnation=reply.incarnation,
        )

    def forget(self, worker: int | None = None) -> None:
        """Reset the compression state of a worker, or of all workers."""
        self._encoder.reset(worker)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Return the compression state of each worker, copied."""
        return self._encoder.state_dict()

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Restore what `state_dict` returned."""
        self._encoder.load_state_dict(state)
