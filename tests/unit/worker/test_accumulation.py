"""Gradient accumulation: a batch in parts has the gradient that plain PyTorch computes of the whole batch."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.data import Epochs, MapSplit, trees
from ormo_rpc.errors import ConfigError
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.options import find
from ormo_rpc.runtimes import prepare
from ormo_rpc.tasks import Classification
from ormo_rpc.worker.accumulation import micro_batches
from ormo_rpc.worker.backward import Backward
from ormo_rpc.worker.worker import Worker
from tests.support.own_splits import Tensors

SAMPLES, CLASSES, IGNORED = 11, 4, -100


def rows(*shape: int, ignored: str = "none") -> Tensors:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 6, *shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (SAMPLES, *shape), generator=generator)
    if ignored == "many":  # of the first samples nearly all, so that counts of the parts differ
        targets[:5] = IGNORED
        targets.view(-1)[::4] = IGNORED
    if ignored == "all":
        targets.fill_(IGNORED)
    return Tensors(inputs, targets)


def pushed(module: nn.Module, data: Tensors, accumulate: int, ticket: int = 0, size: int = SAMPLES) -> Push:
    model = FlatModel(module)
    epochs = Epochs(SAMPLES, size, seed=0)
    worker = Worker(model, data, epochs, find("algorithm", "asgd")(), seed=0, accumulate=accumulate)
    reply = Reply(worker=0, ticket=ticket, stamp=0, params=model.flat_params(), lr=0.1, steps=1, incarnation=0)
    push = worker.compute(reply)
    return dataclasses.replace(
        push, grad=push.grad.clone(), buffers={name: each.clone() for name, each in push.buffers.items()}
    )


def network(*layers: nn.Module, dense: bool = False) -> nn.Module:
    torch.manual_seed(2)
    first = nn.Conv2d(6, 8, 1) if dense else nn.Linear(6, 8)
    last = nn.Conv2d(8, CLASSES, 1) if dense else nn.Linear(8, CLASSES)
    return nn.Sequential(first, *layers, nn.Tanh(), last).double()


def plain(module: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    loss = functional.cross_entropy(module(inputs), targets)
    loss.backward()
    return loss.item(), torch.cat([each.grad.reshape(-1) for each in module.parameters() if each.grad is not None])


@pytest.mark.parametrize("ignored", ["none", "many"])
@pytest.mark.parametrize("shape", [(), (3, 2)])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 11, 50])
def test_loss_and_gradient_are_those_of_plain_pytorch_on_the_whole_batch(
    parts: int, shape: tuple[int, ...], ignored: str
) -> None:
    data = rows(*shape, ignored=ignored)
    loss, grad = plain(network(dense=bool(shape)), data.inputs, data.targets)
    push = pushed(network(dense=bool(shape)), data, parts)
    assert push.loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(push.grad, grad, rtol=1e-10, atol=1e-12)


def test_the_smaller_last_batch_of_an_epoch_has_fewer_parts() -> None:
    data, epochs = rows(), Epochs(SAMPLES, 4, seed=0)
    indices = epochs.indices(2)  # 3 of 11 samples
    loss, grad = plain(network(), data.inputs[indices], data.targets[indices])
    push = pushed(network(), data, 4, ticket=2, size=4)
    assert (push.loss, push.samples) == (pytest.approx(loss, rel=1e-12), 3)
    torch.testing.assert_close(push.grad, grad, rtol=1e-10, atol=1e-12)


def test_a_batch_in_which_no_target_counts_has_no_loss_and_a_gradient_of_zero() -> None:
    push = pushed(network(), rows(ignored="all"), 3)
    assert push.loss is None
    assert not push.grad.any()


def test_parts_differ_by_one_sample_at_most_and_have_all_of_them() -> None:
    batch = {"inputs": torch.arange(22).view(11, 2), "labels": torch.zeros(11).long()}
    cut = list(micro_batches(Classification(), batch, 4))
    assert [trees.size(part) for _, part, _ in cut] == [2, 3, 3, 3]
    assert torch.equal(torch.cat([part["inputs"] for _, part, _ in cut]), batch["inputs"])
    assert sum(weight for _, _, weight in cut) == pytest.approx(1)


def test_batch_norms_see_each_part_by_itself() -> None:
    data = rows()
    order = Epochs(SAMPLES, SAMPLES, seed=0).indices(0)
    push = pushed(network(nn.BatchNorm1d(8)), data, 2)
    net = network(nn.BatchNorm1d(8))
    for start, stop in ((0, 5), (5, 11)):
        part = order[start:stop]
        (functional.cross_entropy(net(data.inputs[part]), data.targets[part]) * len(part) / SAMPLES).backward()
    grad = torch.cat([each.grad.reshape(-1) for each in net.parameters() if each.grad is not None])
    torch.testing.assert_close(push.grad, grad, rtol=1e-10, atol=1e-12)
    assert int(push.buffers["1.num_batches_tracked"]) == 2


def test_dropout_is_a_function_of_seed_ticket_and_part() -> None:
    data = Tensors(torch.ones(SAMPLES, 6, dtype=torch.float64), torch.zeros(SAMPLES).long())  # equal samples

    def grads(parts: int, ticket: int) -> Tensor:
        return pushed(network(nn.Dropout()), data, parts, ticket).grad

    assert torch.equal(grads(3, 0), grads(3, 0))
    assert not torch.allclose(grads(3, 0), grads(3, 1))
    seen: list[Tensor] = []
    net = network()
    net.register_forward_pre_hook(lambda *_: seen.append(torch.rand(())))
    pushed(net, data, 3)
    assert len({float(each) for each in seen}) == 3


# -- refusals ------------------------------------------------------------------------------------------------------------


class Contrastive(Classification):
    """A loss in which each sample is compared with all others of the batch."""

    def loss(self, output: Any, batch: Any) -> Tensor:
        del batch
        return functional.cross_entropy(output @ output.t(), torch.arange(len(output)))


def refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare.check(parse_config({**values, "logger": "none", "runtime": "sim"}), starts_server=True)


def test_more_parts_than_samples_are_refused() -> None:
    message = r"^worker\.accumulate: got 33, expected at most train\.batch_size=32: a part has a sample$"
    refused({"worker": {"accumulate": 33}}, message)


def test_a_loss_that_compares_samples_is_refused() -> None:
    message = r"^worker\.accumulate: got 4, expected 1: the loss of training batch 0 of digits is .*, and that of its parts .*"
    refused({"task": {"_target_": f"{__name__}.Contrastive"}, "worker": {"accumulate": 4}}, message)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_without_the_hooks_of_their_accumulation_are_those_of_backward(accumulate: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    split, module, idle = MapSplit(TensorDataset(inputs, targets)), nn.Linear(4, 3), nn.Parameter(torch.ones(2))
    parameters, found = [module.weight, module.bias, idle], list[list[torch.Tensor | None]]()
    called = list[torch.Tensor]()
    handle = module.weight.register_post_accumulate_grad_hook(called.append)
    for into in (None, parameters):
        module.zero_grad()
        backward = Backward(module, split, Classification(), seed=0, accumulate=accumulate, into=into)
        backward(torch.arange(8), 0)
        found.append([None if each.grad is None else each.grad.clone() for each in parameters])
        assert len(called) == accumulate, "of backward() alone"
    handle.remove()
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(cast("torch.Tensor", one), cast("torch.Tensor", other))
    assert found[0][2] is None
