"""Reports of several pushes in one: they enter a server's buffers as they would one after the other."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.server.buffer_rules import Rule, RuleKind
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.combined_buffers import combine

RULES = {
    "exponential": Rule(RuleKind.average, 0.1, "calls"),
    "cumulative": Rule(RuleKind.average, None, "calls"),
    "calls": Rule(RuleKind.count),
    "uncounted": Rule(RuleKind.average, 0.3),
}


def initial() -> dict[str, Tensor]:
    averages = {name: torch.arange(3.0, dtype=torch.float64) for name in ("exponential", "cumulative")}
    return {**averages, "calls": torch.tensor(5), "newest": torch.zeros(2)}


def report(number: int, calls: int) -> dict[str, Tensor]:
    """Return what a push of that many calls of a norm reports; of none, another buffer alone."""
    generator = torch.Generator().manual_seed(number)
    norm = {name: torch.randn(3, generator=generator, dtype=torch.float64) for name in ("exponential", "cumulative")}
    norm["calls"] = torch.tensor(calls)
    return {**(norm if calls else {}), "newest": torch.full((2,), float(number))}


@given(calls=st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_reports_in_one_enter_as_they_would_one_after_the_other(calls: list[int]) -> None:
    apart, together = RunningBuffers(initial(), RULES), RunningBuffers(initial(), RULES)
    combined: dict[str, Tensor] = {}
    for number, count in enumerate(calls):
        apart.update(report(number, count))
        combined = combine(RULES, combined, report(number, count))
    together.update(combined)
    assert apart.current.keys() == together.current.keys()
    for name, expected in apart.current.items():
        torch.testing.assert_close(together.current[name], expected, rtol=0, atol=1e-13)


def test_what_was_combined_stays_though_the_reports_change() -> None:
    later = {"newest": torch.zeros(2), "calls": torch.tensor(1)}
    combined = combine(RULES, {}, later)
    for each in later.values():
        each.fill_(7)
    assert (combined["newest"].tolist(), combined["calls"].item()) == ([0.0, 0.0], 1)


def test_an_average_that_nothing_counts_has_one_call_in_each_report() -> None:
    combined = combine(RULES, {"uncounted": torch.zeros(1)}, {"uncounted": torch.ones(1)})
    # W(1) / W(2) = 0.3 / (1 - 0.7^2)
    torch.testing.assert_close(combined["uncounted"], torch.tensor([0.3 / 0.51]))
