"""The direction of imports: a package imports only from those above it, and each outside library has its one place."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ormo_rpc

PACKAGE = Path(ormo_rpc.__file__).parent
SOURCES = {
    ".".join(("ormo_rpc", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
}

LAYERS: Sequence[str] = (
    "lazy_import errors console messages seeding signals devices options kernels algorithms schedulers server data models "
    "compression tasks worker rendezvous control transports loggers config storage report runtimes overrides composing "
    "own_loop sweeps cli launch export main __main__ training evaluate"
).split()
"""Each imports from itself and from those before it."""

MATHEMATICS = ("options", "kernels", "algorithms", "schedulers", "server")
"""Packages that know no lock (the pool of memory in `kernels` apart), clock, network, process, hydra or wandb."""
IMPURE = (
    "asyncio concurrent hydra matplotlib multiprocessing omegaconf queue signal socket subprocess threading time "
    "torch.distributed torch.futures tqdm wandb"
).split()

ONLY_IN = {
    "torch.distributed": (
        "control.torch_rpc",
        "transports.rpc",
        "transports.gloo",
        "transports.nccl",
        "runtimes.collectives",
        "runtimes.torchrun_store",
        "runtimes.ddp",
    ),
    "torch.distributed.rpc": ("control.torch_rpc", "transports.rpc"),
    "torch.futures": ("control.torch_rpc", "transports.rpc"),
    "socket": (
        "rendezvous",
        "transports.gloo",
        "transports.stream",
        "runtimes.distributed",
        "runtimes.programs",
        "runtimes.torchrun_agent",
    ),
    "subprocess": (
        "kernels.compiled",
        "storage.environment",
        "runtimes.distributed.starter",
        "runtimes.distributed.worker_process.region",
    ),
    "hydra": ("overrides", "composing", "sweeps", "cli"),
    "omegaconf": ("composing", "sweeps", "cli", "config"),
    "wandb": ("loggers",),
    "tqdm": ("loggers", "runtimes.replay"),
    "matplotlib": ("report",),
    "sklearn": ("data",),
    "torchvision": ("data", "models"),
    "safetensors": ("export",),
    "triton": ("kernels.triton_kernels",),
}
"""The only places of outside libraries."""

KERNELS_MAY = {
    "kernels.pool": {"threading"},
    "kernels.threads": {"threading", "concurrent"},
    "kernels.compiled": {"subprocess"},
}


@functools.cache
def imports(source: str, module: str, *, types: bool = True) -> frozenset[str]:
    """Every module that a source imports anywhere, also within functions; ``from a import b`` counts as ``a.b``.

    With ``types=False`` those that are imported for type checkers alone do not count.
    """
    found: set[str] = set()
    tree = ast.parse(source)
    ifs = [] if types else [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    blocks = [node for node in ifs if "TYPE_CHECKING" in ast.unparse(node.test)]
    apart = {id(node) for block in blocks for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in apart:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def within(module: str, packages: Iterable[str]) -> bool:
    """Tell whether a module is one of the packages, or inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def faults(sources: dict[str, str]) -> list[str]:
    """Every forbidden arrow, as a line ``from -> to``."""
    found: list[str] = []
    for module, source in sources.items():
        own_name = module.removeprefix("ormo_rpc").removeprefix(".")
        layer = own_name.split(".")[0]
        for name in imports(source, module):
            inside = name.removeprefix("ormo_rpc.")
            if name.startswith("ormo_rpc.") and layer and LAYERS.index(inside.split(".")[0]) > LAYERS.index(layer):
                found.append(f"{module} -> {name}")
            if layer in MATHEMATICS and within(name, IMPURE) and not within(name, KERNELS_MAY.get(own_name, ())):
                found.append(f"{module} -> {name}")
            found += [
                f"{module} -> {name}"
                for library, places in ONLY_IN.items()
                if within(name, (library,)) and not within(own_name, places)
            ]
    return sorted(set(found))


def cycles(sources: dict[str, str]) -> list[str]:
    """Import cycles among the modules and subpackages of each package, as lines ``package: a, b``."""
    arrows = {module: imports(source, module, types=False) for module, source in sources.items()}
    found: list[str] = []
    for package in sorted({module.rpartition(".")[0] for module in sources} - {"", "ormo_rpc"}):
        inside = f"{package}."
        graph: dict[str, set[str]] = {}
        for module, names in arrows.items():
            if module.startswith(inside):
                parts = {name.removeprefix(inside).split(".")[0] for name in names if name.startswith(inside)}
                own = module.removeprefix(inside).split(".")[0]
                graph.setdefault(own, set()).update(parts - {own})
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append(f"{package}: {', '.join(sorted(set(error.args[1])))}")
    return found


def test_every_arrow_points_down() -> None:
    assert faults(SOURCES) == []


def test_no_import_cycle_within_a_package() -> None:
    assert cycles(SOURCES) == []


def test_a_planted_cycle_is_found() -> None:
    name = "ormo_rpc.runtimes.distributed.starter"
    line = "def f():\n    from ormo_rpc.runtimes.distributed.launcher import supervisor"
    planted = {**SOURCES, name: f"{SOURCES[name]}\n{line}\n"}
    assert cycles(planted) == ["ormo_rpc.runtimes.distributed: launcher, starter"]


def test_every_place_of_an_outside_library_uses_it() -> None:
    used = {
        (library, place)
        for module, source in SOURCES.items()
        for name in imports(source, module)
        for library, places in ONLY_IN.items()
        for place in places
        if within(name, (library,)) and within(module.removeprefix("ormo_rpc."), (place,))
    }
    assert used == {(library, place) for library, places in ONLY_IN.items() for place in places}


def test_every_package_has_its_layer() -> None:
    assert {module.split(".")[1] for module in SOURCES if module != "ormo_rpc"} == set(LAYERS)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("algorithms.ormo", "from ormo_rpc.server import parameter_server"),
        ("algorithms.base", "from threading import Lock"),
        ("server.parameter_server", "import time"),
        ("server.assignments", "def f():\n    from torch.distributed import rpc"),
        ("server.validation", "from ormo_rpc.runtimes.distributed.launcher import supervisor"),
        ("worker.worker", "import torch.distributed.rpc as rpc"),
        ("worker.evaluation", "from tqdm import tqdm"),
        ("transports.stream.server", "import torch.distributed.rpc as rpc"),
        ("runtimes.simulator", "import socket"),
        ("runtimes.replay", "import torch.distributed.rpc"),
        ("runtimes.recorder", "import wandb"),
        ("training", "import hydra.utils"),
        ("storage.checkpoint", "from ormo_rpc.runtimes import job"),
    ],
)
def test_a_planted_import_is_found(module: str, line: str) -> None:
    name = f"ormo_rpc.{module}"
    planted = faults({**SOURCES, name: f"{SOURCES[name]}\n{line}\n"})
    assert [fault for fault in planted if fault.startswith(f"{name} -> ")]
