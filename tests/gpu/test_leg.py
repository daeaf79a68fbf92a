"""The leg itself: the GPU that its tests compute on."""

from __future__ import annotations

import torch


def test_the_gpu_computes_what_the_cpu_does(gpu: torch.device) -> None:
    values = torch.arange(1000, dtype=torch.float32)
    assert torch.equal(values.to(gpu).mul_(3).add_(1).cpu(), values * 3 + 1)
