"""Buffers of a server for tests, and pushes with buffers in them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ormo_rpc.compression import Encoder, PushFormat
from ormo_rpc.server.buffer_rules import Rule, RuleKind
from ormo_rpc.server.buffers import RunningBuffers


def averages(initial: Mapping[str, Tensor], momentum: Mapping[str, float]) -> RunningBuffers:
    """Averages of which each push is one call."""
    return RunningBuffers(initial, {name: Rule(RuleKind.average, m) for name, m in momentum.items()})


def wire(form: PushFormat, grad: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
    """The bytes of a push whose form is plain."""
    encoder = Encoder(form)
    encoder.push.copy_(grad)
    encoder.encode(0)
    encoder.buffers.write(buffers)
    return encoder.wire.view(torch.uint8)
