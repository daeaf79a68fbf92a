"""The job of a loop of the user's own: the script's model, and numbers."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ormo_rpc.algorithms.groups import Groups
from ormo_rpc.compression import Allocate, PushFormat
from ormo_rpc.config.schema import Config
from ormo_rpc.data.own_loop import OwnLoopData
from ormo_rpc.errors import ConfigError, LoopMisused, one_line
from ormo_rpc.kernels.page_locked import zeros
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.options.imports import users_line
from ormo_rpc.own_loop.evaluation import OwnEvaluator, OwnFunction
from ormo_rpc.own_loop.worker import OwnWorker
from ormo_rpc.runtimes.configured import configured_format, configured_groups, configured_scale, configured_server
from ormo_rpc.runtimes.job_like import Exporter
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.events import Event
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.tasks.metrics import TaskMetric
from ormo_rpc.tasks.own_loop import own_metric
from ormo_rpc.worker.options import Autocast


class OwnModel:
    """The script's model, whose parameters belong to the run from `join` to the end of the loop.

    Args:
        module: The model, maybe compiled; then the module inside of it, which has the user's names, is what is trained.

    Attributes:
        flat: The model as a flat vector.
        fingerprint: The fingerprint of the model at the beginning.

    Raises:
        ConfigError: it cannot be trained.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        original = getattr(module, "_orig_mod", module)  # of torch.compile
        if not isinstance(original, torch.nn.Module):
            raise ConfigError(f"model: got {type(module).__name__} in join(), expected a torch.nn.Module")
        try:
            self.flat = FlatModel(original, _device(original))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.fingerprint = Fingerprint.of(original)
        self._parameters = _parameters(original)

    @property
    def class_name(self) -> str:
        """The name of its class."""
        return type(self.flat.module).__name__

    def refuse_changed(self) -> None:
        """Refuse to begin with other parameters than at `join`; their values may be others.

        Raises:
            LoopMisused: some have come, gone, or have another form; the message has the script's line.
        """
        now, then = _parameters(self.flat.module), self._parameters
        changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        if changed:
            raise LoopMisused(
                f"{users_line()}: model: the parameter {changed[0]} is another one than at join(), or has another dtype, "
                "device or requires_grad, expected the same to the end of the loop: do all that makes the model before join()"
            )

    def copy(self) -> FlatModel:
        """Make a copy, which nothing else uses.

        Raises:
            ConfigError: it cannot be copied.
        """
        try:
            return FlatModel(copy.deepcopy(self.flat.module), self.flat.device)
        except Exception as error:  # of the user's own module, or of a tensor in it
            raise ConfigError(f"model: {self.class_name} cannot be copied (copy.deepcopy): {one_line(error)}") from error

    def release(self, params: torch.Tensor | None = None, buffers: Mapping[str, torch.Tensor] | None = None) -> None:
        """Give the parameters memory of their own again, and take the gradients away.

        Args:
            params: The new parameters, shape (D,); by default the present ones.
            buffers: The new buffers; by default the present ones.
        """
        if params is not None:
            self.flat.bind(params.to(self.flat.device))
        if buffers is not None:
            self.flat.buffers.load(buffers)
        for parameter in self.flat.trainable.values():
            parameter.data = parameter.data.clone()
            parameter.grad = None


def _parameters(module: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """Identity, shape, dtype, device and requires_grad of each parameter, by name."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: (id(each), each.shape, each.dtype, each.device, each.requires_grad) for name, each in named}


def _device(module: torch.nn.Module) -> torch.device:
    """The device of the script's model.

    Raises:
        ConfigError: it is on several.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    first = tensors[0][1].device if tensors else torch.device("cpu")
    elsewhere = next((f"{name} on {tensor.device}" for name, tensor in tensors if tensor.device != first), None)
    if elsewhere is not None:
        raise ConfigError(f"model: got {tensors[0][0]} on {first} and {elsewhere} in join(), expected all on one device")
    return first if first.type == "cuda" else torch.device("cpu")


def with_every(config: Config, evaluate: OwnFunction | None) -> Config:
    """Return the configuration with the iterations between evaluations that the script asks for."""
    if evaluate is None or evaluate.every is None:
        return config
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, every=evaluate.every))


class OwnJob:
    """A run whose gradients come from a script (`LiveJob`).

    Args:
        config: The configuration, with the number of workers decided.
        model: The script's model.
        lr: The script's learning rate, a function of the iteration; by default that of the configuration.
        evaluate: The script's evaluation; None for none.
        trains_here: The script's loop uses the model in this process, so that everything else works on a copy.
    """

    SAME_MODEL: str = "make the model from a seed (torch.manual_seed) or from a file before join()"

    def __init__(
        self,
        config: Config,
        model: OwnModel,
        *,
        lr: Callable[[int], float] | None = None,
        evaluate: OwnFunction | None = None,
        trains_here: bool = False,
    ) -> None:
        data, total = config.dataset, config.train.max_iterations
        assert isinstance(data, OwnLoopData), "a loop of the user's own has it"
        assert total is not None, "join() has set it"
        self.config = config = with_every(config, evaluate)
        self.model = model
        self.total_tickets = total
        self.batches_per_epoch = data.tickets_per_epoch or total
        self.lr: Callable[[int], float] = lr or config.learning_rate(self.batches_per_epoch, total)
        self.guessing_loss = 0.0
        self.built: ParameterServer | None = None
        """The server, once there is one."""
        self._evaluate = evaluate
        self._push_format: PushFormat | None = None
        self._worker: OwnWorker | None = None
        self._lends_model = not trains_here
        """Nobody in this process uses the script's own model so far."""

    def server(self, record: Callable[[Event], None], clock: Callable[[], float]) -> ParameterServer:
        """Build the parameter server at iteration 0; it calls ``record`` with each event, timed by ``clock``."""
        model = self.model
        buffers = RunningBuffers(
            {name: each.cpu() for name, each in model.flat.buffers.tensors.items()}, model.flat.buffers.rules
        )
        # Of float16 alone nothing is scaled: the script does not say that its losses are.
        loss_scale = configured_scale(self.config, model.flat) if self.config.worker.autocast is Autocast.fp16 else None
        flat, groups = model.flat, self.groups()
        self.built = configured_server(self, flat.flat_params().cpu(), buffers, record, clock, groups, flat.params, loss_scale)
        return self.built

    def groups(self) -> Groups:
        """Return the parameter groups.

        Raises:
            ValueError: a pattern matches no parameter.
        """
        return configured_groups(self.config.train, self.model.flat.params)

    def device(self, process: int) -> torch.device:  # noqa: ARG002 - the script has chosen it
        """Return the device of the script's model."""
        return self.model.flat.device

    def worker(self, allocate: Allocate | None = None, device: torch.device | None = None) -> OwnWorker:  # noqa: ARG002 - as above
        """Make the worker that takes over the gradients of the script's model.

        Args:
            allocate: Makes the memory of its pushes; by default torch's, on the CPU.
            device: That of the script's model.
        """
        if self._worker is not None:  # which watches the same model
            self._worker.close()
        config = self.config
        self._worker = OwnWorker(
            self.model.flat,
            config.algorithm,
            groups=self.groups(),
            clip_norm=config.train.clip_norm,
            wire_format=self.push_format(),
            allocate=allocate or functools.partial(zeros, page_locked=self.model.flat.device.type == "cuda"),
        )
        return self._worker

    def close(self) -> None:
        """Leave the model without anything that watches it."""
        if self._worker is not None:
            self._worker.close()

    def push_format(self) -> PushFormat:
        """Return the wire form of pushes, which has room for the script's metrics."""
        if self._push_format is None:
            flat = self.model.flat
            self._push_format = configured_format(self.config, flat.params, flat.buffers.layout, flat.dtype, metrics=True)
        return self._push_format

    def fingerprint(self) -> Fingerprint:
        """Return what other processes and checkpoints must have in common with it; of the data nothing is known."""
        return self.model.fingerprint

    def initial_digest(self) -> None:
        """Initial parameters may differ: the server's count, and a script need not make its model from a seed."""

    def epoch(self, iteration: int) -> float:
        """Return the number of epochs that this many applied gradients are."""
        return iteration / self.batches_per_epoch

    def metric(self, name: str) -> TaskMetric:
        """Return the declaration of a metric in evaluations, of which only the name is known."""
        return own_metric(name, () if self._evaluate is None else self._evaluate.higher_is_better)

    def evaluator(self) -> OwnEvaluator | None:
        """Return the script's evaluation, with a model of its own; None where there is none."""
        return None if self._evaluate is None else OwnEvaluator(self.model.copy(), self._evaluate.function)

    def exporter(self) -> Exporter:
        """Return a function that makes a ``state_dict``, with the names of the script's model."""
        model = self.model.flat if self._lends_model else self.model.copy()  # threads of this process may export at a time
        self._lends_model = False

        def export(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
            return model.state_dict(state["params"], state["buffers"])

        return export
