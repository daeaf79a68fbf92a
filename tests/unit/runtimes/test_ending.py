"""The end of a run: diverged by its losses, finished before its last epoch; over which time its rate is; its closing line."""

from __future__ import annotations

import math
import re
import shutil
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from torch import Tensor, nn
from typing_extensions import override

from ormo_rpc import RunFailed, train
from ormo_rpc.cli import _result  # pyright: ignore[reportPrivateUsage] # the line is built nowhere else
from ormo_rpc.config.runtimes import RpcRuntime
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes import evaluations
from ormo_rpc.runtimes.ending import GRADIENTS, PARAMETERS, ending
from ormo_rpc.runtimes.job_like import JobLike
from ormo_rpc.runtimes.process_start import process_began
from ormo_rpc.runtimes.running import run
from ormo_rpc.runtimes.simulator.synthetic import Quadratic
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import read_metrics, read_trace
from ormo_rpc.storage.summary import read_summary
from tests.support.events import apply_event

SIM = ("runtime=sim", "logger=none", "checkpoint.every_seconds=0")
SMALL = (*SIM, "train.max_iterations=60", "model.hidden=8")
DIVERGING = (*SMALL, "algorithm=naive", "train.lr=3")
QUADRATIC = (*SIM, "runtime.gradient=quadratic", "runtime.dimension=4", "workers=2")


def job(factor: float | None = 3.0, guessing: float = math.log(10), total: int = 100, limit: float | None = None) -> JobLike:
    """The part of a job that decides about its end: ten iterations an epoch."""
    options = SimpleNamespace(divergence_factor=factor, max_seconds=limit)
    made = SimpleNamespace(
        config=SimpleNamespace(train=options, runtime=RpcRuntime()),
        guessing_loss=guessing,
        total_tickets=total,
        epoch=lambda iteration: iteration / 10,
    )
    return cast("JobLike", made)


def observed(losses: Iterable[float | None], workers: int = 1) -> Statistics:
    """Statistics of a run in which all workers begin at the initial parameters, and then take turns."""
    made = Statistics()
    for iteration, loss in enumerate(losses):
        made.observe(apply_event(iteration, 0, min(iteration, workers - 1), loss=loss))
    return made


def status(made: JobLike, losses: Iterable[float | None], workers: int = 1) -> str | None:
    return ending(made, observed(losses, workers), "completed", 100)["status"]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.3] * 60, "completed"),
        ([2.3, *[6.8] * 500], "completed"),  # not above 3 ln 10 = 6.9
        ([2.3, *[7.1] * 500], "diverged"),
        ([8.0, *[23.0] * 500], "completed"),  # a bad start counts: 3 * 8 = 24
        ([8.0, *[25.0] * 500], "diverged"),
        ([1e-4, *[0.5] * 500], "completed"),  # fine-tuning: far above the start, and better than guessing
        ([2.3, 2.3, 1e6], "diverged"),  # fewer than 50: their mean
        ([2.3, 2.3, 14.0], "completed"),  # mean 6.2
        ([2.3, *[math.inf] * 3], "diverged"),
        ([2.3, math.nan], "diverged"),
        ([None] * 60, "completed"),
        ([], "completed"),
    ],
)
def test_the_last_losses_against_those_of_the_start_and_of_guessing(losses: list[float | None], expected: str) -> None:
    assert status(job(), losses) == expected
    assert status(job(factor=None), losses) == "completed"


def test_all_gradients_at_the_initial_parameters_are_the_start() -> None:
    """The mean of 1 and 15 is 8; the first of them alone would make 23 a divergence."""
    losses = [1.0, 15.0, *[23.0] * 500]
    assert status(job(), losses, workers=2) == "completed"
    assert status(job(), losses, workers=1) == "diverged"


def test_a_loss_without_classes_is_compared_with_its_start_alone() -> None:
    assert status(job(guessing=0.0), [0.1, *[0.29] * 500]) == "completed"
    assert status(job(guessing=0.0), [0.1, *[0.31] * 500]) == "diverged"
    assert status(job(guessing=0.0), [0.0] * 60) == "completed"


def test_the_reasons_have_the_figures() -> None:
    found = ending(job(limit=7.5), observed([2.0, *[50.0] * 500]), "completed", 25)
    assert found["status"] == "diverged"
    assert found["reason"] == (
        "the training loss ended at 50, above train.divergence_factor=3 times the 2 at the start (and of the 2.303 of "
        "guessing); "
        "train.max_seconds=7.5: ended after 2.50 of 10 epochs, 25 of 100 iterations"
    )
    early = ending(job(), observed([2.0]), "completed", 25)
    assert early == {"status": "completed", "reason": "finished early: ended after 2.50 of 10 epochs, 25 of 100 iterations"}
    assert ending(job(), observed([2.0]), "diverged", 25) == {"status": "diverged", "reason": GRADIENTS}
    assert ending(job(), observed([2.0]), "diverged", 25, finite=False) == {"status": "diverged", "reason": PARAMETERS}
    assert ending(job(), observed([2.0, *[50.0] * 500]), "running", 25) == {"status": "running", "reason": None}


@pytest.mark.slow
def test_a_simulation_whose_loss_explodes_is_diverged_and_so_is_its_replay(tmp_path: Path) -> None:
    summary = train(DIVERGING, run_dir=tmp_path / "run")
    losses = [event["loss"] for event in read_trace(tmp_path / "run")[1] if event["event"] == "apply"]
    first = [event["loss"] for event in read_trace(tmp_path / "run")[1] if event["event"] == "apply" and event["stamp"] == 0]
    assert all(map(math.isfinite, losses)), "or the server would say it"
    assert statistics.fmean(losses[-20:]) > 20 > 3 > statistics.fmean(first)
    assert summary["status"] == "diverged"
    assert f"the {statistics.fmean(first):.4g} at the start (and of the {math.log(10):.4g} of guessing)" in summary["reason"]
    again = train(["runtime=replay", f"replay.run={tmp_path / 'run'}", "logger=none"], run_dir=tmp_path / "again")
    assert {key: again[key] for key in ("status", "reason")} == {key: summary[key] for key in ("status", "reason")}
    assert again["identical"] is True
    assert f"identical to {tmp_path / 'run'}" in _result(again, tmp_path / "again")
    calm = train([*DIVERGING, "train.divergence_factor=null"], run_dir=tmp_path / "calm")
    assert (calm["status"], calm["final_params_sha256"]) == ("completed", summary["final_params_sha256"])


@pytest.mark.parametrize("algorithm", ["easgd", "orlomo", "rennala", "asgd_da"])
@pytest.mark.parametrize(("lr", "diverges"), [(0.01, False), (2.2, True)])
def test_every_kind_of_algorithm_on_a_quadratic(algorithm: str, lr: float, diverges: bool, tmp_path: Path) -> None:
    """Those of local steps, and those that make one step of several gradients; the curvature of 1 wants lr below 2."""
    limit = ["train.momentum=0", "runtime.condition=10", "train.max_iterations=60", f"train.lr={lr}"]
    summary = train([*QUADRATIC, *limit, f"algorithm={algorithm}"], run_dir=tmp_path / "run")
    assert summary["status"] == ("diverged" if diverges else "completed")
    assert str(summary["reason"]).startswith("the training loss ended at") is diverges


def test_a_resumed_run_keeps_the_loss_of_its_start(tmp_path: Path) -> None:
    """Its own first losses are huge already; both an exact continuation and one with more workers."""
    options = [*QUADRATIC, "algorithm=asgd", "runtime.condition=10", "runtime.noise=0", "train.lr=2.5"]
    whole = train([*options, "train.max_iterations=60", "checkpoint.every=20"], run_dir=tmp_path / "whole")
    assert whole["status"] == "diverged"
    source = checkpoint.complete(tmp_path / "whole")[0]
    assert checkpoint.iteration_of(source) == 20
    for number, more in enumerate(([], ["train.lr=2.4"])):
        resumed = train(
            [*options, "train.max_iterations=60", f"checkpoint.resume={source}", *more], run_dir=tmp_path / str(number)
        )
        assert (resumed["status"], resumed["iterations"]) == ("diverged", 60)
    state = checkpoint.read(source, "server.pt")["session"]["statistics"]
    assert state["start_loss"] == pytest.approx(0.5 * sum(10 ** (-k / 3) for k in range(4)))  # x = 1, curvatures 1 to 1/10


def test_a_run_that_max_seconds_ended_says_so(tmp_path: Path) -> None:
    summary = train([*SIM, "train.max_seconds=1.5", "model.hidden=4", "train.epochs=3"], run_dir=tmp_path / "run")
    # 4 workers, 0.1 s a gradient: 60 are applied in 1.5 s, of 3 epochs of 45.
    assert (summary["status"], summary["iterations"]) == ("completed", 60)
    assert summary["reason"] == "train.max_seconds=1.5: ended after 1.33 of 3 epochs, 60 of 135 iterations"
    assert summary["reason"] in _result(summary, tmp_path)
    whole = train([*SIM, "train.max_seconds=100", "model.hidden=4", "train.epochs=1"], run_dir=tmp_path / "whole")
    assert (whole["status"], whole["reason"]) == ("completed", None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["runtime.leaves={0: 0.35, 1: 0.55}"], "no worker is left after 0.55 virtual seconds"),
        (
            ["runtime.leaves={1: 0.55}", "runtime.min_workers=2"],
            "1 of runtime.min_workers=2 workers are left after ",
        ),
    ],
)
def test_a_simulation_that_nobody_can_end_has_failed(options: list[str], reason: str, tmp_path: Path) -> None:
    """It was "running", with exit status 0."""
    with pytest.raises(
        RunFailed, match=rf"^{re.escape(reason)}.*; iteration \d+ is kept: resume with checkpoint.resume="
    ) as error:
        train([*QUADRATIC, "train.max_iterations=100", *options], run_dir=tmp_path / "run")
    summary = read_summary(tmp_path / "run") or {}
    assert (summary["status"], error.value.exit_status) == ("failed", 1)
    assert summary["reason"].startswith(reason)


def test_the_rate_is_over_the_time_of_training_and_the_rest_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation takes its time on the clock of a live run; here it is the clock of the process."""
    monkeypatch.setattr(evaluations.Evaluations, "wait", lambda _: time.sleep(0.2))
    before = time.monotonic()
    summary = train([*SIM, "train.max_iterations=40", "model.hidden=4"], run_dir=tmp_path / "run")
    assert 0.2 < summary["wall_seconds"] <= time.monotonic() - before
    # Real seconds of start, computing and end; those of training are virtual.
    assert 0 < summary["start_seconds"] < summary["wall_seconds"] - summary["end_seconds"] < summary["wall_seconds"] - 0.2
    # 40 gradients of 0.1 virtual seconds, 4 at a time: exactly 1 s.
    assert (summary["training_seconds"], summary["updates_per_second"]) == (pytest.approx(1.0), pytest.approx(40.0))
    assert [row["seconds"] for row in read_metrics(tmp_path / "run")][-1] == 1.0
    line = _result(summary, tmp_path)
    assert ", 4 workers, " in line
    assert ", 1 worker, " in _result(summary | {"num_workers": 1}, tmp_path)
    assert f"40 iterations in 1.0 virtual seconds ({summary['wall_seconds']:.1f} s of real time)" in line


def test_wall_seconds_count_from_the_given_start(tmp_path: Path) -> None:
    from ormo_rpc.composing import compose

    config = compose([*QUADRATIC, "train.max_iterations=4"])
    summary = run(config, tmp_path / "run", began=time.monotonic() - 14)
    assert 14 < summary["start_seconds"] < summary["wall_seconds"] < 20


def test_the_process_began_before_its_first_import() -> None:
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    assert time.monotonic() - process_began() == pytest.approx(up - ticks / 100, abs=0.5)


def test_a_summary_without_losses_and_evaluations_has_a_closing_line(tmp_path: Path) -> None:
    summary = train([*SIM, "worker.dummy=true", "train.max_iterations=4", "model.hidden=4"], run_dir=tmp_path / "run")
    assert (summary["train_loss"], summary["status"], summary["reason"]) == (None, "completed", None)
    assert "training loss -, test accuracy -" in _result(summary, tmp_path)


class Tired(nn.Module):
    """Raises some time after the trial."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.passes = 0

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        if self.passes > 9:
            raise OSError("no space\nis left")
        return self.layers(inputs)


def test_a_simulation_whose_model_raises_has_failed(tmp_path: Path) -> None:
    """It had no summary, so that nobody could tell it from one that goes on."""
    values = {"runtime": "sim", "logger": "none", "workers": 1, "train": {"epochs": 1}, "model": Tired}
    with pytest.raises(OSError, match="no space"):
        train(values, run_dir=tmp_path / "run")
    summary = read_summary(tmp_path / "run")
    assert summary is not None
    assert (summary["status"], summary["reason"]) == ("failed", "OSError: no space is left")


@pytest.mark.parametrize("runtime", ["sim", "replay"])
def test_a_run_whose_directory_is_deleted_meanwhile_fails_and_leaves_nothing(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former, run_dir = tmp_path / "former", tmp_path / "run"
    train([*QUADRATIC, "train.max_iterations=50"], run_dir=former)
    compute = Quadratic.compute

    def delete(source: Quadratic, reply: Reply) -> Push:
        shutil.rmtree(run_dir, ignore_errors=True)
        return compute(source, reply)

    monkeypatch.setattr(Quadratic, "compute", delete)
    overrides = [*QUADRATIC, "train.max_iterations=50"] if runtime == "sim" else ["runtime=replay", f"replay.run={former}"]
    with pytest.raises(RunFailed, match=f"^the run directory {run_dir} is gone"):
        train(overrides, run_dir=run_dir)
    assert list(tmp_path.iterdir()) == [former]
