"""Going on from checkpoints: simulations that end to the bit as if nothing had been, servers that take over after a crash."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_rpc import RunFailed, train
from ormo_rpc.config.parsing import parse_config, save_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.messages import Reply
from ormo_rpc.options import find, parts
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.session import Session
from ormo_rpc.runtimes.simulator import InlineExecutor
from ormo_rpc.schedulers import incompatibility
from ormo_rpc.server.events import Kind
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.checkpoint import complete
from ormo_rpc.storage.run_directory import read_trace
from ormo_rpc.storage.summary import Summary, write_summary

QUADRATIC: dict[str, Any] = {
    "runtime": {"name": "sim", "gradient": "quadratic", "dimension": 6},
    "logger": {"name": "none", "progress": False},
    "heterogeneity": {"name": "gamma"},
    "train": {"lr": 0.001, "max_iterations": 70},
    "workers": 4,
}


def changed(base: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A configuration with more values in its sections."""
    return {
        **base,
        **{key: {**base.get(key, {}), **value} if isinstance(value, dict) else value for key, value in more.items()},
    }


PAIRS = [
    (algorithm, scheduler)
    for algorithm in parts("algorithm")
    for scheduler in parts("scheduler")
    if incompatibility(find("algorithm", algorithm), find("scheduler", scheduler)) is None
]
EVERY = {"every": 7, "keep": 100}
OF_THIS_MACHINE = {"wall_seconds", "step_seconds", "checkpoint", "updates_per_second"}
"""Figures that have nothing to do with what was simulated."""


def happened(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a trace, but for checkpoints."""
    return [event for event in read_trace(run_dir)[1] if event["event"] != "checkpoint"]


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in OF_THIS_MACHINE}


def check_going_on(run_dir: Path, whole: dict[str, Any], config: dict[str, Any], source: Path, again: Path) -> int:
    """Go on from a checkpoint and compare with the run that was never interrupted; returns where it went on."""
    resumed = train(changed(config, checkpoint={"resume": str(source)}), run_dir=again)
    at = checkpoint.iteration_of(source)
    rest, all_events = happened(again), happened(run_dir)
    assert rest == all_events[len(all_events) - len(rest) :]
    assert [event["iteration"] for event in rest if event["event"] == "apply"] == list(range(at, whole["iterations"]))
    assert figures(resumed) == figures(whole)
    return at


@pytest.mark.parametrize(("algorithm", "scheduler"), PAIRS)
def test_an_interrupted_simulation_ends_as_if_nothing_had_been(algorithm: str, scheduler: str, tmp_path: Path) -> None:
    config = changed(QUADRATIC, algorithm={"name": algorithm}, scheduler={"name": scheduler}, checkpoint=EVERY)
    whole = train(config, run_dir=tmp_path / "whole")
    *sources, last = complete(tmp_path / "whole")
    assert checkpoint.iteration_of(last) == whole["iterations"]
    assert len(sources) >= 2
    for number, source in enumerate((sources[0], sources[-1])):
        check_going_on(tmp_path / "whole", whole, config, source, tmp_path / str(number))


def test_joins_leaves_links_and_real_gradients_go_on_too(tmp_path: Path) -> None:
    config = {
        "runtime": {
            "name": "sim",
            "joins": {7: 0.9, 8: 2.5},
            "leaves": {1: 1.7},
            "latency_seconds": [0.01, 0.2],
            "service_seconds": 0.02,
        },
        "logger": QUADRATIC["logger"],
        "heterogeneity": {"name": "gamma"},
        "model": {"hidden": 4, "dropout": 0.3},
        "train": {"max_iterations": 80},
        "workers": 3,
        "algorithm": {"name": "dc_asgd"},
        "checkpoint": {"every": 9, "keep": 100},
    }
    whole = train(config, run_dir=tmp_path / "whole")
    assert {event["event"] for event in happened(tmp_path / "whole")} >= {"join", "leave", "reissue"}
    *sources, _ = complete(tmp_path / "whole")
    places = [check_going_on(tmp_path / "whole", whole, config, s, tmp_path / s.name) for s in sources]
    assert len(places) >= 3
    again = train(["runtime=replay", f"replay.run={tmp_path / sources[1].name}", "logger=none"], run_dir=tmp_path / "replayed")
    assert again["identical"] is True


def test_going_on_twice_is_going_on(tmp_path: Path) -> None:
    config = changed(QUADRATIC, checkpoint=EVERY)
    whole = train(config, run_dir=tmp_path / "whole")
    first = complete(tmp_path / "whole")[0]
    train(changed(config, checkpoint={"resume": str(first)}), run_dir=tmp_path / "second")
    check_going_on(tmp_path / "whole", whole, config, complete(tmp_path / "second")[0], tmp_path / "third")


def test_a_checkpoint_from_before_working_ahead_and_lossy_wires_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, read, without = changed(QUADRATIC, checkpoint=EVERY), checkpoint.read, list[str]()
    whole = train(config, run_dir=tmp_path / "whole")

    def read_older(source: Path, name: str) -> dict[str, Any]:
        state = read(source, name)
        for key in ("computing_until", "source"):
            del state["cluster"][key]
            without.append(key)
        return state

    monkeypatch.setattr(checkpoint, "read", read_older)
    check_going_on(tmp_path / "whole", whole, config, complete(tmp_path / "whole")[0], tmp_path / "again")
    assert without == ["computing_until", "source"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_a_simulation_where_it_is(number: signal.Signals, tmp_path: Path) -> None:
    config = changed(QUADRATIC, train={"max_iterations": 400})
    whole = train(config, run_dir=tmp_path / "whole")
    started = threading.Event()
    count = 0
    compute = Session.observe

    def observe(self: Session, server: Any) -> None:
        nonlocal count
        count += 1
        if count == 123:
            started.set()
            os.kill(os.getpid(), number)
        compute(self, server)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "observe", observe)
        with pytest.raises(
            RunFailed, match=rf"\Ainterrupted by {number.name}; iteration 123 is kept: resume with .*"
        ) as caught:
            train(config, run_dir=tmp_path / "first")
    assert caught.value.exit_status == 130
    assert started.is_set()
    assert json.loads((tmp_path / "first" / "summary.json").read_text())["reason"] == number.name
    source = checkpoint.locate(tmp_path / "first")
    assert check_going_on(tmp_path / "whole", whole, config, source, tmp_path / "second") == 123


# -- a server that takes over ------------------------------------------------------------------------------------------


class Life:
    """One life of a server in a run directory, without processes: a session, and pushes to it."""

    def __init__(
        self, run_dir: Path, number: int, *, start: bool = True, writer: Executor | None = None, **options: Any
    ) -> None:
        run_dir.mkdir(exist_ok=True)
        config = parse_config(
            {
                "workers": 2,
                "model": {"hidden": 4},
                "train": {"max_iterations": 60, "lr": 0.01},
                "logger": {"name": "none"},
                "checkpoint": {"every_seconds": 0, **options},
            }
        )
        (run_dir / "trace.jsonl").touch()
        job = Job(config)
        self.worker = job.worker()
        self.session = Session(job, run_dir, InlineExecutor(), writer or InlineExecutor(), lambda: 1.5)
        self.session.open(incarnation=number)
        self.server = self.session.server
        self.replies: dict[int, Reply] = {}
        if start:
            self.replies = {reply.worker: reply for reply in self.server.start([0, 1])}
            self.session.journal.start([0, 1], self.server.incarnation)

    def push(self, count: int) -> None:
        """Redeem so many tickets, the workers taking turns, with a look at the queues after each."""
        for _ in range(count):
            worker = self.server.iteration % 2
            push = self.worker.compute(self.replies[worker])
            replies: list[Reply] = self.server.receive(push)
            self.session.journal.push(push, rejected=False)
            self.session.observe(self.server)
            self.session.journal.sync()
            self.replies |= {reply.worker: reply for reply in replies}
            self.session.flush()

    def die(self) -> None:
        """Be gone, as after a SIGKILL: what was written stays, and no more is written."""
        self.session.directory.close()
        if self.session.job.config.checkpoint.journal:
            os.close(self.session.journal._file)  # pyright: ignore[reportPrivateUsage,reportAttributeAccessIssue] # no sync

    def sha(self) -> bytes:
        """The parameters, to the bit."""
        return self.server.params.numpy().tobytes()


def lineage(run_dir: Path) -> list[int]:
    """The tickets of the applied gradients, whose iterations are in order."""
    applied = [event for event in read_trace(run_dir)[1] if event["event"] == "apply"]
    assert [event["iteration"] for event in applied] == list(range(len(applied)))
    return [event["ticket"] for event in applied]


@pytest.mark.parametrize("journal", [False, True])
@pytest.mark.parametrize("every", [0, 10])
def test_after_a_crash_the_lineage_has_every_ticket_once(every: int, journal: bool, tmp_path: Path) -> None:
    first = Life(tmp_path, 0, every=every, journal=journal)
    first.push(25)
    kept = {25: first.sha()}
    first.die()
    # The process is gone: what it had in memory is lost. Without the journal the newest checkpoint counts, or the beginning.
    second = Life(tmp_path, 1, every=every, journal=journal)
    went_on = 25 if journal else 20 if every else 0
    assert second.server.iteration == went_on
    assert second.session.counters.rolled_back == 25 - went_on
    assert second.session.counters.incarnations == 2
    assert second.server.incarnation == 1
    if journal:
        assert second.sha() == kept[25]
    second.push(8)
    second.die()
    third = Life(tmp_path, 2, every=every, journal=journal)
    went_on_again = went_on + 8 if journal else 20 if every else 0
    assert third.server.iteration == went_on_again
    assert third.session.counters.rolled_back == (25 - went_on) + (went_on + 8 - went_on_again)
    assert third.server.incarnation == 2
    third.push(60 - went_on_again)
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


def test_a_life_that_ended_before_it_began_is_no_obstacle_to_the_journal(tmp_path: Path) -> None:
    shas: list[bytes] = []
    for number, start in enumerate((True, False, True)):
        life = Life(tmp_path, number, start=start, journal=True)
        if start:
            life.push(7)
        shas.append(life.sha())
        life.die()
    last = Life(tmp_path, 3, journal=True)
    assert (last.server.iteration, last.session.counters.rolled_back, last.server.incarnation) == (14, 0, 3)
    assert last.sha() == shas[-1]
    last.die()


def test_what_is_rolled_back_can_be_looked_at(tmp_path: Path) -> None:
    life = Life(tmp_path, 0, every=10)
    life.push(17)
    life.die()
    Life(tmp_path, 1, every=10).die()
    lines = [json.loads(line) for line in (tmp_path / "trace.rolled_back.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["event"] == "apply"] == list(range(10, 17))


def test_a_torn_newest_checkpoint_is_passed_over_and_the_journal_chains_from_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Life(tmp_path, 0, every=10, journal=True)
    first.push(25)
    first.die()
    newest = complete(tmp_path)[-1]
    (newest / "server.pt").write_bytes(b"")
    second = Life(tmp_path, 1, every=10, journal=True)
    assert (second.server.iteration, second.session.counters.rolled_back) == (25, 0)
    assert second.sha() == first.sha()
    second.die()
    assert [record.getMessage() for record in caplog.records] == [
        f"{newest / 'server.pt'}: is damaged: its SHA-256 is not the one in manifest.json; an older checkpoint is used instead"
    ]


def test_a_checkpoint_without_its_manifest_does_not_end_the_run_at_the_next_one(tmp_path: Path) -> None:
    life = Life(tmp_path, 0, every=10, journal=True)
    life.push(12)
    (spoilt,) = complete(tmp_path)
    (spoilt / "manifest.json").unlink()
    life.push(10)
    life.die()
    assert checkpoint.locate(tmp_path).name == "iteration_000000020"


def test_a_full_disk_ends_the_run_and_the_last_good_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(tmp_path, 0, every=10)
    life.push(12)
    (good,) = complete(tmp_path)

    def full(*_arguments: Any, **_more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        life.push(10)
    monkeypatch.undo()
    life.die()
    assert checkpoint.locate(tmp_path) == good
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]


def test_a_checkpoint_that_is_being_written_holds_nobody_up(tmp_path: Path) -> None:
    slow: list[tuple[Any, tuple[Any, ...], Future[Any]]] = []

    class Slow(InlineExecutor):
        def submit(self, fn: Any, /, *args: Any, **_kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            slow.append((fn, args, future))
            return future

    life = Life(tmp_path, 0, writer=Slow(), every=5)
    life.push(23)  # four become due; those that do while the first one is written are skipped
    assert len(slow) == 1
    assert lineage_written(tmp_path) == 23
    fn, arguments, future = slow.pop()
    future.set_result(fn(*arguments))
    assert checkpoint.iteration_of(complete(tmp_path)[0]) == 5
    life.session.flush()
    life.push(3)
    assert len(slow) == 1
    life.die()


def lineage_written(run_dir: Path) -> int:
    """How many gradients the trace tells of."""
    return len(lineage(run_dir))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("server.pt", lambda data: data[:-1], r"server\.pt: is damaged: its SHA-256 is not the one in manifest\.json"),
        ("model.pt", lambda data: data[:50] + b"x" + data[51:], r"model\.pt: is damaged: its SHA-256 .*"),
        ("config.yaml", lambda data: data + b"#", r"config\.yaml: is damaged: its SHA-256 .*"),
        ("manifest.json", lambda _: b"{}", r"manifest\.json: is damaged: it is not a manifest of this format"),
        ("manifest.json", lambda _: b"\xff", r"manifest\.json: is damaged: it is not a manifest of this format"),
        ("manifest.json", lambda data: data.replace(b'"format": 2', b'"format": 1'), r".*: format: got 1, expected 2"),
        ("server.pt", None, r".*: is incomplete: No such file or directory: server\.pt"),
        ("manifest.json", None, r".*: is incomplete: No such file or directory: manifest\.json"),
    ],
)
def test_damage_is_found_and_named(file: str, change: Any, said: str, tmp_path: Path) -> None:
    life = Life(tmp_path, 0, every=10)
    life.push(10)
    life.die()
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


def test_pausing_is_told_once_and_undone_by_whoever_comes() -> None:
    config = parse_config({"workers": 3, "runtime": {"min_workers": 2}, "model": {"hidden": 4}})
    events: list[Any] = []
    server = Job(config).server(events.append, lambda: 0.0)
    assert len(server.start()) == 3
    assert server.leave(0) != [] or server.assignments.returned
    server.leave(1)
    assert server.join(5) != []
    kinds = [event.kind for event in events if event.kind in (Kind.pause, Kind.proceed)]
    assert kinds == [Kind.pause, Kind.proceed]
