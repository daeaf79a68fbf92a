"""A loop of the user's own whose model is on a GPU: it trains as plain PyTorch does, and all that is kept is on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.own_loops import TICKETS, Normed, batch, joined, plain


def loss_of(model: torch.nn.Module, ticket: int) -> torch.Tensor:
    """The loss of a ticket's batch, on the model's device."""
    device = next(model.parameters()).device
    inputs, targets = (each.to(device) for each in batch(ticket))
    return torch.nn.functional.cross_entropy(model(inputs), targets)


def test_a_model_on_the_gpu_trains_as_plain_pytorch(gpu: torch.device, tmp_path: Path) -> None:
    model = Normed().to(gpu)
    worker, evaluated = joined(model, tmp_path), list[str]()

    @worker.evaluate_with
    def evaluate(model: torch.nn.Module) -> torch.Tensor:
        evaluated.append(str(next(model.parameters()).device))
        return loss_of(model, 99)

    assert callable(evaluate), "it stays what it was"
    losses = list[float]()
    for work in worker:
        loss = loss_of(model, work.ticket)
        loss.backward()
        worker.push(loss)
        losses.append(loss.item())
    assert len(losses) == TICKETS
    assert set(evaluated) == {str(gpu)}
    expected = plain(Normed(), lambda model, ticket: loss_of(model, ticket).backward())
    for (name, one), (_, two) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert one.device == gpu, name
        torch.testing.assert_close(one.cpu(), two, rtol=1e-4, atol=1e-5)
    saved = torch.load(next((tmp_path / "run").glob("checkpoints/*/model.pt")))
    assert {str(each.device) for each in saved.values()} == {"cpu"}


def test_a_model_on_two_devices_is_refused(gpu: torch.device, tmp_path: Path) -> None:
    model = Normed()
    model.net.to(gpu)
    with pytest.raises(
        ValueError, match=r"^model: got net\.0\.weight on cuda:0 and norm\.weight on cpu in join\(\), expected all"
    ):
        joined(model, tmp_path)
