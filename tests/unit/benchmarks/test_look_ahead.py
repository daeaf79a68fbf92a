"""The experiment on look-aheads: its clock, its choice of a rate, and the look-aheads themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from experiments import look_ahead
from experiments.look_aheads import TRIED, Ahead
from ormo_rpc.algorithms.base import PullContext, PushContext


def test_the_time_is_that_of_the_last_of_three_evaluations_whose_mean_is_below_the_target() -> None:
    # The target is 0.03. Means of three: 0.05, 0.03 (not below), 0.02. The second never gets there.
    values = torch.tensor([[0.07, 0.05, 0.03, 0.01, 0.02], [1.0, 1.0, 1.0, 1.0, math.nan]], dtype=torch.float64).T[:, None, :]
    times = look_ahead.times_to_target([1.0, 2.0, 4.0, 8.0, 16.0], values, 3)
    assert times.tolist() == [[16.0, math.inf]]


def test_a_case_is_tuned_with_other_seeds_than_it_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    times = torch.full((len(look_ahead.RATES), 16), 5.0)
    times[2, :8], times[3, 8:] = 1.0, 2.0  # the best rates of the reported seeds, and of the others

    def found(*_: object) -> torch.Tensor:
        return times

    monkeypatch.setattr(look_ahead, "losses", lambda *_: ([], torch.empty(0)))
    monkeypatch.setattr(look_ahead, "times_to_target", found)
    row = look_ahead.case("ormo", "none", 4, "quiet")
    assert (row["rate"], row["seconds"]) == (look_ahead.RATES[3].item(), [5.0] * 8)


@pytest.mark.parametrize(("rate", "seconds", "told"), [(0, 1.0, "0.0251189"), (-1, 1.0, "2.51189"), (4, math.inf, "0.0251189")])
def test_no_rate_is_chosen_at_an_edge_or_where_none_reaches_the_target(
    rate: int, seconds: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = torch.full((len(look_ahead.RATES), 16), math.inf)
    times[rate] = seconds

    def found(*_: object) -> torch.Tensor:
        return times

    monkeypatch.setattr(look_ahead, "losses", lambda *_: ([], torch.empty(0)))
    monkeypatch.setattr(look_ahead, "times_to_target", found)
    with pytest.raises(SystemExit, match=rf"^ormo, none, K = 4, quiet: got {told} as the best rate, .* expected a rate within"):
        look_ahead.case("ormo", "none", 4, "quiet")


def test_a_run_ends_near_the_optimum_at_a_moderate_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look_ahead, "BUCKETS", 60)
    evaluated, values = look_ahead.losses(*look_ahead.RULES["ormo_la"], "none", 2, 0.0)
    assert evaluated[-1] == 60.0
    assert values.shape == (120, len(look_ahead.RATES), 16)
    assert values[-1, 4].max() < 0.01 < values[0].min()


def test_synchronous_rules_are_evaluated_at_the_ends_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look_ahead, "BUCKETS", 6)
    evaluated, values = look_ahead.losses(*look_ahead.RULES["heavy ball, sync"], "one_slow", 4, 0.0)
    assert evaluated == [10.0, 20.0, 30.0, 40.0, 50.0, 60.0], "of which the slow worker takes 10 each"
    # Plain heavy ball, of the same rates, without noise.
    x, u = (torch.full((len(look_ahead.RATES), 24), value, dtype=torch.float64) for value in (1.0, 0.0))
    for value in values:
        u = 0.9 * u + look_ahead.RATES[:, None] * look_ahead.CURVATURES * x
        x = x - u
        expected = (x.square() * look_ahead.CURVATURES).sum(-1) / look_ahead.CURVATURES.sum()
        torch.testing.assert_close(value, expected[:, None].expand_as(value))


@pytest.mark.parametrize(
    ("name", "ahead"),
    [
        # beta = 1/2. Two gradients, of worker 0 in its own bucket (e = 0) and of worker 1 two buckets late (e = 2).
        ("Nesterov's alone", {0: 1 / 2, 1: 1 / 2}),
        ("mean delay of all", {0: 1 / 2 + 1 / 4, 1: 1 / 2 + 1 / 4}),
        ("steady momentum", {0: 1 / 2, 1: 5 / 2}),
        # a = 1, rho = (1 + 1/4) / 2 = 5/8: c = 1 - (1/2 - n) 8/5.
        ("sequential Nesterov", {0: 1 - 0.5 * 8 / 5, 1: 1 + 1.5 * 8 / 5}),
        ("place moved", {0: 1 / 2, 1: 1 / 2 + 1 / 4 + 1 / 8}),
        ("c = 1.4", {0: 1.4, 1: 1.4}),
    ],
)
def test_the_look_aheads_that_were_tried(name: str, ahead: Mapping[int, float]) -> None:
    algorithm = TRIED[name]()
    assert isinstance(algorithm, Ahead)
    algorithm.init(torch.zeros(1, dtype=torch.float64), 0.5)
    grad = torch.ones(1, dtype=torch.float64)
    for t, (worker, bucket) in enumerate([(0, 2), (1, 0)]):
        context = PushContext(
            worker=worker, ticket=t, iteration=t, stamp=0, bucket=bucket, newest_bucket=2, concurrency=2, lr=0.1
        )
        algorithm.step(grad, 0.1, context)
    for worker, c in ahead.items():
        sent = algorithm.outgoing(PullContext(worker=worker, concurrency=2, lr=0.1))
        torch.testing.assert_close(sent, algorithm.params - c * algorithm.state_dict()["u"])
