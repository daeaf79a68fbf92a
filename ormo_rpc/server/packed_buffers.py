"""Buffers that a push reports all together, in one vector of bytes: checked and entered in a few passes over that.

What passes here would pass the checks one by one, and enters with the bits that it would have then. What is not plainly right
is left to them: they say what is wrong, and know more cases.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ormo_rpc.server.buffer_layout import ALIGNMENT, BufferLayout, PackedTensors, aligned
from ormo_rpc.server.buffer_rules import Rule, RuleKind

MOST_CALLS = 2**31 - 1
"""The largest number of calls of a norm in a push, so that no sum of them overflows."""
_CODES = {"torch.float32": "f", "torch.float64": "d"}  # by name, as this module is read before PyTorch is
"""Of `struct`."""


@dataclass(frozen=True)
class PackedRules:
    """The rules of buffers by their places in the vector of bytes.

    Attributes:
        layout: The places of all buffers.
        device: Of the server's.
        dtype: Of the averages.
        averages: All averages among the bytes, as values of their dtype; there may be zeros between them.
        variances: Those among the averages that are variances: from that value on.
        count_names: The names of the counts.
        counts: All counts among the bytes, `ALIGNMENT` bytes each.
        newest: All buffers of which the newest value counts, among the bytes.
        pairs: Rules of averages, one for each pair of momentum and count.
        alike: Where each average has a momentum and a count: one for each momentum. They do where all counts are alike.
    """

    layout: BufferLayout
    device: torch.device
    dtype: torch.dtype
    averages: slice
    variances: int
    count_names: Sequence[str]
    counts: slice
    newest: slice
    pairs: Sequence[Rule]
    alike: Sequence[Rule]

    @classmethod
    def of(cls, layout: BufferLayout, rules: Mapping[str, Rule], device: torch.device) -> PackedRules | None:
        """Return them for buffers on a device, in a layout by these rules.

        None where there are no averages, or they or their counts have odd dtypes.
        """
        averages = [name for name, rule in rules.items() if rule.kind is RuleKind.average]
        counted = [name for name, rule in rules.items() if rule.kind is RuleKind.count]
        dtypes = {layout.dtypes[name] for name in averages}
        if len(dtypes) != 1 or not {*map(str, dtypes)} <= _CODES.keys() or torch.bool in layout.dtypes.values():
            return None
        if any(rules[name].count not in (None, *counted) for name in averages):
            return None
        if any(layout.dtypes[name] != torch.int64 or layout.shapes[name].numel() != 1 for name in counted):
            return None
        (dtype,) = dtypes
        simple = all(rules[name].momentum is not None and rules[name].count is not None for name in averages)
        end = max(layout.span(name)[1] for name in averages)
        variances = min((layout.span(name)[0] for name in averages if rules[name].variance), default=end)
        begin_counts = aligned(end)
        end_counts = begin_counts + ALIGNMENT * len(counted)
        return cls(
            layout=layout,
            device=device,
            dtype=dtype,
            averages=slice(0, end // dtype.itemsize),
            variances=variances // dtype.itemsize,
            count_names=counted,
            counts=slice(begin_counts, end_counts),
            newest=slice(end_counts, layout.size),
            pairs=list({(rules[name].momentum, rules[name].count): rules[name] for name in averages}.values()),
            alike=list({rules[name].momentum: rules[name] for name in averages}.values()) if simple else [],
        )

    def select(self, pushed: PackedTensors) -> Reported | None:
        """Take from a push what `Reported` has; None where its bytes are placed otherwise. Values are not looked at."""
        if not self.layout.matches(pushed.layout):
            return None
        return Reported(self, pushed.flat.to(self.device, non_blocking=True))


class Reported:
    """The buffers of a push.

    Args:
        rules: Of the server's buffers.
        flat: The bytes of all buffers, as pushed, on the server's device; they stay as they are until they have entered.

    Attributes:
        rules: Of the server's buffers.
        flat: The bytes.
        calls: The counts by name, once they are read.
    """

    def __init__(self, rules: PackedRules, flat: torch.Tensor) -> None:
        self.rules = rules
        self.flat = flat
        self.calls: Mapping[str, int] = {}
        self._averages = flat.view(rules.dtype)[rules.averages]

    def read(self, number: torch.Tensor) -> tuple[float, bool]:
        """Read counts, sums and one more number at once, as a read waits for a GPU; note the calls.

        Args:
            number: Shape (), float32 or float64.

        Returns:
            The number; and whether all values may enter: where not, each has to be looked at.
        """
        rules = self.rules
        variances = self._averages[rules.variances :]
        least = variances.amin() if len(variances) else number.new_zeros((), dtype=rules.dtype)
        read = (self.flat[rules.counts], number, self._averages.sum(), least)
        data = torch.cat([each.reshape(-1).view(torch.uint8) for each in read]).cpu().numpy().tobytes()
        form = f"<{'q8x' * len(rules.count_names)}{_CODES[str(number.dtype)]}{2 * _CODES[str(rules.dtype)]}"
        *counts, value, total, smallest = struct.unpack(form, data)
        self.calls = dict(zip(rules.count_names, counts, strict=True))
        possible = not counts or (min(counts) >= 0 and max(counts) <= MOST_CALLS)
        return value, possible and math.isfinite(total) and smallest >= 0

    def enter(self, own: torch.Tensor, weight: float) -> None:
        """Let them enter the bytes of the server's buffers, with one weight for all averages."""
        rules = self.rules
        own.view(rules.dtype)[rules.averages].mul_(1 - weight).add_(self._averages, alpha=weight)
        if rules.count_names:
            own[rules.counts].view(torch.int64).add_(self.flat[rules.counts].view(torch.int64))
        if rules.newest.start < rules.newest.stop:
            own[rules.newest].copy_(self.flat[rules.newest])
