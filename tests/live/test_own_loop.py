"""The example of a loop of one's own, started in the ways that its page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ormo_rpc.runtimes.linux import LINUX
from ormo_rpc.training import train
from tests.support.processes import PATIENCE_SECONDS, ROOT, check_lineage, launched, summary

pytestmark = [
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not LINUX, reason="processes are forked on Linux alone"),
]
EXAMPLE = str(ROOT / "examples" / "own_loop.py")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
VALUE = 0.95
"""The accuracy that the example's docstring states."""
TICKETS = 20 * 45


def accuracy(output: str) -> float:
    """The accuracy that a script prints."""
    found = re.search(r"^test accuracy: ([\d.]+)%$", output, re.MULTILINE)
    assert found is not None, output
    return float(found[1]) / 100


def check(run: Path) -> None:
    """Check that each ticket was applied once, and what was reached."""
    check_lineage(run, TICKETS)
    found = summary(run)
    assert (found["status"], found["iterations"]) == ("completed", TICKETS)
    assert found["test_accuracy"] >= VALUE


def test_the_script_before_and_the_example_alone_reach_the_value(tmp_path: Path) -> None:
    with launched(str(ROOT / "examples" / "own_loop_before.py"), cwd=tmp_path, env=ENVIRONMENT) as process:
        assert accuracy(process.communicate(timeout=2 * PATIENCE_SECONDS)[0]) >= VALUE
    environment = {**ENVIRONMENT, "ORMO_RPC_OVERRIDES": "logger=none"}
    with launched(EXAMPLE, cwd=tmp_path, env=environment) as process:
        assert accuracy(process.communicate(timeout=2 * PATIENCE_SECONDS)[0]) >= VALUE
    check(next(tmp_path.glob("outputs/*/*")))


def test_the_example_survives_a_killed_worker_and_reaches_its_value(tmp_path: Path) -> None:
    words = ("--workers", "3", "--run-dir", "run", "logger=none", "runtime.faults=[kill@1:5]")
    with launched("-m", "ormo_rpc", "launch", *words, EXAMPLE, cwd=tmp_path, env=ENVIRONMENT) as process:
        _, err = process.communicate(timeout=2 * PATIENCE_SECONDS)
    assert process.returncode == 0, err
    assert len(re.findall(r"worker 1 \(pid \d+\) was killed by SIGKILL .* restarting it", err)) == 1
    check(tmp_path / "run")
    assert accuracy((tmp_path / "run" / "logs" / "server.log").read_text()) >= VALUE


def test_ranks_of_torchrun_go_on_after_the_death_of_one(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "--max-restarts=1")
    environment = {**ENVIRONMENT, "ORMO_RPC_OVERRIDES": "logger=none checkpoint.every=50 runtime.faults=[kill@1:60]"}
    with launched(*torchrun, EXAMPLE, cwd=tmp_path, env=environment) as process:
        out, err = process.communicate(timeout=3 * PATIENCE_SECONDS)
    assert process.returncode == 0, err
    assert "fault kill@1:60" in err
    (run,) = tmp_path.glob("outputs/*/*")
    check(run)
    assert summary(run)["incarnations"] == 2
    assert accuracy(out) >= VALUE


DIGITS = """
import torch
import ormo_rpc
from ormo_rpc.composing import compose
from ormo_rpc.runtimes.job import build_module
config = compose(["model.hidden=16", "model.dropout=0.2"])
data = config.dataset.load_splits(config.seed)
model = build_module(config, data)
epochs = ormo_rpc.Epochs(len(data.train), config.train.batch_size, config.seed)
worker = ormo_rpc.join(model, "logger=none", total_tickets=100)
for work in worker:
    inputs, targets = data.train.batch(epochs.indices(work.ticket), None)
    loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    worker.push(loss)
"""


def test_a_live_loop_of_one_worker_has_the_bits_of_the_built_in_task(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(DIGITS)
    words = ("--workers", "1", "--run-dir", "run", "train.py")
    with launched("-m", "ormo_rpc", "launch", *words, cwd=tmp_path, env=ENVIRONMENT) as process:
        _, err = process.communicate(timeout=2 * PATIENCE_SECONDS)
    assert process.returncode == 0, err
    built_in = ("runtime=sim", "workers=1", "model.hidden=16", "model.dropout=0.2", "train.max_iterations=100", "logger=none")
    expected = train([*built_in, "logger.progress=false"], run_dir=tmp_path / "built_in")
    assert summary(tmp_path / "run")["final_params_sha256"] == expected["final_params_sha256"]


def test_an_error_of_the_script_names_its_line(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    text = (ROOT / "examples" / "own_loop.py").read_text()
    wrong = "        assert work.ticket < 7, inputs.nothing\n"
    broken = text.replace("        loss.backward()\n", f"        loss.backward()\n{wrong}")
    line = 1 + next(number for number, each in enumerate(broken.splitlines()) if "nothing" in each)
    script.write_text(broken)
    words = ("--workers", "1", "--run-dir", "run", "logger=none", "runtime.max_restarts=0")
    with launched("-m", "ormo_rpc", "launch", *words, "train.py", cwd=tmp_path, env=ENVIRONMENT) as process:
        _, err = process.communicate(timeout=2 * PATIENCE_SECONDS)
    assert process.returncode == 1
    assert f"train.py:{line}: " in err
