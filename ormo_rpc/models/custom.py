"""The user's own model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.models.base import Model
from ormo_rpc.options import CallsTarget, register


@register("custom")
@dataclass(frozen=True, kw_only=True)
class CustomModel(Model, CallsTarget):
    """A model of your own: the class or function that ``model._target_`` names, the keys beside it are its keywords.

    ``input_shape`` and ``num_classes`` are passed if it takes them. The forward pass may write to buffers, but not to
    parameters, as ``nn.Embedding`` with ``max_norm`` does: they are views of what the server has sent, which others read, and
    may be the server's own memory. It is refused, before a run by its trial pass; a later pass that is the first to do so may
    corrupt the server of a simulation before that, and over shared memory the system kills its worker.
    """

    @override
    def build(self, input_shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
        model = self.call(input_shape=input_shape, num_classes=num_classes)
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"model._target_: {self._target_} returned {type(model).__name__}, expected a torch.nn.Module")
        return model
