"""Asynchronous data-parallel training with ordered momentum: a parameter server and its workers."""

from __future__ import annotations

from ormo_rpc.build import build_server
from ormo_rpc.config import Config, ConfigError
from ormo_rpc.errors import NonFiniteGradient, PushRefused, Rejoin
from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes import RunFailed
from ormo_rpc.server import ParameterServer
from ormo_rpc.train import train

__all__ = [
    "Config",
    "ConfigError",
    "NonFiniteGradient",
    "ParameterServer",
    "Push",
    "PushRefused",
    "Rejoin",
    "Reply",
    "RunFailed",
    "build_server",
    "train",
]
