"""The classifiers of torchvision."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.models.base import Model
from ormo_rpc.options import option, register

_TAKES_AUXILIARY_LOSS: dict[str, Any] = {"aux_logits": False, "init_weights": True}


@register("torchvision")
@dataclass(frozen=True, kw_only=True)
class Torchvision(Model):
    """A classifier of torchvision with random weights: none are ever downloaded.

    It is tried once on an image of zeros: most want three channels, and some a certain size.
    """

    arch: str = option("resnet18", "its name in torchvision.models, such as resnet50 or mobilenet_v3_small")

    @override
    def build(self, input_shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
        from torchvision import models  # imported here, because every other model works without torchvision

        names = models.list_models(module=models)
        if self.arch not in names:
            close = difflib.get_close_matches(self.arch, names) or names
            raise ValueError(
                f"model.arch: got {self.arch!r}, expected a classifier of torchvision.models such as {', '.join(close)}"
            )
        # These two answer a training batch with further logits, which an ordinary loss does not understand.
        further = _TAKES_AUXILIARY_LOSS if self.arch in ("googlenet", "inception_v3") else {}
        model = models.get_model(self.arch, weights=None, num_classes=num_classes, **further)
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, *input_shape))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(f"model.arch: {self.arch} does not take inputs of shape {input_shape}: {error}") from error
        return model.train()
