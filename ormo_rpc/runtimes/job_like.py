"""The contract of a job, as sessions and the processes of a run use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from ormo_rpc.algorithms.groups import Groups
from ormo_rpc.compression import PushFormat
from ormo_rpc.config.schema import Config
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.server.events import Event
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.tasks.metrics import TaskMetric
from ormo_rpc.worker.evaluation import Evaluation

Evaluate = Callable[["torch.Tensor", Mapping[str, "torch.Tensor"]], Evaluation]
"""Evaluates parameters, shape (D,), and buffers by name."""
Exporter = Callable[[Mapping[str, Any]], dict[str, "torch.Tensor"]]
"""Makes a ``state_dict`` of plain PyTorch from a server's state."""


class JobLike(Protocol):
    """A job as a session uses it: training on data, or a synthetic one.

    Attributes:
        config: The configuration, with the number of workers decided.
        total_tickets: T, the number of gradients that the run applies.
        batches_per_epoch: Tickets in an epoch.
        lr: The learning rate at an iteration.
        guessing_loss: The mean loss of a model that has learnt nothing; 0 where it is unknown.
    """

    config: Config
    total_tickets: int
    batches_per_epoch: int
    lr: Callable[[int], float]
    guessing_loss: float

    def server(self, record: Callable[[Event], None], clock: Callable[[], float]) -> ParameterServer:
        """Build the parameter server at iteration 0; it calls ``record`` with each event, timed by ``clock``."""
        ...

    def push_format(self) -> PushFormat:
        """Return the wire form of its pushes."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Return what other processes, checkpoints and a replay must have in common with it."""
        ...

    def epoch(self, iteration: int) -> float:
        """Return the number of epochs that this many applied gradients are."""
        ...

    def evaluator(self) -> Evaluate | None:
        """Return a function that evaluates parameters; None where there is no test set."""
        ...

    def metric(self, name: str) -> TaskMetric:
        """Return the declaration of a metric by its name in evaluations, from which that of an unknown one is guessed."""
        ...

    def exporter(self) -> Exporter:
        """Return a function that makes a ``state_dict`` of plain PyTorch."""
        ...


class LiveJob(JobLike, Protocol):
    """A job as the process of a live run's server uses it."""

    def initial_digest(self) -> Callable[[], bytes] | None:
        """Return a function, for any thread, that hashes the initial parameters; None where other processes may differ."""
        ...

    def groups(self) -> Groups:
        """Return the parameter groups.

        Raises:
            ValueError: a pattern matches no parameter.
        """
        ...
