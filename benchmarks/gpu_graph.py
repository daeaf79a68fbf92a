"""Capture the step of a plain training loop as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


def captured(step: Callable[[], None], *, warm_ups: int = 3) -> Callable[[], None]:
    """Capture a step on the current device; return what repeats it.

    Args:
        step: The step.
        warm_ups: Steps before, in which libraries allocate and choose.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
