"""The wandb logger by a stand-in for wandb's module: which value counts, which run is continued, and what a failure does."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc.loggers import RunInfo
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.loggers.wandb import ENVIRONMENT, WandbLogger, WandbMode
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.tasks import Classification
from tests.support.error_task import MAE
from tests.support.events import apply_event
from tests.support.fake_wandb import FakeAuthenticationError, FakeCommError, FakeError, FakeWandb

CONFIG = {
    "seed": 5,
    "algorithm": {"name": "ormo"},
    "scheduler": {"name": "async"},
    "dataset": {"name": "digits"},
    "model": {"name": "mlp"},
    "runtime": {"name": "sim"},
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*ENVIRONMENT.values(), "WANDB_SWEEP_ID", "WANDB_RESUME", "WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"]:
        monkeypatch.delenv(name, raising=False)


def run_info(directory: Path, **more: Any) -> RunInfo:
    directory.mkdir(exist_ok=True)
    return RunInfo(name="ormo-async-3w-seed5", config=CONFIG, directory=directory, total_iterations=50, **more)


def statistics() -> Statistics:
    """Five gradients of three workers, with the delays 0, 3, 1, 0, 6; and three that were discarded."""
    made = Statistics()
    for iteration, (worker, delay) in enumerate([(0, 0), (1, 3), (1, 1), (0, 0), (2, 6)]):
        made.observe(apply_event(iteration, worker, delay))
    for worker, delay in [(1, 9), (1, 9), (3, 9)]:
        made.observe(Event(Kind.discard, 0.0, {"worker": worker, "delay": delay}))
    return made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_every_row_with_delays_by_worker_and_their_histogram(tmp_path: Path, fake: FakeWandb) -> None:
    log = WandbLogger().start(run_info(tmp_path))
    (run,) = fake.runs
    # Rows of a restarted server come again at earlier iterations: not steps, which wandb would drop, but values of the x axis.
    assert run.metrics == [("*", "iteration", None)]
    log.log({"iteration": 5, "train_loss": 1.5}, statistics())
    log.log({"iteration": 5, "test_loss": 0.5}, statistics())
    log.finish({"status": "completed"})
    # Worker 0 had the delays 0 and 0, worker 1 had 3 and 1, worker 2 had 6; worker 3 had none that was applied.
    per_worker = {"delay/worker_0": 0.0, "delay/worker_1": 2.0, "delay/worker_2": 6.0}
    first, second = run.logged
    assert first == {"iteration": 5, "train_loss": 1.5, **per_worker}
    histogram = second.pop("delay/histogram")
    assert second == {"iteration": 5, "test_loss": 0.5, **per_worker}
    # Delays 0, 0, 1, 3, 6 in at most four bins: seven values make bins of two.
    assert (histogram.counts, histogram.edges) == ([3, 1, 0, 1], [0, 2, 4, 6, 8])
    assert run.summary == {"status": "completed"}
    assert run.finished == 1


def test_wandb_keeps_the_best_value_by_the_direction_of_each_metric(tmp_path: Path, fake: FakeWandb) -> None:
    metrics = {metric.name: metric for metric in (*Classification().metrics(), MAE)}
    rows = [{"iteration": 1, "test_accuracy": 0.25}]
    log = WandbLogger().start(run_info(tmp_path, rows=rows, metric=metrics.__getitem__))
    log.log({"iteration": 5, "train_loss": 1.5, "train_tokens": 3.0}, statistics())
    for accuracy in (0.5, 0.25):
        log.log({"iteration": 9, "test_loss": 1.0, "test_accuracy": accuracy, "val_mae": 2.0}, statistics())
    log.finish({"status": "completed", "test_accuracy": 0.25, "val_mae": 2.0, "train_loss": 1.5, "val_loss": None})
    assert fake.runs[0].metrics == [
        ("*", "iteration", None),
        ("test_accuracy", "iteration", "max,last"),
        ("test_loss", "iteration", "min,last"),
        ("val_mae", "iteration", "min,last"),
    ]
    assert fake.runs[0].summary == {"status": "completed", "train_loss": 1.5, "val_loss": None}


def test_in_a_sweep_of_wandbs_each_metric_is_one_number(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    log = WandbLogger().start(run_info(tmp_path))
    log.log({"iteration": 9, "test_loss": 1.0}, statistics())
    log.finish({"test_loss": 0.5})
    assert fake.runs[0].metrics == [("*", "iteration", None)]
    assert fake.runs[0].summary == {"test_loss": 0.5}


def argument_of(name: str) -> str:
    return {"run_name": "name", "run_id": "id", "directory": "dir"}.get(name, name)


def defaults(tmp_path: Path) -> dict[str, Any]:
    return {
        "mode": "offline",
        "project": "ormo_rpc",
        "run_name": "ormo-async-3w-seed5",
        "job_type": "sim",
        "tags": ["ormo", "async", "digits", "mlp"],
        "directory": str(tmp_path),
    }


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_the_option_counts_then_wandbs_variable_then_our_default(
    name: str, tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argument, options = argument_of(name), {"mode": WandbMode.online, "tags": ["mine"]}
    given: Any = options.get(name, "mine")
    WandbLogger().start(run_info(tmp_path))
    assert fake.arguments[argument] == defaults(tmp_path).get(name)
    for restarted in tmp_path.glob("wandb_id"):
        restarted.unlink()
    monkeypatch.setenv(ENVIRONMENT[name], "")  # as good as not set
    WandbLogger().start(run_info(tmp_path))
    assert fake.arguments[argument] == defaults(tmp_path).get(name) or name == "run_id"
    monkeypatch.setenv(ENVIRONMENT[name], "offline" if name == "mode" else "theirs")
    WandbLogger().start(run_info(tmp_path))
    assert fake.arguments[argument] is None  # wandb reads the variable itself
    WandbLogger(**{name: given}).start(run_info(tmp_path))
    assert fake.arguments[argument] == (given.value if isinstance(given, WandbMode) else given)


def test_time_outs_are_bounded_unless_a_variable_says_otherwise(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(**options: Any) -> dict[str, Any]:
        WandbLogger(**options).start(run_info(tmp_path))
        return {key: value for key, value in fake.arguments["settings"].items() if "timeout" in key}

    assert settings() == {"init_timeout": 60.0, "finish_timeout": 60.0}
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "7")
    assert settings() == {"finish_timeout": 60.0}
    assert settings(timeout_seconds=2.0) == {"init_timeout": 2.0, "finish_timeout": 2.0}


def test_names_say_what_was_typed_but_not_twice(tmp_path: Path, fake: FakeWandb) -> None:
    typed = (
        "algorithm=ormo",
        "train.lr=0.1",
        "seed=5",
        "logger.mode=offline",
        "checkpoint.every=5",
        "+model.width=3",
        "workers=3",
    )
    WandbLogger().start(run_info(tmp_path, overrides=typed, sweep="2026-01-01_10-00-00"))
    assert fake.arguments["name"] == "ormo-async-3w-seed5 train.lr=0.1 +model.width=3"
    assert fake.arguments["group"] == "2026-01-01_10-00-00"
    WandbLogger().start(run_info(tmp_path, overrides=[f"train.lr={'1' * 200}"]))
    assert len(fake.arguments["name"]) == 128  # wandb's limit


def test_a_run_of_a_wandb_sweep_has_its_project_its_id_and_its_group(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "run1")
    WandbLogger().start(run_info(tmp_path))
    assert (fake.arguments["project"], fake.arguments["id"], fake.arguments["group"]) == (None, None, "sweep1")


def test_a_restarted_server_and_a_resumed_run_continue_the_wandb_run(tmp_path: Path, fake: FakeWandb) -> None:
    def id_of(logger: WandbLogger, run: RunInfo) -> str:
        logger.start(run)
        assert fake.arguments["resume"] == "allow"
        return fake.runs[-1].id

    first = run_info(tmp_path / "first")
    begun = id_of(WandbLogger(), first)
    assert id_of(WandbLogger(), first) == begun  # after the death of the server
    second = run_info(tmp_path / "second", continues=tmp_path / "first")
    assert id_of(WandbLogger(), second) == begun
    third = run_info(tmp_path / "third", continues=tmp_path / "second")
    assert id_of(WandbLogger(), third) == begun
    branch = run_info(tmp_path / "branch", continues=tmp_path / "first")
    assert id_of(WandbLogger(run_id="other"), branch) == "other"
    assert id_of(WandbLogger(), replace(branch, continues=tmp_path / "first")) == "other"  # its own counts first
    assert id_of(WandbLogger(), run_info(tmp_path / "new")) not in (begun, "other")
    assert id_of(WandbLogger(), run_info(tmp_path / "copied", continues=tmp_path / "checkpoint_alone")) not in (begun, "other")


@pytest.mark.parametrize("mode", WandbMode)
def test_an_offline_run_begins_with_the_rows_that_died_with_wandbs_process(
    mode: WandbMode, tmp_path: Path, fake: FakeWandb
) -> None:
    rows = [{"iteration": 3, "train_loss": 2.5}, {"iteration": 5, "test_accuracy": 0.5}]
    WandbLogger(mode=mode).start(run_info(tmp_path, rows=rows))
    assert fake.runs[0].logged == (rows if mode is WandbMode.offline else [])  # online they were sent


def test_wandbs_own_resume_variable_counts(tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RESUME", "must")
    WandbLogger().start(run_info(tmp_path))
    assert fake.arguments["resume"] is None


def test_a_disabled_run_has_no_id_to_continue(tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.fake_wandb.FakeRun.disabled", True)
    WandbLogger().start(run_info(tmp_path))
    assert [run.disabled for run in fake.runs] == [True]
    assert not (tmp_path / "wandb_id").exists()


@pytest.mark.parametrize("error", [FakeError, FakeAuthenticationError])
def test_a_wandb_that_cannot_start_is_an_error_with_the_key_to_change(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(error("not\nlogged in")))
    with pytest.raises(ValueError, match="wandb") as caught:
        WandbLogger(mode=WandbMode.online, run_name="mine").start(run_info(tmp_path))
    assert str(caught.value) == (
        "logger.mode: wandb cannot start online: not logged in; use logger.mode=offline or logger=none"
    )


@pytest.mark.parametrize("error", [RuntimeError("no home"), PermissionError("/home"), KeyError("uid")])
def test_where_wandb_finds_no_home_it_is_left_out_with_a_warning(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(error))
    log = WandbLogger().start(run_info(tmp_path))
    log.log({"iteration": 1}, Statistics())
    log.finish({"status": "completed"})
    (record,) = caplog.records
    assert record.getMessage().startswith(f"wandb is left out, metrics.jsonl has every row: {type(error).__name__}: ")


def test_a_server_of_wandb_that_does_not_answer_makes_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeWandb(FakeCommError("timed\nout"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = WandbLogger(mode=WandbMode.online).start(run_info(tmp_path))
    assert fake.arguments["mode"] == "offline"
    log.log({"iteration": 1}, Statistics())
    assert fake.runs[0].logged == [{"iteration": 1}]
    assert [record.getMessage() for record in caplog.records] == [
        "wandb cannot be reached, so the run is logged offline, for `wandb sync`: timed out"
    ]


def test_a_restarted_server_goes_on_whatever_wandb_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    WandbLogger(mode=WandbMode.online).start(run_info(tmp_path))
    fake = FakeWandb(FakeAuthenticationError("the key was revoked"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    WandbLogger(mode=WandbMode.online).start(run_info(tmp_path))
    assert (fake.arguments["mode"], fake.runs[0].id) == ("offline", "new0")


def test_rows_that_wandb_does_not_take_are_one_warning(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = WandbLogger().start(run_info(tmp_path))

    def fail(row: dict[str, Any]) -> None:
        raise BrokenPipeError(f"no process for {row}")

    monkeypatch.setattr(fake.runs[0], "log", fail)
    for iteration in range(3):
        log.log({"iteration": iteration}, Statistics())
    assert [record.getMessage() for record in caplog.records] == [
        "wandb takes no more rows, metrics.jsonl does: BrokenPipeError: no process for {'iteration': 0}"
    ]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("project", "team/project", r"1 to 128 characters but / \ # ? % :"),
        ("project", "p" * 129, r"1 to 128 characters but / \ # ? % :"),
        ("run_id", "a:b", "1 to 128 characters but : ; , # ? / '"),
        ("tags", ["t" * 65], "tags of 1 to 64 characters"),
        ("tags", ["one", ""], "tags of 1 to 64 characters"),
    ],
)
def test_names_that_wandb_does_not_take_are_refused_before_anything_starts(
    name: str, value: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=rf"^logger\.{name}: got .*, expected {re.escape(expected)}$"):
        WandbLogger(**{name: value})
    monkeypatch.setenv(ENVIRONMENT[name], ",".join(value) if isinstance(value, list) else value)
    separated = ", separated by commas" if name == "tags" else ""
    with pytest.raises(
        ValueError, match=rf"^{ENVIRONMENT[name]}: got .*, expected {re.escape(expected)}{separated}; or set logger\.{name}$"
    ):
        WandbLogger().prepare()
    WandbLogger(project="p", run_id="i", tags=["t"]).prepare()  # options win


def test_parts_from_outside_are_tags_as_well(tmp_path: Path, fake: FakeWandb) -> None:
    outside = {**CONFIG, "model": {"_target_": f"my_package.{'N' * 70}"}, "dataset": {"_target_": "my_package.data.blobs"}}
    WandbLogger().start(replace(run_info(tmp_path), config=outside))
    assert fake.arguments["tags"] == ["ormo", "async", "blobs", "N" * 64]


def test_a_mode_that_wandb_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "of-line")
    with pytest.raises(
        ValueError, match=r"^WANDB_MODE: got 'of-line', expected one of offline, dryrun, .*; or set logger\.mode$"
    ):
        WandbLogger().prepare()
    WandbLogger(mode=WandbMode.offline).prepare()
