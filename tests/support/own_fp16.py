"""A loop of one's own in float16; alone, the whole run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

import ormo_rpc
from tests.support.precision import Shared


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets that depend on a number alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(16, 64, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def model() -> Shared:
    torch.manual_seed(0)
    return Shared()


def run(
    *overrides: str, run_dir: str, total: int, scales: bool = True, clip: Callable[[Shared], object] | None = None
) -> tuple[Shared, dict[str, float]]:
    """Train; return the model and the summary."""
    net = model()
    worker = ormo_rpc.join(net, *overrides, total_tickets=total, run_dir=run_dir)
    for work in worker:
        inputs, targets = batch(work.ticket)
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(net(inputs), targets)
        (worker.scaled(loss) if scales else loss).backward()
        if clip is not None:
            worker.unscale()
            clip(net)
        worker.push(loss)
    assert worker.summary is not None
    return net, worker.summary
