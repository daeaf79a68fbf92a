"""Evaluations of a run: parameters are copied under the server's lock, and evaluated beside training."""

from __future__ import annotations

import logging
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue

import torch

from ormo_rpc.errors import ConfigError, one_line
from ormo_rpc.runtimes.best_model import BestModel
from ormo_rpc.runtimes.job import Evaluate
from ormo_rpc.runtimes.ranking import Ranking
from ormo_rpc.runtimes.recorder import Recorder
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.worker.evaluation import Evaluation

MAX_WAITING = 8
"""Copies that wait for their evaluation, where they are made more often than once an epoch."""
_log = logging.getLogger(__name__)


class Evaluations:
    """The evaluations of a run, in the order of their iterations.

    Args:
        evaluator: Evaluates parameters; None where there is no test set, and nothing is evaluated.
        executor: Runs it.
        recorder: Receives the results.
        ranking: Compares the results; None where nobody asks which is the best.
        best: Keeps the model of the best; None where it is not kept.
        max_waiting: The number of copies that may wait; those that become due meanwhile are skipped, but for the last of a run.

    Attributes:
        failed: Evaluations that failed; training does not depend on them.
        skipped: Evaluations that were skipped.
    """

    def __init__(
        self,
        evaluator: Evaluate | None,
        executor: Executor,
        recorder: Recorder,
        *,
        ranking: Ranking | None = None,
        best: BestModel | None = None,
        max_waiting: int | None = None,
    ) -> None:
        self._evaluator = evaluator
        self._executor = executor
        self._recorder = recorder
        self._copies: SimpleQueue[tuple[int, float, torch.Tensor, dict[str, torch.Tensor]]] = SimpleQueue()
        self._running: list[tuple[int, float, Future[tuple[Evaluation, Exception | None]]]] = []
        self._ranking = ranking
        self._best = best
        self._max_waiting = max_waiting
        self.failed = 0
        self.skipped = 0
        self._cause = ""
        """Type and message of the newest failure."""

    @property
    def failure(self) -> str | None:
        """The reason why there is no result, where every evaluation so far has failed."""
        if not self.failed or self._recorder.evaluation is not None:
            return None
        return f"every evaluation failed ({self.failed}), the last with {self._cause}"

    def request(self, server: ParameterServer, seconds: float) -> None:
        """Have the present parameters evaluated; called under the server's lock."""
        if self._evaluator is None:
            return
        waiting = self._copies.qsize() + len(self._running)
        if self._max_waiting is not None and waiting >= self._max_waiting and not server.ended:
            if not self.skipped:
                _log.warning("evaluations take longer than evaluate.every iterations; some are skipped")
            self.skipped += 1
        else:
            self._copies.put((server.iteration, seconds, server.evaluated(), server.buffers.copy()))

    def flush(self) -> None:
        """Start the requested evaluations, and record those that are ready.

        Raises:
            OSError: the best model cannot be written, such as to a full disk.
            ConfigError: an evaluation does not have the metric by which it is compared.
        """
        while self._evaluator is not None:
            try:
                iteration, seconds, params, statistics = self._copies.get_nowait()
            except Empty:
                break
            self._running.append((iteration, seconds, self._executor.submit(self._evaluate, iteration, params, statistics)))
        while self._running and self._running[0][-1].done():
            self._record_first()

    def wait(self) -> None:
        """Record all started evaluations, waiting for those that are not ready; raises what `flush` does."""
        while self._running:
            self._record_first()

    def _evaluate(
        self, iteration: int, params: torch.Tensor, buffers: dict[str, torch.Tensor]
    ) -> tuple[Evaluation, Exception | None]:
        """Evaluate, and keep the best model; return the reason why that failed, too; called in the executor."""
        assert self._evaluator is not None, "nothing is requested without"
        evaluation = self._evaluator(params, buffers)
        try:
            if self._best is not None:
                self._best.consider(iteration, evaluation, params, buffers)
        except (OSError, ConfigError) as error:
            return evaluation, error
        return evaluation, None

    def _record_first(self) -> None:
        iteration, seconds, future = self._running.pop(0)
        failure = future.exception()
        if failure is None:
            evaluation, fault = future.result()
            self._recorder.record_evaluation(iteration, seconds, evaluation)
            if fault is not None:
                raise fault
            if self._ranking is not None:
                self._ranking.add(iteration, evaluation)
        else:
            self.failed += 1
            self._cause = one_line(failure)
            _log.error("evaluation at iteration %d failed: %s", iteration, self._cause)
            _log.info("its traceback", exc_info=failure)
