"""A module that loads at its first use: PyTorch takes longer to import than a command to be checked."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from typing_extensions import override

_executing: set[str] = set()
"""Lazy modules that a thread executes now: another one would find half of them."""


class _LazyModule(types.ModuleType):
    """A module that is executed when an attribute is first asked for that the import system has not set.

    `importlib.util.LazyLoader` executes it on any access, and so at the second ``import`` statement, which asks for the spec.
    """

    def __getattr__(self, name: str) -> Any:
        load(self.__name__)
        return getattr(self, name)


class _Submodules(MetaPathFinder):
    """Loads a lazy package before a submodule of it is imported, and finds those that it has imported itself."""

    @override
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> ModuleSpec | None:
        root = fullname.partition(".")[0]
        if root == fullname or not isinstance(sys.modules.get(root), _LazyModule):
            return None
        load(root)
        module = sys.modules.get(fullname)
        if module is None:
            return None
        # The import system goes by the module's own spec where it finds the module there, and would execute it again.
        module.__spec__ = spec = ModuleSpec(fullname, _Loaded(module, module.__spec__))
        return spec


class _Loaded(Loader):
    """Loader of a module that has been imported."""

    def __init__(self, module: types.ModuleType, spec: ModuleSpec | None) -> None:
        self.module = module
        self.spec = spec

    @override
    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return self.module

    @override
    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self.spec


def make_lazy(name: str) -> None:
    """Let ``import name`` cost nothing until the module is used; one that has been imported stays as it is.

    ``from name import ...`` and the import of a submodule use it.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _LazyModule
    sys.modules[name] = module
    if not any(isinstance(finder, _Submodules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Submodules())


def is_loaded(name: str) -> bool:
    """Tell whether a module has been imported, to its end, and used where it is lazy."""
    return name in sys.modules and name not in _executing and not isinstance(sys.modules[name], _LazyModule)


def load(name: str) -> None:
    """Execute a lazy module now: a thread that uses it while another one does so would find half of it."""
    module = sys.modules[name]
    if not isinstance(module, _LazyModule):
        return
    spec = module.__spec__
    assert spec is not None
    assert spec.loader is not None
    _executing.add(name)
    module.__class__ = types.ModuleType  # pyright: ignore[reportAttributeAccessIssue] # Python allows it for modules
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        _executing.discard(name)
