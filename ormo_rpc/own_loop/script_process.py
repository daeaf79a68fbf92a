"""A process that runs a user's script for ``ormo-rpc launch``: its preloader, or a child that runs it from the beginning."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import runpy
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn

if __name__ == "__main__":
    gc.disable()  # nothing of what is imported is garbage, and a collection takes its time
# First, as it counts the threads with which Python has started.
from ormo_rpc.runtimes.programs.preloader import PreloaderProcess, main  # isort: split

from ormo_rpc.errors import ConfigError, one_line
from ormo_rpc.options.imports import fault, is_users, line_of, raised_in
from ormo_rpc.own_loop.script import PROGRAM, Script
from ormo_rpc.own_loop.script_preloading import Launched, launched
from ormo_rpc.runtimes.distributed.preloading.load import Records, settle
from ormo_rpc.runtimes.distributed.shortages import limit_reached
from ormo_rpc.runtimes.programs.entry_point import Child


class ScriptExit(Exception):
    """The script has ended itself with a status other than 0."""


class Scripts:
    """Runs a script as far as `join` (`programs.preloader.Program`); in forks it goes on."""

    keeps_random = True

    def load(self, request: Mapping[str, Any], process: PreloaderProcess) -> Mapping[str, Any]:
        """Run a script; what it does not say by `join` is its end."""
        settle(request)
        script, records = Script.read(request["script"]), Records()
        this = launched(Launched(os.getpid(), process, request, records))
        ended = run(script, this)
        if this.child is not None:  # this is a fork
            end(this.child, ended)
        records.close()
        return process.loaded(request, {**_without_run(script, ended), "log": records.rows})

    def main(self, arguments: list[str]) -> NoReturn:
        """Be a child that runs its script from the beginning."""
        split = Script.of_child(arguments)
        assert split is not None, "a child is told its script"
        script, words = split
        child = Child(words)
        child.set_up_torch()
        this = launched(Launched(os.getpid(), child=child))
        end(child, run(script, this))


def run(script: Script, this: Launched) -> BaseException | None:
    """Run a script as Python does; return how it has ended, None for at its end.

    A process that the script itself has forked ends with it.

    Args:
        script: The script.
        this: This process.
    """
    ended = _run(script)
    if os.getpid() != this.pid:
        if ended is not None and not isinstance(ended, SystemExit):
            traceback.print_exception(ended)
        os._exit(0 if ended is None else ended.code if isinstance(ended, SystemExit) and isinstance(ended.code, int) else 1)
    return ended


def _run(script: Script) -> BaseException | None:
    sys.argv[:] = [script.name, *script.arguments]
    gc.enable()
    try:
        if script.module:
            runpy.run_module(script.name, run_name="__main__", alter_sys=True)
        elif Path(script.name).is_dir():
            runpy.run_path(script.name, run_name="__main__")
        else:
            _run_file(os.path.abspath(script.name))  # noqa: PTH100 - without following links
    except BaseException as error:
        return error
    return None


def _run_file(path: str) -> None:
    """Run a file as Python does, which `runpy` does not to the word: ``sys.argv[0]`` stays as it was typed."""
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__ = path
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)  # else with the annotations of this module
    exec(code, vars(module))  # noqa: S102 - the user's own program


def end(child: Child, ended: BaseException | None) -> NoReturn:
    """End a child whose script has ended, as Python ends a program, and as its launcher expects it."""
    if isinstance(ended, SystemExit):
        exited = ScriptExit(f"it has ended itself by sys.exit({ended.code!r})").with_traceback(ended.__traceback__)
        ended = None if ended.code in (None, 0) else exited
    if ended is None and child.joined_at:
        missing = "the script has ended without a loop over what ormo_rpc.join() returns, expected one in each process"
        child.end(ConfigError(missing), place=child.joined_at)
    if ended is None:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage] # finalising the interpreter would stop the heartbeats
        if vars(sys.modules["__main__"]) is not globals():
            vars(sys.modules["__main__"]).clear()
        gc.collect()  # closes the files of the script's variables
        child.end()
    ended.__traceback__ = _of_user(ended.__traceback__) or ended.__traceback__
    again = child.serves or child.has_worked or isinstance(ended, OSError) or bool(limit_reached(ended))
    child.end(ended, place=raised_in(ended), final=not again)


def _without_run(script: Script, ended: BaseException | None) -> dict[str, Any]:
    """The answer to a launcher whose script has ended before `join`."""
    if isinstance(ended, SystemExit):
        if ended.code is None or isinstance(ended.code, int):
            return {"exited": ended.code or 0}
        return {"refused": f"{line_of(ended)}: {ended.code}"}
    if ended is None:
        return {
            "refused": f"{script.name}: it has ended without a call of ormo_rpc.join(model, ...), so there is nothing to run"
        }
    if isinstance(ended, ConfigError):
        return {"refused": str(ended)}
    trace = _of_user(ended.__traceback__)
    if trace is None and not isinstance(ended, SyntaxError):  # such as of a module that is not there
        return {"refused": f"{script.name}: {one_line(ended)}"}
    traceback.print_exception(ended.with_traceback(trace))
    return {"refused": fault(ended)}


def _of_user(trace: TracebackType | None) -> TracebackType | None:
    """A traceback from the first line of the user's on; None where there is none."""
    while trace is not None and not is_users(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    if Script.of_child(sys.argv[1:]) is None:
        main(Scripts(), PROGRAM)
    Scripts().main(sys.argv[1:])
