"""Checks before a run: a configuration that cannot be run is refused before anything starts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Generator
from pathlib import Path

from ormo_rpc import devices
from ormo_rpc.config.parsing import load_config
from ormo_rpc.config.runtimes import DdpRuntime, GradientKind, ReplayRuntime, RpcRuntime, Shares, SimRuntime
from ormo_rpc.config.schema import Config
from ormo_rpc.data import CustomData
from ormo_rpc.errors import ConfigError, one_line
from ormo_rpc.options import Part
from ormo_rpc.options.instantiate import values_of
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.job_like import JobLike, LiveJob
from ormo_rpc.runtimes.ranking import Ranking, check_choice
from ormo_rpc.runtimes.ranks import Ranks
from ormo_rpc.runtimes.round_sizes import check_rounds
from ormo_rpc.runtimes.simulator.jobs import SyntheticJob
from ormo_rpc.runtimes.targets import check_clock
from ormo_rpc.runtimes.trial import try_job
from ormo_rpc.server.build import check_resumable
from ormo_rpc.server.lr_schedule import LearningRate
from ormo_rpc.server.state import Status
from ormo_rpc.storage import best, checkpoint
from ormo_rpc.storage.optimized_metric import refuse_metric
from ormo_rpc.tasks import Task

RESUMED_KEYS = (
    *(
        "seed",
        "algorithm",
        "scheduler",
        "dataset.name",
        "dataset.validation",
        "model",
        "task",
        "train.batch_size",
        "train.momentum",
    ),
    *("compression", "wire.dtype", "wire.params"),
)
"""Keys that a resumed run must have in common with the checkpoint's: they give its tickets and its state their meaning."""
EXACT_KEYS = ("num_processes", "worker.prefetch", "runtime.joins", "runtime.leaves")
"""Those that a simulation which goes on from the middle of another has in common too: its workers and events are saved."""
_KEYS = frozenset(field.name for field in dataclasses.fields(Config))
"""Keys that our own messages begin with, before a dot or a colon."""


def check(
    config: Config, *, starts_server: bool, apart: Callable[[Callable[[], None]], None] | None = None
) -> Job | SyntheticJob | None:
    """Refuse a configuration one of whose parts cannot be used, or that has nothing to do.

    Args:
        config: What is to be run.
        starts_server: Check the checkpoint that the run resumes from and the logger too, and try one batch; one launcher of a
            run does.
        apart: Calls a function that may start threads, and whose only result is a `ConfigError`, maybe in another process.

    Returns:
        The job, whose configuration has what the data set was read for; None for a replay.

    Raises:
        ConfigError: it cannot be run; the message has the key to change.
    """
    later = isinstance(config.dataset, CustomData)  # that has a validation split, or none, is known once it is loaded
    refuse_metric(config.optimized_metric, config.task, validation=later or config.dataset.has_validation)
    config.refuse_unavailable(works=_works_here(config))
    resumed = None
    if config.checkpoint.resume is not None and isinstance(config.runtime, ReplayRuntime):
        given = config.checkpoint.resume
        raise ConfigError(f"checkpoint.resume: got {given} with runtime=replay, expected None: a replay begins as its run did")
    if starts_server:
        devices.check(config.server.device, "server.device")
    if starts_server and config.checkpoint.resume is not None:
        resumed = checkpoint.locate(Path(config.checkpoint.resume))
        best.refuse(resumed)
        check_resume(config, resumed)
    with _as_config_error():
        config.heterogeneity.prepare()
    if isinstance(config.runtime, ReplayRuntime):
        if starts_server:
            _try(config, None)
        return None
    with _as_config_error():
        check_resumable(config.algorithm, config.scheduler)
    if starts_server:
        check_rounds(config)
    synthetic = isinstance(config.runtime, SimRuntime) and config.runtime.gradient is not GradientKind.real
    job = SyntheticJob(config) if synthetic else check_data_and_model(config)
    refuse_metric(job.config.optimized_metric, config.task, validation=job.config.dataset.has_validation)
    if isinstance(config.runtime, DdpRuntime) and isinstance(job, Job):
        _refuse_16_bits(job)
    check_choice(job.config, evaluated=not synthetic and not config.worker.dummy)
    if starts_server:
        with _as_config_error():
            job.lr.prepare()
    if resumed is not None:
        check_something_is_left(resumed, job.total_tickets)
        check_patience_is_left(config, resumed, job)
    if starts_server and apart is not None:
        apart(lambda: _try(config, job))
    elif starts_server:
        _try(config, job)
    if resumed is not None:
        checkpoint.check_fingerprint(resumed, job.fingerprint())
    return job


def check_own_loop(job: LiveJob, *, starts_server: bool) -> None:
    """Refuse a loop of the user's own as `check` does; its model was checked as the job was made.

    Raises:
        ConfigError: it cannot be run; the message has the key to change.
    """
    config = job.config
    config.refuse_unavailable(works=_works_here(config))
    with _as_config_error():
        config.heterogeneity.prepare()
        check_resumable(config.algorithm, config.scheduler)
        job.push_format()
        job.groups()
    check_choice(config, evaluated=True)
    if not starts_server:
        return
    devices.check(config.server.device, "server.device")
    check_rounds(config)
    with _as_config_error():
        config.logger.prepare()
        if isinstance(job.lr, LearningRate):
            job.lr.prepare()
    if config.checkpoint.resume is not None:
        resumed = checkpoint.locate(Path(config.checkpoint.resume))
        best.refuse(resumed)
        check_resume(config, resumed)
        check_something_is_left(resumed, job.total_tickets, "total_tickets (or train.max_iterations)")
        check_patience_is_left(config, resumed, job)
        checkpoint.check_fingerprint(resumed, job.fingerprint())


def _works_here(config: Config) -> bool:
    """Tell whether this launcher starts a worker: under torchrun and the like the first rank is the server alone."""
    ranks = Ranks.from_environment()
    return ranks is None or ranks.rank > 0 or not isinstance(config.runtime, RpcRuntime)


@contextlib.contextmanager
def _as_config_error() -> Generator[None]:
    """Refuse what raises a ValueError that says all."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _try(config: Config, job: Job | SyntheticJob | None) -> None:
    """Prepare the logger, and try one batch of a job that trains.

    Raises:
        ConfigError: the run cannot be logged, or the batch cannot be computed.
    """
    with _as_config_error():
        config.logger.prepare()
    if isinstance(job, Job) and not config.worker.dummy:
        try_job(job)


def _refuse_16_bits(job: Job) -> None:
    """Refuse parameters that the vector of all parameters is wider than, which torch.optim.SGD would step in their own dtype.

    Raises:
        ConfigError: there are some.
    """
    with job.reading_model() as model:
        found = [name for name, parameter in model.trainable.items() if parameter.dtype != model.dtype]
        expected = str(model.dtype).removeprefix("torch.")
    if found:
        raise ConfigError(
            f"model: {found[0]}: got a trainable parameter of other than {expected} with runtime=ddp, expected all of one "
            "dtype of at least 32 bits; worker.autocast=bf16 computes in 16"
        )


def check_resume(config: Config, path: Path) -> None:
    """Refuse to resume from the checkpoint of a different run.

    Raises:
        ConfigError: a key of `RESUMED_KEYS` differs, its run was one of ``runtime=ddp``, or there are targets and it had
            another clock.
    """
    then = load_config(path / "config.yaml")
    if isinstance(then.runtime, DdpRuntime):
        raise ConfigError(
            f"checkpoint.resume: got {path} of a run with runtime=ddp, whose momentum is in no checkpoint, expected one of "
            "another runtime"
        )
    for key in RESUMED_KEYS:
        expected, given = (functools.reduce(getattr, key.split("."), each) for each in (then, config))
        if isinstance(expected, Task) and isinstance(given, Task):  # what is measured beside may change
            expected, given = (dataclasses.replace(each, torchmetrics={}) for each in (expected, given))
        if expected != given:
            if key == "dataset.name":
                given, expected = config.dataset.known_as, then.dataset.known_as
            got, wanted = _typed(given), _typed(expected)
            raise ConfigError(f"checkpoint.resume: {key}: got {got}, expected {wanted}, as {path} has it")
    _check_own_data(config, then, path)
    if config.evaluate.targets:
        check_clock(config, then, checkpoint.read(path, checkpoint.SERVER)["session"].get("targets"), path)
    if isinstance(config.runtime, SimRuntime) and isinstance(then.runtime, SimRuntime):
        _check_exact_resume(config, then, path)
    if isinstance(config.runtime, SimRuntime) and config.sim.shares is Shares.proportional:
        _check_whole_rounds(config, then, path)


def _check_own_data(config: Config, then: Config, path: Path) -> None:
    """Refuse another data set of the user's own than a checkpoint's, whose sizes and first labels may agree.

    Keywords that are texts may differ: they may be paths.

    Raises:
        ConfigError: its function, keywords, batches or weights differ.
    """
    old, new = then.dataset, config.dataset
    if not isinstance(old, CustomData) or not isinstance(new, CustomData):
        return
    kept = ("_target_", "collate", "pad_values", "weights")
    expected, given = (
        {key: getattr(each, key) for key in kept}
        | {key: value for key, value in each.kwargs.items() if not isinstance(value, str)}
        for each in (old, new)
    )
    for key in {**expected, **given}:
        if expected.get(key) != given.get(key):
            raise ConfigError(
                f"checkpoint.resume: dataset.{key}: got {given.get(key)}, expected {expected.get(key)}, as {path} has it"
            )


def _check_exact_resume(config: Config, then: Config, path: Path) -> None:
    """Refuse to go on with other workers than a checkpoint from the middle of a simulation has.

    Raises:
        ConfigError: a key of `EXACT_KEYS` differs.
    """
    for key in EXACT_KEYS:
        expected, given = (functools.reduce(getattr, key.split("."), each) for each in (then, config))
        if expected != given and checkpoint.read(path, checkpoint.SERVER)["status"] == Status.running.value:
            name = "workers" if key == "num_processes" else key
            raise ConfigError(
                f"checkpoint.resume: {name}: got {given}, expected {expected}, as {path} has it: a simulation goes on exactly "
                "from a checkpoint of its middle; one of the end of a run may be resumed with others"
            )


def _check_whole_rounds(config: Config, then: Config, path: Path) -> None:
    """Refuse to count rounds from the start of a run after a short one, as ``runtime.shares=proportional`` does.

    Raises:
        ConfigError: the checkpoint is of the end of a run, or of a live one, whose last round was short.
    """
    state = checkpoint.read(path, checkpoint.SERVER)
    goes_on = isinstance(then.runtime, SimRuntime) and state["status"] == Status.running.value
    if not goes_on and state["iteration"] % config.num_workers:
        raise ConfigError(
            f"checkpoint.resume: got {path} at iteration {state['iteration']}, expected a multiple of workers="
            f"{config.num_workers}, as runtime.shares=proportional divides rounds that are counted from the start; "
            "runtime.shares=equal continues it"
        )


def _typed(value: object) -> str:
    """Write a value as it would be typed: the keys of a part."""
    if not isinstance(value, Part):
        return str(value)
    options = values_of(value)
    words = [f"{value.PATH}={options.pop('name')}"] if "name" in options else []
    return " ".join([*words, *(f"{value.key(key)}={'null' if each is None else each}" for key, each in options.items())])


def check_something_is_left(path: Path, total: int, length: str = "train.epochs (or train.max_iterations)") -> None:
    """Refuse to resume a run that is done.

    Args:
        path: The checkpoint.
        total: The gradients of the configured run.
        length: What sets its length.

    Raises:
        ConfigError: the checkpoint has all gradients of the configured run already.
    """
    done = checkpoint.gradients_in(path)
    if done >= total:
        what = f"iteration {done} of {total} is done" if done == total else f"got iteration {done}, and the run ends at {total}"
        raise ConfigError(f"checkpoint.resume: {what}; raise {length}")


def check_patience_is_left(config: Config, path: Path, job: JobLike) -> None:
    """Refuse to resume a run that would stop at once.

    Raises:
        ConfigError: it had stopped early by the checkpoint, or would have with this configuration.
    """
    if config.evaluate.patience is not None:
        ranking, state = Ranking(job.config, job.metric), checkpoint.read(path, checkpoint.SERVER)
        ranking.load_state_dict(state["session"].get("ranking"), state["iteration"])
        if ranking.reason is not None:
            raise ConfigError(f"checkpoint.resume: nothing is left to do: {ranking.reason}; raise it, or set it to null")


def check_data_and_model(config: Config) -> Job:
    """Load the data set and build the model twice, to find errors in one place instead of in every process.

    Raises:
        ConfigError: the data set is missing or damaged, the model does not fit it or differs the second time, or a pattern of
            parameter names matches none.
    """
    with _refused(config.dataset):
        config.dataset.prepare()
        job = Job(config)
    with _refused(config.model):
        job.prepare_models(2)
        job.groups()
    for name, split in (("test set", job.data.test), ("validation split", job.data.validation)):
        if split is not None and len(split) == 0:
            raise ConfigError(f"dataset: got an empty {name}, expected at least one sample")
    job.config = dataclasses.replace(config, dataset=config.dataset.with_findings(job.data))
    return job


@contextlib.contextmanager
def _refused(part: Part) -> Generator[None]:
    """Refuse what a data set or a model raises while it is made."""
    try:
        yield
    except (Exception, SystemExit) as error:  # the user's own may raise anything
        if isinstance(error, ValueError) and re.split("[.:]", str(error), maxsplit=1)[0] in _KEYS:
            raise ConfigError(str(error)) from None  # of this package, which has said what is wrong
        raise ConfigError(f"{part.PATH}: {part.known_as} cannot be made: {one_line(error)}") from error
