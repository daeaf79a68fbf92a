"""Live runs whose workers share a GPU: by each transport, with a death, and resumed elsewhere."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import ormo_rpc
from ormo_rpc.composing import compose
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.runtimes.distributed.server_process.serving import served
from ormo_rpc.runtimes.distributed.worker_process.worker_process import WorkerProcess
from ormo_rpc.runtimes.job import Job
from ormo_rpc.server.events import Kind
from tests.support.processes import QUIET, launch, summary
from tests.support.rendezvous import serving, worker_args

DATA = ("dataset._target_=benchmarks.gpu_images.images", "train.batch_size=32", "train.lr=0.01", "model.hidden=64")
SECRET = Secret("a secret that only we two know")
TICKETS = 200


def losses(transport: str, device: str, *more: str) -> list[float]:
    """The losses of a run with one worker, which is in this process."""
    found = list[float]()
    job = Job(
        compose(["workers=1", *DATA, f"transport={transport}", f"worker.device={device}", "train.max_iterations=40", *more])
    )
    server = job.server(lambda event: found.append(event.data["loss"]) if event.kind is Kind.apply else None, lambda: 0.0)
    service = Service(server, lambda _: None, push_format=job.push_format())
    side = job.config.transport.server_side()
    what = serving(transport, config=job.config.yaml, fingerprint=job.fingerprint().to_dict())
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(listener.shutdown, socket.SHUT_RDWR)
        stack.enter_context(served(listener, SECRET, service, side, what))
        args = worker_args(listener.getsockname()[:2], SECRET)
        WorkerProcess(args).run()
    return found


@pytest.mark.parametrize("transport", ["shm", "gloo", "tcp"])
def test_a_worker_on_the_gpu_trains_as_on_the_cpu(transport: str, gpu: torch.device) -> None:
    there = losses(transport, str(gpu))
    here = losses(transport, "cpu")
    assert len(there) == len(here) == 40
    assert there == pytest.approx(here, rel=1e-3)


def test_a_push_leaves_the_gpu_while_the_next_ticket_is_computed(gpu: torch.device) -> None:
    found = losses("shm", str(gpu), "worker.prefetch=2")
    assert len(found) == 40
    assert sum(found[-10:]) < 0.95 * sum(found[:10])


def test_workers_share_a_gpu_and_one_that_dies_is_replaced(tmp_path: Path, gpu: torch.device) -> None:
    options = (*DATA, "workers=2", "worker.device=cuda", f"train.max_iterations={TICKETS}", "runtime.faults=[kill@1:20]")
    status, _, err = launch(tmp_path / "live", *QUIET, *options, "runtime.restart_backoff_seconds=0")
    assert status == 0, err
    assert "worker 1" in err, "its death was told"
    found = summary(tmp_path / "live")
    assert found["status"] == "completed"
    assert found["transports"]["0"]["transport"] == "shm"
    assert found["devices"] == dict.fromkeys(["0", "1"], f"cuda:0 ({torch.cuda.get_device_name(gpu)})")
    assert 0 < found["worker_gpu_bytes"] < 2**30
    assert found["start"] == "fork", "no process that forks has initialised CUDA"
    assert found["test_accuracy"] > 0.5
    log = (tmp_path / "live" / "logs" / "server.log").read_text()
    assert "worker 1 computes on cuda:0 (" in log

    # The same run goes on by the fallback, and in a simulation on the CPU.
    resume = (*QUIET, *DATA, "workers=2", f"train.max_iterations={TICKETS + 40}", f"checkpoint.resume={tmp_path / 'live'}")
    status, _, err = launch(tmp_path / "rpc", *resume, "worker.device=cuda:0", "transport=rpc")
    assert (status, err) == (0, "")
    assert summary(tmp_path / "rpc")["iterations"] == TICKETS + 40
    simulated = ormo_rpc.train([*resume, "runtime=sim", "worker.device=cpu"], run_dir=tmp_path / "cpu")
    assert (simulated["iterations"], simulated["worker_device"]) == (TICKETS + 40, "cpu")
    assert simulated["test_loss"] == pytest.approx(summary(tmp_path / "rpc")["test_loss"], rel=0.2)


def test_ranks_of_ddp_share_a_gpu_over_gloo(tmp_path: Path, gpu: torch.device) -> None:
    options = (*QUIET, *DATA, "runtime=ddp", "workers=2", "worker.device=cuda", f"train.max_iterations={TICKETS}")
    status, _, err = launch(tmp_path, *options)
    assert (status, err) == (0, "")
    found = summary(tmp_path)
    assert found["worker_device"] == f"cuda:0 ({torch.cuda.get_device_name(gpu)})"
    assert found["test_accuracy"] > 0.5


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    with pytest.raises(
        ormo_rpc.ConfigError, match=rf"^worker\.device: got cuda:{count}, expected a GPU that this machine has: "
    ):
        ormo_rpc.train([*QUIET, *DATA, "runtime=sim", f"worker.device=cuda:{count}"], run_dir=tmp_path)
