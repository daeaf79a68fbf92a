"""A script that runs alone, and its moving average, early stop, best model and export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ormo_rpc
from ormo_rpc.errors import LoopMisused
from ormo_rpc.export import export
from ormo_rpc.storage import best

QUIET = ("logger=none", "algorithm=asgd", "train.lr=0.1")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def loss_of(model: nn.Module, ticket: int) -> torch.Tensor:
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(ticket))
    return (model(inputs).squeeze(1) - inputs.sum(1)).square().mean()


def test_the_average_is_that_of_a_plain_script_and_is_evaluated_kept_and_exported(tmp_path: Path) -> None:
    plain = net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    averaged = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for ticket in range(12):
        optimizer.zero_grad()
        loss_of(plain, ticket).backward()
        optimizer.step()
        averaged.update_parameters(plain)

    model = net()
    options = (*QUIET, "evaluate.ema=0.9", "checkpoint.best=true", "evaluate.every=4")
    worker = ormo_rpc.join(model, *options, total_tickets=12, run_dir=tmp_path / "run")
    seen = list[dict[str, torch.Tensor]]()

    def evaluate(each: nn.Module) -> float:
        seen.append({name: value.clone() for name, value in each.state_dict().items()})
        return loss_of(each, 1000).item()

    worker.evaluate_with(evaluate)
    for work in worker:
        loss = loss_of(model, work.ticket)
        loss.backward()
        worker.push(loss)
    assert worker.summary is not None
    assert worker.summary["evaluated"] == "ema"
    assert len(seen) == 3
    expected = averaged.module.state_dict()
    assert all(torch.equal(seen[-1][name], value) for name, value in expected.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in plain.state_dict().items())

    record = best.read(tmp_path / "run")
    assert record is not None
    assert (record.iteration, record.evaluated, record.metric) == (12, "ema", "test_loss"), "the loss falls"
    for flag in (False, True):
        export(tmp_path / "run", tmp_path / f"{flag}.safetensors", best_model=flag)
        other = net()
        load_model(other, tmp_path / f"{flag}.safetensors")
        assert all(torch.equal(other.state_dict()[name], value) for name, value in expected.items())


def test_it_stops_early_by_what_its_evaluation_returns(tmp_path: Path) -> None:
    model, calls = net(), list[int]()
    worker = ormo_rpc.join(model, *QUIET, "evaluate.patience=2", total_tickets=100, run_dir=tmp_path / "run")

    @worker.evaluate_with(every=5)
    def evaluate(_: nn.Module) -> dict[str, float]:  # pyright: ignore[reportUnusedFunction] # the worker calls it
        calls.append(len(calls))
        return {"loss": [3.0, 1.0, 2.0, 2.0, 2.0][len(calls) - 1], "accuracy": 0.5}

    for work in worker:
        loss_of(model, work.ticket).backward()
        worker.push()
    assert worker.summary is not None
    # Evaluated at 5, 10, 15 and 20; one ticket is out when the fourth has come.
    assert (worker.summary["status"], worker.summary["iterations"], len(calls)) == ("completed", 21, 5)
    assert "no test_loss was better than the 1 of iteration 10: ended after" in worker.summary["reason"]
    assert worker.summary["best"]["iteration"] == 10


@pytest.mark.parametrize("choice", ["evaluate.patience=2", "evaluate.targets=[0.5]"])
def test_a_choice_without_an_evaluation_is_refused(choice: str, tmp_path: Path) -> None:
    worker = ormo_rpc.join(net(), *QUIET, choice, total_tickets=5, run_dir=tmp_path / "run")
    with pytest.raises(LoopMisused, match=r"nothing is evaluated, expected evaluate_with\(\) before the loop"):
        next(iter(worker))
