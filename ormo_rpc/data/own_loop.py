"""The data of a loop of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from typing_extensions import override

from ormo_rpc.data.sources import DataSource
from ormo_rpc.options import at_least_one, option, register


@register("own_loop")
@dataclass(frozen=True, kw_only=True)
class OwnLoopData(DataSource):
    """The data that a script with `ormo_rpc.join` makes its batches of, of which no other part knows anything."""

    tickets_per_epoch: int | None = option(
        None, "tickets that count as an epoch; default: the whole run", valid=at_least_one, expected="a whole number >= 1"
    )

    @property
    @override
    def known_as(self) -> str:
        return "own loop"

    @override
    def load(self) -> NoReturn:
        raise ValueError(
            f"dataset: {self.name} is that of a script which calls ormo_rpc.join(model, ...); start the script, see "
            "docs/own_loop.md"
        )
