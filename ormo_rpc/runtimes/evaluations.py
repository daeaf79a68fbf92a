"""Evaluations of a run: parameters are copied under the server's lock, and evaluated beside training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ormo_rpc.config.evaluating import When
from ormo_rpc.errors import ConfigError, one_line
from ormo_rpc.runtimes.best_model import BestModel
from ormo_rpc.runtimes.job_like import JobLike
from ormo_rpc.runtimes.later_snapshots import LaterSnapshots, Snapshot
from ormo_rpc.runtimes.ranking import Ranking
from ormo_rpc.runtimes.recorder import Recorder
from ormo_rpc.runtimes.targets import Targets
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.worker.evaluation import Evaluation
from ormo_rpc.worker.heterogeneity import cpu_seconds

MAX_WAITING = 8
"""Copies that wait for their evaluation, or to be written, where they are made more often than once an epoch."""
_log = logging.getLogger(__name__)


class Evaluations:
    """The evaluations of a run, in the order of their iterations.

    Args:
        job: The run.
        run_dir: Its directory.
        executor: Runs them.
        recorder: Receives the results.
        inline: The executor computes at once, and all is one thread: a result is recorded before the next gradient, so that an
            early stop is decided at its iteration and a checkpoint has all evaluations before it.

    Attributes:
        ranking: Compares the results.
        targets: When they reached which target.
        best: Keeps the model of the best one; None where it is not kept.
        failed: Evaluations that failed; training does not depend on them.
        skipped: Evaluations that were skipped, as too many were waiting.
        seconds: The processor time of the thread that evaluates; it alone writes it.
        ends_now: Returns True where evaluations after the last update are to be left out, as the process has to end.
        stopped: The reason to stop early, once `stops_early` has told it.
        unsaved: True if there is a result that the last `state_dict` does not have.
    """

    def __init__(self, job: JobLike, run_dir: Path, executor: Executor, recorder: Recorder, *, inline: bool = False) -> None:
        config = job.config
        self._evaluator = job.evaluator()
        self._executor = executor
        self._recorder = recorder
        self._copies: SimpleQueue[Snapshot] = SimpleQueue()
        self._running: list[tuple[Snapshot, Future[tuple[Evaluation, Exception | None] | None]]] = []
        """Snapshots that are evaluated, or written."""
        # A simulation's clock, and one that is stopped meanwhile, do not count evaluations anyway.
        self._later = LaterSnapshots(run_dir) if config.evaluate.when is When.after and not inline else None
        self.ranking = Ranking(config, job.metric)
        self.targets = Targets(config, job.metric)
        self.best = BestModel(job, run_dir, self.ranking) if config.keeps_best else None
        self._every = config.evaluate.every or job.batches_per_epoch
        self._max_waiting = None if config.evaluate.every is None else MAX_WAITING
        self._inline = inline
        self.failed = 0
        self.seconds = 0.0
        self.ends_now: Callable[[], bool] = lambda: False
        self.skipped = 0
        self.stopped: str | None = None
        self.unsaved = False
        self._left_out: str | None = None
        self._cause = ""
        """Type and message of the newest failure."""
        self._failed_at = self._recorded_at = self._requested_at = -1
        """Iterations: of the newest failure, of the newest result, and of the parameters that were copied last."""
        if self.best is not None and self.ranking.name.startswith("test_") and not config.task.CHOOSES_DATA:
            _log.warning(
                "the best evaluation is chosen by the test split (%s), whose metrics no longer tell what the model does with "
                "other data; with a validation split (dataset.validation=0.1) it is chosen by that",
                self.ranking.name,
            )

    @property
    def failure(self) -> str | None:
        """The reason why there is no result, or none of the newest parameters that were to be evaluated."""
        if self._failed_at <= self._recorded_at:
            return self._left_out
        if self._recorder.evaluation is None:
            return f"every evaluation failed ({self.failed}), the last with {self._cause}"
        last = f"the last evaluation, at iteration {self._failed_at}, failed with {self._cause}"
        return f"{last}; the metrics are those of an earlier one"

    def request_last(self, server: ParameterServer, seconds: float) -> None:
        """Have the final parameters evaluated, where the run ended with none of its pushes.

        Args:
            server: The server, which has ended.
            seconds: The run's seconds at its last gradient.
        """
        if self._requested_at != server.iteration:
            self.request(server, seconds)

    def request_missing(self, server: ParameterServer, seconds: float) -> None:
        """Have a loaded checkpoint's parameters evaluated where an evaluation was due that its records lack.

        A checkpoint does not wait for evaluations that are under way when it is copied.

        Args:
            server: The server, as it was loaded.
            seconds: The run's seconds then; 0 where it has a clock of its own.
        """
        kept = 0 if self._later is None else self._later.last(server.iteration)
        if server.iteration // self._every > max(self.targets.last_iteration, kept) // self._every:
            self.request(server, seconds)

    def observe(self, server: ParameterServer, seconds: float, before: int) -> None:
        """Have the parameters evaluated where that is due; called under the server's lock.

        Args:
            server: The server.
            seconds: The run's clock.
            before: The iteration at the last call; gradients of one round may come together.
        """
        if server.iteration // self._every > before // self._every or server.ended:
            self.request(server, seconds)
            if self._inline:
                self._recorder.flush(row=server.ended)  # rows before its own, and checkpoints that are without it
                self.flush()

    def stops_early(self) -> bool:
        """Tell, once, that the run is to be finished as no evaluation is better any more."""
        if self.stopped is not None:
            return False
        self.stopped = self.ranking.reason
        return self.stopped is not None

    def request(self, server: ParameterServer, seconds: float) -> None:
        """Have the present parameters evaluated; called under the server's lock."""
        if self._evaluator is None:
            return
        waiting = self._copies.qsize() + sum(not future.done() for _, future in self._running)
        if self._max_waiting is not None and waiting >= self._max_waiting and not server.ended:
            if not self.skipped:
                what = "evaluations take" if self._later is None else "to write snapshots takes"
                than = "evaluate.every iterations or, after a restart, than to make these again from the journal"
                _log.warning("%s longer than %s; some are skipped", what, than)
            self.skipped += 1
        else:
            self._requested_at = server.iteration
            self._copies.put(
                Snapshot(
                    iteration=server.iteration,
                    seconds=seconds,
                    params=server.evaluated(),
                    buffers=server.buffers.state_dict(),  # torch.save refuses views of one memory in several dtypes
                )
            )

    def begin(self, iteration: int, former: Path | None) -> None:
        """Forget what an earlier server process of this run was going to evaluate, but which a crash has undone.

        Args:
            iteration: Gradients applied so far.
            former: The directory of the run that is resumed in another one.
        """
        if self._later is not None:
            self._later.begin(iteration)
        if former is not None and (left := len(LaterSnapshots(former))):
            _log.warning("%d snapshots in %s were not evaluated, and do not count towards targets", left, former)

    def flush(self) -> None:
        """Start the requested evaluations, and record those that are ready.

        Raises:
            OSError: the best model cannot be written, such as to a full disk.
            ConfigError: an evaluation does not have the metric by which it is compared.
        """
        self.start_requested()
        while self._running and self._running[0][-1].done():
            self._record_first()

    def start_requested(self) -> None:
        """Start the requested evaluations."""
        while self._evaluator is not None:
            try:
                snapshot = self._copies.get_nowait()
            except Empty:
                break
            do = self._evaluate if self._later is None else self._later.write
            self._running.append((snapshot, self._executor.submit(do, snapshot)))

    def wait(self) -> None:
        """Record all started evaluations, waiting for those that are not ready, and make those that are due after training.

        Raises:
            OSError, ConfigError: as `flush` does.
        """
        while self._running:
            self._record_first()
        if self._later is None:
            return
        _log.info("evaluating %d snapshots after the last update", len(self._later))
        for snapshot in self._later.taken():
            if self.ends_now():
                self._left_out = f"evaluations from iteration {snapshot.iteration} on are left out, as the process was to end"
                _log.warning("%s", self._left_out)
                break
            self._running.append((snapshot, self._executor.submit(self._evaluate, snapshot)))
            self._record_first()

    def saved(self) -> None:
        """Take note that the results so far are in a checkpoint."""
        if self._later is not None:
            self._later.forget_taken()

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on from a checkpoint has to know of the evaluations so far, as plain values."""
        self.unsaved = False
        return {"ranking": self.ranking.state_dict(), "targets": self.targets.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], iteration: int, *, seconds: float) -> None:
        """Restore what `state_dict` returned, now or in an earlier version.

        Args:
            state: As in the checkpoint.
            iteration: That of the checkpoint.
            seconds: The seconds of the former run, where this one has a clock of its own; else 0.
        """
        self.ranking.load_state_dict(state.get("ranking"), iteration)
        self.targets.load_state_dict(state.get("targets"), iteration, seconds=seconds)

    def _evaluate(self, snapshot: Snapshot) -> tuple[Evaluation, Exception | None]:
        """Evaluate, and keep the best model; return the reason why that failed, too; called in the executor."""
        assert self._evaluator is not None, "nothing is requested without"
        began = cpu_seconds()
        try:
            evaluation = self._evaluator(snapshot.params, snapshot.buffers)
            if self.best is not None:
                try:
                    self.best.consider(snapshot.iteration, evaluation, snapshot.params, snapshot.buffers)
                except (OSError, ConfigError) as error:
                    return evaluation, error
            return evaluation, None
        finally:
            self.seconds += cpu_seconds() - began

    def _record_first(self) -> None:
        snapshot, future = self._running.pop(0)
        iteration, seconds = snapshot.iteration, snapshot.seconds
        failure = future.exception()
        if failure is None:
            result = future.result()
            if result is None:  # written
                return
            evaluation, fault = result
            self._recorded_at, self.unsaved = iteration, True
            self._recorder.record_evaluation(iteration, seconds, evaluation)
            self.targets.add(iteration, seconds, evaluation)
            if fault is not None:
                raise fault
            if self.best is not None:
                self.ranking.add(iteration, evaluation)
        else:
            self.failed += 1
            self._failed_at = iteration
            self._cause = one_line(failure)
            _log.error("evaluation at iteration %d failed: %s", iteration, self._cause)
            _log.info("its traceback", exc_info=failure)
