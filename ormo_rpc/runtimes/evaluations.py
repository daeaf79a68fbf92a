"""Evaluations of a run: parameters are copied under the server's lock, and evaluated beside training."""

from __future__ import annotations

import logging
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue

from torch import Tensor

from ormo_rpc.runtimes.job import Evaluator
from ormo_rpc.runtimes.recorder import Recorder
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.worker.evaluation import Evaluation

_log = logging.getLogger(__name__)


class Evaluations:
    """The evaluations of a run, in the order of their iterations.

    Args:
        evaluator: Evaluates parameters; None where there is no test set, and nothing is evaluated.
        executor: Runs it.
        recorder: Receives the results.
    """

    def __init__(self, evaluator: Evaluator | None, executor: Executor, recorder: Recorder) -> None:
        self._evaluator = evaluator
        self._executor = executor
        self._recorder = recorder
        self._copies: SimpleQueue[tuple[int, float, Tensor, dict[str, Tensor]]] = SimpleQueue()
        self._running: list[tuple[int, float, Future[Evaluation]]] = []

    def request(self, server: ParameterServer, seconds: float) -> None:
        """Have the present parameters evaluated; called under the server's lock."""
        if self._evaluator is not None:
            self._copies.put((server.iteration, seconds, server.snapshots.exact(), server.buffers.copy()))

    def flush(self) -> None:
        """Start the requested evaluations, and record those that are ready."""
        while self._evaluator is not None:
            try:
                iteration, seconds, params, statistics = self._copies.get_nowait()
            except Empty:
                break
            self._running.append((iteration, seconds, self._executor.submit(self._evaluator, params, statistics)))
        while self._running and self._running[0][-1].done():
            self._record_first()

    def wait(self) -> None:
        """Record all started evaluations, waiting for those that are not ready."""
        while self._running:
            self._record_first()

    def _record_first(self) -> None:
        iteration, seconds, future = self._running.pop(0)
        failure = future.exception()
        if failure is None:
            self._recorder.record_evaluation(iteration, seconds, future.result())
        else:  # training does not depend on it
            _log.error("evaluation at iteration %d failed", iteration, exc_info=failure)
