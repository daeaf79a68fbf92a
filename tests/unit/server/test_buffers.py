"""The buffers on the server: averages against torch's own batch norm, counts, and newest values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ormo_rpc.server.buffer_rules import Rule, RuleKind
from ormo_rpc.server.buffers import RunningBuffers

BATCHES = 12
CALLS = torch.tensor(1)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 3, generator=generator) * 2 + 1 for size in (5, 9, 2, 7) * (BATCHES // 4)]


def statistics(batch: Tensor) -> dict[str, Tensor]:
    """Return what a push with one call reports: the mean and the unbiased variance, here by their sums."""
    mean = batch.sum(0) / len(batch)
    return {"mean": mean, "var": ((batch - mean) ** 2).sum(0) / (len(batch) - 1), "count": CALLS}


def of_norm(momentum: float | None) -> RunningBuffers:
    initial = {"mean": torch.zeros(3), "var": torch.ones(3), "count": torch.tensor(0)}
    average = Rule(RuleKind.average, momentum, "count")
    return RunningBuffers(initial, {"mean": average, "var": average, "count": Rule(RuleKind.count)})


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.4, 1.0, None])
def test_it_is_torchs_running_statistics_batch_by_batch(momentum: float | None) -> None:
    norm, running = nn.BatchNorm1d(3, momentum=momentum), of_norm(momentum)
    for number, batch in enumerate(batches(), 1):
        norm(batch)
        running.update(statistics(batch))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        torch.testing.assert_close(running.current["mean"], norm.running_mean)
        torch.testing.assert_close(running.current["var"], norm.running_var)
        assert running.current["count"] == number


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_several_calls_in_a_push_move_it_as_so_many_pushes(momentum: float | None) -> None:
    apart, together = of_norm(momentum), of_norm(momentum)
    apart.update(statistics(batches()[0]))
    together.update(statistics(batches()[0]))
    several = [statistics(batch) for batch in batches()[1:5]]
    for each in several:
        apart.update(each)
    # As the norm weights them: the newest one by m, the one before by m (1 - m), and so on; all alike without momentum.
    weights = torch.tensor([1.0 if momentum is None else momentum * (1 - momentum) ** age for age in (3, 2, 1, 0)])
    mean = {
        name: (torch.stack([each[name] for each in several]) * weights[:, None]).sum(0) / weights.sum()
        for name in ("mean", "var")
    }
    together.update({**mean, "count": torch.tensor(4)})
    for name in ("mean", "var", "count"):
        torch.testing.assert_close(together.current[name], apart.current[name])


def test_without_momentum_it_goes_on_from_the_calls_before_the_run() -> None:
    norm = nn.BatchNorm1d(3, momentum=None)
    for batch in batches()[:7]:
        norm(batch)
    running = of_norm(None)
    saved = norm.state_dict()
    running.load_state_dict({"mean": saved["running_mean"], "var": saved["running_var"], "count": saved["num_batches_tracked"]})
    norm(batches()[7])
    running.update(statistics(batches()[7]))
    assert norm.running_var is not None
    torch.testing.assert_close(running.current["var"], norm.running_var)


def test_each_buffer_has_its_own_rule_and_what_is_not_reported_stays() -> None:
    initial = {"a": torch.zeros(1), "b": torch.zeros(1), "n": torch.tensor(5), "flag": torch.tensor(False)}
    rules = {"a": Rule(RuleKind.average, 0.5), "n": Rule(RuleKind.count)}
    running = RunningBuffers(initial, rules)
    for value in (8.0, 4.0):
        running.update(
            {"a": torch.tensor([value]), "b": torch.tensor([value]), "n": torch.tensor(3), "flag": torch.tensor(True)}
        )
    running.update({"b": torch.tensor([float("inf")])})
    # a: 0.5 * 8 = 4, then 0.5 * 4 + 0.5 * 4 = 4; n: 5 + 3 + 3; b and flag have no rule, so the newest values.
    assert {name: value.tolist() for name, value in running.current.items()} == {
        "a": [4.0],
        "b": [float("inf")],
        "n": 11,
        "flag": True,
    }
    assert initial["n"] == 5, "copied, not written to"


def test_an_average_needs_a_momentum_or_a_count() -> None:
    with pytest.raises(ValueError, match="got an average without momentum and count, expected one of them"):
        Rule(RuleKind.average)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_saved_buffers_continue_where_they_were_saved(momentum: float | None) -> None:
    whole, first, second = (of_norm(momentum) for _ in range(3))
    values = [statistics(batch) for batch in batches()]
    for value in values:
        whole.update(value)
    for value in values[:5]:
        first.update(value)
    state = first.state_dict()
    first.update(values[0])  # the state is a copy: this does not reach it
    second.update(values[3])
    second.load_state_dict(state)
    for value in values[5:]:
        second.update(value)
    assert torch.equal(second.snapshot(), whole.snapshot())


def test_a_copy_never_changes() -> None:
    running = RunningBuffers({"mean": torch.zeros(2)}, {"mean": Rule(RuleKind.average, 0.5)})
    copy = running.copy()
    running.update({"mean": torch.ones(2)})
    assert torch.equal(copy["mean"], torch.zeros(2))
    assert torch.equal(running.current["mean"], torch.full((2,), 0.5))
