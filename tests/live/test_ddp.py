"""``runtime=ddp`` with several ranks: the same updates as synchronous rounds elsewhere, and the end of a run with a rank."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from ormo_rpc import train
from ormo_rpc.composing import compose
from ormo_rpc.config.parsing import save_config
from ormo_rpc.config.schema import Config
from ormo_rpc.runtimes.job import Job
from ormo_rpc.storage import checkpoint
from tests.support.plain_rounds import plain_rounds
from tests.support.processes import PATIENCE_SECONDS, QUIET, ROOT, descendants, events, gone, launched, summary, wait_until

pytestmark = pytest.mark.live
RANKS = 3
DECAY = ["model.dropout=0.3", "train.weight_decay=0.01", "train.max_iterations=24"]
SHORT = [
    *("model=cnn", "model.dropout=0.3", "train.batch_size=8", "train.max_iterations=25"),
    *("train.warmup_epochs=0.1", "train.lr_schedule=cosine"),
]
SHARED = ["train.max_iterations=24", "model.dropout=0.3", "heterogeneity=one_slow", "runtime.shares=proportional"]
CASES = {"decay": DECAY, "short": [*SHORT, "runtime.nesterov=true"], "shared": SHARED}


def trained_by_ranks(folder: Path, configs: dict[str, Config]) -> dict[str, torch.Tensor]:
    """Train configurations by `RANKS` processes; return the final parameters by name."""
    for name, config in configs.items():
        save_config(config, folder / f"{name}.yaml")
    command = [sys.executable, "-m", "tests.support.ddp_ranks"]
    ranks = [subprocess.Popen([*command, str(rank), str(RANKS), str(folder)], cwd=ROOT) for rank in range(RANKS)]
    try:
        assert [rank.wait(PATIENCE_SECONDS) for rank in ranks] == [0] * RANKS
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(PATIENCE_SECONDS)
    return {name: torch.load(folder / f"{name}.pt") for name in configs}


def simulated(folder: Path, *words: str) -> torch.Tensor:
    """Simulate a run; return its final parameters."""
    train([f"workers={RANKS}", "runtime=sim", *QUIET, *words], run_dir=folder)
    return checkpoint.read(checkpoint.locate(folder), checkpoint.SERVER)["params"]


@pytest.mark.timeout(180)  # processes and simulations, on a busy machine
def test_ranks_make_the_updates_of_synchronous_rounds_in_the_simulator_and_in_plain_pytorch(tmp_path: Path) -> None:
    """Up to float32 rounding: Gloo adds the gradients of three ranks in another order, and weighs them before.

    That is an error of a few units in the last place (6e-8) of each gradient, in at most 9 steps; 1e-5 leaves room for what the
    passes make of it. The last round of 25 tickets has one.
    """
    (tmp_path / "ranks").mkdir()
    configs = {name: compose(["runtime=ddp", f"workers={RANKS}", *QUIET, *words]) for name, words in CASES.items()}
    found = trained_by_ranks(tmp_path / "ranks", configs)
    shared = plain_rounds(Job(configs["shared"]), RANKS, sizes=[46, 46, 4])  # 96 samples at speeds 1, 1, 0.1: 45.7, 45.7, 4.6
    expected = {
        "decay": simulated(tmp_path / "ormo", *DECAY, "scheduler=sync", "train.lr_scaling=mean"),
        "short": simulated(tmp_path / "m_sync", *SHORT, "algorithm=m_sync", "algorithm.nesterov=true"),
        "shared": torch.cat([each.detach().reshape(-1) for each in shared.parameters()]),
    }
    for name, params in expected.items():
        torch.testing.assert_close(found[name], params, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_ends_with_any_of_its_ranks_and_in_order_on_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [f"hydra.run.dir={run_dir}", "runtime=ddp", f"workers={RANKS}", "train.epochs=1000", "evaluate.every=30", *QUIET]
    with launched("launch.py", *words) as launcher:
        wait_until(lambda: (run_dir / "trace.jsonl").is_file() and len(events(run_dir, "apply")) > 60, "rounds")
        family = descendants(launcher.pid)
        if number is signal.SIGKILL:
            rank_of(family, 1).send_signal(number)
        else:
            launcher.send_signal(number)
        _, said = launcher.communicate(timeout=PATIENCE_SECONDS)
        wait_until(lambda: gone(family), "the end of all processes")
    ended, reason = summary(run_dir), r"a run of runtime=ddp cannot be resumed\n\Z"
    if number is signal.SIGKILL:
        assert launcher.returncode == 1
        killed = rf"\Alaunch\.py: rank 1 \(pid \d+\) was killed by SIGKILL \(see {re.escape(str(run_dir))}/logs/rank_1\.log\); "
        assert re.search(killed + r"runtime=ddp cannot go on without it; " + reason, said), said
        assert ended["status"] == "failed"
    else:
        assert launcher.returncode == 128 + number
        assert re.search(r"\Alaunch\.py: interrupted by SIGINT; " + reason, said), said
        assert (ended["status"], ended["reason"], ended["algorithm"], ended["runtime"]) == (
            "interrupted",
            "SIGINT",
            "ddp",
            "ddp",
        )
        assert ended["iterations"] == len(events(run_dir, "apply")) > 60
        assert ended["pushes_per_worker"] == {str(rank): ended["iterations"] // RANKS for rank in range(RANKS)}
        assert ended["test_accuracy"] > 0.3


def test_a_rank_that_does_not_come_to_a_round_is_named_by_those_that_wait(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [f"hydra.run.dir={run_dir}", "runtime=ddp", f"workers={RANKS}", "train.epochs=1000", "evaluate.every=1000000"]
    with launched("launch.py", *words, "runtime.round_timeout_seconds=2", *QUIET) as launcher:
        wait_until(lambda: (run_dir / "trace.jsonl").is_file() and len(events(run_dir, "apply")) > 60, "rounds")
        family = descendants(launcher.pid)
        rank_of(family, 1).send_signal(signal.SIGSTOP)
        _, said = launcher.communicate(timeout=PATIENCE_SECONDS)
        wait_until(lambda: gone(family), "the end of all processes")
    assert launcher.returncode == 1
    assert re.search(
        r"\brank 1 did not come to the end of round \d+, which others waited for \(runtime\.round_timeout_", said
    ), said


def rank_of(family: list[psutil.Process], rank: int) -> psutil.Process:
    """The process of a rank: a fork has the arguments of its command line in its title."""
    return next(process for process in family if f"--rank {rank} " in " ".join(process.cmdline()))
