"""Evaluations that take longer than the time between two of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typing_extensions import override

from ormo_rpc import build_server
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.messages import Push
from ormo_rpc.runtimes.evaluations import MAX_WAITING, Evaluations
from ormo_rpc.tasks.metrics import metric_named
from ormo_rpc.worker.evaluation import Evaluation


class Later(Executor):
    """Runs what was submitted when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    @override
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append(lambda: future.set_result(fn(*args, **kwargs)))
        return future


@pytest.mark.parametrize("every", [None, 1])
def test_copies_that_wait_are_few_where_they_are_made_often_and_the_last_one_counts(
    every: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluated, recorded, executor = list[float](), list[int](), Later()

    def evaluator(params: torch.Tensor, _: object) -> Evaluation:
        evaluated.append(params[0].item())
        return Evaluation({"loss": 1.0})

    job: Any = SimpleNamespace(
        config=parse_config({"evaluate": {"every": every}}),
        evaluator=lambda: evaluator,
        metric=metric_named,
        batches_per_epoch=1,
    )
    recorder: Any = SimpleNamespace(evaluation=None, record_evaluation=lambda iteration, *_: recorded.append(iteration))
    evaluations = Evaluations(job, tmp_path, executor, recorder)
    server = build_server(params=torch.zeros(1), num_workers=1, algorithm="asgd", lr=1.0, total_tickets=20)
    (reply,) = server.start()
    while reply.ticket is not None:
        push = Push(worker=0, ticket=reply.ticket, stamp=reply.stamp, grad=-torch.ones(1))
        (reply,) = server.receive(push)
        evaluations.observe(server, 0.0)
        evaluations.flush()
    expected = list(range(1, 21)) if every is None else [*range(1, MAX_WAITING + 1), 20]
    for run in executor.waiting:
        run()
    evaluations.wait()
    assert recorded == expected
    assert evaluated == expected, "each at the parameters of its iteration"
    assert evaluations.skipped == 20 - len(expected)
    warned = [record for record in caplog.records if "some are skipped" in record.getMessage()]
    assert len(warned) == (every is not None)
