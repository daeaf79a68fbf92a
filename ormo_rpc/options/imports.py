"""Dotted paths: a class or function of the user's, as every process of a run imports it by its name."""

from __future__ import annotations

import importlib
import os
import sysconfig
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from ormo_rpc.errors import ConfigError, one_line

DOTTED_PATH = "a dotted path such as my_package.my_module.my_function"
"""The form of a ``_target_``, in words."""
_SCRIPT = ("__main__", "__mp_main__")
"""The names of the module that Python was started with; in another process they are another module."""
_MACHINERY = (__file__, importlib.__file__, "<frozen ")
_OURS = os.path.join(Path(__file__).parent.parent, "")  # noqa: PTH118 - with a slash at the end
LIBRARIES = (*{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}, _OURS)
"""Folders whose files are hardly the user's own."""


_importing = ContextVar("importing", default="")
"""The target that this thread imports at present, such as ``model._target_='my_module.Net'``; empty for nothing."""


def refuse_while_importing() -> None:
    """Refuse to start a run while a module of the user's is imported, since each of its processes would start one as well.

    Raises:
        ConfigError: a module is being imported.
    """
    if _importing.get():
        raise ConfigError(
            f"train() is called while its module is imported for {_importing.get()}, as every process of a run does; put the "
            f"call under if __name__ == '__main__':"
        )


def is_dotted_path(target: object) -> bool:
    """Tell whether a value is a text of the form ``module.name``."""
    return isinstance(target, str) and "." in target and all(part.isidentifier() for part in target.split("."))


def locate(path: str, target: str, option: str = "_target_") -> Callable[..., Any]:
    """Import the function or class of a dotted path.

    Args:
        path: The section of the configuration where it stands, such as ``dataset``.
        target: The dotted path.
        option: Its key there.

    Raises:
        ValueError: there is none, or other processes would not find it.
        ConfigError: its module refuses something itself while it is imported.
    """
    if not is_dotted_path(target):
        raise ValueError(f"{path}.{option}: got {target!r}, expected {DOTTED_PATH}")
    if target.split(".")[0] in _SCRIPT:
        raise ValueError(f"{path}.{option}: {_refused_script(target)}")
    token = _importing.set(f"{path}.{option}={target!r}")
    try:
        found = _import(target)
    except ConfigError as error:
        raise ConfigError(str(error)) from None
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        raise ValueError(f"{path}.{option}: {target!r} cannot be imported: {fault(error)}") from error
    finally:
        _importing.reset(token)
    if not callable(found):
        raise ValueError(f"{path}.{option}: {target!r} is {found!r}, expected a function or class")
    return found


def path_of(group: str, thing: Any) -> str:
    """Return the dotted path by which other processes can import a class or function.

    Raises:
        ValueError: there is none.
    """
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if module is None or name is None:
        raise ValueError(
            f"{group}: got an object of {type(thing).__qualname__}, expected plain values, or the class or function that makes "
            f"it, by its name: {{'_target_': 'my_module.my_function'}}"
        )
    if "<" in name:
        raise ValueError(f"{group}: {name!r} cannot be imported by other processes; define it at the top of a module")
    if module in _SCRIPT:
        raise ValueError(f"{group}: {_refused_script(name)}")
    path = f"{module}.{name}"
    try:
        found = _import(path)
    except Exception:  # a module may do anything to the names of what is in it
        found = None
    if found is not thing and found != thing:
        raise ValueError(f"{group}: other processes do not find the given {name} as {path}; define it at the top of a module")
    return path


def _refused_script(name: str) -> str:
    return f"{name} is defined in __main__, where other processes cannot import it; move it to a module"


def fault(error: BaseException) -> str:
    """Type and message of what the user's code raised, with its line, if there is one."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    place = line_of(error)
    if place:
        return f"{place}: {one_line(error)}"
    hint = "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
    return f"{' '.join(str(error).split())}{hint}"


def line_of(error: BaseException) -> str:
    """File and line of the user's code that an error comes from; else of a library's; empty where there is neither."""
    return _innermost(traceback.extract_tb(error.__traceback__))


def raised_in(error: BaseException) -> str:
    """File and line of the user's code that has raised an error, itself or by a library; empty where this package has."""
    own = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if is_users(frame.filename):
            own = f"{frame.filename}:{frame.lineno}"
        elif frame.filename.startswith(_OURS):
            own = ""
    return own


def users_line(frame: FrameType | None = None) -> str:
    """File and line of the user's code that is being run; empty where it is none.

    Args:
        frame: Of the thread; by default this one's.
    """
    own = [each for each in traceback.extract_stack(frame) if is_users(each.filename)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def place_of(function: object) -> str:
    """File and line of a function, and a colon, for the beginning of a message; empty where it is none of Python's."""
    code = getattr(function, "__code__", None)
    return "" if code is None else f"{code.co_filename}:{code.co_firstlineno}: "


def is_users(file: str) -> bool:
    """Tell whether a file of source is the user's own."""
    return not file.startswith((*_MACHINERY, *LIBRARIES))


def _innermost(stack: traceback.StackSummary) -> str:
    frames = [frame for frame in stack if not frame.filename.startswith(_MACHINERY)]
    own = [frame for frame in frames if is_users(frame.filename)]
    return f"{(own or frames)[-1].filename}:{(own or frames)[-1].lineno}" if frames else ""


def _import(target: str) -> Any:
    """Import the object of a dotted path: the longest prefix that is a module, and attributes from there on."""
    head, *rest = target.split(".")
    found: Any = importlib.import_module(head)
    for position, name in enumerate(rest):
        if not hasattr(found, name) and isinstance(found, ModuleType):
            module = ".".join((head, *rest[: position + 1]))
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
        found = getattr(found, name)
    return found
