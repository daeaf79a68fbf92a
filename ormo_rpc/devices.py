"""The device of a process: what ``worker.device`` and ``server.device`` name on this machine.

GPUs are counted without initialising CUDA, which a process must not do whose forks use it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import signal
import threading
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path

import torch

from ormo_rpc.errors import ConfigError

_EVERYWHERE = ("auto", "cpu")
_NAME = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_RANKS = {
    "LOCAL_RANK": ("WORLD_SIZE",),
    "SLURM_LOCALID": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "OMPI_COMM_WORLD_LOCAL_RANK": ("OMPI_COMM_WORLD_SIZE",),
    "MPI_LOCALRANKID": ("PMI_SIZE",),
    "MV2_COMM_WORLD_LOCAL_RANK": ("MV2_COMM_WORLD_SIZE",),
}
"""The variable of the number of a process on its machine (torchrun, srun, Open MPI, MPICH, MVAPICH), with those of the number
of all: where that is one, or missing, the process is alone, or its number is left over from elsewhere."""
_STEP = "SLURM_STEP_ID"
_RESERVED_STEP = 0xFFFFFFF0
"""The first of the numbers that are no steps of srun's, such as that of the batch script."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/nvmap"), Path("/dev/kfd"), Path("/dev/dxg"))
"""Of NVIDIA, on its boards for vehicles and robots too, of AMD, and of either under Windows."""
_COUNT_SECONDS = 120.0


def is_device(text: str) -> bool:
    """Tell whether a text names a device: auto, cpu, cuda, or a GPU by its number."""
    return _NAME.fullmatch(text) is not None


def is_fixed_device(text: str) -> bool:
    """Tell whether a text names a device without looking at the machine: any but auto."""
    return text != "auto" and is_device(text)


def gpu_count() -> int:
    """The number of GPUs that PyTorch can use in this process, which can still be forked afterwards."""
    if not torch.backends.cuda.is_built() or not any(driver.exists() for driver in _DRIVERS):
        return 0
    return torch.cuda.device_count() if torch.cuda.is_initialized() else _counted(os.environ.get(_VISIBLE))


@functools.cache
def _counted(visible: str | None) -> int:
    """Count the GPUs among those that are visible, as the environment has them.

    In a process of one thread, such as a preloader, a fork counts: the driver's library leaves files and threads behind where
    it is asked, and CUDA has to be initialised where that is missing, or knows no part of a GPU (MIG).
    """
    del visible
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where the driver's library cannot tell
        if threading.active_count() > 1 or not hasattr(os, "fork"):
            return torch.cuda.device_count()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.write(writing, str(torch.cuda.device_count()).encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        ready, _, _ = select.select([file], [], [], _COUNT_SECONDS)
        if not ready:
            os.kill(child, signal.SIGKILL)
        text = file.read()
    os.waitpid(child, 0)
    return int(text or 0)


def local_rank(env: Mapping[str, str]) -> int | None:
    """The number of this process among the ranks on its machine; None where it is none of several ranks."""
    for local, sizes in _RANKS.items():
        size = next((env[name] for name in sizes if name in env), "")
        if not (env.get(local, "").isdecimal() and size.isdecimal() and int(size) > 1):
            continue
        step = env.get(_STEP, "")
        if local != "SLURM_LOCALID" or (step.isdecimal() and int(step) < _RESERVED_STEP):
            return int(env[local])
    return None


def resolve(text: str, *, key: str, worker: int = 0) -> torch.device:
    """Return the device that a text names in this process.

    ``cuda`` is the GPU of the number of this rank on its machine, else of the worker, modulo the number of GPUs, so that
    workers may share one.

    Args:
        text: auto, cpu, cuda, or cuda:N.
        key: The option that it is the value of, for messages.
        worker: The number of the worker.

    Raises:
        ConfigError: there is no such device.
    """
    count = 0 if text == "cpu" else gpu_count()
    if text == "cpu" or (text == "auto" and not count):
        return torch.device("cpu")
    if not is_device(text):
        raise ConfigError(f"{key}: got {text!r}, expected cpu, cuda or cuda:N, the GPU of that number")
    if not count:
        raise ConfigError(
            f"{key}: got {text}, expected cpu on this machine, which has no GPU that PyTorch sees ({_why_none()})"
        )
    _, _, number = text.partition(":")
    if number and int(number) >= count:
        there = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"{key}: got {text}, expected a GPU that this machine has: {there}")
    if number:
        return torch.device("cuda", int(number))
    local = local_rank(os.environ)
    return torch.device("cuda", (worker if local is None else local) % count)


def use(device: torch.device) -> torch.device:
    """Have this process work on a device from now on: new streams and draws are on it. Return it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def in_front(device: torch.device) -> Generator[None]:
    """Put what a block computes onto a stream whose work a GPU prefers to that of others; on the CPU nothing is changed."""
    if device.type == "cpu":
        yield
        return
    own, former = torch.cuda.Stream(device, priority=-1), torch.cuda.current_stream(device)
    own.wait_stream(former)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        former.wait_stream(own)


def described(device: torch.device) -> str:
    """Name a device and, of a GPU, its card; CUDA is initialised for that."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def card_id(device: torch.device) -> str:
    """Return the number of a GPU that no other card in the world has; CUDA is initialised for that."""
    return str(torch.cuda.get_device_properties(device).uuid)


def peak_bytes(device: torch.device) -> int:
    """The most memory of a GPU that tensors of this process have had at once; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def resolve_if_there(text: str, *, key: str, worker: int = 0) -> torch.device:
    """Return the device that a text names, or the CPU where this machine does not have it: for what need not be on a GPU."""
    try:
        return resolve(text, key=key, worker=worker)
    except ConfigError:
        return torch.device("cpu")


def check(text: str, key: str) -> None:
    """Refuse a device that this machine does not have; CUDA is not initialised.

    Raises:
        ConfigError: it has none; one line with the key.
    """
    if text not in _EVERYWHERE:  # for which PyTorch need not be loaded
        resolve(text, key=key)


def _why_none() -> str:
    """The reason why PyTorch sees no GPU."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} was built without CUDA"
    visible = os.environ.get(_VISIBLE)
    if not any(driver.exists() for driver in _DRIVERS):
        return "there is no driver"
    if visible is not None:
        return f"{_VISIBLE} is {visible}" if visible.strip() else f"{_VISIBLE} is empty"
    return f"torch {torch.__version__} finds none"
