"""The options of each runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ormo_rpc.options import Part, at_least_one, not_negative, option, positive, register
from ormo_rpc.worker.faults import are_faults

MAX_ROUND_SECONDS = 1e6
"""Nearly twelve days: a longer wait is none that anybody wants, and at some length none that Gloo can count."""


def _are_times(value: Mapping[int, float]) -> bool:
    return all(worker >= 0 and not_negative(seconds) for worker, seconds in value.items())


class ControlKind(Enum):
    """The carriers of the control plane."""

    auto = "auto"
    """torch.distributed.rpc, except where the transport is for networks that one does not trust, or torch has no RPC."""
    rpc = "rpc"
    """torch.distributed.rpc: each process has an agent, and calls go to the owner of the server's RRef."""
    socket = "socket"
    """The connection of each worker's lease; no process has an agent of torch's."""


class StartKind(Enum):
    """The ways in which processes are started."""

    auto = "auto"
    """Forked from one that has all imports, data and model, where that is safe; else spawned."""
    fork = "fork"
    """Forked, or the run is refused."""
    spawn = "spawn"
    """Each by itself."""


class Shares(Enum):
    """The division of the samples of a synchronous round."""

    equal = "equal"
    """Each worker has the samples of one ticket."""
    proportional = "proportional"
    """Each worker has as many as its lasting speed allows."""


class GradientKind(Enum):
    """The gradients of virtual workers."""

    real = "real"
    """Gradients of the model on the data."""
    quadratic = "quadratic"
    """Gradients of a noisy ill-conditioned quadratic: no data, no model."""
    noise = "noise"
    """Noise alone, where nothing but the schedule is of interest."""


@dataclass(frozen=True, kw_only=True)
class Runtime(Part):
    """The options that every runtime has."""

    PATH = "runtime"
    threads: int = option(
        1, "threads of each process for tensor operations", valid=at_least_one, expected="a whole number >= 1"
    )
    min_workers: int = option(
        1, "while fewer workers have joined, no ticket is issued", valid=at_least_one, expected="a whole number >= 1"
    )


@dataclass(frozen=True, kw_only=True)
class LiveRuntime(Runtime):
    """The options of runtimes whose runs are processes."""

    start_timeout_seconds: float = option(
        180.0, "time for all processes to start and find one another", valid=positive, expected="a finite number > 0"
    )
    stop_timeout_seconds: float = option(
        10.0, "time for a run to shut down when it is interrupted", valid=positive, expected="a finite number > 0"
    )
    worker_timeout_seconds: float = option(
        15.0,
        "silence after which a process counts as dead; it sends ten heartbeats in that time",
        valid=positive,
        expected="a finite number > 0",
    )
    start: StartKind = option(
        StartKind.auto,
        "processes are forked from one that has all imports, data and model (fork) or started by themselves (spawn); auto: "
        "fork where that is safe",
    )
    interface: str | None = option(
        None,
        "under torchrun and the like: network interface between the nodes, such as eth0, in place of a host in server.address; "
        "loopback when all is on one machine",
    )

    @property
    def heartbeat_seconds(self) -> float:
        """The time between two heartbeats: ten of them have to be missed before a process counts as dead."""
        return self.worker_timeout_seconds / 10


@register("rpc")
@dataclass(frozen=True, kw_only=True)
class RpcRuntime(LiveRuntime):
    """Processes on this machine, or as ranks of torchrun or srun on many, connected as ``transport`` says."""

    rpc_timeout_seconds: float = option(
        30.0,
        "time for each call of the control plane, and for opening a connection; with transport=rpc, until an unanswered push "
        "is repeated",
        valid=positive,
        expected="a finite number > 0",
    )
    ticket_timeout_seconds: float = option(
        900.0,
        "time after which a worker that has not pushed for its ticket is evicted",
        valid=positive,
        expected="a finite number > 0",
    )
    regroup_seconds: float = option(
        10.0,
        "time that a restarted server waits for all workers before it continues with those that have joined again",
        valid=not_negative,
        expected="a finite number >= 0",
    )
    max_restarts: int = option(5, "restarts of each process that dies", valid=not_negative, expected="a whole number >= 0")
    restart_backoff_seconds: float = option(
        0.5,
        "pause before the first restart of a process; it doubles each time, up to 30",
        valid=not_negative,
        expected="a finite number >= 0",
    )
    max_not_finite: int = option(
        10,
        "consecutive gradients that are not finite after which a worker is banned",
        valid=at_least_one,
        expected="a whole number >= 1",
    )
    control: ControlKind = option(
        ControlKind.auto,
        "carrier of joining, leaving and opening data paths: rpc (torch.distributed.rpc), socket (without any agent of "
        "torch's), or auto, which is socket with transport=tcp or where torch has no RPC, else rpc",
    )
    faults: list[str] = option(
        [],
        "for tests: faults to inject, such as kill@1:20 or stop@server:100 (see ormo_rpc/worker/faults.py)",
        valid=are_faults,
        expected="words KIND@WORKER:PUSH[:AMOUNT], kinds kill, stop, delay, drop_reply, corrupt",
    )


def ddp_rule(*, nesterov: bool) -> tuple[str, str]:
    """The names of algorithm and scheduler by which a run of ``runtime=ddp`` is described."""
    return "ddp_nesterov" if nesterov else "ddp", "sync"


@register("ddp")
@dataclass(frozen=True, kw_only=True)
class DdpRuntime(LiveRuntime):
    """One process for each worker, torch's DistributedDataParallel over Gloo or NCCL: synchronous training without a server.

    ``algorithm`` and ``scheduler`` do not count: the update is that of torch.optim.SGD on the mean of a round's gradients.
    """

    nesterov: bool = option(False, "Nesterov momentum in place of heavy ball")
    shares: Shares = option(
        Shares.equal,
        "equal: a rank has the samples of one ticket in each round; proportional: the samples of a round are divided by the "
        "lasting speeds that heterogeneity gives the ranks",
    )
    find_unused_parameters: bool = option(False, "for models that do not use each of their parameters in every pass")
    round_timeout_seconds: float = option(
        900.0,
        "time after which ranks give up one that does not come to a round; a rank that has died is noticed at once",
        valid=lambda v: 0 < v <= MAX_ROUND_SECONDS,
        expected=f"a number > 0, at most {MAX_ROUND_SECONDS:g}",
    )


@register("sim")
@dataclass(frozen=True, kw_only=True)
class SimRuntime(Runtime):
    """A virtual cluster in this process: the same server and gradients, virtual time."""

    compute_seconds: float = option(
        0.1,
        "virtual seconds that a worker computes for a batch, before heterogeneity; a ticket of H local steps has H",
        valid=positive,
        expected="a finite number > 0",
    )
    latency_seconds: list[float] = option(
        [0.0],
        "one way, per worker (worker k takes entry k modulo the length)",
        valid=lambda v: bool(v) and all(map(not_negative, v)),
        expected="at least one finite number >= 0",
    )
    region_latency_seconds: float = option(
        0.0,
        "one way, between a region's server and its workers, where workers are regions",
        valid=not_negative,
        expected="a finite number >= 0",
    )
    bandwidth: list[float] = option(
        [],
        "bytes per second, per worker in the same way; empty: no limit",
        valid=lambda v: all(map(positive, v)),
        expected="finite numbers > 0",
    )
    service_seconds: float = option(
        0.0, "virtual seconds that the server takes for a push", valid=not_negative, expected="a finite number >= 0"
    )
    shares: Shares = option(
        Shares.equal,
        "equal: each worker computes the samples of a ticket; proportional: times are those of rounds of all workers whose "
        "samples are divided by the lasting speeds that heterogeneity gives them",
    )
    joins: dict[int, float] = option(
        {},
        "further workers and when they join, in virtual seconds",
        valid=_are_times,
        expected="whole numbers >= 0 with finite times >= 0",
    )
    leaves: dict[int, float] = option(
        {},
        "workers that leave, and when, in virtual seconds",
        valid=_are_times,
        expected="whole numbers >= 0 with finite times >= 0",
    )
    gradient: GradientKind = option(GradientKind.real, "real; for very many workers: quadratic (synthetic), or noise alone")
    dimension: int = option(1000, "parameters of the quadratic", valid=at_least_one, expected="a whole number >= 1")
    condition: float = option(100.0, "condition number of the quadratic", valid=at_least_one, expected="a finite number >= 1")
    noise: float = option(
        0.1, "standard deviation of its gradient's noise, per coordinate", valid=not_negative, expected="a finite number >= 0"
    )


@register("replay")
@dataclass(frozen=True, kw_only=True)
class ReplayRuntime(Runtime):
    """A recorded run computed again, bit for bit: replay.run=RUN_DIRECTORY."""
