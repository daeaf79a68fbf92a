"""The recipes of ``docs/extending.md`` as a module that can be imported, so that the page's own code is what is tested."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest

from tests.support.pages import ROOT, commands

PAGE = ROOT / "docs" / "extending.md"
MODULE = "my_module"
"""The page's name for the reader's own module."""
IMPORTS = """
from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from ormo_rpc import Algorithm, PushContext, Scheduler, option
from ormo_rpc.loggers import Logger, RunInfo, RunLog
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.options import not_negative
from ormo_rpc.transports.base import ServerSide, Transport, WorkerSide
from ormo_rpc.transports.stream.client import StreamWorkerSide
from ormo_rpc.transports.stream.server import StreamServerSide
from ormo_rpc.worker.heterogeneity import Heterogeneity
"""


def code() -> str:
    """The classes and functions of the page; none of them is registered, as that would last for the process."""
    blocks = re.findall(r"^```python\n((?:@|class |def ).*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return IMPORTS + "\n\n".join(re.sub(r"^@register\(.*\)\n", "", block, flags=re.MULTILINE) for block in blocks)


def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Make the page's module importable, and the programs in ``examples/``, for the length of a test."""
    made = ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, made)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    exec(compile(code(), str(PAGE), "exec"), vars(made))  # noqa: S102 - our own page
    return made


def overrides() -> list[list[str]]:
    """The overrides of each command of the page that names a part from outside."""
    found = [command for command in commands(PAGE.read_text("utf-8")) if any("_target_=" in word for word in command)]
    return [[word for word in command if "=" in word and not word.startswith("PYTHONPATH")] for command in found]
