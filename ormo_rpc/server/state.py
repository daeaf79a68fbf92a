"""The state of a parameter server: everything that the future of a run depends on, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from ormo_rpc.server.assignments import Assignments
from ormo_rpc.server.buckets import Buckets

if TYPE_CHECKING:
    from ormo_rpc.server.parameter_server import ParameterServer

STATE_VERSION = 7
"""The format of `ParameterServer.state_dict`; another one is refused."""
_WITHOUT_RATES = 6
"""As 7, with outstanding tickets that have no learning rate: the scheduled one is taken."""
_OTHER_PLACES = 5
"""As 6, with buffers of replies at other places among their bytes."""


class Status(Enum):
    """The status of a run."""

    running = "running"
    completed = "completed"
    """Every ticket is committed, or the run was asked to end early and did."""
    diverged = "diverged"
    """The parameters are not finite, or a ticket's gradient was not, from two workers."""
    stopped = "stopped"
    """Asked to end before its time; outstanding tickets were not waited for."""


def save(server: ParameterServer, replies: bool = False) -> dict[str, Any]:
    """Return the state of a server, which `torch.load` reads with ``weights_only``; see `ParameterServer.state_dict`.

    Its tensors are on the server's device, where they are copied without a wait; what is saved is `host_copies.on_host` of it.
    """
    return {
        "paused": server.paused,
        "version": STATE_VERSION,
        "algorithm": server.algorithm.name,
        "scheduler": server.scheduler.name,
        "params": server.snapshots.exact(),
        "algorithm_state": {
            k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in server.algorithm.state_dict().items()
        },
        "buffers": server.buffers.state_dict(),
        "ema": None if server.ema is None else server.ema.state_dict(),
        "loss_scale": None if server.loss_scale is None else server.loss_scale.state_dict(),
        "status": server.status.value,
        "iteration": server.iteration,
        "incarnation": server.incarnation,
        "buckets": (server.buckets.current, server.buckets.room),
        "newest_bucket": server.newest_bucket,
        "assignments": server.assignments.state_dict(),
        **server.members.state_dict(replies=replies),
        "scheduler_state": server.scheduler.state_dict(),
        "scheduler_generator": server.scheduler.generator.get_state(),
    }


def load(server: ParameterServer, state: Mapping[str, Any]) -> None:
    """Give a server the state that `save` returned; see `ParameterServer.load_state_dict`."""
    mine = {
        "version": STATE_VERSION,
        "algorithm": server.algorithm.name,
        "scheduler": server.scheduler.name,
        "params": _layout({"params": server.params}),
        "buffers": _layout(server.buffers.state_dict()),
        "algorithm_state": _layout(server.algorithm.state_dict()),
    }
    theirs = {
        "version": _version(state),
        **{key: state.get(key) for key in ("algorithm", "scheduler")},
        "params": _layout({"params": state.get("params")}),
        "buffers": _layout(state.get("buffers", {})),
        "algorithm_state": _layout(state.get("algorithm_state", {})),
    }
    for key, expected in mine.items():
        if theirs[key] != expected:
            remedy = "build this server as that one was" if key != "version" else "load it with the ormo_rpc that saved it"
            raise ValueError(f"state of a server: {key}: got {theirs[key]}, expected {expected}; {remedy}")
    if server.assignments.total is not None and state["iteration"] > server.assignments.total:
        raise ValueError(f"state of a server: iteration: got {state['iteration']}, expected at most {server.assignments.total}")
    server.algorithm.params = server.algorithm.empty().copy_(state["params"])  # others may still read the former ones
    server.algorithm.load_state_dict(state["algorithm_state"])
    server.buffers.load_state_dict(state["buffers"])
    if server.ema is not None:
        server.ema.load_state_dict(state.get("ema"), server.params)
    if server.loss_scale is not None and state.get("loss_scale") is not None:
        server.loss_scale.load_state_dict(state["loss_scale"])
    server.iteration = state["iteration"]
    server.incarnation = state["incarnation"]
    server.buckets = Buckets(*state["buckets"])
    server.newest_bucket = state["newest_bucket"]
    total = server.assignments.total
    server.assignments = Assignments.from_state(state["assignments"], server.assignments.process_of)
    server.assignments.total = total
    diverged = state["status"] == Status.diverged.value
    server.status = Status.diverged if diverged else Status.completed if server.assignments.done else Status.running
    server.members.load_state_dict(state, server.params.device)
    server.paused = state["paused"]
    server.scheduler.load_state_dict(state["scheduler_state"])
    server.scheduler.generator.set_state(state["scheduler_generator"])
    server.started = True
    server.snapshots.invalidate()


def _version(state: Mapping[str, Any]) -> int | None:
    """Return the format of a state, which is the present one where nothing tells it from that."""
    version = state.get("version")
    if version == _OTHER_PLACES and any(reply["buffers"].numel() for reply in state.get("replies", ())):
        return version
    return STATE_VERSION if version in (_WITHOUT_RATES, _OTHER_PLACES) else version


def _layout(values: Mapping[str, Any]) -> dict[str, str]:
    """Return dtype and shape of each tensor by name, "number" for anything else.

    Names with a slash are left out: they belong to one worker each, and workers come and go.
    """
    return {
        k: f"{v.dtype} {tuple(v.shape)}" if isinstance(v, torch.Tensor) else "number"
        for k, v in sorted(values.items())
        if "/" not in k
    }
