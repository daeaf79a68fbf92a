"""A restarted server: it resumes from checkpoint and journal after a crash, and its lineage has every ticket once."""

from __future__ import annotations

import errno
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_rpc import train
from ormo_rpc.config.parsing import parse_config, save_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.simulator import InlineExecutor
from ormo_rpc.server.events import Kind
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.checkpoint import complete
from ormo_rpc.storage.run_directory import read_metrics, read_trace
from ormo_rpc.storage.summary import Summary, write_summary
from tests.support.contract import same
from tests.support.incarnation import Incarnation


@pytest.mark.parametrize("every", [0, 10])
def test_gradients_of_a_journal_keep_their_times_and_the_clock_goes_on_from_the_last(every: int, tmp_path: Path) -> None:
    first = Incarnation(tmp_path, 0, every=every, journal=True)
    for _ in range(25):
        first.now += 0.25
        first.push(1)
    expected = [event["seconds"] for event in read_trace(tmp_path)[1] if event["event"] == "apply"]
    assert expected == [1.75 + 0.25 * number for number in range(25)]
    first.die()
    second = Incarnation(tmp_path, 1, every=every, journal=True)
    assert second.now == second.session.seconds_before == expected[-1]
    second.push(35)
    summary = second.session.close(second.server.state_dict(), wait=True)
    assert [event["seconds"] for event in read_trace(tmp_path)[1] if event["event"] == "apply"][:25] == expected
    assert summary["training_seconds"] == expected[-1]


@pytest.mark.parametrize("every", [0, 10])
@pytest.mark.parametrize(
    "options", [{"name": "ormo"}, {"name": "shifted"}, {"name": "spa"}, {"name": "orlomo", "combine": "mean"}], ids=str
)
def test_a_journal_restores_a_corrected_momentum_in_the_midst_of_a_schedule(
    options: dict[str, Any], every: int, tmp_path: Path
) -> None:
    algorithm = {**options, "momentum_correction": True}
    first = Incarnation(tmp_path, 0, every=every, journal=True, algorithm=algorithm)
    first.push(25)
    state = first.server.state_dict()
    first.die()
    second = Incarnation(tmp_path, 1, start=False, every=every, journal=True, algorithm=algorithm)
    restored = second.server.state_dict()
    assert restored["iteration"] == 25
    assert same(restored["algorithm_state"], state["algorithm_state"])
    assert same(restored["params"], state["params"])
    second.die()


@pytest.mark.parametrize("when", ["during", "after"])
@pytest.mark.parametrize("journal", [False, True])
@pytest.mark.parametrize("every", [0, 10])
def test_evaluations_since_the_checkpoint_are_made_again(every: int, journal: bool, when: str, tmp_path: Path) -> None:
    """Also that of the checkpoint's own iteration, which was not ready when it was written."""
    targets = (0.07, 0.09, 0.0995, 0.5)
    evaluate = {"every": 5, "targets": targets, "when": when}

    def evaluated(name: str, *deaths: int) -> list[dict[str, Any]]:
        incarnation = Incarnation(tmp_path / name, 0, every=every, journal=journal, evaluate=evaluate, best=True)
        for number, death in enumerate(deaths, 1):
            push_until(incarnation, death)
            incarnation.die()
            if number == 1:  # as if the death had come before it was written
                (tmp_path / name / "snapshots" / "000000000020.pt").unlink(missing_ok=True)
            incarnation = Incarnation(tmp_path / name, number, every=every, journal=journal, evaluate=evaluate, best=True)
        push_until(incarnation, 60)
        summary = incarnation.session.close(incarnation.server.state_dict(), wait=True)
        rows = [row for row in read_metrics(tmp_path / name) if "test_accuracy" in row]
        reached = [next((row for row in rows if row["test_accuracy"] >= target), None) for target in targets]
        assert list(summary["seconds_to"].values()) == [row and row["seconds"] for row in reached]
        assert list(summary["gradients_to"].values()) == [row and row["iteration"] for row in reached]
        assert summary["best"]["value"] == min(row["val_loss"] for row in rows)
        return rows

    killed, whole = evaluated("killed", 22, 37), evaluated("whole")
    assert [row["iteration"] for row in killed] == [row["iteration"] for row in whole] == list(range(5, 61, 5))
    values = [[(row["seconds"], row["test_accuracy"], row["val_loss"]) for row in rows] for rows in (killed, whole)]
    assert values[0][:4] == values[1][:4], "up to the first death"


def test_all_evaluations_of_recovered_gradients_are_made_again(tmp_path: Path) -> None:
    evaluate = {"every": 2, "targets": [0.5]}
    first = Incarnation(tmp_path, 0, journal=True, evaluate=evaluate)
    first.push(41)
    rows = [row for row in read_metrics(tmp_path) if "test_accuracy" in row]
    assert len(rows) == 20
    first.die()
    second = Incarnation(tmp_path, 1, journal=True, evaluate=evaluate)
    second.session.flush()
    second.die()
    again = [row for row in read_metrics(tmp_path) if "test_accuracy" in row]
    kept = ("iteration", "seconds", "test_accuracy", "val_loss")
    assert [[row[key] for key in kept] for row in again] == [[row[key] for key in kept] for row in rows]
    assert second.session.evaluations.skipped == 0


def push_until(incarnation: Incarnation, iteration: int) -> None:
    """Push at one gradient a quarter of a second, whatever came before."""
    while incarnation.server.iteration < iteration:
        incarnation.now = 2.0 + 0.25 * incarnation.server.iteration
        incarnation.push(1)


def lineage(run_dir: Path) -> list[int]:
    """Return the tickets of the applied gradients, whose iterations are in order."""
    applied = [event for event in read_trace(run_dir)[1] if event["event"] == "apply"]
    assert [event["iteration"] for event in applied] == list(range(len(applied)))
    return [event["ticket"] for event in applied]


@pytest.mark.parametrize("journal", [False, True])
@pytest.mark.parametrize("every", [0, 10])
def test_after_a_crash_the_lineage_has_every_ticket_once(every: int, journal: bool, tmp_path: Path) -> None:
    first = Incarnation(tmp_path, 0, every=every, journal=journal)
    first.push(25)
    kept = {25: first.sha()}
    first.die()
    # The memory of the process is lost: without the journal the newest checkpoint counts, or the beginning.
    second = Incarnation(tmp_path, 1, every=every, journal=journal)
    resumed_at = 25 if journal else 20 if every else 0
    assert second.server.iteration == resumed_at
    assert second.session.counters.rolled_back == 25 - resumed_at
    assert second.session.counters.incarnations == 2
    assert second.server.incarnation == 1
    if journal:
        assert second.sha() == kept[25]
    second.push(8)
    second.die()
    third = Incarnation(tmp_path, 2, every=every, journal=journal)
    resumed_again_at = resumed_at + 8 if journal else 20 if every else 0
    assert third.server.iteration == resumed_again_at
    assert third.session.counters.rolled_back == (25 - resumed_at) + (resumed_at + 8 - resumed_again_at)
    assert third.server.incarnation == 2
    third.push(60 - resumed_again_at)
    assert third.server.ended
    assert sorted(lineage(tmp_path)) == list(range(60))
    resumes = [event for event in read_trace(tmp_path)[1] if event["event"] == "resume"]
    assert [event["workers"] for event in resumes] == [[0, 1]] * (2 if journal else 1)
    state = third.server.state_dict()
    summary = third.session.close(state, wait=True)
    assert (summary["rolled_back"], summary["incarnations"], summary["iterations"]) == (
        third.session.counters.rolled_back,
        3,
        60,
    )
    assert sum(summary["pushes_per_worker"].values()) == summary["gradients_computed"] == 60  # of the lineage alone

    save_config(third.session.job.config, tmp_path / "config.yaml")
    write_summary(tmp_path, Summary.from_dict(summary))
    again = train(["runtime=replay", f"replay.run={tmp_path}", "logger=none"], run_dir=tmp_path / "again")
    assert again["identical"] is True


def test_the_journal_recovers_across_an_incarnation_that_never_started(tmp_path: Path) -> None:
    shas: list[bytes] = []
    for number, start in enumerate((True, False, True)):
        incarnation = Incarnation(tmp_path, number, start=start, journal=True)
        if start:
            incarnation.push(7)
        shas.append(incarnation.sha())
        incarnation.die()
    last = Incarnation(tmp_path, 3, journal=True)
    assert (last.server.iteration, last.session.counters.rolled_back, last.server.incarnation) == (14, 0, 3)
    assert last.sha() == shas[-1]
    last.die()


def test_recovered_gradients_are_not_earlier_than_the_checkpoint_before_them(tmp_path: Path) -> None:
    first = Incarnation(tmp_path, 0, every=10, journal=True)
    first.push(25)
    first.die()
    second = Incarnation(tmp_path, 1, every=10, journal=True)
    second.now += 2.0
    second.push(5)
    second.die()
    applied = [event for event in read_trace(tmp_path)[1] if event["event"] == "apply"]
    assert [event["seconds"] for event in applied] == [1.5] * 25 + [3.5] * 5
    assert second.session.recorder.statistics.seconds == 3.5


def test_rolled_back_events_are_kept_in_a_file_of_their_own(tmp_path: Path) -> None:
    incarnation = Incarnation(tmp_path, 0, every=10)
    incarnation.push(17)
    incarnation.die()
    Incarnation(tmp_path, 1, every=10).die()
    lines = [json.loads(line) for line in (tmp_path / "trace.rolled_back.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["event"] == "apply"] == list(range(10, 17))


def test_a_torn_newest_checkpoint_is_skipped_and_the_journal_continues_from_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Incarnation(tmp_path, 0, every=10, journal=True)
    first.push(25)
    first.die()
    newest = complete(tmp_path)[-1]
    (newest / "server.pt").write_bytes(b"")
    second = Incarnation(tmp_path, 1, every=10, journal=True)
    assert (second.server.iteration, second.session.counters.rolled_back) == (25, 0)
    assert second.sha() == first.sha()
    second.die()
    assert [record.getMessage() for record in caplog.records] == [
        f"{newest / 'server.pt'}: is damaged: its SHA-256 is not the one in manifest.json; an older checkpoint is used instead"
    ]


def test_a_checkpoint_without_its_manifest_does_not_stop_the_next_one(tmp_path: Path) -> None:
    incarnation = Incarnation(tmp_path, 0, every=10, journal=True)
    incarnation.push(12)
    (spoilt,) = complete(tmp_path)
    (spoilt / "manifest.json").unlink()
    incarnation.push(10)
    incarnation.die()
    assert checkpoint.locate(tmp_path).name == "iteration_000000020"


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    incarnation = Incarnation(tmp_path, 0, every=10)
    incarnation.push(12)
    (good,) = complete(tmp_path)

    def full(*_arguments: Any, **_more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        incarnation.push(10)
    monkeypatch.undo()
    incarnation.die()
    assert checkpoint.locate(tmp_path) == good
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    slow: list[tuple[Any, tuple[Any, ...], Future[Any]]] = []

    class Slow(InlineExecutor):
        def submit(self, fn: Any, /, *args: Any, **_kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            slow.append((fn, args, future))
            return future

    incarnation = Incarnation(tmp_path, 0, writer=Slow(), every=5)
    incarnation.push(23)  # four become due; those during the writing of the first are skipped
    assert len(slow) == 1
    assert lineage_written(tmp_path) == 23
    fn, arguments, future = slow.pop()
    future.set_result(fn(*arguments))
    assert checkpoint.iteration_of(complete(tmp_path)[0]) == 5
    incarnation.session.flush()
    incarnation.push(3)
    assert len(slow) == 1
    incarnation.die()


def lineage_written(run_dir: Path) -> int:
    """Count the gradients in the trace."""
    return len(lineage(run_dir))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("server.pt", lambda data: data[:-1], r"server\.pt: is damaged: its SHA-256 is not the one in manifest\.json"),
        ("model.pt", lambda data: data[:50] + b"x" + data[51:], r"model\.pt: is damaged: its SHA-256 .*"),
        ("config.yaml", lambda data: data + b"#", r"config\.yaml: is damaged: its SHA-256 .*"),
        ("manifest.json", lambda _: b"{}", r"manifest\.json: is damaged: it is not a manifest of this format"),
        ("manifest.json", lambda _: b"\xff", r"manifest\.json: is damaged: it is not a manifest of this format"),
        ("manifest.json", lambda data: data.replace(b'"format": 3', b'"format": 1'), r".*: format: got 1, expected 3; .*"),
        ("server.pt", None, r".*: is incomplete: No such file or directory: server\.pt"),
        ("manifest.json", None, r".*: is incomplete: No such file or directory: manifest\.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_damaged_file(file: str, change: Any, said: str, tmp_path: Path) -> None:
    incarnation = Incarnation(tmp_path, 0, every=10)
    incarnation.push(10)
    incarnation.die()
    (path,) = complete(tmp_path)
    assert checkpoint.damage_of(path) is None
    if change is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes(change((path / file).read_bytes()))
    with pytest.raises(ConfigError, match=rf"\A.*{said}; take another checkpoint\Z"):
        checkpoint.locate(path)
    with pytest.raises(ConfigError, match=r"\A.*: got a path without an intact checkpoint, expected .*\Z"):
        checkpoint.locate(tmp_path)


def test_a_pause_is_one_event_and_ends_with_the_next_join() -> None:
    config = parse_config({"workers": 3, "runtime": {"min_workers": 2}, "model": {"hidden": 4}})
    events: list[Any] = []
    server = Job(config).server(events.append, lambda: 0.0)
    assert len(server.start()) == 3
    assert server.leave(0) != [] or server.assignments.returned
    server.leave(1)
    assert server.join(5) != []
    kinds = [event.kind for event in events if event.kind in (Kind.pause, Kind.proceed)]
    assert kinds == [Kind.pause, Kind.proceed]
