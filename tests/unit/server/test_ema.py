"""The moving average against torch's `AveragedModel`, which is updated after every gradient that the server applies."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ormo_rpc import build_server
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.options import parts
from ormo_rpc.server.parameter_server import ParameterServer


def net() -> nn.Module:
    """A model whose tensors have odd sizes, so that torch's vectors do not fit them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 3, bias=False))


def server(params: torch.Tensor, **options: Any) -> ParameterServer:
    given: dict[str, Any] = {"lr": 0.05, "num_workers": 3, "algorithm": "ormo", **options}
    return build_server(params=params, **given)


def drive(server: ParameterServer, pushes: int, outstanding: list[Reply], seed: int = 0) -> list[Reply]:
    """Push gradients in a mixed order; return the replies that are not answered yet."""
    for number in range(pushes):
        reply = outstanding.pop((number * 7) % len(outstanding))
        assert reply.ticket is not None
        randomness = torch.Generator().manual_seed(1000 * seed + number)
        grad = torch.randn(server.params.numel() * server.algorithm.VECTORS_PUSHED, generator=randomness).to(
            server.params.dtype
        )
        push = Push(worker=reply.worker, ticket=reply.ticket, stamp=reply.stamp, grad=grad, incarnation=reply.incarnation)
        outstanding += server.receive(push)
    return outstanding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("algorithm", ["ormo", "asgd", "dc_asgd"])
def test_the_average_has_the_bits_of_torchs(algorithm: str, decay: float, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    flat = FlatModel(net().to(dtype))
    ours = server(flat.flat_params(), algorithm=algorithm, ema=decay)
    assert torch.equal(ours.evaluated(), ours.params), "before the first gradient"
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    outstanding = ours.start()
    for number in range(25):
        outstanding = drive(ours, 1, outstanding, seed=number)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), flat.params.views(ours.params).values(), strict=True):
                parameter.copy_(value)
        theirs.update_parameters(model)
        expected = torch.cat([each.detach().reshape(-1) for each in theirs.module.parameters()])
        assert torch.equal(ours.evaluated(), expected)
    assert not torch.equal(ours.evaluated(), ours.params)


def test_a_vector_that_is_handed_out_never_changes() -> None:
    ours = server(torch.arange(5.0), ema=0.9)
    outstanding = drive(ours, 3, ours.start())
    evaluated, sent = ours.evaluated(), outstanding[0].params
    before = evaluated.clone(), sent.clone()
    drive(ours, 9, outstanding)
    assert torch.equal(evaluated, before[0])
    assert torch.equal(sent, before[1]), "workers are sent the parameters"
    assert not torch.equal(ours.evaluated(), before[0])


@pytest.mark.parametrize("algorithm", parts("algorithm"))
def test_parameters_are_those_of_a_server_without_an_average(algorithm: str) -> None:
    plain, averaged = (server(torch.linspace(-1, 1, 9), algorithm=algorithm, ema=ema) for ema in (None, 0.9))
    for each in (plain, averaged):
        drive(each, 20, each.start())
    assert torch.equal(plain.params, averaged.params)
    assert torch.equal(plain.evaluated(), plain.params)


def from_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_server_that_loads_the_state_goes_on_to_the_bit() -> None:
    whole, again = (server(torch.linspace(-1, 1, 9), ema=0.9) for _ in range(2))
    outstanding = drive(whole, 11, whole.start())
    again.load_state_dict(from_file(whole.state_dict(replies=True)))
    copies = list(outstanding)
    drive(whole, 20, outstanding, seed=1)
    drive(again, 20, copies, seed=1)
    assert torch.equal(whole.evaluated(), again.evaluated())
    assert torch.equal(whole.params, again.params)


def test_an_average_begins_where_the_state_has_none() -> None:
    without, ours = server(torch.linspace(-1, 1, 9)), server(torch.linspace(-1, 1, 9), ema=0.9)
    drive(without, 11, without.start())
    ours.load_state_dict(from_file(without.state_dict()))
    assert torch.equal(ours.evaluated(), without.params)
    outstanding = drive(ours, 1, ours.start())
    assert torch.equal(ours.evaluated(), ours.params), "as with the first gradient of a run"
    drive(ours, 1, outstanding)
    assert not torch.equal(ours.evaluated(), ours.params)
    without.load_state_dict(from_file(ours.state_dict()))  # and one that is not wanted is left out
    assert torch.equal(without.evaluated(), ours.params)


def test_gradients_that_are_not_applied_do_not_count() -> None:
    ours = server(torch.linspace(-1, 1, 9), ema=0.9)
    outstanding = drive(ours, 3, ours.start())
    before = ours.evaluated()
    reply = outstanding.pop(0)
    assert reply.ticket is not None
    ours.receive(Push(worker=reply.worker, ticket=reply.ticket, stamp=reply.stamp, grad=torch.full((9,), torch.nan)))
    assert torch.equal(ours.evaluated(), before)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"^ema: got .*, expected a number in \(0, 1\)$"):
        server(torch.zeros(3), ema=decay)
