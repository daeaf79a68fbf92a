"""Synchronous rounds in plain PyTorch, in one process: the mean of K tickets' gradients, then a step of torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from ormo_rpc.runtimes.job import Job
from ormo_rpc.seeding import generator, seed_for


def plain_rounds(job: Job, size: int, sizes: Sequence[int] | None = None) -> torch.nn.Module:
    """Train a classifier to the end of a job; return it.

    Args:
        job: The run; its groups, accumulation and evaluations do not count.
        size: K, the number of tickets of a round.
        sizes: The samples of each rank in a round, each counting the same; None for a ticket each.
    """
    train, seed = job.config.train, job.config.seed
    module = job.model().module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=1.0, momentum=train.momentum, nesterov=job.config.ddp.nesterov, weight_decay=train.weight_decay
    )
    for first in range(0, job.total_tickets, size):
        tickets = range(first, min(first + size, job.total_tickets))
        indices = [job.epochs.indices(ticket) for ticket in tickets]
        if sizes is not None:
            indices = list(torch.cat(indices).split(list(sizes)))
        total = sum(map(len, indices))
        mean = [torch.zeros_like(p) for p in parameters]
        for ticket, part in enumerate(indices, first):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_for(seed, "forward", ticket))
                inputs, targets = job.data.train.batch(part, generator(seed, "augment", ticket))
                optimizer.zero_grad()
                F.cross_entropy(module(inputs), targets).backward()
            weight = 1 / len(indices) if sizes is None else len(part) / total
            for into, parameter in zip(mean, parameters, strict=True):
                assert parameter.grad is not None
                into.add_(parameter.grad, alpha=weight)
        for grad, parameter in zip(mean, parameters, strict=True):
            parameter.grad = grad
        if train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm)
        optimizer.param_groups[0]["lr"] = job.lr(tickets[-1])
        optimizer.step()
    return module
