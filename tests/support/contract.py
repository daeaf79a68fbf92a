"""The table of algorithms: one row each, and every row inherits every test of ``test_contract.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.contract_rounds import ROUNDS
from tests.support.contract_row import Row
from tests.support.contract_steps import STEPS
from tests.support.reference import Reference
from tests.support.schedule import Run, Schedule, noise, schedules

ROWS = (*STEPS, *ROUNDS)
SCHEDULER_OPTIONS: Mapping[str, Mapping[str, Any]] = {"partial": {"k": 2}, "ssp": {"s": 1}}
"""Options with which a scheduler holds workers back although these tests have few."""
DIMENSION = 6
SHAPES = ((2, 2), (), (1,))
"""The tensors of the parameters."""
LEARNING_RATES: Mapping[str, Callable[[int], float]] = {
    "constant": lambda _: 0.1,
    "decay": lambda t: 0.1 / (1 + t),
    "step": lambda t: 0.1 if t % 4 < 2 else 0.03,
    "erratic": lambda t: (0.0, 0.1, 0.02, 0.05)[(t * t % 11 + t) % 4],
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of any algorithm, the same for all rows.

    Attributes:
        variant: Picks one of the row's variants.
        num_workers: K at the start.
        tickets: T.
        momentum: beta.
        lr: The name of a schedule of learning rates.
        seed: Of the start and the gradients.
        schedule: The pushes, joins and leaves.
    """

    variant: int
    num_workers: int
    tickets: int
    momentum: float
    lr: str
    seed: int
    schedule: Schedule

    def options(self, row: Row) -> Mapping[str, Any]:
        """Return the options of the variant."""
        return row.variants[self.variant % len(row.variants)]

    def start(self) -> Tensor:
        """Return ``w_0``, shape (D,)."""
        return torch.randn(DIMENSION, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)

    def reference(self, row: Row) -> Reference:
        """Build the reference implementation."""
        return row.reference(
            self.start(),
            num_workers=self.num_workers,
            lr=LEARNING_RATES[self.lr],
            momentum=self.momentum,
            shapes=SHAPES,
            **self.options(row),
        )

    def server(
        self, name: str, scheduler: str, options: Mapping[str, Any], record: list[Event] | None = None
    ) -> ParameterServer:
        """Build a server with an algorithm; its events go to ``record``."""
        return build_server(
            algorithm=name,
            scheduler=scheduler,
            params=self.start(),
            num_workers=self.num_workers,
            lr=LEARNING_RATES[self.lr],
            momentum=self.momentum,
            total_tickets=self.tickets,
            shapes=SHAPES,
            record=(lambda _: None) if record is None else record.append,
            **SCHEDULER_OPTIONS.get(scheduler, {}),
            **options,
        )

    def run(
        self, name: str, scheduler: str, options: Mapping[str, Any], record: list[Event] | None = None
    ) -> Run[ParameterServer]:
        """Start a run of such a server."""
        server = self.server(name, scheduler, options, record)
        gradient = noise(DIMENSION * server.algorithm.VECTORS_PUSHED, self.seed)
        return Run(server=server, gradient=gradient, num_workers=self.num_workers).start()


@st.composite
def cases(draw: st.DrawFn, *, changes: bool = True, momentum: float | None = None, num_workers: int | None = None) -> Case:
    """Draw runs of every kind, also with T < K and T no multiple of K; with ``changes`` workers join and leave."""
    return Case(
        variant=draw(st.integers(0, 99)),
        num_workers=draw(st.integers(1, 5)) if num_workers is None else num_workers,
        tickets=draw(st.integers(1, 25)),
        momentum=draw(st.sampled_from([0.9, 0.5, 0.0])) if momentum is None else momentum,
        lr=draw(st.sampled_from(sorted(LEARNING_RATES))),
        seed=draw(st.integers(0, 9)),
        schedule=draw(schedules(changes=changes)),
    )


def values(server: ParameterServer) -> dict[str, Tensor | int | float]:
    """Return ``w`` and the state of the algorithm."""
    return {"w": server.params, **server.algorithm.state_dict()}


def same(a: Any, b: Any) -> bool:
    """Tell if two nested values are identical, tensors to the bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def tensors(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Return every tensor that an object holds at any depth, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (str, bytes, int, float, type)) or callable(value):
        inner = []
    elif hasattr(value, "__iter__"):
        inner = list(value)
    else:
        inner = list(getattr(value, "__dict__", {}).values())
    return [tensor for item in inner for tensor in tensors(item, seen)]
