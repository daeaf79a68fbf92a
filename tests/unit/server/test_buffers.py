"""The running average on the server against torch's own batch norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ormo_rpc.server.buffers import RunningBuffers

BATCHES = 12


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 3, generator=generator) * 2 + 1 for size in (5, 9, 2, 7) * (BATCHES // 4)]


def statistics(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the batch statistics of a batch norm: the mean and the unbiased variance, here by their sums."""
    mean = batch.sum(0) / len(batch)
    return {"mean": mean, "var": ((batch - mean) ** 2).sum(0) / (len(batch) - 1)}


@pytest.mark.parametrize("momentum", [0.1, 0.4, 1.0, None])
def test_it_is_torchs_running_statistics_batch_by_batch(momentum: float | None) -> None:
    norm = nn.BatchNorm1d(3, momentum=momentum)
    initial = {"mean": torch.zeros(3), "var": torch.ones(3)}
    running = RunningBuffers(initial, {"mean": momentum, "var": momentum})
    for batch in batches():
        norm(batch)
        running.update(statistics(batch))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        torch.testing.assert_close(running.average["mean"], norm.running_mean)
        torch.testing.assert_close(running.average["var"], norm.running_var)
    assert torch.equal(initial["mean"], torch.zeros(3))  # copied, not written to


def test_without_momentum_it_is_the_mean_of_all_batches() -> None:
    running = RunningBuffers({"mean": torch.full((3,), 99.0)}, {"mean": None})
    means = [statistics(batch)["mean"] for batch in batches()]
    for mean in means:
        running.update({"mean": mean})
    torch.testing.assert_close(running.average["mean"], torch.stack(means).mean(0))


def test_each_buffer_has_its_own_momentum() -> None:
    running = RunningBuffers({"a": torch.zeros(1), "b": torch.zeros(1)}, {"a": 0.5, "b": None})
    for value in (8.0, 4.0):
        running.update({"a": torch.tensor([value]), "b": torch.tensor([value])})
    # a: 0.5 * 8 = 4, then 0.5 * 4 + 0.5 * 4 = 4. b: (8 + 4) / 2 = 6.
    assert (running.average["a"].item(), running.average["b"].item()) == (4.0, 6.0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_saved_buffers_continue_where_they_were_saved(momentum: float | None) -> None:
    whole, first = (RunningBuffers({"mean": torch.zeros(3)}, {"mean": momentum}) for _ in range(2))
    values = [{"mean": statistics(batch)["mean"]} for batch in batches()]
    for value in values:
        whole.update(value)
    for value in values[:5]:
        first.update(value)
    state = first.state_dict()
    first.update(values[0])  # the state is a copy: this does not reach it
    second = RunningBuffers({"mean": torch.full((3,), 7.0)}, {"mean": momentum})
    second.load_state_dict(state)
    for value in values[5:]:
        second.update(value)
    assert torch.equal(second.average["mean"], whole.average["mean"])


def test_a_copy_never_changes() -> None:
    running = RunningBuffers({"mean": torch.zeros(2)}, {"mean": 0.5})
    copy = running.copy()
    running.update({"mean": torch.ones(2)})
    assert torch.equal(copy["mean"], torch.zeros(2))
    assert torch.equal(running.average["mean"], torch.full((2,), 0.5))
