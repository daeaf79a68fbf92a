"""Server algorithms, each in the file of its name. Adding one takes a file here, a yaml and a row in the table of tests."""

from __future__ import annotations

import importlib
import pkgutil

from ormo_rpc.algorithms.base import Algorithm, LocalWork, PullContext, PushContext

__all__ = ["NAMES", "Algorithm", "LocalWork", "PullContext", "PushContext", "find"]

NAMES: tuple[str, ...] = tuple(
    sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base" and module.name[0] != "_")
)
"""The names of all algorithms."""


def find(name: str) -> type[Algorithm]:
    """The algorithm of a name.

    Raises:
        ValueError: when there is none.
    """
    if name not in NAMES:
        raise ValueError(f"algorithm: got {name!r}, expected one of {', '.join(NAMES)}")
    module = importlib.import_module(f"{__name__}.{name}")
    (algorithm,) = (
        c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__ and issubclass(c, Algorithm)
    )
    return algorithm
