"""Evaluations of a run: parameters are copied under the server's lock, and evaluated beside training."""

from __future__ import annotations

import logging
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue

import torch

from ormo_rpc.errors import one_line
from ormo_rpc.runtimes.job import Evaluate
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

    Attributes:
        failed: Evaluations that failed; training does not depend on them.
    """

    def __init__(self, evaluator: Evaluate | None, executor: Executor, recorder: Recorder) -> None:
        self._evaluator = evaluator
        self._executor = executor
        self._recorder = recorder
        self._copies: SimpleQueue[tuple[int, float, torch.Tensor, dict[str, torch.Tensor]]] = SimpleQueue()
        self._running: list[tuple[int, float, Future[Evaluation]]] = []
        self.failed = 0
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
        if self._evaluator is not None:
            self._copies.put((server.iteration, seconds, server.evaluated(), server.buffers.copy()))

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
        else:
            self.failed += 1
            self._cause = one_line(failure)
            _log.error("evaluation at iteration %d failed: %s", iteration, self._cause)
            _log.info("its traceback", exc_info=failure)
