"""Options that mean nothing to ``runtime=ddp``, or that it does not have: each is refused, none is ignored."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from ormo_rpc.config.runtimes import DdpRuntime
from ormo_rpc.config.schema import Config, Role
from ormo_rpc.config.training import LRScaling
from ormo_rpc.errors import ConfigError
from ormo_rpc.options import Part
from ormo_rpc.worker.options import Autocast

_NO_SERVER = "there is no server"
_UNUSED: dict[str, str] = {
    "algorithm": "its update is that of torch.optim.SGD, see train.momentum and runtime.nesterov",
    "scheduler": "it is synchronous",
    "compression": "gradients are reduced as they are",
    "wire.dtype": "gradients are reduced as they are",
    "wire.params": "parameters are not sent",
    "transport": "gradients are reduced over Gloo, or NCCL",
    "server.device": _NO_SERVER,
    "server.address": _NO_SERVER,
    "server.secret_file": _NO_SERVER,
    "worker.dummy": "each rank computes gradients",
    "worker.cuda_graph": "gradients are reduced while they are computed",
    "worker.prefetch": "the next round needs the step of this one",
    "train.grad_norm_limit": f"{_NO_SERVER}; train.clip_norm clips the mean gradient",
    "evaluate.ema": "the ranks keep no moving average",
    "checkpoint.every": "there is one checkpoint, at the end",
    "checkpoint.journal": _NO_SERVER,
    "checkpoint.resume": "a run of it begins anew",
}
"""Keys that must have their defaults, with the reason."""


def refuse_with_ddp(config: Config, runtime: DdpRuntime) -> None:
    """Refuse a configuration that ``runtime=ddp`` would not follow.

    Raises:
        ConfigError: a key has another value than its default; the message has the key.
    """
    default = Config()
    for key, why in _UNUSED.items():
        given, expected = _value(config, key), _value(default, key)
        allowed = (expected, "sync") if key == "scheduler" else (expected,)
        if given not in allowed:
            raise ConfigError(f"{key}: got {given} with runtime=ddp, expected {expected}: {why}")
    for message in _others(config, runtime):
        raise ConfigError(message)


def _value(config: Config, key: str) -> object:
    value = functools.reduce(getattr, key.split("."), config)
    return value.known_as if isinstance(value, Part) else getattr(value, "value", value)


def _others(config: Config, runtime: DdpRuntime) -> Iterator[str]:
    if config.role is not Role.all:
        yield f"role: got {config.role.value} with runtime=ddp, expected all: no worker can join such a run"
    if config.train.lr_scaling is LRScaling.mean:
        yield "train.lr_scaling: got mean with runtime=ddp, expected none: a round applies the mean of its gradients already"
    if config.worker.autocast is Autocast.fp16:
        yield "worker.autocast: got fp16 with runtime=ddp, expected none or bf16: the loss is not scaled"
    if runtime.nesterov and not config.train.momentum:
        yield "runtime.nesterov: got true with train.momentum=0, expected false, or a momentum"
