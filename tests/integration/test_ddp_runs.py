"""Runs of ``runtime=ddp`` with one rank, in this process: what they record, and how they end."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc.composing import compose
from ormo_rpc.config.parsing import save_config
from ormo_rpc.errors import ConfigError, Interrupted
from ormo_rpc.runtimes.ddp.rank_process import RankArgs, RankProcess
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.rank_checks import decide_workers
from ormo_rpc.runtimes.ranks import TORCHRUN, Ranks
from ormo_rpc.runtimes.session import Session
from ormo_rpc.runtimes.simulator import InlineExecutor
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import read_metrics, read_trace
from ormo_rpc.storage.summary import read_summary


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank names the network interface in its environment."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")


def rank(folder: Path, *words: str) -> RankProcess:
    """The only rank of a run."""
    run_dir = folder / "run"
    run_dir.mkdir()
    save_config(compose(["runtime=ddp", "workers=1", "logger=none", *words]), run_dir / "config.yaml")
    return RankProcess(
        RankArgs(
            rank=0,
            size=1,
            run_dir=run_dir,
            began=time.monotonic(),
            store_file=folder / "store",
            store=None,
            interface=None,
            one_machine=True,
            timeout_seconds=30.0,
            round_timeout_seconds=30.0,
            start="here",
            terminal_fd=None,
            loaded=None,
        )
    )


def test_a_run_leaves_what_other_runtimes_do(tmp_path: Path) -> None:
    summary = rank(tmp_path, "train.max_iterations=50", "evaluate.every=20", "evaluate.targets=[0.3]").run()
    _, events = read_trace(tmp_path / "run")
    applied = [event for event in events if event["event"] == "apply"]
    assert [(event["iteration"], event["ticket"], event["delay"], event["samples"]) for event in applied] == [
        (number, number, 0, 32 if number != 44 else 29)
        for number in range(50)  # 1,437 = 44 * 32 + 29
    ]
    assert all(before["seconds"] < after["seconds"] for before, after in itertools.pairwise(applied))
    evaluations = [row for row in read_metrics(tmp_path / "run") if "test_accuracy" in row]
    assert [row["iteration"] for row in evaluations] == [20, 40, 50]
    assert summary == read_summary(tmp_path / "run")
    expected: dict[str, Any] = {
        "status": "completed",
        "algorithm": "ddp",
        "scheduler": "sync",
        "runtime": "ddp",
        "iterations": 50,
    }
    assert {key: summary[key] for key in expected} == expected
    assert summary["training_seconds"] == pytest.approx(applied[-1]["seconds"], abs=1e-6)
    assert summary["gradients_to"]["0.3"] in (20, 40, 50)
    exported = checkpoint.read(checkpoint.locate(tmp_path / "run"), "model.pt")
    assert sum(value.numel() for value in exported.values()) == summary["parameters"]


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["train.lr=1e30"], "diverged", "the loss of a rank is not finite"),
        (["train.max_seconds=0.01"], "completed", "train.max_seconds=0.01: ended after "),
        (["evaluate.every=1", "evaluate.patience=1", "train.lr=1e-9"], "completed", "evaluate.patience=1: "),
    ],
)
def test_a_run_ends_early_as_others_do(words: list[str], status: str, reason: str, tmp_path: Path) -> None:
    summary = rank(tmp_path, "train.epochs=100", *words).run()
    assert summary["status"] == status
    assert summary["reason"].startswith(reason)
    assert summary["iterations"] < 4500


def test_a_signal_ends_a_run_in_order(tmp_path: Path) -> None:
    process = rank(tmp_path, "train.epochs=100")
    process.handle({"stop": {"status": "interrupted", "reason": "SIGTERM"}})
    with pytest.raises(Interrupted):
        process.run()
    summary = read_summary(tmp_path / "run")
    assert summary is not None
    assert (summary["status"], summary["reason"], summary["iterations"]) == ("interrupted", "SIGTERM", 1)


def test_an_evaluation_is_due_in_the_round_that_reaches_its_iteration(tmp_path: Path) -> None:
    job = Job(compose(["runtime=ddp", "workers=4", "logger=none", "evaluate.every=10"]))
    session = Session(job, tmp_path / "run", InlineExecutor(), InlineExecutor(), lambda: 1.0, began=0.0, inline=True)
    session.open()
    for iteration in range(4, 41, 4):
        session.server.iteration = iteration
        session.observe(session.server)
    session.flush()
    session.close(session.server.state_dict(), wait=True)
    rows = [row["iteration"] for row in read_metrics(tmp_path / "run") if "test_accuracy" in row]
    assert rows == [12, 20, 32, 40]  # the first rounds that reach 10, 20, 30 and 40


def ranks(launcher: str, *, agent_store: bool) -> Ranks:
    return Ranks(
        launcher=launcher,
        variables=("RANK", "WORLD_SIZE"),
        job=None,
        rank=0,
        world_size=3,
        master="127.0.0.1:9",
        agent_store=agent_store,
    )


def test_each_rank_of_torchrun_is_a_worker() -> None:
    assert decide_workers(compose(["runtime=ddp"]), ranks(TORCHRUN, agent_store=True)).workers == 3
    assert decide_workers(compose(["runtime=ddp", "workers=3"]), ranks(TORCHRUN, agent_store=True)).workers == 3
    with pytest.raises(
        ConfigError, match=r"\Aworkers: got 2, expected 3 under torchrun with as many processes and runtime=ddp; "
    ):
        decide_workers(compose(["runtime=ddp", "workers=2"]), ranks(TORCHRUN, agent_store=True))
    with pytest.raises(ConfigError, match=r"\Aruntime: got ddp under srun, expected torchrun, whose store the ranks meet by; "):
        decide_workers(compose(["runtime=ddp"]), ranks("srun", agent_store=False))
