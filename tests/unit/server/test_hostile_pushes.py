"""Bad pushes, joins and leaves by the thousand: each gets its one error, and nothing changes."""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ormo_rpc.errors import GradientTooLarge, NonFiniteGradient, PushRefused, StaleSession
from ormo_rpc.messages import Push, Reply
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.validation import NormLimit, NormPolicy
from tests.support.buffers import averages
from tests.support.contract import same
from tests.support.examples import examples
from tests.support.schedule import answer, normal
from tests.support.trial import receive_or_raise

RULES = (
    "ormo",
    "ormo_da",
    "ringmaster",
    "fedbuff",
    "easgd",
    "orlomo",
    "dc_asgd",
    "shifted",
    "rennala",
    "smega2",
    "asgd",
    "mla",
    "ringleader",
)
DIMENSION = 3
PUSHES_PER_RULE = 1000
"""Together 11,000 pushes, joins and leaves."""
Bad = tuple[dict[str, Any], type[Exception]]
"""Fields of a push, and the very error that they are refused with."""
NO_NUMBERS: tuple[Any, ...] = (
    *(True, False, None, 1.0, 0.0, -0.0, math.nan, math.inf, 1j, "1", "", b"1", [], [1], (), (1,), {}, {1}, ..., object(), int),
    *(10**30, -(10**30), 2**53 + 1, -(2**63), 10**5000, torch.tensor(1), torch.ones(2), np.int64(1), np.float64(1), len),
)
"""In place of a whole number."""


def no_gradients(size: int) -> list[Bad]:
    """In place of a gradient of ``size`` float64 values."""
    good = torch.ones(size, dtype=torch.float64)
    emptied = good.clone()
    emptied.untyped_storage().resize_(0)
    shorter = torch.ones(size, dtype=torch.float64)
    shorter.untyped_storage().resize_(8)
    spoilt = [good.clone() for _ in range(4)]
    for tensor, value in zip(spoilt, (math.nan, math.inf, -math.inf, math.nan), strict=True):
        tensor[-1] = value
    spoilt[3].requires_grad_()
    refused: list[Any] = [
        *(None, 1.0, True, "grad", b"", [], [1.0] * size, (1.0,) * size, {}, object(), np.ones(size), Tensor, math.nan),
        *(good.float(), good.half(), good.bfloat16(), good.long(), good.bool(), good.to(torch.complex128)),
        *(good[:-1], torch.cat([good, good[:1]]), good[:0], good.reshape(1, size), good.reshape(size, 1), torch.tensor(1.0)),
        *(torch.ones([0] * 30), good.expand(2, size), good.to("meta"), torch.empty(size + 1, device="meta")),
        *(good.to_sparse(), (good - good).to_sparse(), good.reshape(1, size).to_sparse_csr()),
        torch.quantize_per_tensor(good.float(), 0.1, 0, torch.qint8) if hasattr(torch, "quantize_per_tensor") else None,
        torch.nested.nested_tensor([good, good], layout=torch.jagged),
        *(nn.UninitializedParameter(), emptied, shorter, torch.ones(size, dtype=torch.float32).requires_grad_()),
    ]
    return [*(({"grad": grad}, PushRefused) for grad in refused), *(({"grad": grad}, NonFiniteGradient) for grad in spoilt)]


NO_BUFFERS: list[Bad] = [
    *(({"buffers": buffers}, PushRefused) for buffers in (None, 1, "mean", [], (), [("mean", 1)], {1: torch.ones(2)})),
    *(
        ({"buffers": {"mean": value}}, PushRefused)
        for value in (None, 1.0, "x", [1.0, 2.0], torch.ones(2), torch.ones(3).double())
    ),
    ({"buffers": {"mean": torch.ones(2).double(), "more": torch.ones(2).double()}}, PushRefused),
    ({"buffers": {"mean": torch.ones(2).double().to_sparse()}}, PushRefused),
    ({"buffers": {"mean": torch.tensor([1, math.nan]).double()}}, NonFiniteGradient),
]
NO_METRICS: list[Bad] = [
    *(({"metrics": metrics}, PushRefused) for metrics in (None, 1, "tokens", [], (), [("tokens", 1.0)], {1: 1.0})),
    *(
        ({"metrics": {"tokens": value}}, PushRefused)
        for value in (None, True, 1, "1", [1.0, 2.0], (1.0,), (1.0, 2.0, 3.0), (1.0, 2), (1.0, -1.0), {}, torch.tensor(1.0))
    ),
    *(({"metrics": {name: 1.0}}, PushRefused) for name in ("", "loss", "a b", "a\n", "x" * 61, "x" * 100_000)),
]
NO_LOSSES: list[Bad] = [
    *(({"loss": loss}, PushRefused) for loss in NO_NUMBERS if loss is not None and type(loss) is not float),
    *(({"loss": loss}, NonFiniteGradient) for loss in (math.nan, math.inf, -math.inf)),
]


class Attack:
    """A server in the middle of a run, and the calls that it has to refuse at this moment.

    Args:
        algorithm: Its algorithm.
        chance: What decides.
    """

    def __init__(self, algorithm: str, chance: random.Random) -> None:
        self.chance = chance
        self.events: list[Event] = []
        self.server = self._build(algorithm, self.events)
        self.twin = self._build(algorithm, [])
        """Gets the good pushes alone."""
        self.size = DIMENSION * self.server.algorithm.VECTORS_PUSHED
        self.held: dict[int, Reply] = {}
        self.take(self.server.start())
        self.twin.start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, about kinds of tensors that it wants to drop or to change
            self.gradients = no_gradients(self.size)

    @staticmethod
    def _build(algorithm: str, events: list[Event]) -> ParameterServer:
        return build_server(
            algorithm=algorithm,
            params=torch.zeros(DIMENSION, dtype=torch.float64),
            num_workers=4,
            lr=0.01,
            buffers=averages({"mean": torch.zeros(2, dtype=torch.float64)}, {"mean": 0.25}),
            record=events.append,
            norm_limit=NormLimit(1e6, NormPolicy.refuse),
        )

    def take(self, replies: list[Reply]) -> None:
        self.held |= {reply.worker: reply for reply in replies}

    def good(self, worker: int) -> Push:
        reply = self.held[worker]
        assert reply.ticket is not None
        return replace(answer(reply, normal(self.size, 0, reply.ticket)), buffers={"mean": torch.ones(2).double()}, loss=0.5)

    def advance(self) -> None:
        """One good push for both servers."""
        push = self.good(self.chance.choice(sorted(self.held)))
        self.take(self.server.receive(push))
        self.twin.receive(push)

    def bad(self) -> tuple[Callable[[], object], type[Exception]]:
        """A call that has to fail, and how."""
        pick, server = self.chance.choice, self.server
        worker = pick(sorted(self.held))
        good = self.good(worker)
        other = pick([number for number in self.held if number != worker])
        kind = pick(
            (
                "number",
                "gradient",
                "gradient",
                "buffers",
                "loss",
                "loss",
                "metrics",
                "place",
                "place",
                "norm",
                "join",
                "leave",
                "push",
            )
        )
        if kind in ("join", "leave"):
            numbers = [value for value in NO_NUMBERS if not (kind == "leave" and value is None)]
            number = pick([*numbers, -1, *(sorted(self.held) if kind == "join" else (4, 5, 2**53))])
            return (lambda: server.join(number)) if kind == "join" else (lambda: server.leave(number)), ValueError
        if kind == "push":
            thing: Any = pick((None, 1, "push", {}, [], object(), self.held[worker], Push, vars))
            return lambda: server.receive(thing), PushRefused
        places: list[Bad] = [
            ({"worker": pick((-1, 4, 7, 2**53, self.chance.randrange(4, 2**53)))}, StaleSession),
            ({"incarnation": pick((-1, 1, 2**53, -(2**53)))}, StaleSession),
            ({"worker": other}, PushRefused),
            ({"ticket": self.held[other].ticket}, PushRefused),
            ({"ticket": pick((-1, server.assignments.issued, server.assignments.issued + 5, 2**53, -(2**53)))}, PushRefused),
            ({"stamp": pick((-1, good.stamp + 1, server.iteration + 1, 2**53, -(2**53)))}, PushRefused),
            ({"samples": pick((0, -1, -(2**53)))}, PushRefused),
        ]
        changes, error = pick(
            {
                "number": [({pick(("worker", "ticket", "stamp", "incarnation", "samples")): pick(NO_NUMBERS)}, PushRefused)],
                "gradient": self.gradients,
                "buffers": NO_BUFFERS,
                "loss": NO_LOSSES,
                "metrics": NO_METRICS,
                "place": places,
                "norm": [
                    ({"grad": torch.full((self.size,), value, dtype=torch.float64)}, GradientTooLarge)
                    for value in (1e7, -1e300)
                ],
            }[kind]
        )
        return lambda: receive_or_raise(server, replace(good, **changes)), error


@pytest.mark.parametrize("algorithm", RULES)
def test_a_thousand_bad_calls_each_get_their_error_and_change_nothing(algorithm: str) -> None:
    attack = Attack(algorithm, random.Random(algorithm))
    seen, before, recorded = Counter[str](), attack.server.state_dict(), len(attack.events)
    for number in range(PUSHES_PER_RULE):
        if number % 20 == 0:
            attack.advance()
            before, recorded = attack.server.state_dict(), len(attack.events)
        call, error = attack.bad()
        with pytest.raises(error) as caught:
            call()
        assert type(caught.value) is error, f"{type(caught.value).__name__}: {caught.value}"
        assert len(str(caught.value)) < 1000
        seen[error.__name__] += 1
        assert len(attack.events) == recorded
        if number % 4 == 3:
            assert same(attack.server.state_dict(), before)
    assert same(attack.server.state_dict(), before)
    assert same(attack.server.state_dict(), attack.twin.state_dict()), "the good pushes had another effect than by themselves"
    assert seen.total() == PUSHES_PER_RULE
    assert seen.keys() == {"PushRefused", "NonFiniteGradient", "GradientTooLarge", "StaleSession", "ValueError"}
    assert min(seen.values()) >= 20


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.tuples(inner, inner)
    ),
    max_leaves=5,
)


def is_metric(name: object, value: object) -> bool:
    pair = type(value) is tuple and [type(each) for each in value] == [float, float] and not value[1] < 0
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", "loss")
        and " " not in name
        and (pair or type(value) is float)
    )


@pytest.mark.slow
@examples(60)
@given(st.sampled_from([field.name for field in fields(Push)]), ANYTHING)
def test_any_value_in_a_field_is_accepted_or_refused_as_documented(name: str, value: Any) -> None:
    events: list[Event] = []
    server = build_server(params=torch.zeros(DIMENSION, dtype=torch.float64), num_workers=2, record=events.append)
    push = answer(server.start()[0], torch.ones(DIMENSION, dtype=torch.float64))
    before, recorded = server.state_dict(), len(events)
    # What is right there, in other words than the server's.
    right = {
        "worker": type(value) is int and value == 0,
        "ticket": type(value) is int and value == 0,
        "stamp": type(value) is int and value == 0,
        "incarnation": type(value) is int and value == 0,
        "samples": type(value) is int and 1 <= value <= 2**53,
        "loss": value is None
        or (type(value) is float and math.isfinite(value))
        or (type(value) is int and abs(value) <= 2**53),
        "loss_scale": type(value) in (int, float) and value == 1,  # that of the reply: losses are not scaled
        "buffers": value == {},
        "metrics": type(value) is dict and all(is_metric(*item) for item in value.items()),
        "grad": False,
    }[name]
    try:
        receive_or_raise(server, replace(push, **{name: value}))
    except PushRefused:
        assert not right
        assert same(server.state_dict(), before)
        assert len(events) == recorded
    else:
        assert right
        assert server.iteration == 1


@examples(30)
@given(st.booleans(), ANYTHING)
def test_only_valid_worker_numbers_join_or_leave(joins: bool, value: Any) -> None:
    server = build_server(params=torch.zeros(DIMENSION, dtype=torch.float64), num_workers=2)
    server.start()
    before = server.state_dict()
    right = type(value) is int and (1 < value <= 2**53 if joins else value in (0, 1))
    try:
        (server.join if joins else server.leave)(value)
    except ValueError:
        assert not right
        assert same(server.state_dict(), before)
    else:
        assert right
