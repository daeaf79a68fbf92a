"""Sweeps of hydra: a bad job does not end the others, each job returns its optimised metric, and the end says what failed."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from ormo_rpc.config.schema import GROUPS, Config
from ormo_rpc.errors import ConfigError, Interrupted, RunFailed, RunInterrupted, one_line
from ormo_rpc.loggers.metrics import key_of, metric_of
from ormo_rpc.options.imports import locate
from ormo_rpc.options.instantiate import part
from ormo_rpc.signals import raise_interrupted
from ormo_rpc.storage.optimized_metric import higher_is_better, refuse_metric
from ormo_rpc.storage.summary import metrics_of
from ormo_rpc.storage.sweep_directory import FAILED, INTERRUPTED, RUNNING, JobRecord, Plan, SweepDirectory
from ormo_rpc.tasks import Classification, Task
from ormo_rpc.tasks.metrics import LOSS, metric_named

_log = logging.getLogger(__name__)
Run = Callable[[], tuple[Config, dict[str, Any]]]
"""Runs a job; its configuration and its summary."""


class JobFailed(RuntimeError):
    """Raised to a sweeper that searches: it counts the trial as failed and goes on."""


class SweepStart(Callback):
    """Hydra calls this in the process that was started, before the first job.

    Attributes:
        directory: That of the sweep of this process, if it is one; of the class, since hydra makes the instance.
    """

    directory: SweepDirectory | None = None

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        plan = _plan(config.hydra)
        try:
            _refuse_direction(config, None if {"task", "task._target_"} & {*plan.keys} else _task(config))
            _refuse_run_id(config, plan)
            _refuse_launcher(config.hydra)
            _refuse_targets(config)
        except ValueError as error:
            sys.exit(str(error))  # hydra only warns of an exception
        directory = SweepDirectory(_sweep_dir(config.hydra).absolute())
        try:
            directory.begin(plan)
        except OSError as error:
            sys.exit(f"hydra.sweep.dir: {directory.path} cannot be made: {error.strerror}")
        SweepStart.directory = directory


def run_job(hydra: HydraConf, run: Run, say: Callable[[str], None]) -> float | None:
    """Run one job of a sweep, and write down what became of it.

    Args:
        hydra: Hydra's settings of the job.
        run: Runs it.
        say: Prints a line on standard error.

    Returns:
        The optimised metric: the worst value there is where the run diverged, None where the job failed or has no such value.

    Raises:
        JobFailed: instead of None, to any sweeper but hydra's own, which ends with the first exception.
        KeyboardInterrupt: a signal ended the run, or has ended the sweep before.
    """
    directory = SweepDirectory(_sweep_dir(hydra))
    plan, number = directory.plan(), int(hydra.job.num)
    record = JobRecord(number=number, settings=_settings(hydra, plan), directory=str(hydra.runtime.output_dir))
    raise_interrupted()  # in a job's process of joblib's or submitit's
    if directory.stopped:
        raise KeyboardInterrupt
    print(f"{_name(record, plan)}: {record.settings}")
    directory.write(record)
    searches = not str(hydra.sweeper._target_).endswith(".BasicSweeper")
    value, status, reason = None, FAILED, None
    try:
        config, summary = run()
        status, metric = str(summary.get("status")), _searched_metric(config, summary)
        value = _value(metric, summary, hydra)
        if value is None and (searches or config.optimized_metric is not None):
            entries = ", ".join(key for key, each in summary.items() if metric_of(key) is not None and each is not None)
            status, reason = FAILED, f"optimized_metric: the run has no {metric}, only {entries or 'no evaluation'}"
        elif searches:
            print(f"{_name(record, plan)}: {metric} {value}")
        if value is not None and math.isfinite(value):
            record = dataclasses.replace(record, metric=metric, value=value, higher_is_better=_higher(metric, summary, hydra))
    except RunInterrupted as error:
        directory.write(dataclasses.replace(record, status=INTERRUPTED))
        raise Interrupted(error.number) from None
    except (ConfigError, RunFailed) as error:
        reason = str(error)
    except (Exception, SystemExit) as error:  # a user's own code may raise anything
        traceback.print_exc()
        reason = one_line(error)
    directory.write(dataclasses.replace(record, status=status, reason=reason))
    if reason is not None:
        say(f"{_name(record, plan)} failed: {reason}")
        if searches:
            raise JobFailed(reason)
    return value


def end(directory: SweepDirectory, say: Callable[[str], None], *, interrupted: bool) -> bool:
    """Say how the jobs of a sweep ended; True where none failed.

    Args:
        directory: That of the sweep.
        say: Prints a line on standard error.
        interrupted: A signal ended the sweep, and with it the jobs that were running.
    """
    if interrupted:
        directory.stop()
        _end_children()
    plan, records = directory.plan(), directory.records()
    without_end = INTERRUPTED if interrupted else FAILED
    counted = Counter(without_end if record.status == RUNNING else record.status for record in records)
    total, failed = max(plan.jobs or 0, len(records)), counted.pop(FAILED, 0)
    counted["not started"] = total - len(records)
    others = [f"{count} {status}" for status, count in sorted(counted.items()) if count]
    say(", ".join([f"{failed} of {total} jobs failed" if failed else f"{total} jobs", *others]))
    for record in records:
        if record.status == FAILED or (record.status == RUNNING and not interrupted):
            reason = record.reason or "its process ended without a word, or runs on"
            say(f"{_name(record, plan)} ({record.settings}): {reason}; {record.directory}")
    if (best := _best(records)) is not None:
        print(f"best: {_name(best, plan)} ({best.settings}): {best.metric} {best.value:.6g}; {best.directory}")
    print(f"sweep directory: {directory.path}")
    if counted["completed"]:
        print(f"compare its runs: python -m ormo_rpc.report {shlex.quote(str(directory.path))}")
    return not failed


def _end_children() -> None:
    """Ask the processes to end that a launcher has started and leaves to themselves, as submitit does; Linux lists them."""
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread or the process is gone
            for number in file.read_text().split():
                os.kill(int(number), signal.SIGTERM)


def _sweep_dir(hydra: HydraConf) -> Path:
    """The directory of the sweep, which a job may have left (``hydra.job.chdir``)."""
    return Path(str(hydra.runtime.cwd), str(hydra.sweep.dir))


def _name(record: JobRecord, plan: Plan) -> str:
    return f"job {record.number + 1}" + ("" if plan.jobs is None else f" of {plan.jobs}")


def _settings(hydra: HydraConf, plan: Plan) -> str:
    words = [str(word) for word in hydra.overrides.task]
    own = [word for word in words if word.partition("=")[0].lstrip("+") in plan.keys]
    return " ".join(own or words) or "no overrides"


def _plan(hydra: HydraConf) -> Plan:
    """Count the jobs of hydra's own sweeper, and take the number of trials of one that searches."""
    params: DictConfig | None = hydra.sweeper.get("params")
    words = [f"{key}={value}" for key, value in (params or {}).items()] + list(hydra.overrides.task)
    swept: dict[str, int | None] = {}
    for each in OverridesParser.create().parse_overrides(words):
        swept[str(each.key_or_group)] = _choices(each)
    keys = [key for key, count in swept.items() if count != 1]
    if "n_trials" in hydra.sweeper:
        return Plan(jobs=None if "GridSampler" in str(hydra.sweeper.sampler) else int(hydra.sweeper.n_trials), keys=keys)
    counts = [count for count in swept.values() if count is not None]
    return Plan(jobs=math.prod(counts) if len(counts) == len(swept) else None, keys=keys)


def _choices(word: Override) -> int | None:
    """The number of values that an override stands for; None where there is no telling."""
    if not word.is_sweep_override():
        return 1
    try:
        return sum(1 for _ in word.sweep_string_iterator()) if word.is_discrete_sweep() else None
    except HydraException:  # glob(*), whose names hydra looks up
        return None


def _searched_metric(config: Config, summary: Mapping[str, Any]) -> str:
    """The metric of a job, whose data set may have a validation split that the configuration does not tell of."""
    validated = config.optimized_metric is None and summary.get("val_loss") is not None
    return "val_loss" if validated else config.searched_metric


def _value(metric: str, summary: dict[str, Any], hydra: HydraConf) -> float | None:
    if summary.get("status") == "diverged":
        return -math.inf if _maximizes(hydra.sweeper) else math.inf
    best = summary.get("best")  # by the same metric
    value = summary.get(metric) if best is None else best["value"]
    return None if value is None or not math.isfinite(value) else float(value)


def _higher(metric: str, summary: Mapping[str, Any], hydra: HydraConf) -> bool | None:
    """Tell if a larger value is better: of what no run says, the sweeper's direction does."""
    found = higher_is_better(metric, lambda name: metric_named(name, metrics_of(summary)))
    return _maximizes(hydra.sweeper) if found is None and "direction" in hydra.sweeper else found


def _best(records: Sequence[JobRecord]) -> JobRecord | None:
    """The best of several jobs that completed; None where they are not to be compared."""
    measured = [record for record in records if record.value is not None and record.status == "completed"]
    if len(measured) < 2 or len({(record.metric, record.higher_is_better) for record in measured}) > 1:
        return None
    if measured[0].higher_is_better is None:
        return None
    return (max if measured[0].higher_is_better else min)(measured, key=lambda record: record.value or 0.0)


def _maximizes(sweeper: Any) -> bool:
    direction = sweeper.get("direction")
    return getattr(direction, "name", direction) == "maximize"


def _refuse_targets(config: DictConfig) -> None:
    """Refuse a function or class of the user's that all jobs name and none could import.

    Raises:
        ValueError: there is such a one.
    """
    for group in GROUPS:
        target = (config.get(group) or {}).get("_target_")
        if target is not None:
            locate(group, target)


def _task(config: DictConfig) -> Task | None:
    """The task of all jobs; None where it cannot be made, which the jobs tell."""
    try:
        made = part("task", OmegaConf.to_container(config.task, resolve=True), Classification)
    except (ValueError, OmegaConfBaseException):
        return None
    assert isinstance(made, Task)
    return made


def _refuse_direction(config: DictConfig, task: Task | None) -> None:
    """Refuse an unknown metric, and a direction that would look for the worst value.

    Raises:
        ConfigError: it is such a one.
    """
    name = config.get("optimized_metric")
    refuse_metric(name, task)
    sweeper = config.hydra.sweeper
    if "direction" not in sweeper:
        return
    if isinstance(sweeper.direction, ListConfig):
        raise ConfigError(f"hydra.sweeper.direction: got {sweeper.direction}, expected minimize or maximize, for one metric")
    maximizes = higher_is_better(name or key_of("test", LOSS.name), metric_named if task is None else task.metric)
    if maximizes is None or _maximizes(sweeper) == maximizes:
        return
    given, expected = ("minimize", "maximize") if maximizes else ("maximize", "minimize")
    said = f"hydra.sweeper.direction: got {given}, expected {expected} with optimized_metric={name or 'null (a loss)'}"
    found = metric_of(name or "")
    declared = (LOSS, *([] if task is None else task.all_metrics()))
    if found is not None and found[1] not in [each.name for each in declared]:
        _log.warning("%s, as far as its name tells", said)
        return
    raise ConfigError(said)


def _refuse_launcher(hydra: HydraConf | DictConfig) -> None:
    """Refuse jobs of Slurm on a machine without its programs, for which submitit has a traceback.

    Raises:
        ConfigError: the sweep is for Slurm, and there is no ``srun``.
    """
    if str(hydra.launcher.get("_target_")).endswith(".SlurmLauncher") and shutil.which("srun") is None:
        raise ConfigError(
            "hydra/launcher=slurm: got a machine without the program srun, expected one from which jobs of Slurm are "
            "submitted; hydra/launcher=local runs the same jobs on this machine"
        )


def _refuse_run_id(config: DictConfig, plan: Plan) -> None:
    """Refuse one id of wandb for all jobs, whose curves would become those of a single run.

    Raises:
        ConfigError: there is one.
    """
    logger = config.get("logger", {})
    if plan.jobs == 1 or logger.get("name") != "wandb" or "logger.run_id" in plan.keys:
        return
    option, variable = logger.get("run_id"), os.environ.get("WANDB_RUN_ID")
    if option or variable:
        given = f"logger.run_id: got {option}" if option else f"WANDB_RUN_ID: got {variable}"
        raise ConfigError(f"{given} for all jobs of a sweep, expected an id for each; leave it out")
