"""Connections of the processes of a live run: the control plane, a data path each, and a process group at the start."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import QUIET, check_lineage, events, launch, launched, replayed, summary, wait_until

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]

FORCED = ("gloo", "rpc", "tcp")
"""The transports of the elastic workers of one run; its first worker takes shared memory."""


def pushing(run_dir: Path) -> dict[str, str]:
    """The transports of workers with more than five gradients so far, by number."""
    file = run_dir / "processes.json"
    transports = json.loads(file.read_text())["transports"] if file.is_file() else {}
    applied = [str(event["worker"]) for event in events(run_dir, "apply")]
    return {worker: each["transport"] for worker, each in transports.items() if applied.count(worker) > 5}


def names_of_threads(pid: int) -> list[str]:
    """The names of a process's threads."""
    return [(task / "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()]


def test_workers_of_one_run_push_by_different_transports_and_it_is_evaluated_meanwhile_and_replayed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # A gradient takes a hundred times as long as its computation, so that there are few until all have joined.
    slow = ("heterogeneity=one_slow", "heterogeneity.factor=100")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            launched("launch.py", f"hydra.run.dir={run_dir}", *QUIET, "workers=1", "train.epochs=100000", *slow)
        )
        wait_until((run_dir / "processes.json").is_file, "the first worker")
        address = json.loads((run_dir / "processes.json").read_text())["address"]
        where = ("role=worker", f"server.address={address}", f"server.secret_file={run_dir / 'secret'}")
        elastic = [stack.enter_context(launched("launch.py", *where, f"transport={name}", *QUIET)) for name in FORCED]
        wait_until(lambda: sorted(pushing(run_dir).values()) == sorted(("shm", *FORCED)), "pushes by each transport")

        process_ids = json.loads((run_dir / "processes.json").read_text())
        threads = {pid: names_of_threads(pid) for pid in (process_ids["server"], *process_ids["workers"].values())}
        assert len(threads) == 5
        # Each has an agent of torch.distributed.rpc; no thread is one of a process group that does collectives.
        assert all("TP_UV_loop" in names and "pt_gloo_runloop" not in names for names in threads.values()), threads

        members = process_ids["workers"]
        begun = len(events(run_dir, "apply"))
        evaluated = subprocess.run(
            [sys.executable, "-m", "ormo_rpc.evaluate", str(run_dir)], capture_output=True, text=True, timeout=60, check=False
        )
        found = re.fullmatch(
            rf"{run_dir}, iteration (\d+), while the run goes on\ntest accuracy \d+\.\d\d%, test loss \d+\.\d{{4}}\n",
            evaluated.stdout,
        )
        assert (evaluated.returncode, evaluated.stderr) == (0, "")
        assert found, evaluated.stdout
        assert begun <= int(found[1]) <= len(events(run_dir, "apply")) + 1
        assert json.loads((run_dir / "processes.json").read_text())["workers"] == members

        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=60)
        assert server.returncode == 130, err
        for worker in elastic:
            worker.send_signal(signal.SIGINT)
    result = summary(run_dir)
    assert result["control"] == "rpc"
    transports = result["transports"].values()
    assert sorted(each["transport"] for each in transports) == sorted(("shm", *FORCED))
    assert all(each["reason"] for each in transports)
    assert result["evictions"] == []
    assert replayed(run_dir, tmp_path / "again") == result["final_params_sha256"]


def test_a_run_over_gloo_survives_deaths_in_the_check_at_the_start_and_with_two_tickets_and_is_replayed(tmp_path: Path) -> None:
    """With two loops in each process, which share its agent and have a pair each."""
    run_dir = tmp_path / "run"
    # The first push of a worker is one that the run cannot end without.
    options = ("transport=gloo", "worker.prefetch=1", "workers=2", "train.max_iterations=120")
    status, _, err = launch(run_dir, *QUIET, *options, "runtime.faults=[kill@1:join,kill@0:0]")
    assert status == 0, err
    assert "fault kill@1:join" in err
    assert "fault kill@0:0" in err
    assert {event["worker"] for event in events(run_dir, "leave")} == {0, 2}, (
        "a process that dies takes all its tickets with it"
    )
    log = (run_dir / "logs" / "server.log").read_text()
    # The thread of the worker that dies may have done its part of the check before.
    ends = ("the initial parameters of all processes were not compared: ", "all 3 processes have the same initial parameters")
    assert sum(log.count(end) for end in ends) == 1, log
    result = summary(run_dir)
    assert result["control"] == "rpc"
    assert result["transports"] == {str(worker): {"transport": "gloo", "reason": "asked for"} for worker in range(4)}
    check_lineage(run_dir, 120)
    assert replayed(run_dir, tmp_path / "again") == result["final_params_sha256"]
