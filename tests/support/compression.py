"""Wire forms of pushes for a small model with every shape of parameter, and gradients for them."""

from __future__ import annotations

import torch
from torch import Tensor

from ormo_rpc.compression import Compression, Encoder, NoCompression, PushFormat
from ormo_rpc.compression.powersgd import PowerSGD
from ormo_rpc.compression.topk import TopK
from ormo_rpc.compression.wire_options import WireDtype
from ormo_rpc.models.flat import Layout
from ormo_rpc.server.buffer_layout import BufferLayout

SHAPES = {"conv": (8, 3, 3, 3), "conv_bias": (8,), "linear": (20, 30), "scale": (), "small": (3, 4)}
DIMENSION = 8 * 27 + 8 + 600 + 1 + 12
STATISTICS = {"mean": (5,), "var": (5,)}
COMPRESSIONS: dict[str, Compression] = {
    "none": NoCompression(error_feedback=True),
    "topk": TopK(ratio=0.05),
    "powersgd": PowerSGD(rank=2),
    "topk without feedback": TopK(ratio=0.05, error_feedback=False),
}
CASES = [(name, wire) for name in COMPRESSIONS for wire in WireDtype]


def layout(shapes: dict[str, tuple[int, ...]]) -> Layout:
    return Layout({name: torch.empty(shape) for name, shape in shapes.items()})


def buffer_layout(shapes: dict[str, tuple[int, ...]]) -> BufferLayout:
    return BufferLayout({name: torch.empty(shape) for name, shape in shapes.items()})


def made(name: str, wire: WireDtype, *, dtype: torch.dtype = torch.float32, vectors: int = 1) -> PushFormat:
    return PushFormat(
        params=layout(SHAPES),
        buffers=buffer_layout(STATISTICS),
        dtype=dtype,
        vectors=vectors,
        compression=COMPRESSIONS[name],
        wire=wire,
    )


def gradients(count: int, dtype: torch.dtype = torch.float32, length: int = DIMENSION) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(length, generator=generator, dtype=dtype) for _ in range(count)]


def encoded(encoder: Encoder, gradient: Tensor, worker: int = 0) -> Tensor:
    """A copy of a gradient as the server will decode it."""
    encoder.push.copy_(gradient)
    return encoder.encode(worker).clone()
