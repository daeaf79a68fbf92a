"""The schema of a run: every key with its type, default, meaning and range.

Sections that are always there stand here, or in `training`, `evaluating` and `runtimes`; those of a group (algorithm, model,
...) are parts, each in its own file. The files in ``conf/`` are written from both, see `write_conf`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from enum import Enum

import torch

from ormo_rpc import devices
from ormo_rpc.algorithms import Algorithm
from ormo_rpc.algorithms.ormo import OrMo
from ormo_rpc.compression import Compression, NoCompression
from ormo_rpc.compression.wire_options import ParamsDtype, Wire, WireDtype
from ormo_rpc.config.evaluating import Checkpoint, Evaluate
from ormo_rpc.config.runtimes import ControlKind, DdpRuntime, LiveRuntime, RpcRuntime, Runtime, SimRuntime, ddp_rule
from ormo_rpc.config.saving import to_yaml
from ormo_rpc.config.training import LRScaling, Train
from ormo_rpc.control import torch_rpc
from ormo_rpc.data import DataSource, Digits
from ormo_rpc.errors import ConfigError
from ormo_rpc.loggers import Logger, WandbLogger
from ormo_rpc.models import MLP, Model
from ormo_rpc.options import Section, at_least_one, not_negative, option
from ormo_rpc.options.part import PACKAGES
from ormo_rpc.options.target import Target
from ormo_rpc.schedulers import Scheduler
from ormo_rpc.schedulers.async_ import Async
from ormo_rpc.server.lr_schedule import LearningRate, Unit
from ormo_rpc.server.own_lr_schedule import OwnSchedule
from ormo_rpc.tasks import Classification, Task
from ormo_rpc.transports.auto import Auto
from ormo_rpc.transports.base import Transport
from ormo_rpc.worker.heterogeneity import Heterogeneity, NoHeterogeneity
from ormo_rpc.worker.options import WorkerOptions


class Role(Enum):
    """The work of this launcher."""

    all = "all"
    """Start server and workers."""
    worker = "worker"
    """Start one worker for a server that runs already."""


@dataclass(frozen=True, kw_only=True)
class Server(Section):
    """The server's address and secret, and the place of its parameters."""

    PATH = "server"
    device: str = option(
        "cpu",
        "device of the parameters and of all that the algorithm keeps beside them: cpu, cuda or cuda:N, a GPU of the server's "
        "machine",
        valid=devices.is_fixed_device,
        expected="cpu, cuda or cuda:N",
    )
    address: str | None = option(
        None,
        "HOST:PORT where the server listens (by default on loopback) or, with role=worker, where to join; :PORT alone under "
        "torchrun",
    )
    secret_file: str | None = option(
        None, "file with the secret of the run; else ORMO_RPC_SECRET counts, else one is made for the run", path=True
    )
    public: bool = option(False, "allow server.address to be reachable from outside of a private network; see SECURITY.md")


@dataclass(frozen=True, kw_only=True)
class Replay(Section):
    """The run to compute again."""

    PATH = "replay"
    run: str | None = option(None, "the run directory to compute again, for runtime=replay", path=True)


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """The complete configuration of a run.

    Raises:
        ValueError: a value is out of range; the message has the full key.
    """

    workers: int | None = option(
        None,
        "number of workers; default 4, of n ranks (torchrun, srun) n - 1",
        valid=at_least_one,
        expected="a whole number >= 1",
    )
    role: Role = option(Role.all, "all (server and workers), or worker: join the run at server.address and work for it")
    seed: int = option(0, "seed of all random draws", valid=not_negative, expected="a whole number >= 0")
    optimized_metric: str | None = option(
        None,
        "entry of summary.json that a sweep searches by, and by which an evaluation is better; else val_loss, without "
        "dataset.validation test_loss",
    )
    algorithm: Algorithm = field(default_factory=OrMo)
    scheduler: Scheduler = field(default_factory=Async)
    dataset: DataSource = field(default_factory=Digits)
    model: Model = field(default_factory=MLP)
    task: Task = field(default_factory=Classification)
    heterogeneity: Heterogeneity = field(default_factory=NoHeterogeneity)
    train: Train = field(default_factory=Train)
    runtime: Runtime = field(default_factory=RpcRuntime)
    server: Server = field(default_factory=Server)
    wire: Wire = field(default_factory=Wire)
    worker: WorkerOptions = field(default_factory=WorkerOptions)
    compression: Compression = field(default_factory=NoCompression)
    transport: Transport = field(default_factory=Auto)
    replay: Replay = field(default_factory=Replay)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logger: Logger = field(default_factory=WandbLogger)

    @functools.cached_property
    def yaml(self) -> str:
        """Resolved YAML, which `load_config` reads; kept, because every checkpoint writes it."""
        return to_yaml(self)

    @property
    def searched_metric(self) -> str:
        """The entry of the summary that a sweep's job returns, and by which evaluations are compared."""
        return self.optimized_metric or ("val_loss" if self.dataset.has_validation else "test_loss")

    @property
    def keeps_best(self) -> bool:
        """True where the model of the best evaluation is kept."""
        return self.checkpoint.best or self.evaluate.patience is not None

    @property
    def num_processes(self) -> int:
        """The number of processes (or virtual machines) that work, once it is decided."""
        assert self.workers is not None, "workers is decided before anything starts"
        return self.workers

    @property
    def num_workers(self) -> int:
        """K at the start, the number of workers that the server sees: a process that works ahead counts once for each ticket.

        Process p has the workers p, p + num_processes, and so on.
        """
        return self.num_processes * (1 + self.worker.prefetch)

    @property
    def delay_within_round(self) -> bool:
        """True where all gradients of a step were taken at the same parameters, so that delays are places within a round."""
        return self.scheduler.WHOLE_ROUNDS or self.algorithm.FRESH or isinstance(self.runtime, DdpRuntime)

    def process_of(self, worker: int) -> int:
        """The process of a worker; an elastic one, whose number is K or more, has one of its own."""
        return worker % self.num_processes if worker < self.num_workers else worker

    def slowdown(self, worker: int, generator: torch.Generator) -> float:
        """The factor by which a worker's next ticket takes longer than its computation: that of its process."""
        return self.heterogeneity.slowdown(worker % self.num_processes, self.num_processes, generator)

    def mean_slowdown(self, worker: int) -> float:
        """The expected factor of a worker's tickets, that of its process: 1 over its lasting speed."""
        return self.heterogeneity.mean_slowdown(worker % self.num_processes, self.num_processes)

    @property
    def wire_form(self) -> str:
        """The form of pushes and parameters on the wire in a few words; ``exact`` where nothing is changed."""
        options = [(field.name, field.default, getattr(self.compression, field.name)) for field in fields(self.compression)]
        words = [self.compression.name] * (self.compression.name != "none")
        words += [f"{name}={value}" for name, default, value in options if value != default]
        words += [self.wire.dtype.value] * (self.wire.dtype is not WireDtype.float32)
        words += [f"params={self.wire.params.value}"] * (self.wire.params is not ParamsDtype.float32)
        return " ".join(words) or "exact"

    @property
    def live(self) -> LiveRuntime:
        """The options of a runtime of processes; only with one."""
        assert isinstance(self.runtime, LiveRuntime)
        return self.runtime

    @property
    def ddp(self) -> DdpRuntime:
        """The options of the runtime of torch's DistributedDataParallel; only with ``runtime=ddp``."""
        assert isinstance(self.runtime, DdpRuntime)
        return self.runtime

    @property
    def update_rule(self) -> tuple[str, str]:
        """The names of algorithm and scheduler, as runs are described by them; ``runtime=ddp`` is both by itself."""
        if isinstance(self.runtime, DdpRuntime):
            return ddp_rule(nesterov=self.runtime.nesterov)
        return self.algorithm.name, self.scheduler.name

    @property
    def rpc(self) -> RpcRuntime:
        """The options of the RPC runtime; only with ``runtime=rpc``."""
        assert isinstance(self.runtime, RpcRuntime)
        return self.runtime

    @property
    def sim(self) -> SimRuntime:
        """The options of the simulator; only with ``runtime=sim``."""
        assert isinstance(self.runtime, SimRuntime)
        return self.runtime

    @property
    def control(self) -> str:
        """The carrier of the control plane that is used: ``rpc`` or ``socket``."""
        if self.rpc.control is not ControlKind.auto:
            return self.rpc.control.value
        return "rpc" if self.may_have_agents and not torch_rpc.unavailable() else "socket"

    @property
    def may_have_agents(self) -> bool:
        """True where the processes have agents of torch.distributed.rpc, if torch has it, which is not looked at."""
        kind = self.rpc.control
        return kind is ControlKind.rpc or (kind is ControlKind.auto and not self.transport.AVOIDS_RPC)

    def refuse_unavailable(self, *, works: bool = True) -> None:
        """Refuse what this machine, or its build of PyTorch, does not support.

        Args:
            works: This machine has workers, not the server alone.

        Raises:
            ConfigError: the device, the transport, or the carrier of the control plane is such a one.
        """
        if works and not self.worker.dummy:
            devices.check(self.worker.device, "worker.device")
        if not isinstance(self.runtime, RpcRuntime):
            return
        if self.transport.BETWEEN_GPUS:
            self._refuse_off_gpus()
        if reason := self.transport.unavailable():
            raise ConfigError(f"transport: got {self.transport.name}, which this machine does not support: {reason}")
        if self.control == "rpc" and (reason := torch_rpc.unavailable()):
            raise ConfigError(f"runtime.control: got rpc, expected auto or socket: {reason}")

    def _refuse_off_gpus(self) -> None:
        """Refuse what a transport between GPUs cannot carry.

        Raises:
            ConfigError: a side is on the CPU, or pushes are unpacked there.
        """
        name = self.transport.name
        for key, device in (("server.device", self.server.device), ("worker.device", self.worker.device)):
            if device == "cpu":
                raise ConfigError(f"{key}: got cpu, expected cuda or cuda:N with transport={name}, or take transport=auto")
        if not isinstance(self.compression, NoCompression):
            raise ConfigError(
                f"compression: got {self.compression.name}, which is unpacked on the CPU, expected none with transport={name}, "
                f"or take transport=auto"
            )

    @property
    def lacks_rpc(self) -> bool:
        """True where the control plane would be torch.distributed.rpc, if torch had it."""
        return self.rpc.control is ControlKind.auto and not self.transport.AVOIDS_RPC and bool(torch_rpc.unavailable())

    def learning_rate(self, batches_per_epoch: int, total_tickets: int) -> LearningRate:
        """The scheduled learning rate of this run, in iterations."""
        train, scale = self.train, 1 / self.num_workers if self.train.lr_scaling is LRScaling.mean else 1.0
        shape = train.lr_schedule
        if isinstance(shape, Target):
            per_epoch = train.lr_schedule_unit is Unit.epoch
            shape = OwnSchedule(
                target=shape, base=train.lr, total=total_tickets, batches_per_epoch=batches_per_epoch, per_epoch=per_epoch
            )
        return LearningRate(
            base=train.lr * scale,
            shape=shape,
            scale=scale,
            milestones=tuple(round(epoch * batches_per_epoch, 6) for epoch in self.train.lr_milestones),
            gamma=self.train.lr_gamma,
            warmup=round(self.train.warmup_epochs * batches_per_epoch),
            total=total_tickets,
        )


GROUPS: tuple[str, ...] = tuple(field.name for field in fields(Config) if field.name in PACKAGES)
"""The sections that are parts: chosen by name or, from outside of the package, by ``_target_``."""
