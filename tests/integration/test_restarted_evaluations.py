"""Evaluations of a server that is restarted, or whose run goes on: counted once, at their times, and none is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_rpc.loggers import Logger, RunInfo, RunLog
from ormo_rpc.runtimes import session
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import rows_so_far
from tests.support.incarnation import Incarnation


def test_a_journal_restores_the_moving_average(tmp_path: Path) -> None:
    options: dict[str, Any] = {"every": 10, "journal": True, "evaluate": {"ema": 0.9}}
    first = Incarnation(tmp_path, 0, **options)
    first.push(25)
    average = first.server.evaluated()
    first.die()
    second = Incarnation(tmp_path, 1, start=False, **options)
    assert second.server.iteration == 25
    assert torch.equal(second.server.evaluated(), average)
    assert not torch.equal(second.server.params, average)
    second.die()


@pytest.mark.parametrize("journal", [False, True])
def test_a_restarted_server_counts_the_evaluations_of_the_one_before(journal: bool, tmp_path: Path) -> None:
    evaluate = {"every": 4, "patience": 3, "min_delta": 100}
    first = Incarnation(tmp_path, 0, every=10, journal=journal, evaluate=evaluate)
    first.push(14)  # evaluated at 4, 8 and 12; the checkpoint of iteration 10 has the first two
    kept = first.session.evaluations.ranking.state_dict()["values"]
    assert [iteration for iteration, _ in kept] == [4, 8, 12]
    assert not first.session.stops_early()
    first.die()
    second = Incarnation(tmp_path, 1, every=10, journal=journal, evaluate=evaluate)
    assert second.server.iteration == (14 if journal else 10)
    assert second.session.evaluations.ranking.state_dict()["values"] == kept[:2]
    best = second.session.directory.path / "checkpoints" / "best" / "manifest.json"
    record = json.loads(best.read_text())["best"]
    assert record["iteration"] == 12, "the loss falls; what was better stays, also where it was rolled back"
    while not second.session.stops_early():
        second.push(1)
    assert second.server.iteration == 16, "after those at 8, 12 and 16, as in a run without a restart"
    second.server.finish()
    second.push(2)
    assert second.server.ended
    summary = second.session.close(second.server.state_dict(), wait=True)
    assert summary["reason"].startswith("evaluate.patience=3: for 3 evaluations no val_loss was better than the ")
    assert f" of iteration {kept[0][0]} by more than" in summary["reason"]


@pytest.mark.parametrize("journal", [False, True])
def test_logs_of_a_restarted_server_begin_with_the_rows_that_are_left(
    journal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = list[int]()

    def start(_logger: Logger, run: RunInfo, _terminal: int | None) -> list[RunLog]:
        given[:] = [row["iteration"] for row in run.rows]
        return []

    monkeypatch.setattr(session, "start_logs", start)
    first = Incarnation(tmp_path, 0, every=10, journal=journal, evaluate={"every": 4})
    first.push(18)
    first.die()
    assert max(row["iteration"] for row in rows_so_far(tmp_path)) > 10
    second = Incarnation(tmp_path, 1, every=10, journal=journal, evaluate={"every": 4})
    second.die()
    assert given
    assert max(given) <= 10, "those after the checkpoint are computed, and logged, again"


def test_targets_and_waiting_snapshots_outlive_a_server(tmp_path: Path) -> None:
    evaluate = {"every": 4, "smooth": 2, "targets": [0.05, 0.9]}
    found: list[Any] = []
    for when in ("during", "after"):
        run_dir = tmp_path / when
        run = Incarnation(run_dir, 0, every=10, evaluate={**evaluate, "when": when})
        run.push(14)
        run.die()  # the checkpoint has iteration 10, and what was evaluated at 4 and 8
        run = Incarnation(run_dir, 1, every=10, evaluate={**evaluate, "when": when})
        assert run.server.iteration == 10
        run.push(60 - run.server.iteration)
        summary = run.session.close(run.server.state_dict(), wait=True)
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in rows if "test_loss" in row] == list(range(4, 61, 4))
        found.append([summary[entry] for entry in ("gradients_to", "val_gradients_to", "test_accuracy")])
    assert found[0] == found[1]
    assert found[0][0] == {"0.05": 8, "0.9": None}, "by the mean of the evaluations at 4 and 8, before the crash"


@pytest.mark.parametrize("when", ["during", "after"])
def test_the_last_checkpoint_has_the_evaluations_that_were_ready_after_it(when: str, tmp_path: Path) -> None:
    run = Incarnation(tmp_path, 0, evaluate={"every": 4, "targets": [0.05], "when": when})
    run.push(60)
    state = run.server.state_dict()
    run.session.write_checkpoint(state)
    before, run.now = run.now, run.now + 10  # evaluations take their time
    run.session.close(state, wait=True)
    records = checkpoint.read(checkpoint.locate(tmp_path), checkpoint.SERVER)["session"]
    assert records["seconds"] == before
    assert [point[0] for point in records["targets"]["points"]] == list(range(4, 61, 4))


def test_final_parameters_are_evaluated_though_no_push_has_ended_the_run(tmp_path: Path) -> None:
    run = Incarnation(tmp_path, 0, evaluate={"every": 4})
    run.push(6)
    for worker in (0, 1):
        run.server.leave(worker)
    run.server.finish()
    summary = run.session.close(run.server.state_dict(), wait=True)
    assert (summary["status"], summary["iterations"]) == ("completed", 6)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "test_loss" in row] == [4, 6]
