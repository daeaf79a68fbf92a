"""A script of a user's own under ``ormo-rpc launch``: deaths, signals, and the ranks of torchrun."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ormo_rpc.runtimes.linux import LINUX
from tests.support.processes import PATIENCE_SECONDS, ROOT, events, launched, summary, wait_until

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not LINUX, reason="processes are forked on Linux alone"),
]
SCRIPT = """
import os
import sys
import torch
import ormo_rpc
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
print("before join")
worker = ormo_rpc.join(model, "logger=none", "train.lr=0.01", "checkpoint.journal=true", total_tickets=int(sys.argv[1]))
for work in worker:
    if work.ticket == 5:  # its end is none of the worker's
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        os.waitpid(pid, 0)
    x = torch.randn(8, 4)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    worker.push(loss, metrics={"ticket": work.ticket, "share": (work.ticket % 3, 1 + work.ticket % 5)})
if worker.serves:
    print("error of the weights", float((model.weight - 1).abs().max()) < 0.05)
"""
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# The worker dies long before the server does: one that dies with it, or never gets so far, is not evicted.
FAULTS = "runtime.faults=[kill@0:5,kill@server:300]"


@pytest.fixture(autouse=True)
def script(tmp_path: Path) -> None:
    """The script, in the folder where the commands are typed."""
    (tmp_path / "train.py").write_text(SCRIPT)


def applied(run_dir: Path) -> list[int]:
    """The tickets that were applied, in rising order."""
    return sorted(event["ticket"] for event in events(run_dir, "apply"))


def test_the_deaths_of_a_worker_and_of_the_server_lose_and_repeat_no_ticket(tmp_path: Path) -> None:
    words = ("--workers", "2", "--run-dir", "run", FAULTS, "runtime.restart_backoff_seconds=0", "train.py", "800")
    with launched("-m", "ormo_rpc", "launch", *words, cwd=tmp_path, env=ENVIRONMENT) as process:
        out, err = process.communicate(timeout=2 * PATIENCE_SECONDS)
    assert process.returncode == 0, err
    found = summary(tmp_path / "run")
    assert (found["status"], found["start"], found["iterations"]) == ("completed", "fork", 800)
    assert applied(tmp_path / "run") == list(range(800))
    # Each counts once, also those that are in the journal alone: (0 + ... + 799) / 800, and 799 / (160 * 15).
    assert (found["train_ticket"], found["train_share"]) == (399.5, 799 / 2400)
    assert out.startswith("before join\ncompleted: ormo (async), 2 workers, ")  # said once, by the preloader
    for name in ("worker 0", "server"):
        assert f"was killed by SIGKILL (see {tmp_path / 'run' / 'logs' / name.replace(' ', '_')}.log)" in err
    assert (tmp_path / "run" / "logs" / "server.log").read_text().endswith("error of the weights True\n")


def test_a_run_that_was_ended_by_a_signal_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Its processes are spawned, and run the script themselves."""
    command = ("-m", "ormo_rpc", "launch", "--workers", "1", "runtime.start=spawn")
    with launched(*command, "--run-dir=one", "train.py", "100000", cwd=tmp_path, env=ENVIRONMENT) as process:
        wait_until(lambda: len(events(tmp_path / "one", "apply")) > 20, "the first updates")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 143
    done = len(applied(tmp_path / "one"))
    assert (
        err
        == f"ormo-rpc launch: interrupted by SIGTERM; iteration {done} is kept: resume with checkpoint.resume={tmp_path}/one\n"
    )
    assert (tmp_path / "one" / "logs" / "worker_0.log").read_text().startswith("before join\n")
    more = (*command, f"checkpoint.resume={tmp_path}/one", "--run-dir=two", "train.py", str(done + 50))
    with launched(*more, cwd=tmp_path, env=ENVIRONMENT) as process:
        _, err = process.communicate(timeout=2 * PATIENCE_SECONDS)
    assert (process.returncode, err) == (0, "")
    assert applied(tmp_path / "one") + applied(tmp_path / "two") == list(range(done + 50))


def test_each_rank_of_torchrun_replaces_its_own_process(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "ormo_rpc", "launch")
    words = ("--run-dir=run", FAULTS, "runtime.restart_backoff_seconds=0", "train.py", "800")
    with launched(*torchrun, *words, cwd=tmp_path, env=ENVIRONMENT) as process:
        _, err = process.communicate(timeout=2 * PATIENCE_SECONDS)
    assert process.returncode == 0, err
    assert applied(tmp_path / "run") == list(range(800))
    assert "the server resumes from iteration" in err
    assert summary(tmp_path / "run")["evictions"]
