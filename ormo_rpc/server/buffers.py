"""The buffers of the model on the server, and how what pushes report of them enters, in the order of their application."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ormo_rpc.messages import no_buffers
from ormo_rpc.server.buffer_layout import BufferLayout, PackedTensors
from ormo_rpc.server.buffer_rules import NEWEST, Rule, RuleKind
from ormo_rpc.server.packed_buffers import PackedRules, Reported


class RunningBuffers:
    """The present buffers, as training has left them.

    Args:
        initial: The buffers at the start by name; copied.
        rules: The rule of each; the newest value counts for those that have none here.
        device: The device of the buffers, the one of the server's parameters; by default the one where they are.

    Attributes:
        current: The buffers by name: to be read only, and at once, as the next push may change them.
        layout: Their places among the bytes of a snapshot.
        device: Their device.
    """

    def __init__(
        self,
        initial: Mapping[str, torch.Tensor],
        rules: Mapping[str, Rule] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.rules: dict[str, Rule] = {name: (rules or {}).get(name, NEWEST) for name in initial}
        self.layout = BufferLayout(initial, self.rules)
        self._bytes = self.layout.pack(initial)
        if device is not None:
            self._bytes = self._bytes.to(device)
        self.device = self._bytes.device
        self.current = self.layout.views(self._bytes)
        self._packed = PackedRules.of(self.layout, self.rules, self.device)
        """For pushes that report all buffers; None where these rules need a look at each buffer."""
        self._counts = {rule.count for rule in self.rules.values() if rule.count is not None}
        self._counted: dict[str, int] = {}
        """The calls so far of averages over all calls: their counts, so that none has to be read from a GPU."""
        self._count()
        self._snapshot: torch.Tensor | None = None

    def _count(self) -> None:
        cumulative = {rule.count for rule in self.rules.values() if rule.kind is RuleKind.average and rule.momentum is None}
        names = [name for name, rule in self.rules.items() if rule.kind is RuleKind.count and name in cumulative]
        self._counted = {name: int(self.current[name]) for name in names}

    def to(self, device: torch.device) -> RunningBuffers:
        """Return the buffers on a device: this object where they are there already."""
        return self if device == self.device else RunningBuffers(self.current, self.rules, device)

    def select(self, reported: Mapping[str, torch.Tensor]) -> Reported | None:
        """Take from a push what is checked at once and then enters at once; None where its buffers are to be seen one by one.

        It is on the device then. Only places and dtypes are checked here.
        """
        if self._packed is None or type(reported) is not PackedTensors:
            return None
        return self._packed.select(reported)

    def update(self, reported: Mapping[str, torch.Tensor] | Reported) -> None:
        """Take over what one push reports.

        Args:
            reported: Buffers by name, of the dtypes, shapes and device of the current ones; or what `select` returned for them.
        """
        if not reported:
            return
        with torch.no_grad():
            self._snapshot = None
            if isinstance(reported, Reported):
                weights = self._weights(reported)
                if len(weights) == 1:
                    reported.enter(self._bytes, weights.pop())
                    self._advance(reported.calls)
                else:
                    self._update_one_by_one(self.layout.views(reported.flat), reported.calls)
            else:
                self._update_one_by_one(reported, self._calls(reported))

    def _update_one_by_one(self, reported: Mapping[str, torch.Tensor], calls: Mapping[str, int]) -> None:
        averages: dict[float, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        counts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, value in reported.items():
            rule, mine = self.rules[name], self.current[name]
            if rule.kind is RuleKind.newest:
                mine.copy_(value)
            elif rule.kind is RuleKind.count:
                counts.append((mine, value))
            else:
                into, values = averages.setdefault(self._weight(rule, calls), ([], []))
                into.append(mine)
                values.append(value)
        for weight, (into, values) in averages.items():  # to the bits of mul_ and add_ one by one, in half the time
            torch._foreach_mul_(into, 1 - weight)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # it has no public name
            torch._foreach_add_(into, values, alpha=weight)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # as above
        for mine, value in counts:
            mine.add_(value)
        self._advance(calls)

    def _calls(self, reported: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The calls that a push reports, by the names of their counts."""
        counts = {name: reported[name] for name in self._counts if name in reported}
        if self.device.type == "cpu" or not counts:
            return {name: int(value) for name, value in counts.items()}
        together = torch.cat([value.reshape(1).to(torch.int64) for value in counts.values()])  # a GPU is read once
        return dict(zip(counts, together.tolist(), strict=True))

    def _advance(self, calls: Mapping[str, int]) -> None:
        """Note the calls of averages over all calls, once they have entered."""
        for name in self._counted:
            self._counted[name] += calls.get(name, 0)

    def _weights(self, reported: Reported) -> set[float]:
        """The weights that its averages have."""
        numbers = set(reported.calls.values())
        if reported.rules.alike and len(numbers) == 1:
            (number,) = numbers
            return {rule.weight(number) for rule in reported.rules.alike}
        return {self._weight(rule, reported.calls) for rule in reported.rules.pairs}

    def _weight(self, rule: Rule, calls: Mapping[str, int]) -> float:
        if rule.count is None:
            return rule.weight(1)
        before = 0
        if rule.momentum is None:
            before = self._counted[rule.count] if rule.count in self._counted else int(self.current[rule.count])
        return rule.weight(calls.get(rule.count, 1), before)

    def snapshot(self) -> torch.Tensor:
        """Return the buffers as bytes (uint8), which never change: they are shared until the next push that changes one."""
        if not self.current:
            return no_buffers()
        if self._snapshot is None:
            self._snapshot = self._bytes.clone()
        return self._snapshot

    def copy(self) -> dict[str, torch.Tensor]:
        """Return the buffers by name, as they will stay: to be read only."""
        return self.layout.views(self.snapshot())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return a private copy by name; each has memory of its own, as `torch.save` wants for different dtypes."""
        return {name: tensor.clone() for name, tensor in self.current.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._snapshot = None
        for name, mine in self.current.items():
            mine.copy_(state[name])
        self._count()
