"""Live runs in which processes die, hang, join and leave: no ticket is lost, and the run ends as it should."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import changing
from tests.support.processes import (
    CALM,
    QUIET,
    ROOT,
    check_lineage,
    events,
    first,
    launch,
    launched,
    processes,
    replayed,
    summary,
    wait_until,
)

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]


def fired(err: str) -> list[str]:
    """The faults that were reported."""
    return re.findall(r"^launch\.py: (?:worker \d+|server): fault (\S+)", err, re.MULTILINE)


def test_a_killed_worker_is_replaced_and_a_run_with_too_few_workers_pauses(tmp_path: Path) -> None:
    run_dir, total = tmp_path / "run", 600
    faults = "runtime.faults=[kill@1:5,drop_reply@0:7,corrupt@0:9:2]"
    options = ("workers=2", "runtime.min_workers=2", f"train.max_iterations={total}", "transport=gloo")
    status, out, err = launch(run_dir, *QUIET, *options, faults)
    assert status == 0, err
    assert out.startswith("completed: ")
    assert sorted(fired(err)) == ["corrupt@0:9:2,", "corrupt@0:9:2,", "drop_reply@0:7", "kill@1:5"]
    lost = re.search(
        r"^launch\.py: server: worker 1 \(pid (\d+) on \S+\) was evicted: its connection was closed; "
        r"ticket (\d+) of stamp (\d+) will be reissued$",
        err,
        re.MULTILINE,
    )
    assert lost, err
    pid, ticket, stamp = map(int, lost.groups())
    assert re.search(rf"^launch\.py: worker 1 \(pid {pid}\) was killed by SIGKILL .*restarting it in 0\.5 s", err, re.MULTILINE)
    assert re.search(r"^launch\.py: server: paused: 1 workers, and runtime\.min_workers=2", err, re.MULTILINE)
    assert re.search(r"^launch\.py: server: resumed: 2 workers$", err, re.MULTILINE)
    result = summary(run_dir)
    assert [(loss["worker"], loss["process"], loss["held"]) for loss in result["evictions"]] == [
        (1, pid, [{"ticket": ticket, "stamp": stamp}])
    ]
    check_lineage(run_dir, total)
    found = events(run_dir)
    left = found.index(first(found, event="leave", worker=1))
    joined = found.index(first(found, event="join", worker=1))
    assert not [event for event in found[left:joined] if event["event"] in ("issue", "reissue")]  # paused
    first(found[joined:], event="reissue", ticket=ticket)  # perhaps after one that a corrupt push of worker 0 gave back
    assert [event for event in found[joined:] if event["event"] == "apply" and event["worker"] == 1]
    assert result["repeated"] == 1
    assert [event["reason"] for event in events(run_dir, "discard")] == ["not finite"] * 2
    assert replayed(run_dir, tmp_path / "again") == result["final_params_sha256"]


def test_a_run_whose_output_nobody_reads_goes_on_and_keeps_what_it_could_not_say(tmp_path: Path) -> None:
    (tmp_path / "talking.py").write_text(
        "from tests.support import changing\n\ndef data():\n    print('reads')\n    return changing.data()\n"
    )
    job = ("dataset._target_=talking.data", "model._target_=tests.support.changing.net", "train.lr=0.01", "train.epochs=99")
    options = ("workers=2", "train.max_iterations=600", "runtime.faults=[kill@1:5]")
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    with launched("launch.py", f"hydra.run.dir={tmp_path}", *QUIET, *job, *options, env={"PYTHONPATH": path}) as launcher:
        for stream in (launcher.stdout, launcher.stderr):
            assert stream is not None
            stream.close()
        assert launcher.wait(120) == 0
    assert summary(tmp_path)["status"] == "completed"
    assert list((tmp_path / "checkpoints").glob("iteration_*"))
    unsaid = (tmp_path / "logs" / "launcher.log").read_text()
    assert re.search(r"^\S+ \S+ launch\.py: worker 1 \(pid \d+\) was killed by SIGKILL .*restarting it", unsaid, re.MULTILINE)
    assert re.search(r"^\S+ \S+ completed: ormo", unsaid, re.MULTILINE)


def test_a_run_whose_directory_is_deleted_meanwhile_ends_with_one_line(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with launched("launch.py", f"hydra.run.dir={run_dir}", *QUIET, "workers=2", "train.epochs=100000") as launcher:
        processes(run_dir)
        shutil.rmtree(run_dir)
        out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, out) == (1, "")
    assert err == f"launch.py: the run directory {run_dir} is gone: it was deleted, moved or replaced while the run went on\n"
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_worker_is_evicted_and_the_barrier_shrinks(tmp_path: Path) -> None:
    total, timeout = 300, 3.0
    options = ("scheduler=sync", "workers=3", f"train.max_iterations={total}", "runtime.faults=[stop@1:20]", "transport=gloo")
    status, _, err = launch(tmp_path, *QUIET, *options, f"runtime.worker_timeout_seconds={timeout}", "runtime.max_restarts=0")
    assert status == 0, err
    assert fired(err) == ["stop@1:20"]
    assert re.search(
        r"^launch\.py: server: worker 1 .* was evicted: (it was silent for 3 s|its connection was closed); ", err, re.MULTILINE
    )
    # Its supervisor kills it after the same silence, unless the others have ended the run by then.
    reports = re.findall(r"^launch\.py: worker 1 \(pid \d+\) (.*)$", err, re.MULTILINE)
    assert all(each.startswith("was killed after 3 s without a heartbeat (stopped, or hung)") for each in reports), err
    check_lineage(tmp_path, total)
    found = events(tmp_path)
    left = first(found, event="leave")
    before = [event for event in found if event["event"] == "apply" and event["seconds"] < left["seconds"]]
    # Stopped between its last push and the next; the others waited at the barrier until it was evicted, and no longer.
    assert timeout - 1.5 < left["seconds"] - before[-1]["seconds"] < timeout + 5
    stamps = [event["stamp"] for event in found if event["event"] == "apply"]
    rounds = [stamps.count(stamp) for stamp in dict.fromkeys(stamps)]
    assert rounds[0] == 3
    assert rounds[-2] == 2  # of the two that are left


def test_a_killed_server_resumes_from_its_checkpoint_and_counts_the_updates_rolled_back(tmp_path: Path) -> None:
    run_dir, total = tmp_path / "run", 500
    # The workers stop at iteration 200 until a checkpoint is on the disk, however slow that is.
    faults = ["stop@0:100", "stop@1:100", "kill@server:250"]
    options = ("workers=2", f"train.max_iterations={total}", "checkpoint.every=100", "transport=tcp")
    with launched(
        "launch.py", f"hydra.run.dir={run_dir}", *QUIET, *options, f"runtime.faults=[{','.join(faults)}]"
    ) as launcher:
        workers = [psutil.Process(pid) for pid in processes(run_dir)["workers"].values()]
        wait_until(lambda: all(worker.status() == psutil.STATUS_STOPPED for worker in workers), "two stopped workers")
        wait_until(lambda: list((run_dir / "checkpoints").glob("iteration_*")), "a checkpoint")
        for worker in workers:
            worker.resume()
        _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, err
    assert sorted(fired(err)) == sorted(faults)
    assert re.search(r"^launch\.py: server \(pid \d+\) was killed by SIGKILL .*; restarting it in 0\.5 s", err, re.MULTILINE)
    check_lineage(run_dir, total)
    (resume,) = events(run_dir, "resume")
    result = summary(run_dir)
    assert resume["iteration"] in (100, 200)  # the second may not have been due while the first was written
    assert result["rolled_back"] == 250 - resume["iteration"]
    assert result["incarnations"] == 2
    assert f"server: the server resumes from iteration {resume['iteration']}; {result['rolled_back']} later updates" in err
    assert resume["workers"] == [0, 1]  # the same processes, which never ended
    assert replayed(run_dir, tmp_path / "again") == result["final_params_sha256"]


def test_with_the_journal_a_killed_server_loses_no_acknowledged_push(tmp_path: Path) -> None:
    run_dir, total = tmp_path / "run", 400
    options = ("workers=2", f"train.max_iterations={total}", "checkpoint.every=100", "checkpoint.journal=true")
    status, _, err = launch(
        run_dir, *QUIET, *options, "runtime.faults=[kill@server:250]", "algorithm=dc_asgd", "train.lr=0.005"
    )
    assert status == 0, err
    assert fired(err) == ["kill@server:250"]
    check_lineage(run_dir, total)
    (resume,) = events(run_dir, "resume")
    # The one that was just applied when the server died was acknowledged to nobody; it may be kept or not.
    assert resume["iteration"] in (249, 250)
    assert summary(run_dir)["rolled_back"] == 250 - resume["iteration"]
    assert replayed(run_dir, tmp_path / "again") == summary(run_dir)["final_params_sha256"]


def test_rounds_of_two_out_of_three_outlive_the_deaths_of_a_worker_and_of_the_server(tmp_path: Path) -> None:
    run_dir, total = tmp_path / "run", 300
    rule = ("workers=3", "algorithm=m_sync", "algorithm.m=2", f"train.max_iterations={total}")
    faults = ("kill@1:20", "kill@server:151")  # with 151 applied, a round is half full unless a death has made one short
    durable = ("checkpoint.every=50", "checkpoint.journal=true")
    status, _, err = launch(run_dir, *QUIET, *rule, *durable, f"runtime.faults=[{','.join(faults)}]")
    assert status == 0, err
    assert sorted(fired(err)) == sorted(faults)
    check_lineage(run_dir, total)
    found = events(run_dir)
    assert first(found, event="leave", worker=1)
    (resume,) = events(run_dir, "resume")
    assert resume["iteration"] in (150, 151)
    # A gradient's parameters are those of its round: two of the same stamp at most, of two workers.
    stamps: dict[int, list[int]] = {}
    for event in events(run_dir, "apply"):
        stamps.setdefault(event["stamp"], []).append(event["worker"])
        assert event["delay"] <= 1
    assert all(len(workers) == len(set(workers)) <= 2 for workers in stamps.values())
    assert replayed(run_dir, tmp_path / "again") == summary(run_dir)["final_params_sha256"]


def test_a_torn_newest_checkpoint_is_skipped(tmp_path: Path) -> None:
    total = 1_000_000
    options = ("workers=1", f"train.max_iterations={total}", "train.epochs=100000", "checkpoint.every=150")
    with launched("launch.py", f"hydra.run.dir={tmp_path}", *QUIET, *options) as launcher:
        checkpoints = tmp_path / "checkpoints"
        wait_until(lambda: checkpoints.is_dir() and len(list(checkpoints.glob("iteration_*"))) >= 2, "two checkpoints")
        server = processes(tmp_path)["server"]
        os.kill(server, signal.SIGSTOP)
        before, newest = sorted(checkpoints.glob("iteration_*"))[-2:]
        file = newest / "server.pt"
        file.write_bytes(file.read_bytes()[:-100])
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: events(tmp_path, "resume"), "the next incarnation of the server")
        (resume,) = events(tmp_path, "resume")
        assert resume["iteration"] == int(before.name.removeprefix("iteration_"))
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 143
    assert re.search(rf"^launch\.py: server: .*{newest.name}.*", err, re.MULTILINE), err


def test_a_server_that_dies_after_the_last_update_still_writes_the_results(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = ("workers=2", "train.max_iterations=60", "checkpoint.journal=true", "runtime.faults=[kill@server:60]")
    status, out, err = launch(run_dir, *QUIET, *options)
    assert status == 0, err
    assert out.startswith("completed: ")
    assert fired(err) == ["kill@server:60"]
    assert "resumes from iteration 60; 0 later updates are rolled back" in err
    assert summary(run_dir)["incarnations"] == 2
    assert summary(run_dir)["test_accuracy"] > 0
    check_lineage(run_dir, 60)


@pytest.mark.parametrize(
    ("model", "differs", "reason"),
    [
        ("by_process", "backbone.weight: the values of the server and of this worker differ", "TimeoutError: worker .*"),
        (
            "trained_by_process",
            "the initial parameters of rank 1 (worker 0), rank 2 (worker 1) differ from those of rank 0 (the server)",
            ".*no worker is left: .*",
        ),
    ],
    ids=["frozen", "trained"],
)
def test_workers_whose_initial_values_are_not_the_servers_end_the_run(
    model: str, differs: str, reason: str, tmp_path: Path
) -> None:
    """They are drawn from the process number; forked processes would have the ones of the process that loaded the job."""
    run_dir = tmp_path / "run"
    drawn = (f"model._target_={changing.HERE}.{model}", f"dataset._target_={changing.HERE}.data", "runtime.start=spawn")
    status, _, err = launch(run_dir, *QUIET, *drawn, "workers=2", "train.batch_size=8", "runtime.start=spawn")
    assert status == 1, err
    said = rf"Refused: model: {re.escape(differs)}; every process must make the same: .*"
    for worker in range(2):
        line = rf"^launch\.py: worker {worker} \(pid \d+\) exited with status 65: {said}; the run continues without it$"
        assert len(re.findall(line, err, re.MULTILINE)) == 1, err
    ended = rf"^launch\.py: server \(pid \d+\) exited with status 1: {reason}{said}; the run has ended; "
    assert re.search(ended, err, re.MULTILINE), err
    assert "restarting" not in err
    assert summary(run_dir)["status"] == "failed"


def test_a_model_that_a_late_pass_changes_wrongly_ends_the_run_without_restarts(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    status, _, err = launch(run_dir, *QUIET, "model._target_=tests.support.odd_models.LateGrowth", "workers=2")
    assert status == 1, err
    said = r"ModelRefused: model: average: got torch\.float32 \(1, 16\) after a forward pass, expected torch\.float32 \(16,\)"
    assert len(re.findall(rf"^launch\.py: worker \d \(pid \d+\) exited with status 65: {said}", err, re.MULTILINE)) == 2, err
    assert "restarting" not in err
    assert summary(run_dir)["status"] == "failed"


def test_a_run_without_workers_ends_with_the_reason(tmp_path: Path) -> None:
    options = ("workers=1", "train.epochs=100000", "runtime.max_restarts=1", "runtime.restart_backoff_seconds=0")
    with launched("launch.py", f"hydra.run.dir={tmp_path}", *QUIET, *options) as launcher:
        victims: set[int] = set()
        for _ in range(2):
            pid = wait_until(lambda: next(iter(worker_pids(tmp_path) - victims), None), "a worker that was not killed yet")
            victims.add(pid)
            os.kill(pid, signal.SIGKILL)
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    *_, last = err.splitlines()
    left = r"no worker is left: worker 0 \(pid \d+\) was killed by SIGKILL .*; iteration \d+ is kept"
    assert re.match(rf"launch\.py: server .*RuntimeError: {left}", last), err
    result = summary(tmp_path)
    assert (result["status"], len(result["evictions"])) == ("failed", 2)


def test_a_too_slow_worker_joins_again_and_one_with_non_finite_gradients_is_banned(tmp_path: Path) -> None:
    faults = "runtime.faults=[delay@1:5:4,corrupt@2:5:100]"
    patience = (*CALM, "runtime.ticket_timeout_seconds=1.5", "runtime.max_not_finite=3")
    with launched(
        "launch.py", f"hydra.run.dir={tmp_path}", *QUIET, "train.epochs=100000", "workers=3", faults, *patience
    ) as host:
        before = processes(tmp_path)["workers"]
        wait_until(lambda: [event for event in events(tmp_path, "join") if event["worker"] == 1], "the return of the slow one")
        wait_until(lambda: len(events(tmp_path, "leave")) >= 2, "the ban of the other")
        host.send_signal(signal.SIGINT)
        _, err = host.communicate(timeout=60)
    assert host.returncode == 130
    losses = {loss["worker"]: loss for loss in summary(tmp_path)["evictions"]}
    assert losses[1]["reason"] == "no push for runtime.ticket_timeout_seconds=1.5, stuck or too slow for it"
    assert losses[2]["reason"] == "3 gradients in a row were not finite (runtime.max_not_finite)"
    assert json.loads((tmp_path / "processes.json").read_text())["workers"]["1"] == before["1"]  # the same process
    assert re.search(
        r"^launch\.py: worker 2 .*WorkerBanned: worker 2: 3 gradients .*; the run continues without it$", err, re.MULTILINE
    )
    assert not re.search(r"restarting it", err), err


def worker_pids(run_dir: Path) -> set[int]:
    """The process ids of the present workers."""
    return set(processes(run_dir)["workers"].values())


def test_torchrun_restarts_no_rank_when_server_and_worker_die(tmp_path: Path) -> None:
    total = 900
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "launch.py", f"hydra.run.dir={tmp_path}")
    options = (f"train.max_iterations={total}", "checkpoint.every=100", "runtime.faults=[kill@1:30,kill@server:450]")
    with launched(*command, *QUIET, *options) as launcher:
        ranks: set[int] = set()

        def ended() -> bool:
            # Between fork and exec a process has the command line of its parent, be it a rank or torchrun itself.
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(launcher.pid).children():
                    words = cmdline(process)
                    if "launch.py" in words and "torch.distributed.run" not in words:
                        ranks.add(process.pid)
            return launcher.poll() is not None

        wait_until(ended, "the end of the run")
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, err
    assert sorted(fired(err)) == ["kill@1:30", "kill@server:450"]
    assert len(ranks) == 4  # none was started again
    check_lineage(tmp_path, total)
    assert len(events(tmp_path, "resume")) == 1
    assert summary(tmp_path)["incarnations"] == 2


def cmdline(process: Any) -> list[str]:
    """Its command line; empty where it has just ended."""
    try:
        return process.cmdline()
    except Exception:
        return []
