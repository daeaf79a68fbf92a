"""Asynchronous data-parallel training with ordered momentum: a parameter server and its workers."""

from __future__ import annotations

from ormo_rpc.algorithms import Algorithm, PullContext, PushContext
from ormo_rpc.algorithms.ormo import OrMo
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError, NonFiniteGradient, PushRefused, RunFailed, StaleSession
from ormo_rpc.messages import Push, Reply
from ormo_rpc.options import option, register
from ormo_rpc.schedulers import Scheduler
from ormo_rpc.server.build import build_server
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.train import train

__version__ = "0.2.0"

__all__ = [
    "Algorithm",
    "Config",
    "ConfigError",
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
    "option",
    "register",
    "train",
]
