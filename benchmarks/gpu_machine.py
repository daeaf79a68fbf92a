"""Describe the GPU of this machine, and the versions that its figures depend on."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.machine import machine
from ormo_rpc.storage.environment import environment


def about(commit: str | None = None) -> dict[str, Any]:
    """Date, card, driver and versions; the card is None where torch sees no GPU.

    Args:
        commit: That of the checkout, where this is a copy with another history, or none.
    """
    own, host = environment(), machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or own["commit"],
        **card(),
        "driver": driver(),
        "torch": own["torch"],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": _nccl(),
        "triton": _version("triton"),
        "python": own["python"],
        "cpu": host["cpu"],
        "cores": host["cores"],
        "host_memory_gigabytes": host["memory_gigabytes"],
    }


def card() -> dict[str, Any]:
    """The first GPU and their number."""
    if not torch.cuda.is_available():
        return {"card": None, "cards": 0}
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "cards": torch.cuda.device_count(),
        "card_memory_gigabytes": round(properties.total_memory / 1e9, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def driver() -> str | None:
    """The version of the driver; None where ``nvidia-smi`` does not say it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n", 1)[0].strip() or None


def in_words(found: dict[str, Any]) -> str:
    """All of it in a line of a page."""
    missing = "no GPU"
    cores = found["cores"] or os.cpu_count()
    return (
        f"{found['date'][:10]}, {found['cards']} x {found['card'] or missing}, driver {found['driver']}, "
        f"torch {found['torch']} (CUDA {found['cuda']}, cuDNN {found['cudnn']}, NCCL {found['nccl']}), "
        f"triton {found['triton']}, "
        f"Python {found['python']}, {cores} cores of {found['cpu']}, commit {(found['commit'] or 'unknown')[:7]}"
    )


def _nccl() -> str | None:
    try:
        from torch.cuda import nccl

        return ".".join(map(str, nccl.version()))
    except (AttributeError, RuntimeError, ImportError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
