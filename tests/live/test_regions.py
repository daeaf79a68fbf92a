"""Live runs of two levels: regions with servers and worker processes of their own."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from ormo_rpc import train
from ormo_rpc.composing import compose
from ormo_rpc.runtimes.distributed.worker_process.region import RegionProcesses
from ormo_rpc.runtimes.job import Job
from ormo_rpc.storage import checkpoint
from tests.support.processes import QUIET, check_lineage, descendants, events, gone, launched, processes, summary, wait_until

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]
MODULE = "ormo_rpc.runtimes.distributed.worker_process.region_worker"


def workers_of_regions(launcher: int) -> list[psutil.Process]:
    """Return the processes of the regions' workers."""
    found = list[psutil.Process]()
    for process in descendants(launcher):
        try:
            found += [process] if MODULE in process.cmdline() else []
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def test_the_tickets_of_a_killed_region_and_of_a_killed_worker_of_one_count_once(tmp_path: Path) -> None:
    total = 120
    options = ("algorithm=halos", "algorithm.region_workers=2", "algorithm.exchange=4", "workers=2", "train.lr=0.05")
    batches = ("train.batch_size=8", "train.epochs=1000", f"train.max_iterations={total}")
    with launched("launch.py", f"hydra.run.dir={tmp_path}", *QUIET, *options, *batches) as launcher:
        wait_until(lambda: len(events(tmp_path, "apply")) > 5, "the first updates of both levels")
        found = workers_of_regions(launcher.pid)
        assert len(found) == 4
        regions = processes(tmp_path)["workers"]
        of_first = [process for process in found if process.ppid() == regions["0"]]
        of_first[0].kill()
        next(process for process in found if process.ppid() == regions["1"]).suspend()  # and it ends with its region
        psutil.Process(regions["1"]).kill()
        _, err = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, err
    check_lineage(tmp_path, total)
    # The global server has lost region 1 and its ticket; of the worker of region 0 that region has taken care.
    assert [loss["worker"] for loss in summary(tmp_path)["evictions"]] == [1]
    assert [event["worker"] for event in events(tmp_path, "leave")][:1] == [1]
    assert err.count("of this region ended with -9; another one is started") == 1, err
    assert gone(found)


def test_a_worker_of_a_region_that_stops_reading_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    options = ("algorithm=halos", "algorithm.region_workers=2", "algorithm.exchange=1", "algorithm.local_steps=1")
    large = ("workers=1", "model.hidden=20000", "runtime.rpc_timeout_seconds=1")  # 6 MB, more than a socket takes in
    job = Job(compose([*options, *large, *QUIET]))
    region, reply = RegionProcesses(job, None), job.server(lambda _: None, lambda: 0.0).start()[0]
    try:
        region.compute(reply)
        stopped = workers_of_regions(os.getpid())
        assert len(stopped) == 2
        for process in stopped:
            process.suspend()
        region.compute(reply)
    finally:
        region.close()
    assert "ended with -9; another one is started" in caplog.text
    assert gone(stopped)


def test_edges_with_processes_of_their_own_make_the_updates_of_simulated_ones(tmp_path: Path) -> None:
    options = ("algorithm=hiermo", "algorithm.region_workers=2", "algorithm.local_steps=2", "algorithm.edge_momentum=0")
    batches = ("workers=2", "train.lr=0.05", "train.batch_size=8", "train.max_iterations=8", *QUIET)
    train([*options, *batches, "runtime=sim"], run_dir=tmp_path / "simulated")
    with launched("launch.py", f"hydra.run.dir={tmp_path / 'live'}", *options, *batches) as launcher:
        _, err = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, err
    # Which worker of an edge has which part differs, so what is summed is rounded in another order.
    found, expected = (
        checkpoint.read(checkpoint.locate(tmp_path / name), checkpoint.SERVER)["params"] for name in ("live", "simulated")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
