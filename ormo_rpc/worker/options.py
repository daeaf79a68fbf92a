"""Options of the workers themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from typing_extensions import override

from ormo_rpc.devices import is_device
from ormo_rpc.options import Section, at_least_one, option

MAX_PREFETCH = 100
"""Each ticket ahead costs a model, a thread and two connections, and no network is slow enough for more to be of use."""


class Autocast(Enum):
    """The dtype of a pass where torch.autocast lowers it: matrix products and convolutions."""

    none = "none"
    """The dtypes of parameters and data."""
    bf16 = "bf16"
    """8 bits of precision, the range of float32."""
    fp16 = "fp16"
    """11 bits of precision, up to 65,504: the server scales the loss."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype; None for no autocast."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.value)


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(Section):
    """Options of each worker."""

    PATH = "worker"
    device: str = option(
        "auto",
        "device of the workers: cpu, cuda (the GPU of LOCAL_RANK under torchrun and srun, else of the worker's number, modulo "
        "the number of GPUs: workers may share one), cuda:N, or auto: cuda where there is a GPU; each machine for itself",
        valid=is_device,
        expected="auto, cpu, cuda or cuda:N",
    )
    dummy: bool = option(
        False, "push the same small numbers for every ticket and compute nothing: measures server and wire alone"
    )
    prefetch: int = option(
        0,
        "tickets that a worker has ahead, to compute on while a push is on its way; K, the number of gradients in flight, is "
        "workers x (1 + this)",
        valid=lambda v: 0 <= v <= MAX_PREFETCH,
        expected=f"a whole number from 0 to {MAX_PREFETCH}",
    )
    accumulate: int = option(
        1,
        "parts in which the batch of a ticket goes through the model, to save memory; the gradient is that of the whole batch, "
        "but for batch norms, which see each part by itself",
        valid=at_least_one,
        expected="a whole number >= 1",
    )
    autocast: Autocast = option(
        Autocast.none, "compute passes and losses under torch.autocast: none, bf16 or fp16; evaluations too"
    )
    compile: str | None = option(
        None, "backend of torch.compile for the passes of training, such as inductor; null: they are not compiled"
    )
    loss_scale: float = option(
        65536.0,
        "first scale of the loss where autocast is fp16 or parameters are float16; the server adapts it as GradScaler does",
        valid=lambda v: 2**-10 <= v < math.inf,
        expected="a finite number >= 2^-10",
    )
    loss_scale_interval: int = option(
        2000,
        "applied gradients in a row without an overflow after which the loss scale doubles",
        valid=at_least_one,
        expected="a whole number >= 1",
    )
    channels_last: bool = option(
        False, "images lie with their channels last, as convolutions of 16 bits want them, and those of a GPU in TF32"
    )
    tf32: bool = option(
        False, "on a GPU: round the factors of float32 products and convolutions to TF32, 10 bits; false: exact float32"
    )
    deterministic: bool = option(
        False, "torch.use_deterministic_algorithms: the same bits again on the same device; operations without are refused"
    )
    cuda_graph: bool = option(
        False,
        "on a GPU: record forward and backward pass as a CUDA graph, one for each shape of batch, and repeat it; a model whose "
        "passes wait for the GPU, or change other buffers than statistics of batch norms, is refused",
    )
    data_on_device: bool | None = option(
        None, "on a GPU: keep the training data in its memory; null: where it fits into a quarter of what is free"
    )

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cuda_graph and self.device == "cpu":
            raise ValueError("worker.cuda_graph: got true with worker.device=cpu, expected false, or a GPU")
        if self.cuda_graph and self.accumulate > 1:
            raise ValueError(
                f"worker.cuda_graph: got true with worker.accumulate={self.accumulate}, expected 1: a graph is one pass of the "
                "whole batch"
            )
        if self.cuda_graph and self.compile is not None:
            raise ValueError(
                f"worker.cuda_graph: got true with worker.compile={self.compile}, expected one of them: what is compiled is "
                "recorded as its own graphs"
            )
