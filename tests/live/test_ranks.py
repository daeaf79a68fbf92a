"""Runs whose ranks another launcher has started, over loopback: torchrun, and srun as its environment variables imitate it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest

from ormo_rpc.storage.run_directory import RunDirectory
from tests.support.processes import (
    PATIENCE_SECONDS,
    QUIET,
    descendants,
    events,
    gone,
    launch,
    launched,
    processes,
    summary,
    wait_until,
)

pytestmark = pytest.mark.live
LONG = (*QUIET, "train.epochs=1000", "train.max_iterations=100000", "checkpoint.every=100")


def launchers(agent: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The launchers of torchrun's ranks, by rank."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process(agent.pid).children():
        with contextlib.suppress(psutil.Error, ValueError):
            if "launch.py" in process.cmdline():
                found[int(process.environ()["RANK"])] = process
    return found


@pytest.mark.timeout(180)  # two starts of torchrun, on a busy machine
def test_torchruns_restart_continues_in_the_same_directory_and_ranks_end_with_their_agent(tmp_path: Path) -> None:
    """The agent has neither a folder nor a name for the job, so that the run is known by its directory alone."""
    run_dir = tmp_path / "run"
    options = (
        "--nproc-per-node=3",
        "--max-restarts=1",
        "--log-dir=/dev/null",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    )
    with launched("-m", "torch.distributed.run", *options, "launch.py", f"hydra.run.dir={run_dir}", *LONG) as agent:
        before, first_start = processes(run_dir)["workers"], launchers(agent)[0].create_time()
        launchers(agent)[1].send_signal(signal.SIGKILL)
        wait_until(lambda: events(run_dir, "resume"), "the second start")
        wait_until(lambda: processes(run_dir)["workers"] != before, "the workers of the second start")
        at = events(run_dir, "apply")[-1]["iteration"]
        wait_until(lambda: events(run_dir, "apply")[-1]["iteration"] > at, "gradients of the second start")
        family = descendants(agent.pid)
        agent.kill()
        lasted = time.time() - first_start
        wait_until(lambda: gone(family), "the end of all ranks")
        assert agent.stderr is not None
        said = agent.stderr.read()
    (resumed,) = events(run_dir, "resume")
    assert resumed["iteration"] > 0
    assert (summary(run_dir)["status"], summary(run_dir)["incarnations"]) == ("interrupted", 2)
    assert summary(run_dir)["wall_seconds"] > lasted - 1, "the first start counts too"
    assert summary(run_dir)["checkpoint"], said
    assert said.count(f"launch.py: torchrun's agent (pid {agent.pid}) has ended, so this rank ends as well\n") == 3, said
    assert "the directory of an earlier run" not in said


@contextlib.contextmanager
def task(run_dir: Path, rank: int, number: int, secret: str, *overrides: str) -> Generator[subprocess.Popen[str]]:
    """Start a task of a step of Slurm on this machine; srun itself is not here."""
    env = {
        "ORMO_RPC_SECRET": secret,
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(number),
        "SLURM_STEP_NUM_TASKS": str(number),
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "nowhere[1-2]",
        "SLURM_PROCID": str(rank),
    }
    with launched("launch.py", f"hydra.run.dir={run_dir}", *QUIET, *overrides, env=env) as process:
        yield process


def test_the_tasks_of_a_step_of_slurm_are_one_run(tmp_path: Path) -> None:
    """A task that is not let in, as its secret is another one, fails."""
    run_dir = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(task(run_dir, rank, 3, "of the tasks of a step, for a test", "train.epochs=2"))
            for rank in range(3)
        ]
        other = stack.enter_context(task(run_dir, 2, 3, "of nobody else in this test"))
        said = [process.communicate(timeout=2 * PATIENCE_SECONDS) for process in started]
        _, refused = other.communicate(timeout=PATIENCE_SECONDS)
    assert other.returncode == 1, refused
    assert "refused this worker: wrong secret" in refused
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert [out.count("completed: ormo (async), 2 workers") for out, _ in said] == [1, 0, 0]
    result = summary(run_dir)
    assert (result["status"], result["num_workers"], result["iterations"]) == ("completed", 2, 90)
    assert set(result["pushes_per_worker"]) == {"0", "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    for rank, (_, err) in enumerate(said):
        assert f"launch.py: rank {rank} of 3 on " in err
        assert "(srun: SLURM_PROCID, SLURM_STEP_NUM_TASKS): " in err
        assert "127.0.0.1:15077" in err  # of the number of the job


def test_stale_variables_of_a_launcher_are_refused_in_a_line(tmp_path: Path) -> None:
    with launched("launch.py", f"hydra.run.dir={tmp_path / 'run'}", env={"TORCHELASTIC_RUN_ID": "none"}) as process:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("launch.py: WORLD_SIZE: got nothing in the environment beside TORCHELASTIC_RUN_ID, ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_told_and_the_directory_stays_free_for_the_next_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        env = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "ORMO_RPC_SECRET": "of a test" * 2,
        }
        status, _, err = launch(tmp_path, *QUIET, env=env)
    assert status == 2
    assert err.startswith(
        f"launch.py: server.address: got 127.0.0.1:{port}, where the server cannot listen: Address already in use"
    )
    assert err.endswith("; server.address or MASTER_PORT names another port\n")
    RunDirectory.claim(tmp_path)
