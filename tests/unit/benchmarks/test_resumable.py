"""Runs of an experiment that goes on where it was."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from experiments import at_once, reproduce
from experiments.on_device import MACHINE, machine_in_words, machine_of, note_machine
from experiments.reproduce_report import KEYS, name_of, table, unfinished, write
from experiments.resumable import SETTINGS, ResumableRun, alone
from ormo_rpc.composing import compose
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.storage.environment import environment
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import TRACE
from ormo_rpc.storage.summary import FILE

SHORT = ("runtime=sim", "logger=none", "logger.progress=false", "logger.log_iterations=10", "workers=3", "checkpoint.every=20")


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    settings = (*SHORT, "train.max_iterations=60")
    whole = ResumableRun(tmp_path / "whole", settings)
    expected = whole.go_on()
    killed = ResumableRun(tmp_path / "killed", settings)
    killed.folder.mkdir()
    shutil.copytree(tmp_path / "whole" / "0", killed.folder / "0")
    (killed.folder / "0" / FILE).unlink()
    shutil.rmtree(max((killed.folder / "0" / "checkpoints").glob("iteration_*")))  # the end is lost
    assert killed.summary is None
    found = killed.go_on()
    assert [path.name for path in killed.attempts] == ["0", "1"]
    assert found["final_params_sha256"] == expected["final_params_sha256"]
    assert found["test_accuracy"] == expected["test_accuracy"] == (killed.summary or {})["test_accuracy"]
    evaluated = [[row["iteration"] for row in run.rows() if "test_accuracy" in row] for run in (whole, killed)]
    assert evaluated[0] == evaluated[1] == [45, 60]
    assert killed.rows()[-1]["epoch"] == whole.rows()[-1]["epoch"] > 0
    with pytest.raises(ConfigError, match="differs in workers=2, workers=3"):
        ResumableRun(killed.folder, [each.replace("workers=3", "workers=2") for each in settings]).go_on()


@pytest.mark.slow
@pytest.mark.live
def test_runs_in_processes_of_their_own_end_as_in_this_one_and_pass_their_refusals_on(tmp_path: Path) -> None:
    settings = (*SHORT, "train.max_iterations=20")
    expected = ResumableRun(tmp_path / "here", settings).go_on()
    runs = [ResumableRun(tmp_path / name, [*settings, *more]) for name, more in (("wrong", ("workers=0",)), ("there", ()))]
    with alone(tmp_path) as lock:
        ended = at_once.work_through(runs, (), lock=lock)
        assert next(ended).number == 1
        assert (runs[1].summary or {})["final_params_sha256"] == expected["final_params_sha256"]
        with pytest.raises(ConfigError, match=r"^workers: got 0"):
            next(ended)


def test_no_run_begins_when_the_time_is_up(tmp_path: Path) -> None:
    assert list(at_once.work_through([ResumableRun(tmp_path / "run", SHORT)], (), seconds=0)) == []
    assert not (tmp_path / "run").exists()


def composed(planned: reproduce.Planned) -> Config:
    """The configuration of a planned run."""
    return compose([*planned.run.overrides])


def test_runs_on_a_gpu_are_others_than_those_on_the_cpu_and_have_their_own_folder() -> None:
    a = reproduce.arguments(["--device", "cuda", "--full", "--settings", "het", "--methods", "ormo", "ssgdm"])
    plan = reproduce.planned(a)
    assert {(each.experiment, each.method) for each in plan} == {
        (f"paper_{data}_k{k}_het", method) for data in ("cifar10", "cifar100") for k in (16, 64) for method in ("ormo", "ssgdm")
    }
    assert str(a.work) == "outputs/reproduce-full-cuda"
    gpu = composed(plan[0])
    assert (gpu.worker.device, gpu.server.device, gpu.worker.autocast.value) == ("cuda", "cuda", "bf16")
    cpu = composed(reproduce.planned(reproduce.arguments([]))[0])
    assert (cpu.worker.device, cpu.server.device) == ("cpu", "cpu")


def test_the_machine_of_runs_on_the_cpu_is_this_one_and_a_note_about_the_gpu_is_kept(tmp_path: Path) -> None:
    gpu = {"card": "one", "jobs": 1}
    note_machine(tmp_path, gpu)
    (tmp_path / MACHINE).write_text(json.dumps({**gpu, "note": "It was shared."}))  # as someone writes by hand
    note_machine(tmp_path, {**gpu, "jobs": 2})
    on_gpu, on_cpu = (Namespace(work=tmp_path, device=device) for device in ("cuda", "cpu"))
    assert machine_of(on_gpu) == {"card": "one", "jobs": 2, "note": "It was shared."}
    assert machine_of(on_cpu) == environment()
    assert machine_in_words(machine_of(on_cpu)).endswith(", 1 thread, channels last")


def test_two_commands_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(ConfigError, match="another command works"), alone(tmp_path):
        raise AssertionError("this is never reached")
    with alone(tmp_path):
        pass


def finish(planned: reproduce.Planned, **more: object) -> None:
    """Leave a finished run in its folder."""
    attempt = planned.run.folder / "0"
    attempt.mkdir(parents=True, exist_ok=True)
    ended = {**dict.fromkeys(KEYS, 0), "status": "completed", "test_accuracy": 0.875, "train_loss": 0.5}
    (attempt / "metrics.jsonl").write_text(json.dumps({"iteration": 9, "epoch": float(planned.epochs)}) + "\n")
    ended |= {"training_seconds": 90.0, "delay_mean": 15.0, "wall_seconds": 150.0, **more}
    (attempt / FILE).write_text(json.dumps(ended))


def begin(planned: reproduce.Planned, epoch: float) -> None:
    """Leave a run that was interrupted in its folder."""
    attempt = planned.run.folder / "0"
    attempt.mkdir(parents=True)
    row = {"iteration": 100, "epoch": epoch, "seconds": 9.0, "test_accuracy": 0.6}
    (attempt / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (attempt / "launch.json").write_text(json.dumps({"overrides": []}))


@pytest.fixture
def asked(tmp_path: Path) -> Namespace:
    """Two seeds of a method, in folders of the test."""
    words = ("--methods", "ormo", "--settings", "het", "--work", str(tmp_path / "work"), "--into", str(tmp_path / "results"))
    return reproduce.arguments(words)


def rows_of(a: Namespace) -> list[tuple[str, ...]]:
    """The rows of the table."""
    return table([*reproduce.entries(a).values()])[1:]


def test_results_are_of_finished_runs_and_name_the_others(asked: Namespace) -> None:
    first = reproduce.planned(asked)[0]
    finish(first)
    expected = ("paper_cifar10_k16_het", "ormo", "0.01", "bf16", "1 of 2", "0 of 1", "87.50%", "0.500", "90", "15.0", "2.5")
    assert rows_of(asked) == [expected]
    assert unfinished(reproduce.entries(asked).values()) == [
        "paper_cifar10_k16_het, not begun: ssgdm, asgd, naive, shifted, smega2, ormo_da (seeds 0, 1); ormo (seed 1)",
        "paper_cifar10_k16_hom, not begun: ormo, ssgdm, asgd, naive, shifted, smega2, ormo_da (seeds 0, 1)",
    ]
    (first.run.folder / "1").mkdir()
    (first.run.folder / "0" / FILE).rename(first.run.folder / "1" / FILE)
    assert rows_of(asked) == [(*expected[:-1], "-")], "the time of an interrupted attempt is lost"


def test_a_reproduction_goes_on_from_the_results_of_another_machine(asked: Namespace, tmp_path: Path) -> None:
    plan = reproduce.planned(asked)
    finish(plan[1], test_accuracy=0.5)
    header = {"event": "header", **environment(), "commit": "that of the run", "cpu": "another"}
    (plan[1].run.folder / "0" / TRACE).write_text(json.dumps(header) + "\n{}\n")
    begin(plan[0], epoch=7.5)
    write([*reproduce.entries(asked).values()], asked)
    asked.work = tmp_path / "elsewhere"
    first, second = reproduce.planned(asked)
    found = reproduce.entries(asked)
    assert [found[each]["epochs_done"] for each in (first, second)] == [7.5, 15.0]
    assert reproduce.hours({each: found[each] for each in (first, second)}, 3600.0) == 15, "it cannot go on here"
    assert unfinished([found[first]]) == ["paper_cifar10_k16_het, ormo, seed 0: 7.5 of 15 epochs, 60.00% at epoch 8"]
    # A run that was not finished there begins anew here, and is in the results where it is further.
    begin(first, epoch=0.5)
    assert reproduce.entries(asked)[first]["epochs_done"] == 7.5
    finish(first)
    asked.methods = ["naive"]  # what is not asked for is not lost
    write([*reproduce.entries(asked).values()], asked)
    page = (tmp_path / "results" / "reproduce.md").read_text()
    assert "| paper_cifar10_k16_het | ormo | 0.01 | bf16 | 2 of 2 | 0 of 2 | 68.75% ± 26.52% |" in page
    assert "2 of 28 runs are finished" in page
    here = environment()["cpu"]
    assert f"{here}, 1 thread, channels last.\n\ntorch {environment()['torch']}, another, 1 thread, channels last." in page
    results = json.loads((tmp_path / "results" / "reproduce.json").read_text())
    assert [each["environment"]["commit"] for each in results["runs"]] == [environment()["commit"], "that of the run"]


def test_a_run_that_was_continued_on_another_machine_is_of_both(asked: Namespace, tmp_path: Path) -> None:
    first = reproduce.planned(asked)[0]
    finish(first)
    for attempt, words in enumerate(({"cpu": "one", "commit": "a"}, {"cpu": "one", "commit": "b"}, {"cpu": "two"})):
        folder = first.run.folder / str(attempt)
        if attempt:
            shutil.copytree(first.run.folder / "0", folder)
            Launch(overrides=[f"checkpoint.resume=0/checkpoints/iteration_{9 * attempt:09}"]).write(folder)
        (folder / TRACE).write_text(json.dumps({"event": "header", **environment(), **words}) + "\n{}\n")
    assert [(each["cpu"], each["commit"]) for each in first.run.environments] == [
        ("one", "b"),
        ("two", environment()["commit"]),
    ]
    for _ in range(2):  # the second time from the results alone
        write([*reproduce.entries(asked).values()], asked)
        page = (tmp_path / "results" / "reproduce.md").read_text()
        assert (
            f"torch {environment()['torch']}, one, 1 thread, channels last.\n\ntorch {environment()['torch']}, two, 1" in page
        )
        assert "* 1 of the runs were continued with another processor or version" in page
        asked.work = tmp_path / "elsewhere"
    shutil.copytree(first.run.folder / "2", first.run.folder / "3")
    (first.run.folder / "3" / TRACE).write_text(json.dumps({"event": "header", **environment(), "cpu": "three"}) + "\n")
    assert [each["cpu"] for each in first.run.environments] == ["one", "three"], "nothing of the third attempt is left"
    shutil.rmtree(first.run.folder / "3")
    Launch(overrides=["seed=0"]).write(first.run.folder / "2")
    assert [each["cpu"] for each in first.run.environments] == ["two"], "the third attempt began anew"


def test_a_run_that_is_finished_at_another_precision_is_not_made_again(asked: Namespace, tmp_path: Path) -> None:
    bf16 = reproduce.planned(asked)
    finish(bf16[0])
    begin(bf16[1], epoch=7.5)
    asked.precision = "float32"
    first, second = reproduce.planned(asked)
    assert first.run.folder != bf16[0].run.folder
    assert first.version != bf16[0].version
    assert {"worker.autocast=bf16", "worker.compile=inductor"} == {*first.overrides} ^ {*bf16[0].overrides}
    found = reproduce.entries(asked)
    assert reproduce.left({each: found[each] for each in (first, second)}) == [second]
    assert reproduce.hours({second: found[second]}, 3600.0) == 15, "a run does not go on at another precision"
    finish(second, test_accuracy=0.5)
    for _ in range(2):  # the second time from the results alone
        write([*reproduce.entries(asked).values()], asked)
        page = (tmp_path / "results" / "reproduce.md").read_text()
        assert "| paper_cifar10_k16_het | ormo | 0.01 | bf16, float32 | 2 of 2 | 0 of 2 | 68.75% ± 26.52% |" in page
        assert "* Passes at precision `bf16` are computed under bfloat16 autocast" in page
        asked.work, asked.precision = tmp_path / "elsewhere", "bf16"


def test_results_from_before_precisions_were_asked_for_are_of_bfloat16(asked: Namespace) -> None:
    first = reproduce.planned(asked)[0]
    finish(first)
    write([*reproduce.entries(asked).values()], asked)
    file = Path(asked.into) / "reproduce.json"
    results = json.loads(file.read_text())
    del results["runs"][0]["precision"]
    file.write_text(json.dumps(results))
    asked.work, asked.precision = asked.work / "elsewhere", "float32"
    assert [reproduce.entries(asked)[each]["precision"] for each in reproduce.planned(asked)] == ["bf16", "float32"]


def test_runs_of_another_length_setting_or_rule_are_not_mixed_with_those_of_earlier_results(asked: Namespace) -> None:
    finish(reproduce.planned(asked)[0])
    write([*reproduce.entries(asked).values()], asked)
    asked.epochs = 2
    assert name_of(asked) == "reproduce_2_epochs"
    asked.epochs = 15
    assert name_of(asked) == "reproduce"
    file = Path(asked.into) / "reproduce.json"
    results = json.loads(file.read_text())
    results["runs"][0]["version"] = "old"
    file.write_text(json.dumps(results))
    with pytest.raises(
        ConfigError, match=r"got 1 of 1 runs of settings or rules that have changed since, such as paper_cifar10"
    ):
        reproduce.entries(asked)
    asked.replace = True
    assert len(rows_of(asked)) == 1, "the run is there, and is as it would be made now"
    # A folder whose run was made otherwise does not count for the one that is asked for.
    settings = reproduce.planned(asked)[0].run.folder / SETTINGS
    settings.write_text(json.dumps([*reproduce.planned(asked)[0].overrides, "version=old"]))
    with pytest.raises(ConfigError, match=r"ormo_seed0: got a run that differs in version=\w+, version=old, expected one with"):
        reproduce.entries(asked)
    asked.work = asked.work / "elsewhere"
    assert rows_of(asked) == []


def test_attempts_that_were_killed_early_or_in_a_line_keep_nobody_from_going_on(tmp_path: Path) -> None:
    run = ResumableRun(tmp_path, SHORT)
    for attempt in range(3):
        (tmp_path / str(attempt)).mkdir()
    (tmp_path / "0" / "metrics.jsonl").write_text('{"iteration": 10, "epoch": 0.5}\n{"iteration": 20, "ep')
    (tmp_path / "2" / "metrics.jsonl").write_text('{"iteration": 20, "epoch": 1.0}\n')
    began = tmp_path / "0" / "checkpoints" / "iteration_000000000010"
    (tmp_path / "2" / "launch.json").write_text(json.dumps({"overrides": [f"checkpoint.resume={began}"]}))
    assert [row["iteration"] for row in run.rows()] == [10, 20]
    assert run.rows()[-1]["epoch"] == 1.0


def test_the_schedule_of_a_shorter_run_is_scaled() -> None:
    overrides = reproduce.Planned("paper_cifar10_k16_het", "ssgdm", 0, 15, Path()).run.overrides
    assert {"train.lr_milestones=[7.5,11.25]", "train.warmup_epochs=0.46875", "algorithm=ormo", "scheduler=sync"} <= {
        *overrides
    }


def test_a_plan_is_shown_without_the_data_and_the_refusal_names_the_options_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = reproduce.entries(reproduce.arguments(["--work", str(tmp_path), "--into", str(tmp_path)]))
    with pytest.raises(ConfigError, match=r"dataset\.root is --root here"):
        reproduce.show(found, [f"dataset.root={tmp_path}"])
    assert "paper_cifar10_k16_het" in capsys.readouterr().out
