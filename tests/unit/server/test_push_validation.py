"""Pushes that are refused, with their reasons, and the odd ones that are applied."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ormo_rpc.errors import NonFiniteGradient, PushRefused, StaleSession
from ormo_rpc.messages import Reply
from tests.support.buffers import averages
from tests.support.contract import same
from tests.support.trial import ONE, begin, brief, receive_or_raise, tensor

MEAN = {"mean": tensor(1.0, 2.0)}
LIKE = ", as the server's parameters have it"
NOT_FINITE = "values NaN or infinite, expected finite numbers; lower the learning rate"
MODEL = "server and worker must build the same model"
BAD: dict[str, tuple[dict[str, Any], type[PushRefused], str]] = {
    # Worker 1 holds ticket 1 of stamp 0; the server is at iteration 2 with tickets 0 to 4 issued.
    "too long": (
        {"grad": torch.ones(4).double()},
        PushRefused,
        r"1 for ticket 1: gradient: got shape \(4,\), expected \(3,\)" + LIKE,
    ),
    "empty": ({"grad": tensor()}, PushRefused, r"1 for ticket 1: gradient: got shape \(0,\), expected \(3,\)" + LIKE),
    "2-D": ({"grad": ONE.reshape(3, 1)}, PushRefused, r"1 for ticket 1: gradient: got shape \(3, 1\), expected \(3,\)" + LIKE),
    "scalar": ({"grad": torch.tensor(1.0)}, PushRefused, r"1 for ticket 1: gradient: got shape \(\), expected \(3,\)" + LIKE),
    "dtype": (
        {"grad": ONE.float()},
        PushRefused,
        "1 for ticket 1: gradient: got dtype torch.float32, expected torch.float64" + LIKE,
    ),
    "device": ({"grad": ONE.to("meta")}, PushRefused, "1 for ticket 1: gradient: got device meta, expected cpu" + LIKE),
    "nan": ({"grad": tensor(0, math.nan, 1)}, NonFiniteGradient, "1 for ticket 1: gradient: got 1 of 3 " + NOT_FINITE),
    "inf": ({"grad": tensor(0, math.inf, 1)}, NonFiniteGradient, "1 for ticket 1: gradient: got 1 of 3 " + NOT_FINITE),
    "-inf and inf": (
        {"grad": tensor(-math.inf, math.inf, 1)},
        NonFiniteGradient,
        "1 for ticket 1: gradient: got 2 of 3 " + NOT_FINITE,
    ),
    "loss": (
        {"loss": math.nan},
        NonFiniteGradient,
        "1 for ticket 1: loss: got nan, expected a finite number; the learning rate may be too high",
    ),
    "infinite loss": (
        {"loss": math.inf},
        NonFiniteGradient,
        "1 for ticket 1: loss: got inf, expected a finite number; the learning rate may be too high",
    ),
    "unknown buffer": (
        {"buffers": {**MEAN, "var": tensor(1)}},
        PushRefused,
        rf"1 for ticket 1: got the buffers \['mean', 'var'\], expected of \['mean'\]; {MODEL}",
    ),
    "shape of a buffer": (
        {"buffers": {"mean": tensor(1)}},
        PushRefused,
        r"1 for ticket 1: buffer 'mean': got shape \(1,\), expected \(2,\)" + LIKE,
    ),
    "nan in a buffer": (
        {"buffers": {"mean": tensor(1, math.nan)}},
        NonFiniteGradient,
        "1 for ticket 1: buffer 'mean': got 1 of 2 " + NOT_FINITE,
    ),
    "unknown worker": (
        {"worker": 9},
        StaleSession,
        r"9 for ticket 1: it is not a member, members are \[0, 1, 2\]; join \(again\) to get work",
    ),
    "stamp from the future": (
        {"stamp": 3},
        PushRefused,
        "1 for ticket 1: stamp: got 3, expected one from 0 to the server's iteration 2",
    ),
    "negative stamp": (
        {"stamp": -1},
        PushRefused,
        "1 for ticket 1: stamp: got -1, expected one from 0 to the server's iteration 2",
    ),
    "other stamp": ({"stamp": 1}, PushRefused, "1 for ticket 1: stamp: got 1, expected 0, that of the reply"),
    "never issued": ({"ticket": 5}, PushRefused, "1: ticket: got 5, expected one that was issued, below 5"),
    "negative ticket": ({"ticket": -1}, PushRefused, "1: ticket: got -1, expected one that was issued, below 5"),
    "another's ticket": (
        {"ticket": 2},
        PushRefused,
        "1: ticket: got 2, which is held by worker 2; push for a ticket of your own",
    ),
    "another's redeemed ticket": (
        {"ticket": 3, "stamp": 1},
        PushRefused,
        "1: ticket: got 3, which is settled already; only a worker's newest push may be repeated",
    ),
    "own ticket redeemed long ago": (
        {"worker": 0, "ticket": 0},
        PushRefused,
        "0: ticket: got 0, which is settled already; only a worker's newest push may be repeated",
    ),
    "another incarnation": (
        {"incarnation": 1},
        StaleSession,
        "1 for ticket 1: incarnation: got 1, expected 0; the server has restarted: rejoin",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_push_is_refused_with_its_reason_and_changes_nothing(name: str) -> None:
    changes, error, text = BAD[name]
    trial = begin(buffers=averages({"mean": torch.zeros(2, dtype=torch.float64)}, {"mean": 0.25}))
    trial.push(0, buffers=MEAN)
    trial.push(0, buffers=MEAN)
    before, events = trial.server.state_dict(), len(trial.events)
    bad = replace(trial.work(1, buffers=MEAN), **changes)
    with pytest.raises(error, match=f"^push of worker {text}$") as caught:
        receive_or_raise(trial.server, bad)
    assert type(caught.value) is error
    assert type(caught.value)(str(caught.value)).args == caught.value.args, "it cannot be built again from one string"
    assert same(trial.server.state_dict(), before)
    assert len(trial.events) == events
    assert brief(trial.push(1, buffers=MEAN)) == [(1, 5, 3)], "the right push is taken afterwards"


def test_a_finite_gradient_whose_sum_overflows_is_applied() -> None:
    # 1e308 + 1e308 > 1.8e308; w = 0 - 0.5 * 1e308 is finite.
    trial = begin()
    trial.push(0, tensor(1e308, 1e308, 0))
    assert trial.server.params.tolist() == [-0.5e308, -0.5e308, 0]
    assert trial.events[-2].data["grad_sum"] == "inf"


def test_a_gradient_with_an_autograd_graph_is_detached() -> None:
    trial = begin(buffers=averages({"mean": torch.zeros(2, dtype=torch.float64)}, {"mean": 0.25}))
    grad, mean = ONE.clone().requires_grad_(), MEAN["mean"].clone().requires_grad_()
    trial.push(0, grad * 2, buffers={"mean": mean * 2})
    held = [trial.server.params, *trial.server.algorithm.state_dict().values(), *trial.server.buffers.current.values()]
    assert not any(value.requires_grad for value in held if isinstance(value, Tensor))
    assert trial.server.params.tolist() == [-1, -1, -1]  # 0 - 0.5 * 2
    assert trial.server.buffers.current["mean"].tolist() == [0.5, 1.0]  # 0.75 * 0 + 0.25 * 2 * (1, 2)


def test_a_loaded_state_with_an_autograd_graph_is_detached() -> None:
    start = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    trial = begin(buffers=averages({"mean": start}, {"mean": 0.25}))
    plain = trial.server.state_dict(replies=True)
    graph = {
        **plain,
        "params": plain["params"].clone().requires_grad_(),
        "algorithm_state": {
            k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in plain["algorithm_state"].items()
        },
        "buffers": {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in plain["buffers"].items()},
    }
    for state in (plain, graph):
        trial.server.load_state_dict(state)
        trial.push(0, buffers=MEAN)
        held = [trial.server.params, *trial.server.algorithm.state_dict().values(), *trial.server.buffers.current.values()]
        assert not any(value.requires_grad for value in held if isinstance(value, Tensor))
        assert trial.server.params.tolist() == [-0.5, -0.5, -0.5]  # 0 - 0.5 * 1
        trial.held[0] = next(Reply(**each) for each in plain["replies"] if each["worker"] == 0)
