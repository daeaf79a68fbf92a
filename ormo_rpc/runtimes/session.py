"""A session: the parameter server of a run together with everything that records it, for every runtime that trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from ormo_rpc.config.saving import to_tree
from ormo_rpc.errors import ConfigError
from ormo_rpc.loggers import RunInfo, start_logs
from ormo_rpc.loggers.metrics import measure, measure_by_name
from ormo_rpc.models.flat import sha256
from ormo_rpc.runtimes.checkpoints import CheckpointWriter
from ormo_rpc.runtimes.ending import ending
from ormo_rpc.runtimes.evaluations import Evaluations
from ormo_rpc.runtimes.job_like import JobLike
from ormo_rpc.runtimes.recorder import Recorder
from ormo_rpc.runtimes.round_sizes import more_than_workers
from ormo_rpc.server.parameter_server import ParameterServer, Status
from ormo_rpc.server.validation import all_finite
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.counters import RunCounters
from ormo_rpc.storage.journal import FileJournal, Journal, recover
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import RunDirectory, read_fingerprint, rows_so_far
from ormo_rpc.storage.summary import Summary, identity, metrics_as_dict

_log = logging.getLogger(__name__)


class Session:
    """The parameter server, trace, metrics, evaluations, checkpoints and the summary of one run.

    `observe` and `copy_state` are called under the lock that guards the server, if there is one; they hand copies over through
    queues. All other methods belong to one thread, which calls `flush` regularly.

    Args:
        job: The run.
        run_dir: Its directory.
        evaluation_executor: Starts the logs, and runs evaluations.
        checkpoint_executor: Writes checkpoints.
        clock: The run's seconds, real or virtual.
        began: Time on the monotonic clock at which the run began, before this process did where there is a launcher.
        continue_clock: Called with the run's seconds so far where this process takes over, before anything is recorded, and
            with those of each call that is made again.
        extra_metrics: Returns metrics by name that the runtime measures itself.
        state: Copies the state for a checkpoint, where it is more than that of the server.
        terminal: A file descriptor for the progress bar, where there is a terminal.
        inline: The evaluation executor computes at once, and all is one thread: an early stop is then decided at the iteration.

    Attributes:
        seconds_before: The run's seconds when this process took over.
        counters: Counters that survive this process.
        resumed_state: The checkpoint's state of the simulator, where a simulation continues exactly.
    """

    def __init__(
        self,
        job: JobLike,
        run_dir: Path,
        evaluation_executor: Executor,
        checkpoint_executor: Executor,
        clock: Callable[[], float],
        *,
        began: float,
        continue_clock: Callable[[float], None] = lambda _: None,
        extra_metrics: Callable[[], Mapping[str, float]] = dict,
        state: Callable[[], dict[str, Any]] | None = None,
        terminal: int | None = None,
        inline: bool = False,
    ) -> None:
        config = job.config
        self.job = job
        self.directory = RunDirectory(run_dir)
        self.clock = clock
        self.recorder = Recorder(job, self.directory, clock, lambda: {**self._measured(), **extra_metrics()})
        self._start_logs = lambda: evaluation_executor.submit(start_logs, config.logger, _run_info(job, run_dir), terminal)
        self.server = job.server(self.recorder.record, clock)
        if (more := more_than_workers(config)) is not None:
            _log.warning(
                "%s=%d is more than the %d workers at the start: rounds have one gradient of each until more join",
                *more[:2],
                config.num_workers,
            )
        self.evaluations = Evaluations(job, run_dir, evaluation_executor, self.recorder, inline=inline)
        self.checkpoints = CheckpointWriter(
            run_dir,
            config,
            job.fingerprint(),
            job.exporter(),
            checkpoint_executor,
            self.recorder,
            clock,
            self.evaluations.state_dict,
        )
        self.counters = RunCounters(run_dir)
        self.seconds_before = 0.0
        self.resumed_state: dict[str, Any] | None = None
        self._copy_state = state or (lambda: self.server.state_dict(replies=config.checkpoint.journal))
        self._began = began
        self._continue_clock = continue_clock
        self._seen = 0
        """The server's iteration at the last `observe`."""

    @property
    def journal(self) -> Journal:
        """The journal, which the runtime tells of every call that changes the server."""
        return self.checkpoints.journal

    def open(self, incarnation: int = 0) -> None:
        """Write the header of the trace, and load the checkpoint to resume from, where there is one.

        Args:
            incarnation: The number of earlier server processes in this run directory. A restarted server resumes from the
                directory's newest intact checkpoint and the journal, and truncates the trace to them.

        Raises:
            ConfigError: the checkpoint is of another run, or damaged; or model or data changed since this run began.
        """
        config, path = self.job.config, self.directory.path
        source = None if config.checkpoint.resume is None else checkpoint.locate(Path(config.checkpoint.resume))
        own = checkpoint.newest(path) if incarnation > 0 else None
        if own is not None:
            self._load(own, in_place=True)
        elif source is not None:
            self._load(source, in_place=False)
        former = None if source is None or incarnation > 0 else checkpoint.run_directory_of(source)
        if self.evaluations.best is not None:
            self.evaluations.best.begin(former, self.server.iteration)
        self._seen = self.server.iteration
        if incarnation > 0:
            self._check_fingerprint(buffer_values=own is None)
            if own is None:
                self.directory.truncate(self.directory.header_bytes(), 0)
        self.recorder.give_rows_to(self._start_logs())  # wandb's takes a second or more; it is given the rows that are left
        if incarnation > 0:
            first = 0 if own is None else checkpoint.segment_of(own)
            recover(path, first, self.server, self._set_clock, self._evaluate_recovered)
            self.server.resume_as(incarnation)
        if self.directory.header_bytes() == 0:
            self.directory.write_fingerprint(self.job.fingerprint())
            algorithm, scheduler = config.update_rule
            self.directory.write_header(
                algorithm=algorithm,
                scheduler=scheduler,
                num_workers=config.num_workers,
                seed=config.seed,
                resumed=None if source is None else str(source.absolute()),
                started=self.resumed_state is None,
                steps=self.server.algorithm.kernel.name,
            )
        if config.checkpoint.journal:
            self.checkpoints.journal = FileJournal(path, self.clock)
        self.evaluations.begin(self.server.iteration, former)
        self.counters.begin(self._seen, self._began)
        if incarnation > 0 and self.server.ended:  # the former process died before it could evaluate the final parameters
            self.evaluations.request_last(self.server, self.seconds_before)

    def _evaluate_recovered(self) -> None:
        """Request the evaluation that became due by a recovered call."""
        before, self._seen = self._seen, self.server.iteration
        if self._seen > before:
            self.evaluations.observe(self.server, self.seconds_before, before)
            self.evaluations.start_requested()

    def _load(self, source: Path, *, in_place: bool) -> None:
        """Load a checkpoint's state, and its records where they are continued, ``in_place`` in this run directory."""
        checkpoint.check_fingerprint(source, self.job.fingerprint())
        state = checkpoint.read(source, "server.pt")
        try:
            self.server.load_state_dict(state)
        except ValueError as error:
            raise ConfigError(f"checkpoint.resume: {source}: {error}") from None
        records = state["session"]
        if self.server.ema is not None and state.get("ema") is None:
            _log.warning("evaluate.ema: %s has no moving average; it begins here", source)
        if self.job.config.runtime.name == "sim" and state["status"] == Status.running.value:
            self.resumed_state = state.get("cluster")
        same_clock = in_place or self.resumed_state is not None
        former_seconds = 0.0 if same_clock else records["seconds"]
        self.evaluations.load_state_dict(records, state["iteration"], seconds=former_seconds)
        if same_clock:
            # Statistics of an earlier version have no time of their own.
            self.recorder.continue_from({"seconds": records["seconds"], **records["statistics"]})
            self._set_clock(records["seconds"])
        else:
            self.recorder.statistics.begin_as(records["statistics"])
        self.evaluations.request_missing(self.server, self.seconds_before)
        if in_place:
            self.checkpoints.newest = source
            self.directory.truncate(records["trace_bytes"], records["metrics_bytes"])

    def _set_clock(self, seconds: float) -> None:
        self.seconds_before = seconds
        self._continue_clock(seconds)

    def _check_fingerprint(self, *, buffer_values: bool) -> None:
        """Refuse to continue this run with another model or data set: the journal's pushes would mean something else.

        Raises:
            ConfigError: they have changed since it began.
        """
        began = read_fingerprint(self.directory.path)
        now = self.job.fingerprint()
        difference = began and began.difference(now, "the run as it began", "the restarted server", buffer_values=buffer_values)
        if difference:
            raise ConfigError(f"{self.directory.path}: {difference}; do not change model and data while a run lasts")

    def training_begins(self) -> None:
        """Note that the first ticket is handed out."""
        self.counters.set_start_seconds(time.monotonic() - self._began)

    def observe(self, server: ParameterServer) -> None:
        """Copy what an evaluation or a checkpoint needs, at the end of an epoch or when one is due."""
        if server.iteration == self._seen:
            return
        before, self._seen = self._seen, server.iteration
        self.counters.set_iterations(self._seen, time.monotonic() - self._began)
        self.evaluations.observe(server, self.clock(), before)
        every = self.job.config.checkpoint.every
        if every and self._seen % every == 0:
            self.copy_state()

    def stops_early(self) -> bool:
        """Tell, once, that the run is to be finished as no evaluation is better any more; called by the one thread."""
        return not self.server.ended and self.evaluations.stops_early()

    def copy_state(self) -> None:
        """Copy the state for a checkpoint, unless another one is under way."""
        if not self.checkpoints.busy:
            self.checkpoints.submit(self._copy_state())

    def flush(self) -> None:
        """Write the records so far, start evaluations, and note those and checkpoints that are complete.

        Raises:
            OSError: something cannot be written, such as a checkpoint to a full disk.
        """
        self.recorder.flush(row=self.server.ended)  # the last one, before that of the last evaluation
        self.evaluations.flush()
        self.checkpoints.flush()

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Write a state as a checkpoint, and wait until it is complete.

        Raises:
            OSError: it cannot be written.
        """
        self.checkpoints.write(state)

    def close(self, state: Mapping[str, Any], *, wait: bool, **entries: Any) -> dict[str, Any]:
        """Write the rest and the summary, and return the summary's content.

        Args:
            state: The server's last state.
            wait: Wait for evaluations that are not ready.
            entries: Further entries of the `Summary`; they replace those that the session knows itself.
        """
        if state["status"] == Status.completed.value:
            self.evaluations.request_last(self.server, self.recorder.statistics.seconds)
        self.recorder.flush(row=True)
        self.flush()
        if wait:
            self.evaluations.wait()
        if wait and self.evaluations.unsaved and self.checkpoints.newest is not None:
            self.checkpoints.write_again(state)  # a run that goes on from it has to know of them
        self.evaluations.saved()
        self.recorder.flush()
        self.journal.close()
        return self.recorder.close(Summary(**{**self._summary_entries(state), **entries}))

    def _metrics(self) -> dict[str, dict[str, Any]]:
        """The metrics of the evaluations, or of the task where there was none."""
        evaluation, declared = self.recorder.evaluation, self.job.config.task.all_metrics()
        names = [each.name for each in declared] if evaluation is None else evaluation.test
        return metrics_as_dict(map(self.job.metric, names))

    def _measured(self) -> dict[str, float]:
        scale = self.server.loss_scale
        return {} if scale is None else {"loss_scale": scale.value}

    def _summary_entries(self, state: Mapping[str, Any]) -> dict[str, Any]:
        statistics = self.recorder.statistics
        # One that was recovered from the journal may have been finished by the process before.
        limit, evaluations = self.job.config.train.max_seconds, self.evaluations
        stopped = evaluations.stopped or (evaluations.ranking.reason if limit is None else None)
        ended = ending(
            self.job,
            statistics,
            state["status"],
            state["iteration"],
            stopped=stopped,
            loss_scale=state["loss_scale"],
            finite=all_finite(state["params"]),
        )
        now, start_seconds = time.monotonic(), self.counters.start_seconds or None
        measurements = self.recorder.measurements(statistics.seconds, statistics.applied)
        return {
            **measure(measurements),
            "by_name": measure_by_name(measurements),
            "metrics": self._metrics(),
            **identity(self.job.config),
            **ended,
            "reason": "; ".join(filter(None, (ended["reason"], evaluations.failure))) or None,
            "failed_evaluations": evaluations.failed,
            "evaluation_seconds": evaluations.seconds,
            **evaluations.targets.summary_entries(),
            "parameters": state["params"].numel(),
            "iterations": state["iteration"],
            "epochs": self.job.epoch(state["iteration"]),
            "rolled_back": self.counters.rolled_back,
            "incarnations": self.counters.incarnations,
            "wall_seconds": now - self._began,
            "start_seconds": start_seconds,
            "training_seconds": statistics.seconds,
            "end_seconds": None if start_seconds is None else now - self._began - self.counters.updated_seconds,
            "step_seconds": self.server.step_seconds,
            "server_device": str(self.server.device),
            "final_params_sha256": sha256(state["params"]),
            "best": None if evaluations.best is None else evaluations.best.summary_entry(),
            "final_ema_sha256": None if state["ema"] is None else sha256(state["ema"]["params"]),
            "evaluated": "parameters" if state["ema"] is None else "ema",
            "final_buffers_sha256": sha256(*state["buffers"].values()),
            "checkpoint": None if self.checkpoints.newest is None else str(self.checkpoints.newest),
        }


def _run_info(job: JobLike, run_dir: Path) -> RunInfo:
    config = job.config
    launch, resume = Launch.read(run_dir), config.checkpoint.resume
    return RunInfo(
        name="-".join((*config.update_rule, f"{config.num_workers}w", f"seed{config.seed}")),
        config=to_tree(config),
        directory=run_dir,
        total_iterations=job.total_tickets,
        overrides=launch.overrides,
        sweep=launch.sweep,
        continues=None if resume is None else checkpoint.run_directory_of(Path(resume)),
        rows=rows_so_far(run_dir),
        metric=job.metric,
    )
