"""The entry of the command line, which loads little before it begins what takes long.

PyTorch and numpy are made lazy before anything imports them, so that wrong words are refused at once; a preloader imports
them meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Generator, Sequence

from ormo_rpc import console
from ormo_rpc.errors import ConfigError
from ormo_rpc.lazy_import import make_lazy
from ormo_rpc.own_loop.command import HELP, OVERRIDES, parse
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading
from ormo_rpc.signals import interrupting, interrupting_signal

_NO_PROCESSES = (
    *("--help", "-h", "--help-all", "--version", "-c", "--hydra-help", "--shell-completion", "-sc"),
    *("runtime=sim", "runtime=replay"),
)
"""Words with which no run, or none of processes, is started."""


@interrupting()
def main() -> None:
    """Run ``launch.py`` with this process's arguments."""
    for number in range(3):  # a closed standard stream would give its number to the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("torch", "numpy"):
        make_lazy(name)
    if sys.argv[1:2] == ["export"]:
        from ormo_rpc import export

        export.main(sys.argv[2:], "ormo-rpc export")
        return
    if sys.argv[1:2] == ["launch"]:
        sys.exit(_launch(sys.argv[2:]))
    with contextlib.ExitStack() as stack:
        if not any(map(_needs_no_processes, sys.argv[1:])):
            preloading = stack.enter_context(Preloading())
            with contextlib.suppress(OSError):  # the run tries again, and says why where it fails
                preloading.begin(_threads(sys.argv[1:]))
        else:
            preloading = None
        with _meanwhile():
            from ormo_rpc import cli  # while the preloader has its own imports
        try:
            cli.main(preloading)
        finally:
            gc.freeze()  # so that the interpreter does not look for garbage before it ends


def _launch(words: Sequence[str]) -> int:
    """Run ``ormo-rpc launch`` with the words behind it; return the exit status."""
    console.install()
    console.name_command("ormo-rpc launch")
    if not words or words[0] in ("--help", "-h"):
        sys.stdout.write(f"{HELP}\n")
        return 0
    try:
        command = parse(words)
    except ConfigError as error:
        console.report(str(error))
        return 2
    command.script.set_module_path()
    os.environ[OVERRIDES] = json.dumps(command.overrides)  # for the script in each process
    with Preloading(command.script.programs) as preloading:
        with contextlib.suppress(OSError):  # the run tries again, and says why where it fails
            preloading.begin(command.threads)
        with _meanwhile():
            from ormo_rpc import launch
        try:
            return launch.main(command, preloading)
        finally:
            gc.freeze()


@contextlib.contextmanager
def _meanwhile() -> Generator[None]:
    """Import what the command needs while a preloader has its own imports."""
    gc.disable()  # nothing of what is imported is garbage, and a collection takes its time
    try:
        yield
    except KeyboardInterrupt as error:
        sys.exit(128 + interrupting_signal(error))
    gc.enable()


def _needs_no_processes(word: str) -> bool:
    """Tell that with this word on the command line this process starts no processes of a live run."""
    return word in _NO_PROCESSES or word.startswith(("--cfg", "--info", "hydra/launcher="))


def _threads(words: Sequence[str]) -> int:
    """The threads of each process, as the command line seems to say; a preloader with another number is replaced later."""
    given = [word.partition("=")[2] for word in words if word.startswith("runtime.threads=")]
    return int(given[-1]) if given and given[-1].isdecimal() else 1
