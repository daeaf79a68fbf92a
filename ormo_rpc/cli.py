"""The command line: hydra composes the configuration, the schema checks it, a runtime runs it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import ormo_rpc
from ormo_rpc import console, sweeps
from ormo_rpc.composing import refused
from ormo_rpc.config.help import help_text, list_of_keys
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.config.schema import Config
from ormo_rpc.config.write_conf import conf_dir
from ormo_rpc.errors import ConfigError, RunFailed, one_line
from ormo_rpc.loggers.metrics import key_of
from ormo_rpc.overrides import keys_of, prepared
from ormo_rpc.runtimes.attempts import former_run
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading
from ormo_rpc.runtimes.ranks import TORCHRUN, Ranks
from ormo_rpc.runtimes.torchrun_agent import end_with_agent
from ormo_rpc.signals import SignalWatch, interrupting, interrupting_signal
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.summary import described, metrics_of
from ormo_rpc.storage.sweep_directory import SweepDirectory
from ormo_rpc.sweeps import JobFailed, SweepStart
from ormo_rpc.tasks.metrics import LOSS, main_metric

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Environment variable at which hydra raises its errors instead of printing them over several lines."""
_SWEEP = ("-m", "--multirun")

_preloading: list[Preloading] = []
"""The argument of `main`; hydra's launchers of other processes leave it behind."""


@interrupting()
def main(preloading: Preloading | None = None) -> None:
    """Run ``launch.py`` with this process's arguments.

    Args:
        preloading: Starts the processes of live runs; by default each run has its own.
    """
    console.install()
    arguments = sorted(sys.argv[1:], key=lambda word: word not in _SWEEP)  # hydra takes the overrides in one piece alone
    if "--help-all" in arguments:
        print(list_of_keys())
        return
    if "--help" in arguments or "-h" in arguments:
        program = Path(sys.argv[0]).name
        print(help_text(f"python {program}" if program.endswith(".py") else program))
        return
    if "--version" in arguments:
        print(f"ormo_rpc {ormo_rpc.__version__}, hydra {hydra.__version__}")
        return
    full_error = FULL_ERROR in os.environ
    began = False

    @functools.wraps(_job)
    def job(values: DictConfig) -> float | None:
        nonlocal began
        began = True
        return _job(values)

    ended: BaseException | None = None
    SweepStart.directory = None
    _preloading[:] = [] if preloading is None else [preloading]
    try:
        ranks = Ranks.from_environment()
        if ranks is not None and ranks.launcher == TORCHRUN:
            end_with_agent()
        sys.argv[1:] = [*prepared(arguments), *_directory(arguments, ranks)]
        os.environ[FULL_ERROR] = "1"
        _hydra_main(job)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        ended = error
    SignalWatch.answered = True  # a repeated signal must not end this program in the midst of its last words
    sweep = SweepStart.directory
    if sweep is not None and sweep.records():
        status = _end_sweep(sweep, ended, full_error)
    else:
        status = 0 if ended is None else _end(ended, began, full_error)
    if status != 0:
        sys.exit(status)


def _end(ended: BaseException, began: bool, full_error: bool) -> int:
    """Say how a single run ended, unless that was said; return the exit status.

    Raises:
        BaseException: it is a fault of this program.
    """
    if isinstance(ended, KeyboardInterrupt):
        _say(f"interrupted by {interrupting_signal(ended).name}; there is nothing to resume")
        return 128 + interrupting_signal(ended)
    if isinstance(ended, SystemExit):
        if isinstance(ended.code, str):
            _say(ended.code)
            return 2
        # Hydra refuses wrong arguments with status 1, which is ours for a run that failed.
        return 2 if ended.code == 1 and not began else ended.code or 0
    if isinstance(ended, ConfigError):
        _say(str(ended))
        return 2
    if full_error or began or not isinstance(ended, (HydraException, OmegaConfBaseException, ValueError, OSError)):
        raise ended
    if isinstance(ended, OSError) and not isinstance(ended, HydraException):
        _say(f"the run directory cannot be made: {ended.strerror}: {ended.filename or 'the current directory'}")
    else:  # hydra lets some plain ones of its own through
        _say(str(refused(ended)))
    return 2


def _end_sweep(sweep: SweepDirectory, ended: BaseException | None, full_error: bool) -> int:
    """Say how a sweep ended, of which at least one job has begun; return the exit status."""
    if isinstance(ended, Exception) and not isinstance(ended, JobFailed):
        _say(f"the sweep ended early: {one_line(ended)}")
    elif isinstance(ended, KeyboardInterrupt):
        _say("the sweep was interrupted")
    fine = sweeps.end(sweep, _say, interrupted=isinstance(ended, KeyboardInterrupt))
    if full_error and isinstance(ended, Exception):
        raise ended
    if isinstance(ended, KeyboardInterrupt):
        return 128 + interrupting_signal(ended)
    return 0 if fine and ended is None else 1


def _hydra_main(job: Callable[[DictConfig], float | None]) -> None:
    """Let hydra compose the configuration from our arguments, and call the job."""
    hydra.main(version_base="1.3", config_path=str(conf_dir().absolute()), config_name="config")(job)()


def _directory(arguments: Sequence[str], ranks: Ranks | None) -> list[str]:
    """Return further arguments of hydra about the run directory, which the process that starts the server makes.

    A process without one makes none; rank 0 that was started again has the run directory of its former start.
    """
    if (ranks is None or ranks.rank == 0) and "role=worker" not in arguments:
        former = None if ranks is None else former_run(ranks)
        return [] if former is None else prepared([f"hydra.run.dir={former.run_dir}"])
    return ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


def _job(values: DictConfig) -> float | None:
    """Run one job of hydra: a single run, or one of a sweep, which returns its optimised metric."""
    console.install()  # a launcher of sweeps may have started this process
    mode = HydraConfig.get()
    ranks = Ranks.from_environment()
    if mode.mode is RunMode.MULTIRUN and ranks is None:
        return sweeps.run_job(mode, lambda: _run(values, mode), _say)
    try:
        if mode.mode is RunMode.MULTIRUN and ranks is not None:
            raise ConfigError(f"-m: got a sweep {ranks.under}, expected a single run; start sweeps with python launch.py -m")
        _, summary = _run(values, mode)
    except (ConfigError, RunFailed) as error:
        _say(str(error))
        sys.exit(error.exit_status if isinstance(error, RunFailed) else 2)
    if status := status_of(summary):
        sys.exit(status)
    return None


def status_of(summary: Mapping[str, Any]) -> int:
    """Return the exit status of a run that has ended by itself; say that it has diverged."""
    if summary.get("status") != "diverged":
        return 0
    _say(f"{summary['reason'] or 'the run diverged'}; lower train.lr or train.momentum, or set train.clip_norm")
    return 0 if "WANDB_SWEEP_ID" in os.environ else 3  # its agent stops after three failures, and a rate too high is a result


def _run(values: DictConfig, mode: HydraConf) -> tuple[Config, dict[str, Any]]:
    """Run a configuration and print the result.

    Raises:
        ConfigError, RunFailed: as `run` does.
    """
    from ormo_rpc.runtimes.process_start import process_began
    from ormo_rpc.runtimes.running import run  # hydra answers --cfg without loading the runtimes

    config, run_dir = parse_config(values, keys_of(mode.overrides.task)), Path(mode.runtime.output_dir)
    if console.on_terminal():
        _say(f"starting the processes of {run_dir}")
    began = None if mode.mode is RunMode.MULTIRUN else process_began()
    summary = run(
        config, run_dir, _launch(mode), start=Path(mode.runtime.cwd), began=began, preloading=next(iter(_preloading), None)
    )
    if summary:
        print_result(summary, run_dir)
    return config, summary


def _launch(mode: HydraConf) -> Launch:
    """Collect what was typed, and the sweep's name: the end of its folder, which hydra names by date and time."""
    sweep = "_".join(Path(mode.sweep.dir).parts[-2:]) if mode.mode is RunMode.MULTIRUN else None
    return Launch(overrides=tuple(mode.overrides.task), sweep=sweep)


def _say(message: str) -> None:
    """Print a line on standard error, with the name of the command in front."""
    console.say(f"{Path(sys.argv[0]).name}: {message}")


def print_result(summary: dict[str, Any], run_dir: Path) -> None:
    """Print how a run has ended."""
    print(_result(summary, run_dir))


def _result(summary: dict[str, Any], run_dir: Path) -> str:
    loss = summary["train_loss"]
    early = f"{summary['reason']}\n" if summary["status"] == "completed" and summary["reason"] else ""
    within = " within a round" if summary.get("delay_within_round") else ""
    identical = f"identical to {summary['replayed']}: every event, and each bit of the final parameters\n"
    return (
        f"{summary['status']}: {described(summary)}: {_iterations(summary)} in {_duration(summary)}, "
        f"mean delay {summary['delay_mean']:.1f}{within}, training loss {LOSS.shown(loss)}{_evaluated(summary)}\n"
        f"{early}{_best(summary)}{identical if summary.get('identical') else ''}run directory: {run_dir}"
    )


def _iterations(summary: dict[str, Any]) -> str:
    """Write the iterations, and where the run continues another one those that are its own."""
    total, own = summary["iterations"], (summary.get("gradients_computed") or 0) - (summary.get("discarded") or 0)
    return f"{total} iterations{f', {own} of them in this run,' if 0 < own < total else ''}"


def _best(summary: dict[str, Any]) -> str:
    """Say which model is the best that was kept; nothing where none was."""
    best = summary.get("best")
    return (
        "" if best is None else f"best {best['metric']} {best['value']:.6g} at iteration {best['iteration']}: {best['path']}\n"
    )


def _evaluated(summary: dict[str, Any]) -> str:
    """Write the metrics that are on the progress bar, else the main one, on the test and validation splits."""
    metrics = metrics_of(summary)
    shown = [each for each in metrics if each.bar] or [main_metric(metrics)]
    words = [f"test {each.name} {each.shown(summary.get(key_of('test', each.name)))}" for each in shown]
    found = [(each, summary.get(key_of("val", each.name))) for each in shown]
    words += [f"validation {each.name} {each.shown(value)}" for each, value in found if value is not None]
    return "".join(f", {word}" for word in words)


def _duration(summary: dict[str, Any]) -> str:
    """Seconds of the run's clock, and the real ones of all processes with those of start and end."""
    virtual, training, wall = summary["virtual_seconds"], summary["training_seconds"], f"{summary['wall_seconds']:.1f} s"
    if virtual is not None:
        return f"{virtual:.1f} virtual seconds ({wall} of real time)"
    if summary["runtime"] == "replay":
        return f"{'-' if training is None else f'{training:.1f}'} s (replayed in {wall})"
    start, end = (
        "-" if each is None else f"{each:.1f} s" for each in (summary.get("start_seconds"), summary.get("end_seconds"))
    )
    return f"{training:.1f} s ({wall} in all: start {start}, end {end})"
