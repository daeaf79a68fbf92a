"""Every task, in each of its forms: loss, gradient and metrics against plain PyTorch and loops over the whole split."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from ormo_rpc import train
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.data import DataSet, Epochs, trees
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.options import find, parts
from ormo_rpc.seeding import seeded
from ormo_rpc.tasks import Task
from ormo_rpc.worker.evaluation import Evaluator
from ormo_rpc.worker.worker import Worker
from tests.support.tasks import ROWS, SAMPLES, Trees, data, network

LR, EPOCHS, BATCH = 0.05, 2, 5
every_row = pytest.mark.parametrize("row", ROWS)


def task(row: str) -> Task:
    return parse_config({"task": dict(ROWS[row].task)}).task


def in_double(tree: Any) -> Any:
    return trees.map_tensors(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


def double_model(row: str) -> nn.Module:
    torch.manual_seed(3)
    return network(row).double()


def flat_grad(module: nn.Module) -> torch.Tensor:
    return torch.cat([each.grad.reshape(-1) for each in module.parameters() if each.grad is not None])


def pushed(row: str, accumulate: int) -> tuple[Push, torch.Tensor]:
    model, samples = FlatModel(double_model(row)), Trees(in_double(ROWS[row].samples()))
    epochs = Epochs(SAMPLES, SAMPLES, seed=0)
    worker = Worker(model, samples, epochs, find("algorithm", "asgd")(), seed=0, task=task(row), accumulate=accumulate)
    reply = Reply(worker=0, ticket=0, stamp=0, params=model.flat_params(), lr=0.1, steps=1, incarnation=0)
    push = worker.compute(reply)
    return push, push.grad.clone()


def test_every_registered_task_has_a_row() -> None:
    named = {task(row).name for row in ROWS}
    assert named == set(parts("task")) - {"own_loop"}  # which has no loss


@every_row
@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_loss_and_gradient_are_those_of_plain_pytorch(row: str, accumulate: int) -> None:
    push, grad = pushed(row, accumulate)
    module = double_model(row)
    loss = ROWS[row].loss(module, in_double(ROWS[row].samples()))
    loss.backward()
    assert push.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(grad, flat_grad(module), rtol=1e-9, atol=1e-12)


@every_row
def test_counts_of_the_parts_are_that_of_the_whole(row: str) -> None:
    samples, made = ROWS[row].samples(), task(row)
    parts_of_it = [trees.narrow(samples, start, start + 4) for start in range(0, SAMPLES, 4)]
    assert sum(made.count(part) for part in parts_of_it) == made.count(samples)


@every_row
@pytest.mark.parametrize("size", [1, 4, 500])
def test_metrics_are_means_over_the_whole_split(row: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ormo_rpc.worker.evaluation.BATCH_SIZE", size)
    samples, model = in_double(ROWS[row].samples()), FlatModel(double_model(row))
    split = Trees(samples)
    found = Evaluator(model, DataSet(split, split, (6,), 4), task(row), size)(model.flat_params(), {}).test
    module = double_model(row).eval()
    with torch.no_grad():
        expected = {"loss": ROWS[row].loss(module, samples).item(), **ROWS[row].metrics(module, samples)}
    assert found == pytest.approx(expected, rel=1e-9)
    assert next(iter(found)) == "loss"


@every_row
def test_declared_metrics_are_those_of_an_evaluation(row: str) -> None:
    made, samples = task(row), ROWS[row].samples()
    torch.manual_seed(3)
    with torch.no_grad():
        means = made.means(made.sums(made.forward(network(row).eval(), samples), samples))
    declared = [metric.name for metric in made.metrics()]
    assert list(means)[: len(declared)] == declared
    if made.name != "custom":
        assert len(means) == len(declared)


@every_row
def test_a_run_of_one_worker_is_plain_sgd(row: str, tmp_path: Path) -> None:
    target = "tests.support.tasks"
    summary = train(
        {
            "runtime": "sim",
            "logger": "none",
            "workers": 1,
            "algorithm": "asgd",
            "task": dict(ROWS[row].task),
            "dataset": {"_target_": f"{target}.data", "row": row},
            "model": {"_target_": f"{target}.network", "row": row},
            "train": {"lr": LR, "epochs": EPOCHS, "batch_size": BATCH},
        },
        run_dir=tmp_path,
    )
    with seeded(0, "initial weights", 0):
        module = network(row)
    optimizer, split, epochs = torch.optim.SGD(module.parameters(), LR), data(row).train, Epochs(SAMPLES, BATCH, 0)
    for ticket in range(EPOCHS * epochs.batches_per_epoch):
        optimizer.zero_grad()
        batch = split.batch(epochs.indices(ticket), None)
        if task(row).count(batch):
            ROWS[row].loss(module, batch).backward()
            optimizer.step()
    with torch.no_grad():
        loss = ROWS[row].loss(module.eval(), split.batch(torch.arange(SAMPLES), None)).item()
    assert summary["status"] == "completed"
    assert summary["test_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("keys", "targets", "loss"),
    [
        ({"name": "regression"}, "far", functional.mse_loss),
        ({"_target_": "torch.nn.functional.mse_loss"}, "far", functional.mse_loss),
        ({"_target_": "torch.nn.CrossEntropyLoss"}, "classes", functional.cross_entropy),
    ],
)
def test_under_autocast_losses_and_targets_are_float32(keys: dict[str, Any], targets: str, loss: Any) -> None:
    torch.manual_seed(3)
    inputs = torch.randn(SAMPLES, 6)
    batch = (inputs, inputs[:, :4] + 1000.3 if targets == "far" else torch.arange(SAMPLES) % 4)
    made, split, module = parse_config({"task": keys}).task, Trees(batch), nn.Linear(6, 4)
    model = FlatModel(copy.deepcopy(module))
    evaluator = Evaluator(model, DataSet(split, split, (6,), 4), made, 5, torch.bfloat16)
    found = evaluator(model.flat_params(), {}).test["loss"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = module(inputs)
        expected = loss(output, batch[1]).item()
        trained = made.loss(output, batch).item()
    assert output.dtype is torch.bfloat16
    assert found == pytest.approx(expected, rel=1e-6)
    assert trained == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shapes", [((5,), (5, 1)), ((5, 1), (5,))])
def test_a_loss_of_torch_never_broadcasts_targets(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    made = parse_config({"task": {"_target_": "torch.nn.functional.mse_loss"}}).task
    with pytest.raises(ValueError, match="would be broadcast"):
        made.check(torch.zeros(shapes[0]), (torch.zeros(5, 6), torch.zeros(shapes[1])))
