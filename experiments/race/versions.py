"""Versions of runs: digests of what determines one beside its overrides, the source of its rule and the defaults."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ormo_rpc import algorithms, schedulers
from ormo_rpc.algorithms import base, groups
from ormo_rpc.composing import compose
from ormo_rpc.config.saving import to_tree
from ormo_rpc.config.schema import GROUPS, Config
from ormo_rpc.kernels import steps
from ormo_rpc.schedulers.base import Scheduler

CONTRACTS = (base.__name__, groups.__name__, Scheduler.__module__)
"""Modules of the rules and schedulers that change nothing of what one computes."""
SECTIONS = "algorithm scheduler dataset model task heterogeneity train worker wire compression evaluate runtime".split()
"""Sections of the configuration on which a simulation's results depend."""
IGNORED_OPTIONS = ("dataset.root", "dataset.verify", "worker.device", "runtime.threads")
"""Options of these sections whose change leaves finished runs valid."""


def run_version(overrides: Sequence[str]) -> str:
    """Return a digest of the code and defaults behind a simulated run; runs made with other ones do not count.

    It covers the source of the rule, of its scheduler and of the server's steps; the number of workers; and the options of
    the simulator and of the groups that the overrides choose, such as the width of a model, but those that are empty, zero,
    null or ``none``, as those of new features are. It does not cover the code of models, data, workers and the simulator,
    which `tests/integration/test_golden_runs.py` holds.

    Args:
        overrides: Of the run, at least those that choose groups and those of the rule and its scheduler.

    Raises:
        ConfigError: an override is wrong.
    """
    keys = [each.partition("=")[0] for each in overrides]
    groups = {*GROUPS, "experiment"} - {"runtime"}
    chosen = [key in groups or key.startswith(("algorithm.", "scheduler.")) for key in keys]
    return _version(tuple(each for each, counts in zip(overrides, chosen, strict=True) if counts))


@functools.cache
def _version(overrides: tuple[str, ...]) -> str:
    config = compose(("runtime=sim", *overrides))
    stated = [_sources(config), config.workers, _options(config)]
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]


def _options(config: Config) -> Mapping[str, Any]:
    """The options of `SECTIONS` that are not empty, zero, null or ``none``."""
    tree = to_tree(config)
    found = {f"{section}.{key}": value for section in SECTIONS for key, value in tree[section].items()}
    return {key: value for key, value in found.items() if value and value != "none" and key not in IGNORED_OPTIONS}


def _sources(config: Config) -> Mapping[str, str]:
    """The code of the modules of a rule's and a scheduler's classes and their bases, and of what these import of such."""
    packages = tuple(f"{package.__name__}." for package in (algorithms, schedulers))
    waiting = [kind.__module__ for part in (config.algorithm, config.scheduler) for kind in type(part).__mro__]
    found = dict[str, str]()
    while waiting:
        name = waiting.pop()
        if ((name.startswith(packages) and name not in CONTRACTS) or name == steps.__name__) and name not in found:
            tree = _tree(name)
            found[name] = _without_docstrings(tree)
            waiting += [each.module for each in ast.walk(tree) if isinstance(each, ast.ImportFrom) and each.module]
    return found


def code_of(module: str) -> str:
    """The syntax tree of a module as text, without docstrings and comments."""
    return _without_docstrings(_tree(module))


def _tree(module: str) -> ast.Module:
    return ast.parse(Path(importlib.import_module(module).__file__ or "").read_text())


def _without_docstrings(tree: ast.Module) -> str:
    """The text of a syntax tree, after its docstrings were taken out of it."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [
                each for each in node.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
            ]
    return _text(tree)


def _text(node: object) -> str:
    """Write a syntax tree without what is empty, unlike `ast.dump`: newer versions of Python know more fields."""
    if isinstance(node, list):
        return f"[{', '.join(map(_text, cast('list[object]', node)))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    present = [f"{name}={_text(value)}" for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({', '.join(present)})"
