"""The devices of the ranks, and the backend by which their gradients are reduced.

NCCL connects ranks that have a GPU each; it cannot serve two ranks on one. Such ranks reduce over Gloo, as ranks on CPUs do,
and their gradients go through the memory of the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ormo_rpc import devices
from ormo_rpc.errors import ConfigError

GLOO, NCCL = "gloo", "cpu:gloo,cuda:nccl"
"""Backends of `torch.distributed`; beside NCCL the few numbers of a meeting go over Gloo, and wait for no GPU."""


@dataclass(frozen=True)
class RankDevice:
    """The device of a rank.

    Attributes:
        text: Its name, for people.
        card: Identifies a GPU among those of all machines; empty for a CPU.
    """

    text: str
    card: str

    @classmethod
    def of(cls, device: torch.device) -> RankDevice:
        """Look at a device of this process."""
        if device.type == "cpu":
            return cls(str(device), "")
        return cls(devices.described(device), devices.card_id(device))


def backend(cards: Sequence[str]) -> str:
    """Choose the backend for ranks with these cards, given by rank.

    Raises:
        ConfigError: some ranks have a GPU, and others none.
    """
    without = [rank for rank, card in enumerate(cards) if not card]
    if without and len(without) < len(cards):
        raise ConfigError(
            f"worker.device: got a CPU on rank {without[0]} and a GPU on others with runtime=ddp, expected the same kind on "
            "all ranks: worker.device=cpu, or a GPU on each machine"
        )
    return GLOO if without or len(set(cards)) < len(cards) else NCCL
