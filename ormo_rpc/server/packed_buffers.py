"""Buffers that a push reports all together, in one vector of bytes: checked and entered in a few passes over that.

What passes here would pass the checks one by one, and enters with the bits that it would have then. What is not plainly right
is left to them: they say what is wrong, and know more cases.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ormo_rpc.server.buffer_layout import BufferLayout, PackedTensors
from ormo_rpc.server.buffer_rules import Rule, RuleKind

MOST_CALLS = 2**31 - 1
"""The largest number of calls of a norm in a push, so that no sum of them overflows."""
_CODES = {torch.float32: "f", torch.float64: "d"}
"""Of `struct`."""


@dataclass(frozen=True)
class PackedRules:
    """The rules of buffers by their places in the vector of bytes.

    Attributes:
        layout: The places of all buffers.
        dtype: Of the averages.
        averages: The number of each value of an average, counted in its dtype from the beginning; variances come last.
        first_variance: The number of values before the first variance.
        count_names: The names of the counts.
        counts: The number of each count, counted in int64.
        newest: First byte, and the one behind the last, of each buffer of which the newest value counts.
        pairs: Rules of averages, one for each pair of momentum and count.
        alike: Where each average has a momentum and a count: one for each momentum. They do where all counts are alike.
    """

    layout: BufferLayout
    dtype: torch.dtype
    averages: torch.Tensor
    first_variance: int
    count_names: Sequence[str]
    counts: torch.Tensor
    newest: Sequence[tuple[int, int]]
    pairs: Sequence[Rule]
    alike: Sequence[Rule]

    @classmethod
    def of(cls, layout: BufferLayout, rules: Mapping[str, Rule], device: torch.device) -> PackedRules | None:
        """Return them for buffers on a device; None where there are no averages, or they or their counts have odd dtypes."""
        averages = [name for name, rule in rules.items() if rule.kind is RuleKind.average and layout.shapes[name].numel()]
        counted = [name for name, rule in rules.items() if rule.kind is RuleKind.count]
        newest = [name for name, rule in rules.items() if rule.kind is RuleKind.newest]
        dtypes = {layout.dtypes[name] for name in averages}
        if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64} or torch.bool in layout.dtypes.values():
            return None
        if any(rules[name].count not in (None, *counted) for name in averages):
            return None
        if any(layout.dtypes[name] != torch.int64 or layout.shapes[name].numel() != 1 for name in counted):
            return None
        simple = all(rules[name].momentum is not None and rules[name].count is not None for name in averages)
        averages.sort(key=lambda name: rules[name].variance)
        (dtype,) = dtypes
        return cls(
            layout=layout,
            dtype=dtype,
            averages=_elements(layout.spans(averages), dtype, device),
            first_variance=sum(layout.shapes[name].numel() for name in averages if not rules[name].variance),
            count_names=counted,
            counts=_elements(layout.spans(counted), torch.int64, device),
            newest=[span for span in layout.spans(newest) if span[0] < span[1]],
            pairs=list({(rules[name].momentum, rules[name].count): rules[name] for name in averages}.values()),
            alike=list({rules[name].momentum: rules[name] for name in averages}.values()) if simple else [],
        )

    def select(self, pushed: PackedTensors) -> Reported | None:
        """Take out of a push what has a rule; None where its bytes are placed otherwise. Values are not looked at."""
        if not self.layout.matches(pushed.layout):
            return None
        flat = pushed.flat.to(self.averages.device, non_blocking=True)
        averages = flat.view(self.dtype).index_select(0, self.averages)
        counts = flat.view(torch.int64).index_select(0, self.counts)
        variances = averages[self.first_variance :]
        least = variances.amin() if variances.numel() else averages.new_zeros(())
        return Reported(self, flat, averages, counts, (averages.sum(), least))


@dataclass(slots=True)
class Reported:
    """The buffers of a push, those with a rule in memory of their own.

    Attributes:
        rules: Of the server's buffers.
        flat: The bytes of all buffers, as pushed, on the server's device.
        averages: The values of all averages.
        counts: The values of all counts, int64.
        measures: The sum of the averages and the least variance, shape ().
        calls: The counts by name, once they are read.
    """

    rules: PackedRules
    flat: torch.Tensor
    averages: torch.Tensor
    counts: torch.Tensor
    measures: tuple[torch.Tensor, torch.Tensor]
    calls: Mapping[str, int] = field(default_factory=dict[str, int])

    def read(self, number: torch.Tensor) -> tuple[float, bool]:
        """Read measures, counts and one more number at once, as a read waits for a GPU; note the calls.

        Args:
            number: Shape (), float32 or float64.

        Returns:
            The number; and whether all values may enter: where not, each has to be looked at.
        """
        read = (self.counts, number, *self.measures)
        data = torch.cat([each.reshape(-1).view(torch.uint8) for each in read]).cpu().numpy().tobytes()
        form = f"<{len(self.counts)}q{_CODES[number.dtype]}{2 * _CODES[self.averages.dtype]}"
        *counts, value, total, least = struct.unpack(form, data)
        self.calls = dict(zip(self.rules.count_names, counts, strict=True))
        possible = not counts or (min(counts) >= 0 and max(counts) <= MOST_CALLS)
        return value, possible and math.isfinite(total) and least >= 0

    def enter(self, own: torch.Tensor, weight: float) -> None:
        """Let them enter the bytes of the server's buffers, with one weight for all averages."""
        rules = self.rules
        values = own.view(rules.dtype)
        mine = values.index_select(0, rules.averages).mul_(1 - weight).add_(self.averages, alpha=weight)
        values.index_copy_(0, rules.averages, mine)
        if rules.count_names:
            calls = own.view(torch.int64)
            calls.index_copy_(0, rules.counts, calls.index_select(0, rules.counts).add_(self.counts))
        for start, end in rules.newest:
            own[start:end].copy_(self.flat[start:end])


def _elements(spans: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The numbers of the elements in these spans of bytes."""
    size = dtype.itemsize
    ranges = [torch.arange(start // size, end // size) for start, end in spans]
    return torch.cat(ranges).to(device) if ranges else torch.empty(0, dtype=torch.int64, device=device)
