"""The arithmetic of a process: precision of float32 on a GPU, and determinism."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator

import torch

from ormo_rpc.devices import gpu_count
from ormo_rpc.worker.options import WorkerOptions

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Read by cuBLAS when it is first used; with any other value its products may differ from one time to the next."""


def set_arithmetic(options: WorkerOptions) -> None:
    """Compute from now on as ``worker.tf32`` and ``worker.deterministic`` say; on a machine without GPUs TF32 means nothing."""
    if options.deterministic:
        os.environ.setdefault(_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
    if gpu_count():
        torch.backends.cuda.matmul.allow_tf32 = options.tf32
        torch.backends.cudnn.allow_tf32 = options.tf32


@contextlib.contextmanager
def arithmetic_kept() -> Generator[None]:
    """Give a program its own arithmetic back at the end."""
    deterministic, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(_WORKSPACE)
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
        if (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) != (matmul, convolution):
            torch.backends.cuda.matmul.allow_tf32 = matmul
            torch.backends.cudnn.allow_tf32 = convolution
