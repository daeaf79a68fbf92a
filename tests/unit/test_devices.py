"""The devices that worker.device and server.device name, by the number of GPUs; counting these does not initialise CUDA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ormo_rpc
from ormo_rpc import devices
from ormo_rpc.errors import ConfigError
from tests.support.processes import QUIET

RANKS = ("WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two GPUs, as far as counting goes, and no ranks."""
    monkeypatch.setattr(devices, "gpu_count", lambda: 2)
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def resolved(text: str, worker: int = 0) -> str:
    return str(devices.resolve(text, key="worker.device", worker=worker))


@pytest.mark.usefixtures("gpus")
def test_workers_share_the_gpus_by_their_numbers() -> None:
    assert [resolved("auto", worker) for worker in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert [resolved("cuda", worker) for worker in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [resolved("cuda:1", worker) for worker in range(3)] == ["cuda:1"] * 3
    assert resolved("cpu") == "cpu"


def test_a_rank_has_the_gpu_of_its_number_on_its_machine(gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("LOCAL_RANK", "1")
    assert resolved("cuda", worker=2) == "cuda:0", "a number without a size is left over from elsewhere"
    gpus.setenv("WORLD_SIZE", "8")
    assert resolved("cuda", worker=2) == "cuda:1"
    gpus.setenv("LOCAL_RANK", "2")  # the server, and a worker for each GPU
    assert resolved("cuda", worker=0) == "cuda:0"


@pytest.mark.parametrize(
    ("step", "tasks", "expected"),
    [("0", "8", "cuda:1"), ("0", "1", "cuda:0"), ("4294967291", "8", "cuda:0"), ("", "8", "cuda:0")],
)
def test_a_task_of_srun_is_a_rank_unless_it_is_alone(gpus: pytest.MonkeyPatch, step: str, tasks: str, expected: str) -> None:
    for name, value in (("SLURM_LOCALID", "3"), ("SLURM_NTASKS", tasks), ("SLURM_STEP_ID", step)):
        gpus.setenv(name, value)
    assert resolved("auto", worker=0) == expected


@pytest.mark.usefixtures("gpus")
def test_a_gpu_that_is_not_there_is_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^worker\.device: got cuda:7, expected a GPU that this machine has: cuda:0 to cuda:1$"
    ):
        resolved("cuda:7")


@pytest.mark.parametrize("text", ["cuda:", "cuda:-1", "gpu", "CUDA", "cuda:1:2", "", "cuda: 1"])
def test_garbage_names_no_device(text: str) -> None:
    assert not devices.is_device(text)
    with pytest.raises(ConfigError, match=r"^server\.device: got "):
        devices.resolve(text, key="server.device")


@pytest.mark.skipif(devices.gpu_count() > 0, reason="this machine has a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert resolved("auto") == "cpu"
    with pytest.raises(
        ConfigError, match=r"^worker\.device: got cuda, expected cpu on this machine, which has no GPU that Py.*\(.+\)$"
    ):
        devices.check("cuda", "worker.device")


@pytest.mark.parametrize("options", [["runtime=sim"], ["runtime=replay", "replay.run=."]])
def test_nothing_begins_in_this_process_without_the_gpu(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^worker\.device: got cuda:99, expected "):
        ormo_rpc.train([*QUIET, *options, "worker.device=cuda:99"], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_has_counted_can_still_be_forked() -> None:
    code = (
        "import os, torch\n"
        "from ormo_rpc import devices\n"
        "devices.gpu_count(), devices.resolve('auto', key='worker.device')\n"
        "assert not torch.cuda.is_initialized()\n"
        "if (child := os.fork()) == 0:\n"
        "    os._exit(torch.cuda._is_in_bad_fork())\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "0\n", done.stderr
