"""The direction of imports: the mathematics knows no transport, and each outside library has its one place."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import ormo_rpc

PACKAGE = Path(ormo_rpc.__file__).parent
SOURCES = {
    ".".join(("ormo_rpc", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
}

MATHEMATICS = (
    "ormo_rpc.algorithms",
    "ormo_rpc.schedulers",
    "ormo_rpc.buckets",
    "ormo_rpc.buffers",
    "ormo_rpc.learning_rate",
    "ormo_rpc.kernels.steps",
    "ormo_rpc.kernels.kernel",
)
CORE = (
    "ormo_rpc.server",
    "ormo_rpc.server_state",
    "ormo_rpc.ledger",
    "ormo_rpc.checks",
    "ormo_rpc.messages",
    "ormo_rpc.errors",
    "ormo_rpc.records",
    "ormo_rpc.build",
)
TRANSPORT = (
    "asyncio concurrent hydra matplotlib multiprocessing omegaconf ormo_rpc.runtimes queue signal socket subprocess threading "
    "time torch.distributed torch.futures tqdm wandb"
).split()

ONLY_IN = {
    "torch.distributed": ("ormo_rpc.runtimes.rpc",),
    # An agent, and what it unpickles: only where wire.transport=uv.
    "torch.distributed.rpc": tuple(
        f"ormo_rpc.runtimes.rpc.{name}" for name in ("agent", "handlers", "rpc_calls", "unpickling")
    ),
    "torch.futures": ("ormo_rpc.runtimes.rpc.handlers",),
    "hydra": ("ormo_rpc.cli",),
    "wandb": ("ormo_rpc.dashboards",),
    "tqdm": ("ormo_rpc.dashboards", "ormo_rpc.runtimes.replay"),
    "omegaconf": ("ormo_rpc.cli", "ormo_rpc.config", "ormo_rpc.runtimes.rpc.loop"),
    "matplotlib": ("ormo_rpc.report",),
    "sklearn": ("ormo_rpc.data",),
    "torchvision": ("ormo_rpc.data", "ormo_rpc.models"),
    # Layers of our own: who may look at what lies above.
    "ormo_rpc.runtimes": ("ormo_rpc", "ormo_rpc.cli", "ormo_rpc.train", "ormo_rpc.runtimes"),
    "ormo_rpc.runtimes.rpc": (),  # chosen by its name
    "ormo_rpc.cli": ("ormo_rpc.train",),
    "ormo_rpc.session": ("ormo_rpc.runtimes",),
    "ormo_rpc.dashboards": ("ormo_rpc.session",),
    "ormo_rpc.recorder": ("ormo_rpc.dashboards", "ormo_rpc.session"),
}
"""Who may import what, besides the thing itself."""

UP_TO_THE_WORKER = (*MATHEMATICS, *CORE, "ormo_rpc.worker", "ormo_rpc.data", "ormo_rpc.models", "ormo_rpc.flat")


@functools.cache
def imports(source: str, module: str) -> frozenset[str]:
    """Every module that a source imports anywhere, also within functions; ``from a import b`` counts as ``a`` and ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def within(module: str, packages: Iterable[str]) -> bool:
    """Whether a module is one of the packages, or inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def reachable(module: str, sources: dict[str, str]) -> set[str]:
    """All that a module imports, directly or through modules of ours (but not through the package's own ``__init__``)."""
    found: set[str] = set()
    ahead = [module]
    while ahead:
        here = ahead.pop()
        new = imports(sources[here], here) - found
        found |= new
        ahead += [name for name in new if name in sources and name != "ormo_rpc"]
    return found


def faults(sources: dict[str, str]) -> list[str]:
    """Every forbidden arrow, as a line ``from -> to``."""
    found: list[str] = []
    for module, source in sources.items():
        direct = imports(source, module)
        if within(module, MATHEMATICS):
            allowed = {*MATHEMATICS, "ormo_rpc.options", "torch", *sys.stdlib_module_names}
            found += [f"{module} -> {name}" for name in direct if not within(name, allowed) and name != "ormo_rpc"]
        if within(module, UP_TO_THE_WORKER):
            # The data sets are files, downloaded once: they alone know of locks on them, but not of threads or clocks either.
            found += [f"{module} -> {name}" for name in reachable(module, sources) if within(name, TRANSPORT)]
        for thing, places in ONLY_IN.items():
            at_home = within(module, (thing,)) or module in places or within(module, [p for p in places if p != "ormo_rpc"])
            found += [f"{module} -> {name}" for name in direct if within(name, (thing,)) and not at_home]
    return sorted(set(found))


def test_every_arrow_points_down() -> None:
    assert len(SOURCES) > 40
    assert faults(SOURCES) == []


@pytest.mark.parametrize("runtime", ["ormo_rpc.runtimes.sim", "ormo_rpc.runtimes.replay"])
def test_the_runtimes_of_one_process_know_no_network(runtime: str) -> None:
    modules = [module for module in SOURCES if within(module, (runtime,))]
    assert runtime in modules
    network = ("torch.distributed", "torch.futures", "ormo_rpc.runtimes.rpc", "ormo_rpc.runtimes.supervisor", "socket")
    assert not [(module, name) for module in modules for name in reachable(module, SOURCES) if within(name, network)]


def test_every_place_that_is_named_exists_and_uses_what_it_may() -> None:
    assert {*MATHEMATICS, *CORE} <= SOURCES.keys()
    for thing, places in ONLY_IN.items():
        for place in places:
            inside = [name for name in SOURCES if name == place or (place != "ormo_rpc" and within(name, (place,)))]
            used = {name for module in inside for name in imports(SOURCES[module], module)}
            assert any(within(name, (thing,)) for name in used), f"{place} does not import {thing}"


def test_a_planted_import_is_found() -> None:
    planted = {
        "ormo_rpc.algorithms.ormo": "from ormo_rpc import server",
        "ormo_rpc.schedulers": "import numpy",
        "ormo_rpc.buckets": "from threading import Lock",
        "ormo_rpc.server": "import time",
        "ormo_rpc.ledger": "def f():\n    from torch.distributed import rpc",
        "ormo_rpc.checks": "from ormo_rpc.runtimes import supervisor",
        "ormo_rpc.worker": "import torch.distributed.rpc as rpc",
        "ormo_rpc.recorder": "import wandb",
        "ormo_rpc.runtimes.sim": "from ormo_rpc.runtimes.rpc import service",
        "ormo_rpc.runtimes.replay": "import torch.distributed.rpc",
        "ormo_rpc.runtimes.rpc.streams": "import torch.distributed.rpc as rpc",
        "ormo_rpc.runtimes.rpc.service": "from torch.distributed import rpc",
        "ormo_rpc.runtimes.rpc.door": "from torch.futures import Future",
        "ormo_rpc.job": "from ormo_rpc.session import Session",
        "ormo_rpc.train": "import hydra.utils",
        "ormo_rpc.evaluation": "from tqdm import tqdm",
    }
    for module, line in planted.items():
        assert [fault for fault in faults({**SOURCES, module: f"{SOURCES[module]}\n{line}\n"}) if fault.startswith(module)], (
            line
        )


def test_a_forbidden_import_is_found_through_another_module() -> None:
    # server -> messages -> a clock: also the server is at fault.
    sources = {**SOURCES, "ormo_rpc.messages": f"{SOURCES['ormo_rpc.messages']}\nimport time\n"}
    assert "ormo_rpc.server -> time" in faults(sources)
