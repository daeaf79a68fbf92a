"""The flat model and the worker against plain PyTorch: gradients, clipping, decay, statistics, and that nothing is kept."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from ormo_rpc.algorithms.groups import uniform
from ormo_rpc.algorithms.local_sgd import LocalSGD
from ormo_rpc.composing import compose
from ormo_rpc.data import ArraySplit, Epochs, MapSplit
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models import CNN, MLP, ResNet20
from ormo_rpc.models.flat import FlatModel, Layout, sha256
from ormo_rpc.options import find
from ormo_rpc.runtimes.job import Job
from ormo_rpc.tasks.regression import Regression
from ormo_rpc.worker.graphs import GraphWorker
from ormo_rpc.worker.worker import Worker

SAMPLES, BATCH, SIDE = 21, 4, 8  # five batches of four and one of a single sample
EPOCHS = Epochs(SAMPLES, BATCH, seed=0)


def with_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 6), nn.BatchNorm1d(6), nn.Linear(6, 10)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(hidden=7, depth=2, dropout=0.4).build((1, SIDE, SIDE), 10),
    "cnn": lambda: CNN(dropout=0.3).build((1, SIDE, SIDE), 10),
    "resnet20": lambda: ResNet20().build((1, SIDE, SIDE), 10),
    "norm": with_norm,
}


def data() -> ArraySplit:
    generator = torch.Generator().manual_seed(6)
    pixels = torch.randint(0, 256, (SAMPLES, 1, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (SAMPLES,), generator=generator)
    return ArraySplit(pixels, labels, scale=255, mean=[0.5], std=[0.5], augment=True)


def module(name: str) -> nn.Module:
    torch.manual_seed(11)
    return MODELS[name]()


def worker(name: str, *, seed: int = 0, weight_decay: float = 0.0, clip_norm: float | None = None) -> Worker:
    model = FlatModel(module(name))
    return Worker(
        model,
        data(),
        Epochs(SAMPLES, BATCH, seed),
        find("algorithm", "asgd")(),
        seed=seed,
        groups=uniform(model.params.size, weight_decay),
        clip_norm=clip_norm,
    )


def reply(ticket: int | None, params: Tensor) -> Reply:
    return Reply(worker=2, ticket=ticket, stamp=5, params=params, lr=0.1, steps=1, incarnation=3)


def weights(name: str) -> Tensor:
    """Other parameters than the ones that the worker's own model began with."""
    flat = nn.utils.parameters_to_vector(module(name).parameters()).detach()
    return flat + 0.01 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(4))


def copied(push: Push) -> tuple[Tensor, dict[str, Tensor], float | None]:
    return push.grad.clone(), {name: value.clone() for name, value in push.buffers.items()}, push.loss


def without_chance(name: str) -> Worker:
    """A worker whose gradient plain PyTorch can redo: neither dropout nor augmentation."""
    made = worker(name)
    assert isinstance(made.data, ArraySplit)
    made.data.augment = False
    for layer in made.model.module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return made


def plain(name: str, params: Tensor, ticket: int) -> tuple[nn.Module, Tensor]:
    """The module in training mode with these weights and the gradient of the ticket's batch in it, and the loss."""
    net = module(name).train()
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    nn.utils.vector_to_parameters(params.clone(), net.parameters())
    split, indices = data(), EPOCHS.indices(ticket)
    loss = functional.cross_entropy(net((split.images[indices].float() / 255 - 0.5) / 0.5), split.labels[indices])
    loss.backward()
    return net, loss.detach()


def gradient(net: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.reshape(-1) for parameter in net.parameters() if parameter.grad is not None])


# -- gradients and views -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradient_and_loss_are_those_of_the_plain_model(name: str) -> None:
    made, params = without_chance(name), weights(name)
    for ticket in (3, 1):
        push = made.compute(reply(ticket, params))
        net, loss = plain(name, params, ticket)
        torch.testing.assert_close(push.grad, gradient(net))
        assert push.loss == pytest.approx(loss.item(), rel=1e-5)
        assert push.grad.abs().max() > 1e-3
        assert (push.worker, push.ticket, push.stamp, push.samples, push.incarnation) == (2, ticket, 5, BATCH, 3)


def test_the_last_batch_of_an_epoch_is_smaller_and_says_so() -> None:
    assert without_chance("mlp").compute(reply(5, weights("mlp"))).samples == 1  # 21 = 5 * 4 + 1


@pytest.mark.parametrize("name", ["mlp", "resnet20"])
def test_nothing_is_copied(name: str) -> None:
    made, params = worker(name), weights(name)
    before = params.clone()
    push = made.compute(reply(0, params))
    offset = 0
    for parameter in made.model.module.parameters():
        assert parameter.grad is not None
        assert parameter.data_ptr() == params.data_ptr() + 4 * offset  # float32 has 4 bytes
        assert parameter.grad.data_ptr() == made.payload.data_ptr() + 4 * offset
        offset += parameter.numel()
    assert push.grad.data_ptr() == made.payload.data_ptr()
    assert push.grad.shape == params.shape == (offset,)
    end = made.payload.data_ptr() + 4 * made.payload.numel()
    for buffer in push.buffers.values():
        assert made.payload.data_ptr() + 4 * offset < buffer.data_ptr() < end
    assert torch.equal(params, before)


def test_frozen_parameters_stay_out() -> None:
    first, second = nn.Linear(4, 3).requires_grad_(False), nn.Linear(3, 2)
    model = FlatModel(nn.Sequential(first, second))
    assert model.params.shapes == {"1.weight": (2, 3), "1.bias": (2,)}
    frozen = first.weight.clone()
    model.bind(torch.zeros(8))
    assert torch.equal(first.weight, frozen)
    assert not second.weight.any()


def test_a_layout_gives_views_in_order() -> None:
    layout = Layout({"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(4)})
    views = layout.views(torch.arange(11.0))
    assert layout.size == 11  # 6 + 1 + 4
    assert {name: view.tolist() for name, view in views.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "b": 6,
        "c": [7, 8, 9, 10],
    }
    assert Layout({}).views(torch.zeros(0)) == {}


def test_sha256_is_that_of_the_bytes() -> None:
    # printf '\x00\x00\x80\x3f\x00\x00\x00\x40' | sha256sum: 1.0 and 2.0 in little-endian float32.
    expected = "b9c80b5adeca450753a16950c3cc655d271f7bef7a485bc83f112b72fef21d37"
    assert sha256(torch.tensor([1.0, 2.0])) == sha256(torch.tensor([1.0]), torch.tensor([2.0])) == expected
    # Of a view, its values in order rather than the memory under it.
    assert sha256(torch.tensor([[1.0, 5.0], [2.0, 6.0]])[:, 0]) == expected


# -- clipping and decay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [None, 0.05, 1e3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_clipping_and_decay_make_the_step_of_torchs_sgd(clip_norm: float | None, weight_decay: float) -> None:
    made, params, lr = without_chance("mlp"), weights("mlp"), 0.5
    made.clip_norm, made.groups = clip_norm, uniform(params.numel(), weight_decay)
    net, _ = plain("mlp", params, 2)
    if clip_norm is not None:
        norm = nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
        assert (norm.item() > clip_norm) == (clip_norm < 1)  # one of the two cases clips, the other does not
    torch.optim.SGD(net.parameters(), lr=lr, weight_decay=weight_decay).step()
    stepped = params - lr * made.compute(reply(2, params)).grad
    # torch divides by norm + 1e-6 where we divide by the norm: a difference of 1e-6 / norm of the step.
    torch.testing.assert_close(stepped, nn.utils.parameters_to_vector(net.parameters()).detach(), rtol=1e-5, atol=1e-6)


# -- batch norm --------------------------------------------------------------------------------------------------------


def test_statistics_are_the_batchs_own_mean_and_unbiased_variance() -> None:
    made, params = without_chance("norm"), weights("norm")
    push = made.compute(reply(1, params))
    net, _ = plain("norm", params, 1)
    assert isinstance(net, nn.Sequential)
    split, indices = data(), EPOCHS.indices(1)
    activation = net[0]((split.images[indices].float() / 255 - 0.5) / 0.5).detach()
    assert {name for name, value in push.buffers.items() if value.is_floating_point()} == {
        *("1.running_mean", "1.running_var", "5.running_mean", "5.running_var")
    }
    assert {name: int(value) for name, value in push.buffers.items() if not value.is_floating_point()} == {
        "1.num_batches_tracked": 1,
        "5.num_batches_tracked": 1,
    }
    torch.testing.assert_close(push.buffers["1.running_mean"], activation.mean((0, 2, 3)))
    torch.testing.assert_close(push.buffers["1.running_var"], activation.var((0, 2, 3), unbiased=True))
    # And in the words of the plain model, which began at mean 0 and variance 1 with momentum 0.1.
    state = net.state_dict()
    torch.testing.assert_close(0.1 * push.buffers["5.running_mean"], state["5.running_mean"])
    torch.testing.assert_close(0.9 + 0.1 * push.buffers["5.running_var"], state["5.running_var"])


def test_nan_does_not_leak_into_the_next_ticket() -> None:
    made, params = worker("norm"), weights("norm")
    expected = copied(made.compute(reply(1, params)))
    bad = made.compute(reply(0, torch.full_like(params, math.nan)))
    assert bad.grad.isnan().any()
    assert all(value.isnan().any() for value in bad.buffers.values() if value.is_floating_point())
    grad, buffers, loss = copied(made.compute(reply(1, params)))
    assert torch.equal(grad, expected[0])
    assert all(torch.equal(buffers[name], value) for name, value in expected[1].items())
    assert loss == expected[2]


def test_export_is_a_state_dict_of_plain_pytorch() -> None:
    model, params = FlatModel(module("norm")), weights("norm")
    buffers = {name: torch.full_like(value, 7) for name, value in model.buffers.copy().items()}
    buffers["5.running_var"].fill_(0.25)
    state = model.state_dict(params, buffers)
    net = module("norm")
    net.load_state_dict(state)
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), params)
    assert net.state_dict()["5.num_batches_tracked"] == 7
    assert torch.equal(net.state_dict()["5.running_var"], torch.full((6,), 0.25))
    kept = copy.deepcopy(state)
    model.bind(torch.zeros_like(params))
    model.buffers.load({name: value + 1 for name, value in buffers.items()})
    assert all(torch.equal(state[name], value) for name, value in kept.items())  # a private copy


# -- nothing is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_push_of_a_ticket_does_not_depend_on_earlier_tickets(name: str) -> None:
    params = weights(name)
    made = worker(name, weight_decay=0.1, clip_norm=0.5)
    first = copied(made.compute(reply(3, params)))
    made.warm_up()
    made.compute(reply(7, params * 2))
    torch.rand(5)  # and wherever the global generator stands
    for again in (made, worker(name, weight_decay=0.1, clip_norm=0.5)):
        grad, buffers, loss = copied(again.compute(reply(3, params)))
        assert torch.equal(grad, first[0])
        assert all(torch.equal(buffers[key], value) for key, value in first[1].items())
        assert loss == first[2]


def test_another_ticket_or_seed_draws_another_batch_dropout_and_augmentation() -> None:
    params = weights("mlp")
    here = copied(worker("mlp").compute(reply(3, params)))[0]
    assert not torch.equal(here, worker("mlp").compute(reply(4, params)).grad)
    assert not torch.equal(here, worker("mlp", seed=1).compute(reply(3, params)).grad)
    # Of the same batch, too: the epochs keep their seed, so only dropout and augmentation differ, then each of them alone.
    for augment, dropout in ((True, True), (True, False), (False, True)):
        grads: list[Tensor] = []
        for seed in (0, 1):
            made = worker("mlp", seed=seed)
            made.epochs = EPOCHS
            assert isinstance(made.data, ArraySplit)
            made.data.augment = augment
            for layer in made.model.module.modules():
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.4 if dropout else 0.0
            grads.append(made.compute(reply(3, params)).grad.clone())
        assert not torch.equal(*grads)


def test_the_global_generator_is_left_alone() -> None:
    made = worker("mlp")
    before = torch.get_rng_state()
    made.warm_up()
    made.compute(reply(3, weights("mlp")))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_reply_without_a_ticket_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"\Aa reply without a ticket ends the worker"):
        worker("mlp").compute(reply(None, weights("mlp")))


@pytest.mark.parametrize("name", ["ormo", "easgd"])
def test_batches_that_are_loaded_ahead_are_those_that_would_be_made(name: str) -> None:
    """In another thread, while torch's global generator is in use; a batch that is not used is not kept."""
    data = ArraySplit(
        torch.arange(80, dtype=torch.uint8).view(20, 1, 2, 2), torch.arange(20) % 3, scale=80, mean=[0.5], std=[1], augment=True
    )
    made: list[int] = []

    class Counted(ArraySplit):
        def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
            made.append(len(indices))
            return super().batch(indices, generator)

    def worker(split: ArraySplit) -> Worker:
        linear = nn.Linear(4, 3)
        torch.nn.init.ones_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), linear)
        return Worker(FlatModel(module), split, Epochs(20, 6, 1), find("algorithm", name)(), seed=1, momentum=0.9)

    counted = Counted(data.images, data.labels, scale=80, mean=[0.5], std=[1], augment=True)
    plain, ahead = worker(data), worker(counted)
    params = plain.model.flat_params()
    for ticket in (0, 3, 1):
        reply = Reply(worker=0, ticket=ticket, stamp=0, params=params, lr=0.1, steps=2, incarnation=0)
        thread = threading.Thread(target=ahead.load, args=(reply,))
        thread.start()
        thread.join(10)
        torch.rand(3)
        loaded = len(made)
        assert torch.equal(ahead.compute(reply).grad, plain.compute(reply).grad)
        assert len(made) == loaded, "nothing is made twice"


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_loss_of_a_ticket_with_local_steps_is_a_mean_over_its_samples(recorded: bool, steps: int) -> None:
    inputs, targets = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(7.0).double()
    net = nn.Linear(3, 1).double()
    with torch.no_grad():
        expected = (net(inputs)[:, 0] - targets).square().mean().item()  # 7 samples in parts of 2, 2, 2 and 1, at one place
    split = MapSplit(TensorDataset(inputs, targets))
    arguments, task = (split, Epochs(7, 12, 0), LocalSGD(local_steps=steps)), Regression()
    worker = (
        GraphWorker(FlatModel(copy.deepcopy(net)), FlatModel(net), *arguments, seed=0, task=task)
        if recorded
        else Worker(FlatModel(net), *arguments, seed=0, task=task)
    )
    params = worker.model.flat_params()
    reply = Reply(worker=0, ticket=0, stamp=0, params=params, lr=0.0, steps=steps, incarnation=0)
    assert worker.compute(reply).loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pure", [False, True])
def test_a_data_set_that_draws_from_torch_itself_is_not_loaded_ahead(pure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    split = MapSplit([(torch.zeros(4), 0)] * 20)
    worker = Worker(FlatModel(nn.Linear(4, 3)), split, Epochs(20, 6, 1), find("algorithm", "ormo")(), seed=1)
    asked = list[torch.Tensor]()

    def batch(indices: torch.Tensor, _generator: object) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(indices)
        return torch.zeros(6, 4), indices

    monkeypatch.setattr(split, "PURE", pure, raising=False)
    monkeypatch.setattr(split, "batch", batch)
    worker.load(Reply(worker=0, ticket=0, stamp=0, params=worker.model.flat_params(), lr=0.1, steps=1, incarnation=0))
    assert bool(asked) == pure


def test_channels_last_is_done_on_a_cpu_too() -> None:
    # Of several channels: one channel is the first and the last.
    images = ("dataset._target_=benchmarks.gpu_images.images", "+dataset.side=8", "+dataset.channels=3", "+dataset.count=64")
    config = ("runtime=sim", "workers=1", "logger=none", "worker.device=cpu", *images, "model=cnn", "model.dropout=0")
    pushes, formats = list[Push](), list[bool]()
    for last in (False, True):
        job = Job(compose([*config, f"worker.channels_last={last}".lower()]))
        made = job.worker_here()
        convolution = next(each for each in made.model.module.modules() if isinstance(each, nn.Conv2d))
        convolution.register_forward_hook(
            lambda _module, _inputs, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
        )
        pushes.append(made.compute(job.server(lambda _: None, lambda: 0.0).start()[0]))
    assert formats == [False, True]
    torch.testing.assert_close(pushes[1].grad, pushes[0].grad)
    assert pushes[1].loss == pytest.approx(pushes[0].loss)
