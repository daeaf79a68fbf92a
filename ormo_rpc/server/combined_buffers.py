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
    ``B + (W(n') / W(n + n')) (B' - B)``, with ``W`` of `Rule`, for n calls and n' later ones. So averages need a count, as
    those of all norms of a model have; one without has one call in each report.

    Args:
        rules: The rule of each buffer; the newest value counts for those that have none here.
        earlier: The first report.
        later: The second one; copied.
    """
    counts = {rule.count for rule in rules.values() if rule.count is not None}
    calls, further = ({name: int(report[name]) for name in counts & report.keys()} for report in (earlier, later))
    both = dict(earlier)
    for name, value in later.items():
        rule = rules.get(name, NEWEST)
        if rule.kind is RuleKind.newest or name not in earlier:
            both[name] = value.clone()
        elif rule.kind is RuleKind.count:
            both[name] = earlier[name] + value
        else:
            before, after = calls.get(rule.count or "", 1), further.get(rule.count or "", 1)
            share = rule.weight(after, before=before) / (rule.weight(before + after) or 1.0)
            both[name] = torch.lerp(earlier[name], value, share)
    return both
