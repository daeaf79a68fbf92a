"""The options of training: a run's length, its batches and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from ormo_rpc.options import Section, at_least_one, not_negative, option, positive
from ormo_rpc.options.target import Target
from ormo_rpc.server.lr_schedule import Shape, Unit
from ormo_rpc.server.validation import NormLimit, NormPolicy


class LRScaling(Enum):
    """The scale of the learning rate."""

    none = "none"
    """As given: a synchronous round applies the sum of its gradients, as in arXiv 2407.19234."""
    mean = "mean"
    """Divided by the number of workers: a synchronous round applies their mean."""


@dataclass(frozen=True, kw_only=True)
class Train(Section):
    """The length of a run, its batches and its learning rate."""

    PATH = "train"
    epochs: int = option(
        30, "end after this many passes over the training data", valid=at_least_one, expected="a whole number >= 1"
    )
    max_iterations: int | None = option(
        None, "end after this many applied gradients", valid=at_least_one, expected="a whole number >= 1"
    )
    max_seconds: float | None = option(None, "end after this many seconds", valid=positive, expected="a finite number > 0")
    divergence_factor: float | None = option(
        3.0,
        "diverged: the last training loss is above this many times the first one, and that of guessing; null: never",
        valid=lambda v: v is None or 1 < v < math.inf,
        expected="a finite number > 1, or null",
    )
    batch_size: int = option(32, "samples per gradient", valid=at_least_one, expected="a whole number >= 1")
    lr: float = option(0.02, "learning rate eta, to be tuned per algorithm", valid=positive, expected="a finite number > 0")
    lr_schedule: Shape | Target = option(
        Shape.constant,
        "constant, step (times lr_gamma at each of lr_milestones), cosine, or _target_: a function or scheduler of torch",
    )
    lr_schedule_unit: Unit = option(Unit.iteration, "a step of lr_schedule._target_: iteration or epoch")
    lr_milestones: list[float] = option(
        [],
        "epochs at which step acts",
        valid=lambda v: all(e > 0 for e in v) and sorted(v) == list(v),
        expected="rising epochs > 0",
    )
    lr_gamma: float = option(0.1, "factor of step", valid=positive, expected="a finite number > 0")
    lr_scaling: LRScaling = option(LRScaling.none, "none, or mean: divide the learning rate by the number of workers")
    warmup_epochs: float = option(0.0, "epochs of linear warm-up", valid=not_negative, expected="a finite number >= 0")
    momentum: float = option(
        0.9, "momentum beta, for algorithms that have one", valid=lambda v: 0 <= v < 1, expected="a number in [0, 1)"
    )
    weight_decay: float = option(
        0.0,
        "weight decay lambda, part of the worker's gradient (algorithm=adamw: decoupled, on the server)",
        valid=not_negative,
        expected="a finite number >= 0",
    )
    decay_1d: bool = option(True, "false: no weight decay on parameters of fewer than two dimensions, as biases and norms")
    no_decay: list[str] = option([], "patterns of names of parameters without weight decay: [*.embedding.*]")
    lr_factors: dict[str, float] = option(
        {},
        "factors of the learning rate by patterns of parameter names, {head.*: 10}; where several match, their product; "
        "0 keeps parameters as they are",
        valid=lambda v: all(not_negative(factor) for factor in v.values()),
        expected="finite factors >= 0",
    )
    clip_norm: float | None = option(
        None, "clip each gradient to this global norm, before weight decay", valid=positive, expected="a finite number > 0"
    )
    grad_norm_limit: float | None = option(
        None,
        "the server's limit to the global norm of a push; none by default",
        valid=positive,
        expected="a finite number > 0",
    )
    grad_norm_policy: NormPolicy = option(
        NormPolicy.clip, "for a push above the limit: clip it, or refuse it and assign its ticket to another worker"
    )

    @property
    def norm_limit(self) -> NormLimit | None:
        """The server's limit to the norm of a push."""
        return None if self.grad_norm_limit is None else NormLimit(self.grad_norm_limit, self.grad_norm_policy)
