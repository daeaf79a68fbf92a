"""Reports of buffers by several pushes, as one push would make them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ormo_rpc.server.buffer_rules import NEWEST, Rule, RuleKind


def combine(
    rules: Mapping[str, Rule], earlier: Mapping[str, torch.Tensor], later: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return what a push with the calls of two pushes, one after the other, reports of the buffers.

    It enters a server's buffers as these two would, one after the other: calls are added, and an average is
    ``B + (W(n') / W(n + n')) (B' - B)``, with ``W`` of `Rule`, for n calls and n' later ones.

    Args:
        rules: The rule of each buffer; the newest value counts for those that have none here.
        earlier: The first report.
        later: The second one; copied.
    """
    both = dict(earlier)
    for name, value in later.items():
        rule = rules.get(name, NEWEST)
        if rule.kind is RuleKind.newest or name not in earlier:
            both[name] = value.clone()
        elif rule.kind is RuleKind.count:
            both[name] = earlier[name] + value
        else:
            calls, further = (_calls(rule, report) for report in (earlier, later))
            whole = rule.weight(calls + further)
            both[name] = torch.lerp(earlier[name], value, rule.weight(further, before=calls) / (whole or 1.0))
    return both


def _calls(rule: Rule, reported: Mapping[str, torch.Tensor]) -> int:
    return 1 if rule.count is None else int(reported.get(rule.count, 1))
