"""Parts: the exchangeable pieces of a run, each chosen by name or, from outside of the package, by a ``_target_``.

A part is a dataclass of `option` fields with a subclass of `Part` as its base, registered under its name::

    @register("ormo")
    @dataclass(kw_only=True)
    class OrMo(Algorithm):
        momentum_correction: bool = option(False, "rescale the momentum when the learning rate changes")

Each group has one package, all of whose modules are imported when the group is first asked for: a new part is a new file there.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from ormo_rpc.options.section import Section

PACKAGES: Mapping[str, str] = {
    "algorithm": "ormo_rpc.algorithms",
    "scheduler": "ormo_rpc.schedulers",
    "dataset": "ormo_rpc.data",
    "model": "ormo_rpc.models",
    "task": "ormo_rpc.tasks",
    "compression": "ormo_rpc.compression",
    "heterogeneity": "ormo_rpc.worker",
    "transport": "ormo_rpc.transports",
    "logger": "ormo_rpc.loggers",
    "runtime": "ormo_rpc.config",
}
"""The package that holds the parts of each group."""


class Part(Section):
    """A section of the configuration that is one of several, such as an algorithm or a model.

    Attributes:
        name: The name under which `register` knows the class; that of the class where it comes from outside of the package.
    """

    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__name__

    @property
    def known_as(self) -> str:
        """The name in messages: that of the part, or the dotted path of the user's function or class that it calls."""
        return self.name


P = TypeVar("P", bound=Part)
_registered: dict[str, dict[str, type[Part]]] = {}
"""The parts by group and name."""


def register(name: str) -> Callable[[type[P]], type[P]]:
    """Register a part under a name in the group that its ``PATH`` names.

    Raises:
        ValueError: the name is taken by another class.
    """

    def decorate(cls: type[P]) -> type[P]:
        group = _registered.setdefault(cls.PATH, {})
        taken = group.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{cls.PATH}: {name!r} is registered as {taken.__module__}.{taken.__qualname__}; take another name"
            )
        cls.name = name
        group[name] = cls
        return cls

    return decorate


def parts(group: str) -> Mapping[str, type[Any]]:
    """Return all parts of a group by name, sorted."""
    _import_all(PACKAGES[group])
    return dict(sorted(_registered.get(group, {}).items()))


def find(group: str, name: str) -> type[Any]:
    """Return the part of a group with this name.

    Raises:
        ValueError: there is none; the message lists the names that there are.
    """
    found = parts(group).get(name)
    if found is None:
        raise ValueError(f"{group}: got {name!r}, expected one of {', '.join(parts(group))}")
    return found


@functools.cache
def _import_all(package: str) -> None:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)
