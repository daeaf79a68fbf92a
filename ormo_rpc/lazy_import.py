"""A module that loads at its first use: PyTorch takes longer to import than a command to be checked."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from typing_extensions import override

_lock = threading.Lock()
"""Guards `_unused` and `_begun`, and that a module of the former leaves `sys.modules` as it leaves them."""
_unused: dict[str, types.ModuleType] = {}
"""Lazy modules that nobody has used yet."""
_begun: dict[str, types.ModuleType] = {}
"""Lazy modules that are being executed, or are about to be."""
_threads: dict[str, int] = {}
"""The thread that executes each of the latter."""


class _LazyModule(types.ModuleType):
    """A module that is executed when an attribute is first asked for that the import system has not set.

    `importlib.util.LazyLoader` executes it on any access, and so at the second ``import`` statement, which asks for the spec.
    """

    def __getattr__(self, name: str) -> Any:
        if _threads.get(self.__name__) != threading.get_ident():
            load(self.__name__)
            if not _is_lazy(self):
                return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} yet: it is being imported")


class _Finder(MetaPathFinder):
    """Finds a lazy module that is to be executed.

    It loads a lazy package before a submodule of it is imported, and finds those that it has imported itself.
    """

    @override
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> ModuleSpec | None:
        root = fullname.partition(".")[0]
        if root == fullname:
            module = _begun.get(fullname)
            if module is None or module.__spec__ is None:
                return None
            module.__spec__.loader = _Executing(module, module.__spec__)
            return module.__spec__
        if root not in _unused:  # what another thread executes is not waited for, as that may wait for this submodule
            return None
        load(root)
        module = sys.modules.get(fullname)
        if module is None:
            return None
        # The import system goes by the module's own spec where it finds the module there, and would execute it again.
        module.__spec__ = spec = ModuleSpec(fullname, _Loaded(module, module.__spec__))
        return spec


class _Executing(Loader):
    """Loader of a lazy module, which stays the same object."""

    def __init__(self, module: types.ModuleType, spec: ModuleSpec) -> None:
        self.module = module
        self.spec = spec
        self.loader = spec.loader

    @override
    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        _threads[spec.name] = threading.get_ident()
        return self.module

    @override
    def exec_module(self, module: types.ModuleType) -> None:
        self.spec.loader = self.loader
        assert self.loader is not None
        try:
            self.loader.exec_module(module)
        finally:
            module.__class__ = types.ModuleType  # pyright: ignore[reportAttributeAccessIssue] # Python allows it for modules
            del _begun[module.__name__], _threads[module.__name__]


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
    _unused[name] = sys.modules[name] = module
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_loaded(name: str) -> bool:
    """Tell whether a module has been imported, to its end, and used where it is lazy."""
    return name in sys.modules and name not in _begun and not _is_lazy(sys.modules[name])


def load(name: str) -> None:
    """Execute a lazy module now, or wait until another thread has, as for any import."""
    with _lock:
        module = _unused.pop(name, None)
        if module is not None:
            _begun[name] = module
            sys.modules.pop(name, None)  # so that it is imported, with the locks of the import system
    importlib.import_module(name)


def _is_lazy(module: types.ModuleType) -> bool:
    return isinstance(module, _LazyModule)
