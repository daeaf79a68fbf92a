"""Weights & Biases: metrics over iterations, with the delays of each worker and their histogram."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from ormo_rpc.errors import one_line
from ormo_rpc.loggers.base import Logger, RunInfo, RunLog
from ormo_rpc.loggers.metrics import metric_of
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.options import option, positive, register
from ormo_rpc.tasks.metrics import TaskMetric, metric_named

ENVIRONMENT: Mapping[str, str] = {
    "mode": "WANDB_MODE",
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "run_name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
    "run_id": "WANDB_RUN_ID",
    "directory": "WANDB_DIR",
}
"""The variable that counts where an option says nothing."""
MODES = ("offline", "dryrun", "disabled", "online", "run", "shared")
"""The values of ``WANDB_MODE``; those from ``online`` on need a key."""
TIMEOUT_SECONDS = 60.0
ID_FILE = "wandb_id"
"""The file of the run directory with the id of the run, which is continued under it."""
SERVICE_END_SECONDS = 5.0
"""The process of wandb has ended by then; it is left to itself otherwise, and ends once it misses this one."""
MAX_NAME_CHARACTERS = 128
MAX_TAG_CHARACTERS = 64
UNUSABLE = (RuntimeError, OSError, KeyError)
"""Raised by wandb where it finds no home directory and no user, or no place for its files; its own errors are `wandb.Error`."""
_log = logging.getLogger(__name__)


def _is_project(value: str) -> bool:
    return 0 < len(value) <= MAX_NAME_CHARACTERS and not set(value) & set("/\\#?%:")


def _is_id(value: str) -> bool:
    return 0 < len(value) <= MAX_NAME_CHARACTERS and not set(value) & set(":;,#?/'")


def _are_tags(value: Sequence[str]) -> bool:
    return all(0 < len(tag) <= MAX_TAG_CHARACTERS for tag in value)


PROJECT = r"1 to 128 characters but / \ # ? % :"
ID = "1 to 128 characters but : ; , # ? / '"
TAGS = "tags of 1 to 64 characters"


class WandbMode(Enum):
    """The place where Weights & Biases keeps the run."""

    offline = "offline"
    """In the run directory; ``wandb sync`` uploads it."""
    online = "online"


@register("wandb")
@dataclass(frozen=True, kw_only=True)
class WandbLogger(Logger):
    """Log to Weights & Biases, offline by default; where an option says nothing, wandb's variable counts."""

    mode: WandbMode | None = option(
        None, "offline (kept in the run directory) or online; else WANDB_MODE, else offline but in a wandb sweep"
    )
    project: str | None = option(None, "wandb project; else WANDB_PROJECT, else ormo_rpc", valid=_is_project, expected=PROJECT)
    entity: str | None = option(None, "wandb entity (user or team); else WANDB_ENTITY")
    run_name: str | None = option(
        None, "wandb run name; else WANDB_NAME, else algorithm, scheduler, workers, seed and what the command line sets"
    )
    group: str | None = option(None, "wandb group; else WANDB_RUN_GROUP, else the sweep that the run belongs to")
    job_type: str | None = option(None, "wandb job type; else WANDB_JOB_TYPE, else the runtime, such as rpc")
    tags: list[str] = option(
        [], "wandb tags; else WANDB_TAGS, else algorithm, scheduler, data set and model", valid=_are_tags, expected=TAGS
    )
    notes: str | None = option(None, "wandb notes; else WANDB_NOTES")
    run_id: str | None = option(
        None,
        "id of the wandb run; else WANDB_RUN_ID, else that of the run that checkpoint.resume continues, or a new one",
        valid=_is_id,
        expected=ID,
    )
    directory: str | None = option(None, "folder of wandb's own files; else WANDB_DIR, else the run directory", path=True)
    timeout_seconds: float | None = option(
        None,
        f"seconds to wait for wandb's server, at the start and at the end; else WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT, "
        f"else {TIMEOUT_SECONDS:g}",
        valid=positive,
        expected="a finite number > 0",
    )

    @override
    def prepare(self) -> None:
        mode = (os.environ.get("WANDB_MODE") or _default_mode()) if self.mode is None else self.mode.value
        if mode not in MODES:
            raise ValueError(f"WANDB_MODE: got {mode!r}, expected one of {', '.join(MODES)}; or set logger.mode")
        for name, valid, expected in (("project", _is_project, PROJECT), ("run_id", _is_id, ID)):
            value = os.environ.get(ENVIRONMENT[name])
            if value and not valid(value) and getattr(self, name) is None:
                raise ValueError(f"{ENVIRONMENT[name]}: got {value!r}, expected {expected}; or set logger.{name}")
        tags = os.environ.get("WANDB_TAGS")
        if tags and not _are_tags(tags.split(",")) and not self.tags:
            raise ValueError(f"WANDB_TAGS: got {tags!r}, expected {TAGS}, separated by commas; or set logger.tags")
        if mode not in MODES[MODES.index("online") :]:
            return
        import wandb  # takes half a second to load, so only where it is used
        from wandb.sdk.lib import wbauth  # what wandb.login(prompt=False) asks, without its messages and without saving

        try:
            found = wbauth.authenticate_session(
                host=wandb.setup().settings.base_url, source="ormo_rpc", prompt=False, update_session=False
            )
            fault = "no key was found"
        except wandb.Error as error:
            found, fault = None, " ".join(str(error).split())
        except UNUSABLE as error:
            raise ValueError(
                f"logger.mode: got {mode}, but wandb cannot be used here: {one_line(error).rstrip('.')}; set HOME to a "
                "directory of yours, or use logger=none"
            ) from None
        if found is None:
            raise ValueError(
                f"logger.mode: got {mode}, but {fault}; log in with `wandb login`, or set WANDB_API_KEY, or use "
                f"logger.mode=offline or logger=none"
            )

    @override
    def start(self, run: RunInfo) -> RunLog:
        import wandb  # takes half a second to load, so only where it is used
        from wandb import errors

        if self.directory is not None:
            Path(self.directory).mkdir(parents=True, exist_ok=True)  # else wandb warns that it is in no repository
        own, continued = _read_id(run.directory), None if run.continues is None else _read_id(run.continues)
        arguments = self._arguments(run, own or continued)
        # A run of the calling program's own stays as it is: it is not wandb's current run that is taken, but a new one.
        settings = wandb.Settings(console="off", silent=True, reinit="create_new", **self._timeouts())
        arguments |= {"config": dict(run.config), "settings": settings}
        try:
            started = wandb.init(**arguments)
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            unreachable = isinstance(error, errors.CommError) and not isinstance(error, errors.AuthenticationError)
            if not (unreachable or own):
                mode = arguments["mode"] or os.environ["WANDB_MODE"]
                raise ValueError(
                    f"logger.mode: wandb cannot start {mode}: {reason}; use logger.mode=offline or logger=none"
                ) from None
            _log.warning("wandb cannot be reached, so the run is logged offline, for `wandb sync`: %s", reason)
            arguments["mode"] = "offline"
            started = wandb.init(**arguments)
        except UNUSABLE as error:
            _log.warning("wandb is left out, metrics.jsonl has every row: %s", one_line(error))
            return RunLog()
        if not started.disabled:
            (run.directory / ID_FILE).write_text(started.id)
        started.define_metric("*", step_metric="iteration")
        log = WandbRunLog(started, wandb.Histogram, run.metric, keep_best=_wandb_sweep() is None)
        for row in run.rows if started.offline else ():  # wandb's process may have died with the server before it wrote them
            log.define(row)
            started.log(dict(row))
        return log

    def _arguments(self, run: RunInfo, run_id: str | None) -> dict[str, Any]:
        """The arguments of ``wandb.init``; None where the environment says it, or wandb's own default counts."""
        parts: list[Mapping[str, str]] = [run.config.get(group, {}) for group in ("algorithm", "scheduler", "dataset", "model")]
        names = (part.get("name", part.get("_target_", "").rpartition(".")[2]) for part in parts)
        sweep = _wandb_sweep()
        defaults: Mapping[str, Any] = {
            "mode": _default_mode(),
            "project": None if sweep else "ormo_rpc",  # the project of a sweep is that of its runs
            "run_name": run.title[:MAX_NAME_CHARACTERS],
            "group": run.sweep or sweep,
            "job_type": run.config.get("runtime", {}).get("name"),
            "tags": [name[:MAX_TAG_CHARACTERS] for name in names if name],
            "run_id": run_id,
            "directory": str(run.directory),
        }
        chosen = {name: self._chosen(name, defaults.get(name)) for name in ENVIRONMENT}
        chosen["mode"] = chosen["mode"].value if isinstance(chosen["mode"], WandbMode) else chosen["mode"]
        resume = None if os.environ.get("WANDB_RESUME") else "allow"
        renamed = {"run_name": "name", "run_id": "id", "directory": "dir"}
        return {"resume": resume, **{renamed.get(name, name): value for name, value in chosen.items()}}

    def _chosen(self, name: str, default: Any) -> Any:
        """The option, or None where the environment has it, or the default where neither has."""
        value = getattr(self, name)
        if value:
            return value
        return None if os.environ.get(ENVIRONMENT[name]) else default

    def _timeouts(self) -> dict[str, Any]:
        seconds = self.timeout_seconds
        return {
            name: seconds or TIMEOUT_SECONDS
            for name in ("init_timeout", "finish_timeout")
            if seconds is not None or not os.environ.get(f"WANDB_{name.upper()}")
        }


class WandbRunLog(RunLog):
    """A run of Weights & Biases; what it cannot take is a warning, once, and training goes on.

    Args:
        run: As ``wandb.init`` returns it.
        histogram: The class ``wandb.Histogram``.
        metric: Declares a metric of evaluations.
        keep_best: Have wandb keep the best value of each metric of evaluations beside the last one. Not in a sweep of wandb's,
            which searches by numbers of the summary, and this makes pairs of them.
    """

    def __init__(
        self,
        run: Any,
        histogram: Any,
        metric: Callable[[str], TaskMetric] = metric_named,
        *,
        keep_best: bool = True,
    ) -> None:
        self.run = run
        self.keep_best = keep_best
        self.histogram = histogram
        self.metric = metric
        self._broken = False
        self._defined: set[str] = set()
        """The metrics whose best value wandb keeps."""

    @override
    def log(self, row: Mapping[str, Any], statistics: Statistics) -> None:
        if self._broken:
            return
        per_worker = {f"delay/worker_{worker}": mean for worker, mean in statistics.delay_means().items()}
        with_histogram = "test_loss" in row and statistics.applied > 0  # large, so with evaluations only
        delays = {"delay/histogram": self._histogram(statistics.delay_counts())} if with_histogram else {}
        try:
            self.define(row)
            self.run.log({**row, **per_worker, **delays})
        except Exception as error:  # its process may be gone, which it tells by errors of many kinds
            self._broken = True
            _log.warning("wandb takes no more rows, metrics.jsonl does: %s", one_line(error))

    @override
    def finish(self, summary: Mapping[str, Any]) -> None:
        # Of these wandb has the last value, too; one number would take the place of both.
        self.run.summary.update({key: value for key, value in summary.items() if key not in self._defined})
        self.run.finish()

    def define(self, row: Mapping[str, Any]) -> None:
        """Have wandb keep the best value of each metric of evaluations in a row, if that is wanted."""
        for key in row if self.keep_best else ():
            found = metric_of(key)
            if found is not None and key not in self._defined:
                best = "max" if self.metric(found[1]).higher_is_better else "min"
                self.run.define_metric(key, step_metric="iteration", summary=f"{best},last")
                self._defined.add(key)

    def _histogram(self, counts: list[int]) -> Any:
        """Make a histogram of delays 0, 1, ..., with bins as wide as wandb's limit on their number asks for."""
        width = -(-len(counts) // self.histogram.MAX_LENGTH)
        padded = np.pad(counts, (0, -len(counts) % width)).reshape(-1, width).sum(1)
        return self.histogram(np_histogram=(padded, np.arange(len(padded) + 1) * width))


def end_service() -> None:
    """End the process of wandb, if this one has started it; all runs of this process have to be over."""
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None:  # in a thread, since a process that hangs would hold up this one's end
        ending = threading.Thread(target=wandb.teardown, name="end of wandb", daemon=True)
        ending.start()
        ending.join(SERVICE_END_SECONDS)


def _wandb_sweep() -> str | None:
    """The wandb sweep whose agent has started this run."""
    return os.environ.get("WANDB_SWEEP_ID") or None


def _default_mode() -> str:
    return "offline" if _wandb_sweep() is None else "online"  # the sweep waits for results


def _read_id(directory: Path) -> str | None:
    file = directory / ID_FILE
    return (file.read_text().strip() or None) if file.is_file() else None
