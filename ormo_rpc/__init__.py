"""Asynchronous data-parallel training with ordered momentum: a parameter server and its workers."""

from __future__ import annotations

from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError, NonFiniteGradient, PushRefused, StaleSession
from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes import RunFailed
from ormo_rpc.server.build import build_server
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.train import train

__version__ = "0.2.0"

__all__ = [
    "Config",
    "ConfigError",
    "NonFiniteGradient",
    "ParameterServer",
    "Push",
    "PushRefused",
    "Reply",
    "RunFailed",
    "StaleSession",
    "__version__",
    "build_server",
    "train",
]
