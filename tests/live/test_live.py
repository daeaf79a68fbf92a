"""Live runs: real processes on this machine, over each transport."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import ormo_rpc
from ormo_rpc.composing import compose
from ormo_rpc.config.parsing import load_config
from ormo_rpc.evaluate import evaluate_checkpoint
from ormo_rpc.messages import Reply
from ormo_rpc.models.flat import sha256
from ormo_rpc.runtimes.job import Job
from ormo_rpc.storage import checkpoint
from tests.support.processes import (
    QUIET,
    check_lineage,
    descendants,
    events,
    gone,
    launch,
    launched,
    processes,
    replayed,
    summary,
    wait_until,
)

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]

ENDLESS = ("logger=none", "train.epochs=100000", "workers=2")

SUMMARY_KEYS = set(
    "status algorithm scheduler runtime num_workers iterations gradients_computed epochs train_loss test_accuracy wall_seconds "
    "virtual_seconds updates_per_second delay_mean delay_max pushes_per_worker lock_wait_seconds lock_held_seconds "
    "elastic_mean elastic_max final_params_sha256 final_buffers_sha256".split()
)


def test_the_default_run_trains_digits_and_writes_all_its_files(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    status, out, err = launch(run_dir)
    assert status == 0, err
    assert err == ""  # not a terminal: no progress bar, no warnings
    assert out.startswith("completed: ormo (async), 4 workers, digits, mlp: 1350 iterations")

    result = summary(run_dir)
    assert result.keys() >= SUMMARY_KEYS
    assert (result["status"], result["iterations"], result["gradients_computed"]) == ("completed", 1350, 1350)
    assert result["test_accuracy"] >= 0.95
    assert result["wall_seconds"] < 60
    assert sum(result["pushes_per_worker"].values()) == 1350
    assert 0 < result["elastic_mean"] <= result["elastic_max"]

    check_lineage(run_dir, 1350)
    applied = events(run_dir, "apply")
    assert all(event["delay"] == event["iteration"] - event["stamp"] for event in applied)
    # Identity 6: after T gradients all delays, and those of the gradients in flight, sum to (K - 1) T.
    # The first worker finds no more work when ticket T - 1 is out, so count up to there.
    issued = events(run_dir)
    last_issue = next(i for i, event in enumerate(issued) if event["event"] == "issue" and event["ticket"] == 1349)
    before = issued[: last_issue + 1]
    done = [event for event in before if event["event"] == "apply"]
    holding = {event["ticket"]: event["stamp"] for event in before if event["event"] == "issue"}
    for event in done:
        del holding[event["ticket"]]
    count = len(done)
    assert sum(event["delay"] for event in done) + sum(count - stamp for stamp in holding.values()) == 3 * count

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    accuracies = {row["iteration"]: row["test_accuracy"] for row in rows if "test_accuracy" in row}
    assert sorted(accuracies) == [45 * epoch for epoch in range(1, 31)]  # 1437 samples / 32 = 45 batches an epoch
    # A row is at the time of its last gradient, and is written a moment later.
    assert all(0 <= row["lock_held_seconds"] < result["wall_seconds"] for row in rows if "lock_held_seconds" in row)
    assert any((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))

    found, evaluation = evaluate_checkpoint(run_dir)
    assert evaluation.test["accuracy"] == result["test_accuracy"]
    model = Job(load_config(run_dir / "config.yaml")).model()
    model.module.load_state_dict(torch.load(found / "model.pt", weights_only=True))  # plain PyTorch
    assert sha256(model.flat_params()) == result["final_params_sha256"]
    assert set(processes(run_dir)["workers"]) == {"0", "1", "2", "3"}
    check_control(run_dir, result)
    assert replayed(run_dir, tmp_path / "again") == result["final_params_sha256"]


def check_control(run_dir: Path, result: dict[str, Any]) -> None:
    """Each process has had an agent of torch.distributed.rpc, and every worker the server's RRef; all share memory."""
    logs = {file.stem: file.read_text() for file in (run_dir / "logs").iterdir()}
    (server,) = re.findall(r" of torch\.distributed\.rpc at (uv://127\.0\.0\.1:\d+)$", logs.pop("server"), re.MULTILINE)
    assert logs.keys() == {f"worker_{worker}" for worker in range(4)}
    for log in logs.values():
        (own,) = re.findall(rf" at (uv://127\.0\.0\.1:\d+), for the server's at {server}$", log, re.MULTILINE)
        assert own != server
        assert log.count("INFO got the server's RRef; calls go to its owner, the agent named server\n") == 1
    recorded = json.loads((run_dir / "processes.json").read_text())
    assert (recorded["control"], recorded["transports"]) == (result["control"], result["transports"])
    assert (result["control"], sorted(result["transports"])) == ("rpc", ["0", "1", "2", "3"])
    assert {each["transport"] for each in result["transports"].values()} == {"shm"}
    assert all(each["reason"] for each in result["transports"].values())


# One of each kind: what is sent is not w (smega2), discards (ringmaster), buffers (fedbuff), local steps (orlomo).
# With 1100 hidden units there are enough parameters for them to lie in shared memory. One reply is lost on each transport.
@pytest.mark.parametrize(
    ("algorithm", "transport"),
    [("smega2", "shm"), ("ringmaster", "tcp"), ("fedbuff", "rpc"), ("orlomo", "gloo")],
)
def test_every_kind_of_algorithm_runs_live_and_is_replayed(algorithm: str, transport: str, tmp_path: Path) -> None:
    given = ("workers=2", "train.max_iterations=60", "train.lr=0.005", "model.dropout=0.2")
    # A push over RPC comes in a thread that cannot open files; the journal and checkpoints, which it causes, need some.
    durable = ("checkpoint.journal=true", "checkpoint.every=20") if transport == "rpc" else ()
    options = (*given, "model.hidden=1100", f"transport={transport}", "runtime.faults=[drop_reply@0:5]", *durable)
    status, _, err = launch(tmp_path / "run", *QUIET, f"algorithm={algorithm}", *options)
    assert (status, err) == (0, "launch.py: worker 0: fault drop_reply@0:5\n")
    result = summary(tmp_path / "run")
    assert result["repeated"] == 1
    assert (result["algorithm"], result["status"], result["iterations"]) == (algorithm, "completed", 60)
    check_lineage(tmp_path / "run", 60)
    assert all(event["delay"] == event["iteration"] - event["stamp"] for event in events(tmp_path / "run", "apply"))
    assert replayed(tmp_path / "run", tmp_path / "again") == result["final_params_sha256"]
    if durable:
        log = (tmp_path / "run" / "logs" / "server.log").read_text()
        assert "torch.distributed.rpc" in log, "which protection holds"
        assert len(list((tmp_path / "run" / "journal").iterdir())) > 1, "the journal has begun a new file"
        assert len(list((tmp_path / "run" / "checkpoints").iterdir())) > 1
        assert result["failed_evaluations"] == 0


def test_a_live_run_computes_the_update_rule(tmp_path: Path) -> None:
    """The trace, redone: every gradient recomputed at the parameters that the sums over buckets give, in float64."""
    steps = ("train.max_iterations=61", "workers=3", "heterogeneity=one_slow", "heterogeneity.factor=3")
    options = (*QUIET, *steps, "model.hidden=16", "train.weight_decay=0.01", "train.clip_norm=0.5")
    status, _, err = launch(tmp_path, *options)
    assert status == 0, err
    job = Job(load_config(tmp_path / "config.yaml"))
    worker, beta = job.worker(), 0.9
    start = job.model().flat_params().double()

    received: list[tuple[int, torch.Tensor]] = []  # (bucket, eta g)
    momentum_index, newest_bucket = 0, 0

    def params() -> torch.Tensor:
        """``w = w_0 - sum of (1 - beta^(I - b + 1)) / (1 - beta) eta g``."""
        w = start.clone()
        for bucket, step in received:
            w -= (1 - beta ** (momentum_index - bucket + 1)) / (1 - beta) * step
        return w

    sent: dict[int, torch.Tensor] = {}
    for event in events(tmp_path):
        if event["event"] == "issue":
            assert event["stamp"] == len(received)
            assert event["bucket"] == math.ceil(event["stamp"] / 3)
            newest_bucket = max(newest_bucket, event["bucket"])
            sent[event["ticket"]] = params()
        if event["event"] == "apply":
            momentum_index = newest_bucket
            handed = sent.pop(event["ticket"]).float()
            reply = Reply(worker=0, ticket=event["ticket"], stamp=0, params=handed, lr=0.0, steps=1, incarnation=0)
            grad = worker.compute(reply).grad
            assert float.fromhex(event["grad_sum"]) == pytest.approx(grad.sum().item(), abs=1e-4)
            received.append((event["bucket"], event["eta"] * grad.double()))
    assert len(received) == 61
    found = torch.load(checkpoint.locate(tmp_path) / "server.pt", weights_only=True)["params"].double()
    moved = (found - start).abs().max().item()
    # Float32 carries 24 bits: 61 updates err by about 61 * 2^-24 = 4e-6 of what moved, new gradients by a bit more.
    assert (found - params()).abs().max().item() < 1e-4 * moved
    assert moved > 0.05


def test_batch_norm_statistics_are_averaged_under_the_synchronous_scheduler(tmp_path: Path) -> None:
    """SSGDm: rounds of equal stamps, and running statistics that are the average of what the batches had, in order."""
    (tmp_path / "norms.py").write_text(
        "from torch import nn\n"
        "def net(input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes))\n"
    )
    run_dir = tmp_path / "run"
    overrides = ["scheduler=sync", "workers=3", "train.max_iterations=10", "model=custom", "model._target_=norms.net"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        result = ormo_rpc.train(["logger=none", *overrides], run_dir=run_dir)
        assert result == summary(run_dir)
        # Rounds of K = 3, and a last short one: 3 + 3 + 3 + 1 = 10.
        assert [event["stamp"] for event in events(run_dir, "apply")] == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]

        config = load_config(run_dir / "config.yaml")
        job = Job(config)
        server, worker = job.server(lambda _: None, lambda: 0.0), job.worker()
        replies = {reply.worker: reply for reply in server.start()}
        means = torch.zeros(8)
        for event in events(run_dir, "apply"):
            push = worker.compute(replies.pop(event["worker"]))
            assert push.ticket == event["ticket"]
            means = 0.9 * means + 0.1 * push.buffers["2.running_mean"]
            replies |= {reply.worker: reply for reply in server.receive(push) if reply.ticket is not None}
        state = torch.load(checkpoint.locate(run_dir) / "model.pt", weights_only=True)
        torch.testing.assert_close(state["2.running_mean"], means)
        assert sha256(*server.buffers.current.values()) == result["final_buffers_sha256"]
        assert replayed(run_dir, tmp_path / "again") == result["final_params_sha256"]


def test_a_diverged_run_exits_with_status_3_and_the_reason(tmp_path: Path) -> None:
    # On a busy machine one worker may be done with ten pushes before the other one has begun: it is not banned for that here.
    options = ("algorithm=naive", "train.lr=1e30", "workers=2", "runtime.max_not_finite=1000")
    status, out, err = launch(tmp_path, *QUIET, *options)
    assert status == 3
    assert out.startswith("diverged: naive (async)")
    assert re.fullmatch(
        r"launch\.py: the (parameters|gradients or losses .*) are not finite(, or too large)?; lower train\.lr .*\n", err
    )
    assert summary(tmp_path)["status"] == "diverged"


def test_a_run_whose_loss_explodes_exits_with_status_3_and_its_replay_too(tmp_path: Path) -> None:
    """All stays finite; the summary and its replay say that the loss ended far above where it began."""
    options = ("algorithm=naive", "train.lr=20", "train.clip_norm=1", "train.max_iterations=100", "workers=2", "logger=none")
    began = time.monotonic()
    status, out, err = launch(tmp_path / "run", *options)
    seconds = time.monotonic() - began
    result = summary(tmp_path / "run")
    assert (status, result["status"]) == (3, "diverged"), err
    assert err == f"launch.py: {result['reason']}; lower train.lr or train.momentum, or set train.clip_norm\n"
    losses = [event["loss"] for event in events(tmp_path / "run", "apply")]
    assert statistics.fmean(losses[-20:]) > 3 * statistics.fmean(losses[:2])
    # The process's seconds but for its last ones; the clock of the run has those of the training alone.
    assert 2 * result["training_seconds"] < result["wall_seconds"]
    assert seconds / 2 < result["wall_seconds"] < seconds
    applied = events(tmp_path / "run", "apply")
    assert result["training_seconds"] == pytest.approx(applied[-1]["seconds"], abs=1e-5)
    assert result["updates_per_second"] == pytest.approx(100 / applied[-1]["seconds"], rel=1e-3)
    parts = [result[f"{part}_seconds"] for part in ("start", "training", "end")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(result["wall_seconds"], abs=0.01)  # between the clocks of two processes
    start, training, end = (f"{seconds:.1f} s" for seconds in parts)
    assert f"100 iterations in {training} ({result['wall_seconds']:.1f} s in all: start {start}, end {end})" in out
    status, out, again = launch(tmp_path / "again", "runtime=replay", f"replay.run={tmp_path / 'run'}", "logger=none")
    assert (status, again) == (3, err)
    assert out.startswith("diverged: naive (async)")
    assert "identical to" in out


def test_a_push_that_fails_half_way_ends_the_run_without_a_checkpoint(tmp_path: Path) -> None:
    # 1e39 is finite, as the schema asks, but no float32: the step fails after the check of the push.
    status, _, err = launch(tmp_path, *QUIET, "train.lr=1e39", "workers=2")
    assert status == 1
    said = r"launch\.py: server \(pid \d+\) exited with status 1: RuntimeError: a push could not be applied: .*overflow.*\n"
    assert re.fullmatch(said, err), err
    assert not (tmp_path / "checkpoints").exists()
    assert summary(tmp_path)["status"] == "failed"


@pytest.mark.parametrize("killed", ["the launcher", "all at once"])
def test_no_process_or_shared_memory_survives_a_killed_launcher(killed: str, tmp_path: Path) -> None:
    options = ("train.epochs=100000", "workers=2", "model.hidden=1100", "transport=shm")
    with launched("launch.py", f"hydra.run.dir={tmp_path}", *options) as launcher:
        processes(tmp_path)
        family = descendants(launcher.pid)
        assert len(family) >= 4  # server, two workers, and what wandb starts
        sharing = [names for names in map(shared_memory_of, family) if names]
        everything = {name for names in sharing for name in names}
        # The server and two workers: each has memory of its own, the server has that of all, and each worker the server's.
        assert sorted(map(len, sharing)) == [2, 2, 3]
        assert len(everything) == 3
        for process in [*([] if killed == "the launcher" else family), psutil.Process(launcher.pid)]:
            process.kill()
        wait_until(lambda: gone(family), "the end of all children")
    assert not [process.pid for process in psutil.process_iter() if everything & set(shared_memory_of(process))]
    # PyTorch's names have the process in them; those of runs beside this one do not count.
    pids = {str(process.pid) for process in family}
    left = [path.name for path in Path("/dev/shm").iterdir()]  # noqa: S108 - looked at, not written to
    assert not [each for each in left if "ormo" in each or pids & set(each.split("_"))]


def shared_memory_of(process: psutil.Process) -> list[str]:
    """The names of the memory that a process shares by our segments: its own, or another's."""
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:  # it has ended, or belongs to another user
        return []
    return sorted(set(re.findall(r"memfd:(ormo_rpc_\w+)", maps)))


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_all_sockets_are_on_loopback(transport: str, tmp_path: Path) -> None:
    with launched("launch.py", f"hydra.run.dir={tmp_path}", *ENDLESS, f"transport={transport}") as launcher:
        processes(tmp_path)
        family = descendants(launcher.pid)

        def ports() -> set[Any]:
            return {
                connection.laddr
                for process in family
                for connection in process.net_connections()
                if connection.status == psutil.CONN_LISTEN and connection.family in (socket.AF_INET, socket.AF_INET6)
            }

        # The listener, and for each process a port of its agent; over authenticated streams there is no agent. The ports of the
        # check at the start close beside the first tickets.
        wait_until(lambda: len(ports()) == (1 if transport == "tcp" else 4), "the last of the ports")
        listening = ports()
        named = {each for process in family for each in process.net_connections("unix") if each.status == psutil.CONN_LISTEN}
        assert {each.ip for each in listening} <= {"127.0.0.1", "::1"}
        address = json.loads((tmp_path / "processes.json").read_text())["address"]
        assert address in {f"{each.ip}:{each.port}" for each in listening}
        assert not named
        threads = [task.read_text() for process in family for task in Path(f"/proc/{process.pid}/task").glob("*/comm")]
        assert any("TP_UV" in name for name in threads) == (transport != "tcp")


def test_a_torch_without_rpc_is_said_and_done_without(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import torch\ndel torch._C._rpc_init\n")
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    status, _, err = launch(tmp_path / "run", *QUIET, "workers=1", "train.epochs=1", env=env)
    assert (status, err) == (
        0,
        "launch.py: server: torch was built without torch.distributed.rpc; the run goes on without its agents, as with "
        "runtime.control=socket\n",
    )
    result = summary(tmp_path / "run")
    assert (result["control"], result["transports"]["0"]["transport"]) == ("socket", "shm")


def test_a_sweep_starts_and_ends_its_own_processes_and_a_job_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    # With one worker a run has one order of pushes: the same configuration gives the same bits, whatever ran before it.
    short = ("workers=1", "train.max_iterations=20", "logger.mode=offline")
    probe = "+hydra.callbacks.probe._target_=tests.support.probe.Probe"
    with launched("launch.py", "-m", f"hydra.sweep.dir={tmp_path}", probe, *short, "algorithm=asgd,ormo,asgd") as launcher:
        _, err = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, err
    results = [summary(tmp_path / job) for job in "012"]
    assert [result["algorithm"] for result in results] == ["asgd", "ormo", "asgd"]
    assert results[0]["final_params_sha256"] == results[2]["final_params_sha256"] != results[1]["final_params_sha256"]
    first, *others = [json.loads((tmp_path / f"held_after_{job}.json").read_text()) for job in "012"]
    assert others == [first, first]


def test_torchrun_gives_the_same_outputs(tmp_path: Path) -> None:
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "launch.py", f"hydra.run.dir={tmp_path}")
    began = time.monotonic()
    with launched(*command, *QUIET, "train.epochs=2") as launcher:
        out, err = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, err
    seconds = time.monotonic() - began
    assert out.count("completed: ormo (async), 2 workers") == 1
    result = summary(tmp_path)
    assert (result["status"], result["num_workers"], result["iterations"]) == ("completed", 2, 90)
    assert 0 < result["training_seconds"] < result["wall_seconds"] < seconds
    assert (result["control"], sorted(result["transports"])) == ("rpc", ["0", "1"])
    for worker, path in result["transports"].items():
        assert f"joined as worker {worker}; pushes by shm: {path['reason']}\n" in err
    assert compose(["workers=2", "logger=none", "train.epochs=2"]) == load_config(tmp_path / "config.yaml")
    assert {"config.yaml", "metrics.jsonl", "trace.jsonl", "processes.json", "summary.json", "checkpoints"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_torchrun_is_interrupted_cleanly(tmp_path: Path) -> None:
    """By a manager that signals all processes; torchrun's agent then sends each rank another SIGTERM."""
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "launch.py", f"hydra.run.dir={tmp_path}")
    with launched(*command, *ENDLESS[:2]) as launcher:
        processes(tmp_path)
        family = descendants(launcher.pid)
        for process in (psutil.Process(launcher.pid), *family):
            process.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=60)
        assert launcher.returncode != 0
        assert "launch.py: the worker" not in err, "each line has its rank"
        assert "restarting it" not in err
        wait_until(lambda: gone(family), "the end of all children")
    result = summary(tmp_path)
    assert (result["status"], result["reason"]) == ("interrupted", "SIGTERM")
    assert result["iterations"] == len(events(tmp_path, "apply"))
    assert result["checkpoint"]
