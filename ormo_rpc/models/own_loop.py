"""The model of a loop of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from typing_extensions import override

from ormo_rpc.models.base import Model
from ormo_rpc.options import option, register


@register("own_loop")
@dataclass(frozen=True, kw_only=True)
class OwnLoopModel(Model):
    """The model that a script passes to `ormo_rpc.join`; no process makes it from the configuration."""

    class_name: str = option("", "its class, for summaries")

    @property
    @override
    def known_as(self) -> str:
        return self.class_name or self.name

    @override
    def build(self, input_shape: tuple[int, ...], num_classes: int) -> NoReturn:
        raise ValueError(
            f"model: {self.name} is that of a script which calls ormo_rpc.join(model, ...); start the script, see "
            "docs/own_loop.md"
        )
