"""Asynchronous data-parallel training with ordered momentum: a parameter server and its workers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ormo_rpc.algorithms import Algorithm, PullContext, PushContext
    from ormo_rpc.algorithms.ormo import OrMo
    from ormo_rpc.config.schema import Config
    from ormo_rpc.data.tickets import Epochs
    from ormo_rpc.errors import ConfigError, NonFiniteGradient, PushRefused, RunFailed, StaleSession
    from ormo_rpc.messages import Push, Reply
    from ormo_rpc.options import option, register
    from ormo_rpc.own_loop.join import join
    from ormo_rpc.schedulers import Scheduler
    from ormo_rpc.server.build import build_server
    from ormo_rpc.server.parameter_server import ParameterServer
    from ormo_rpc.training import train

__version__ = "0.2.0"

__all__ = [
    "Algorithm",
    "Config",
    "ConfigError",
    "Epochs",
    "NonFiniteGradient",
    "OrMo",
    "ParameterServer",
    "PullContext",
    "Push",
    "PushContext",
    "PushRefused",
    "Reply",
    "RunFailed",
    "Scheduler",
    "StaleSession",
    "__version__",
    "build_server",
    "join",
    "option",
    "register",
    "train",
]

_HOMES = {
    "algorithms": ("Algorithm", "PullContext", "PushContext"),
    "algorithms.ormo": ("OrMo",),
    "config.schema": ("Config",),
    "data.tickets": ("Epochs",),
    "errors": ("ConfigError", "NonFiniteGradient", "PushRefused", "RunFailed", "StaleSession"),
    "messages": ("Push", "Reply"),
    "options": ("option", "register"),
    "own_loop.join": ("join",),
    "schedulers": ("Scheduler",),
    "server.build": ("build_server",),
    "server.parameter_server": ("ParameterServer",),
    "training": ("train",),
}
"""The modules of the public names, imported at the first use of either: the command line has yet to make PyTorch lazy."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(importlib.import_module(f"ormo_rpc.{module}"), name)
            return globals()[name]
    if name in {module.partition(".")[0] for module in _HOMES}:
        return importlib.import_module(f"ormo_rpc.{name}")
    raise AttributeError(f"module 'ormo_rpc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
