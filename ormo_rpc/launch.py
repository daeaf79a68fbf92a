"""``ormo-rpc launch script.py``: the run of an own loop, from what was typed to the exit status."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from ormo_rpc import console
from ormo_rpc.cli import print_result, status_of
from ormo_rpc.composing import compose
from ormo_rpc.config.runtimes import RpcRuntime, StartKind
from ormo_rpc.config.schema import GROUPS, Config
from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.own_loop.command import SCRIPTS, Command
from ormo_rpc.runtimes.attempts import former_run
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading
from ormo_rpc.runtimes.process_start import process_began
from ormo_rpc.runtimes.ranks import TORCHRUN, Ranks
from ormo_rpc.runtimes.running import run_loaded
from ormo_rpc.runtimes.torchrun_agent import end_with_agent
from ormo_rpc.signals import SignalWatch, interrupting_signal
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import RunDirectory, new_path

_SEVERAL = "Ambiguous value for argument"
"""Hydra's refusal of a sweep where it was asked for none."""


def main(command: Command, preloading: Preloading) -> int:
    """Run what was typed; return the exit status.

    Args:
        command: The command line.
        preloading: Starts the processes.
    """
    logger, reports = logging.getLogger("ormo_rpc"), _Reports(logging.WARNING)
    logger.addHandler(reports)
    try:
        return _run(command, preloading)
    except ConfigError as error:
        status, last = 2, str(error)
    except RunFailed as error:
        status, last = error.exit_status, str(error)
    except KeyboardInterrupt as error:
        number = interrupting_signal(error)
        status, last = 128 + number, f"interrupted by {number.name}; there is nothing to resume"
    except OSError as error:
        status, last = 2, f"the run directory cannot be made: {error.strerror}: {error.filename or 'the current directory'}"
    finally:
        logger.removeHandler(reports)
        SignalWatch.answered = True  # a repeated signal must not end this program in the midst of its last words
    console.report(last)
    return status


def _run(command: Command, preloading: Preloading) -> int:
    _check(command.overrides)
    ranks = Ranks.from_environment()
    if ranks is not None and ranks.launcher == TORCHRUN:
        end_with_agent()
    script, overrides = command.script, command.overrides
    run_dir = _run_dir(command.run_dir, ranks)
    if console.on_terminal():
        console.report(f"starting {script.name}")

    def load(starts: Preloading) -> Config:
        start = StartKind(_given("runtime.start", overrides) or StartKind.auto)
        request = {"script": script.text}
        return starts.load_what(request, script.name, threads=command.threads, start=start)

    try:
        launch = Launch(overrides=overrides, script=script.name, arguments=script.arguments)
        summary: dict[str, Any] = run_loaded(load, run_dir, launch, began=process_began(), preloading=preloading)
    except SystemExit as ended:  # of the script, such as after its --help
        if ended.code:
            console.report(f"{script.name} has ended itself with status {ended.code} before ormo_rpc.join")
        return int(ended.code or 0)
    if not summary:
        return 0
    print_result(summary, run_dir)
    return status_of(summary)


class _Reports(logging.Handler):
    """Reports warnings, such as those about a script's model."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        console.report(record.getMessage())


def _check(overrides: Sequence[str]) -> None:
    """Refuse wrong words before the script is run, as far as they can be understood without what it passes to `join`.

    Raises:
        ConfigError: a key is unknown, or its value is wrong.
    """
    keys = [word.lstrip("+~").partition("=")[0] for word in overrides]
    for key, word in zip(keys, overrides, strict=True):
        if key.partition(".")[0] in SCRIPTS:
            raise ConfigError(f"{word}: the script has its own {key.partition('.')[0]}; leave it out")
    chosen = {key for key in keys if key in GROUPS}
    open_groups = set(GROUPS) - chosen
    known = [word for key, word in zip(keys, overrides, strict=True) if key.partition(".")[0] not in open_groups]
    try:
        config = compose(known)
    except ConfigError as error:
        if not str(error).startswith(_SEVERAL):
            raise
        word = next((word for word in known if f"'{word}'" in str(error)), "the command")
        raise ConfigError(f"{word}: got several values, expected one: there are no sweeps of own loops") from None
    if not isinstance(config.runtime, RpcRuntime):
        raise ConfigError(f"runtime: got {config.runtime.name} for an own loop, expected rpc")


def _given(key: str, overrides: Sequence[str]) -> str | None:
    found = [word.partition("=")[2] for word in overrides if word.partition("=")[0] == key]
    return found[-1] if found else None


def _run_dir(given: str | None, ranks: Ranks | None) -> Path:
    """The run directory; rank 0 that was started again has that of its former start."""
    former = None if ranks is None or ranks.rank > 0 else former_run(ranks)
    if former is not None:
        return former.run_dir
    path = (new_path() if given is None else Path(given).expanduser()).absolute()
    if ranks is None:
        RunDirectory.refuse_taken(path)
    return path
