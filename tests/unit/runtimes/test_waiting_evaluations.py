"""Evaluations that take longer than the time between two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typing_extensions import override

from ormo_rpc import build_server
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.messages import Push
from ormo_rpc.runtimes.evaluations import MAX_WAITING, Evaluations
from ormo_rpc.runtimes.simulator import InlineExecutor
from ormo_rpc.server.buffers import RunningBuffers
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


def made(
    tmp_path: Path, executor: Executor, evaluator: Callable[..., Evaluation], recorded: list[tuple[int, float]], **evaluate: Any
) -> Evaluations:
    """The evaluations of a run, which are noted with their times."""
    job: Any = SimpleNamespace(
        config=parse_config({"evaluate": evaluate}), evaluator=lambda: evaluator, metric=metric_named, batches_per_epoch=1
    )
    recorder: Any = SimpleNamespace(
        evaluation=None, record_evaluation=lambda iteration, seconds, _: recorded.append((iteration, seconds))
    )
    return Evaluations(job, tmp_path, executor, recorder)


def run_through(evaluations: Evaluations, total: int, at_each: Callable[[], object] = lambda: None) -> None:
    """Let a server count its parameter up to the total, one in half a second."""
    buffers = RunningBuffers({"mean": torch.ones(2), "calls": torch.tensor(3)})  # two dtypes, as a batch norm has them
    server = build_server(params=torch.zeros(1), num_workers=1, algorithm="asgd", lr=1.0, total_tickets=total, buffers=buffers)
    (reply,) = server.start()
    while reply.ticket is not None:
        push = Push(worker=0, ticket=reply.ticket, stamp=reply.stamp, grad=-torch.ones(1))
        (reply,) = server.receive(push)
        evaluations.observe(server, server.iteration / 2, server.iteration - 1)
        evaluations.flush()
        at_each()


def test_snapshots_are_evaluated_after_the_last_update_in_order_and_removed(tmp_path: Path) -> None:
    evaluated, recorded, during = list[float](), list[tuple[int, float]](), list[int]()

    def evaluator(params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> Evaluation:
        assert {name: each.tolist() for name, each in buffers.items()} == {"mean": [1.0, 1.0], "calls": 3}
        evaluated.append(params[0].item())
        return Evaluation({"loss": -params[0].item()})

    options = {"every": 3, "when": "after", "targets": [-6.0, -7.0]}
    evaluations = made(tmp_path, InlineExecutor(), evaluator, recorded, **options)
    run_through(evaluations, 10, lambda: during.append(len(evaluated)))
    assert during == [0] * 10
    assert [file.stem for file in sorted((tmp_path / "snapshots").iterdir())] == [f"{n:012}" for n in (3, 6, 9, 10)]
    evaluations.wait()
    assert evaluated == [3.0, 6.0, 9.0, 10.0]
    assert recorded == [(3, 1.5), (6, 3.0), (9, 4.5), (10, 5.0)], "at the moments of the parameters"
    assert evaluations.targets.summary_entries()["seconds_to"] == {"-6.0": 3.0, "-7.0": 4.5}
    assert len([*(tmp_path / "snapshots").iterdir()]) == 4, "a server that starts again has no row of them"
    evaluations.saved()
    assert not (tmp_path / "snapshots").exists()
    assert evaluations.failed == 0
    assert evaluations.seconds > 0


def test_snapshots_that_a_crash_has_undone_are_forgotten_and_the_others_evaluated(tmp_path: Path) -> None:
    recorded = list[tuple[int, float]]()
    first = made(tmp_path, InlineExecutor(), lambda *_: Evaluation({"loss": 1.0}), recorded, every=2, when="after")
    run_through(first, 9)
    again = made(tmp_path, InlineExecutor(), lambda *_: Evaluation({"loss": 1.0}), recorded, every=2, when="after")
    again.begin(6, None)
    again.wait()
    assert recorded == [(2, 1.0), (4, 2.0), (6, 3.0)]


def test_a_process_that_has_to_end_leaves_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorded = list[tuple[int, float]]()
    evaluations = made(tmp_path, InlineExecutor(), lambda *_: Evaluation({"loss": 1.0}), recorded, every=2, when="after")
    run_through(evaluations, 8)
    evaluations.ends_now = lambda: len(recorded) == 2
    evaluations.wait()
    evaluations.saved()
    assert recorded == [(2, 1.0), (4, 2.0)]
    other = made(tmp_path / "other", InlineExecutor(), lambda *_: Evaluation({"loss": 1.0}), recorded)
    other.begin(8, tmp_path)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "evaluations from iteration 6 on are left out, as the process was to end",
        f"2 snapshots in {tmp_path} were not evaluated, and do not count towards targets",
    ]


def test_a_snapshot_that_cannot_be_written_is_an_evaluation_that_failed(tmp_path: Path) -> None:
    (tmp_path / "snapshots").write_text("in the way")
    evaluations = made(tmp_path, InlineExecutor(), lambda *_: Evaluation({"loss": 1.0}), [], every=2, when="after")
    run_through(evaluations, 4)
    (tmp_path / "snapshots").unlink()
    evaluations.wait()
    assert evaluations.failed == 2


def test_nothing_stops_a_run_early_that_is_evaluated_after_its_end() -> None:
    with pytest.raises(ConfigError, match=r"^evaluate\.when: got after with evaluate\.patience=3, expected during: "):
        parse_config({"evaluate": {"when": "after", "patience": 3}, "dataset": {"validation": 0.1}})


@pytest.mark.parametrize("every", [None, 1])
def test_copies_that_wait_are_few_where_they_are_made_often_and_the_last_one_counts(
    every: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluated, recorded, executor = list[float](), list[tuple[int, float]](), Later()

    def evaluator(params: torch.Tensor, _: object) -> Evaluation:
        evaluated.append(params[0].item())
        return Evaluation({"loss": 1.0})

    evaluations = made(tmp_path, executor, evaluator, recorded, every=every)
    run_through(evaluations, 20)
    expected = list(range(1, 21)) if every is None else [*range(1, MAX_WAITING + 1), 20]
    for run in executor.waiting:
        run()
    evaluations.wait()
    assert [iteration for iteration, _ in recorded] == expected
    assert evaluated == expected, "each at the parameters of its iteration"
    assert evaluations.skipped == 20 - len(expected)
    warned = [record for record in caplog.records if "some are skipped" in record.getMessage()]
    assert len(warned) == (every is not None)
