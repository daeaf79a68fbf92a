"""A synthetic job: the noisy quadratic in place of a model and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ormo_rpc.compression import PushFormat
from ormo_rpc.config.runtimes import GradientKind
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.models.flat import Layout
from ormo_rpc.runtimes.configured import configured_format, configured_groups, configured_region, configured_server
from ormo_rpc.runtimes.job_like import Evaluate, Exporter
from ormo_rpc.runtimes.simulator.synthetic import Quadratic
from ormo_rpc.server.buffer_layout import BufferLayout
from ormo_rpc.server.events import Event
from ormo_rpc.server.lr_schedule import LearningRate
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.region import RegionServer
from ormo_rpc.tasks.metrics import TaskMetric, metric_named

BATCHES_PER_EPOCH = 1000
"""Iterations that count as an epoch, since there is no data."""


class SyntheticJob:
    """A job without model, data and evaluations; the training loss is the quadratic itself.

    Args:
        config: The configuration, with the number of workers decided.

    Raises:
        ConfigError: ``train.max_iterations`` is not set, or names of parameters are given, which it has none of.
    """

    def __init__(self, config: Config) -> None:
        if config.train.max_iterations is None:
            raise ConfigError("train.max_iterations: got None, expected a number: the quadratic has no epochs")
        for key in ("no_decay", "lr_factors"):
            if getattr(config.train, key):
                raise ConfigError(
                    f"train.{key}: got {getattr(config.train, key)}, expected none: the quadratic has no named parameters"
                )
        self.config = config
        self.total_tickets = config.train.max_iterations
        self.batches_per_epoch = BATCHES_PER_EPOCH
        self.lr: LearningRate = config.learning_rate(self.batches_per_epoch, self.total_tickets)
        self.guessing_loss = 0.0

    def region(self, params: torch.Tensor) -> RegionServer:
        """Build the server of a region at the parameters that its first reply has, one or more vectors of D."""
        return configured_region(self.config, params)

    def source(self) -> Quadratic:
        """Build the source of gradients."""
        sim = self.config.sim
        condition = sim.condition if sim.gradient is GradientKind.quadratic else None
        return Quadratic(
            sim.dimension,
            condition,
            sim.noise,
            self.config.algorithm,
            momentum=self.config.train.momentum,
            seed=self.config.seed,
            wire_format=self.push_format(),
            clip_norm=self.config.train.clip_norm,
            groups=configured_groups(self.config.train, self._layout()),
        )

    def push_format(self) -> PushFormat:
        """Return the wire form of pushes; they have no matrix, so powersgd sends them as they are."""
        return configured_format(self.config, self._layout(), BufferLayout({}), torch.float32)

    def _layout(self) -> Layout:
        return Layout({"x": torch.empty(self.config.sim.dimension)})

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of a model that has the quadratic's vector as its only parameter."""
        return Fingerprint(parameters={"x": f"float32 ({self.config.sim.dimension},)"})

    def server(self, record: Callable[[Event], None], clock: Callable[[], float]) -> ParameterServer:
        """Build the parameter server at iteration 0; it calls ``record`` with each event, timed by ``clock``."""
        layout = self._layout()
        groups = configured_groups(self.config.train, layout)
        return configured_server(self, self.source().start(), None, record, clock, groups, layout)

    def epoch(self, iteration: int) -> float:
        """Return the number of epochs, of `BATCHES_PER_EPOCH` iterations each."""
        return iteration / self.batches_per_epoch

    def evaluator(self) -> Evaluate | None:
        """Return None: there is no test set."""
        return None

    def metric(self, name: str) -> TaskMetric:
        """Return what the name of a metric tells of it."""
        return metric_named(name)

    def exporter(self) -> Exporter:
        """Return a function that makes a ``state_dict`` of the parameters under one name."""

        def export(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
            return {"x": state["params"].clone()}

        return export
