"""The fingerprint of a run: what its processes must have in common, and what it shares with its checkpoints and its replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ormo_rpc.models.flat import sha256

SHOWN = 6
"""The number of entries of a list that a message has."""
CHECKSUM = "checksum of labels"
"""The entry of `Fingerprint.data` that also depends on the seed, where that draws the validation split."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Names, shapes and values that give the vectors of a run their meaning.

    Attributes:
        parameters: Dtype and shape of each trainable parameter by name, in the order of the vector of parameters.
        frozen: Those of each parameter that is not trained.
        buffers: Those of each buffer.
        sha256: The first 16 digits of the SHA-256 of each frozen parameter and buffer by name, as the model was built.
        data: Numbers that give a ticket its meaning, by what they count.
    """

    parameters: Mapping[str, str] = field(default_factory=dict[str, str])
    frozen: Mapping[str, str] = field(default_factory=dict[str, str])
    buffers: Mapping[str, str] = field(default_factory=dict[str, str])
    sha256: Mapping[str, str] = field(default_factory=dict[str, str])
    data: Mapping[str, int] = field(default_factory=dict[str, int])

    @classmethod
    def of(cls, module: torch.nn.Module) -> Fingerprint:
        """Take the fingerprint of a model that was just built, without a data set."""
        parameters = dict(module.named_parameters())
        frozen = {name: each for name, each in parameters.items() if not each.requires_grad}
        buffers = dict(module.named_buffers())
        return cls(
            parameters={name: _form(each) for name, each in parameters.items() if name not in frozen},
            frozen={name: _form(each) for name, each in frozen.items()},
            buffers={name: _form(each) for name, each in buffers.items()},
            sha256={name: _sha256(each) for name, each in {**frozen, **buffers}.items()},
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Make it of the values that `to_dict` returned."""
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return it as values of JSON's types."""
        return asdict(self)

    def difference(self, other: Fingerprint, mine: str, others: str, *, buffer_values: bool) -> str | None:
        """Say in one line how another fingerprint differs; None where it does not.

        Args:
            other: The other one.
            mine: Whose this one is, such as "the checkpoint".
            others: Whose the other one is.
            buffer_values: Compare the values of buffers as well, not only those of frozen parameters.
        """
        layout = self.layout_difference(other, mine, others)
        if layout is not None:
            return layout
        for name in [*self.frozen, *(self.buffers if buffer_values else ())]:
            if self.sha256[name] != other.sha256[name]:
                return f"model: {name}: the values of {mine} and of {others} differ"
        return self._data_difference(other, mine, others, tuple(self.data))

    def difference_of_seeds(self, other: Fingerprint, mine: str, others: str) -> str | None:
        """Say in one line how another fingerprint differs in what no seed changes, as `difference` does."""
        data = tuple(what for what in self.data if what != CHECKSUM)
        return self.layout_difference(other, mine, others) or self._data_difference(other, mine, others, data)

    def layout_difference(self, other: Fingerprint, mine: str, others: str) -> str | None:
        """Say in one line how names, order, dtypes or shapes differ, as `difference` does."""
        for what in ("parameters", "frozen", "buffers"):
            here, there = _differing(_entries(getattr(self, what)), _entries(getattr(other, what)))
            if here or there:
                kind = "frozen parameters" if what == "frozen" else what
                return f"model: {kind}: {mine}: {_shown(here)}; {others}: {_shown(there)}"
        return None

    def _data_difference(self, other: Fingerprint, mine: str, others: str, entries: Sequence[str]) -> str | None:
        for what in entries:
            if self.data[what] != other.data.get(what):
                return f"dataset: {what}: {mine}: {self.data[what]}; {others}: {other.data.get(what)}"
        return None


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _sha256(tensor: torch.Tensor) -> str:
    return sha256(*_parts(tensor))[:16]


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Dense tensors that tell a tensor from others of its form."""
    if tensor.layout is torch.sparse_coo:
        entries = tensor.coalesce()
        return entries.indices(), entries.values()
    return (tensor.int_repr() if tensor.is_quantized else tensor.to_dense(),)


def _entries(forms: Mapping[str, str]) -> list[str]:
    return [f"{name} {form}" for name, form in forms.items()]


def _differing(mine: list[str], others: list[str]) -> tuple[list[str], list[str]]:
    """The entries that only one of two lists has; where both have the same ones, those at places that differ."""
    those, these = set(others), set(mine)
    only = [entry for entry in mine if entry not in those], [entry for entry in others if entry not in these]
    if any(only):
        return only
    pairs = [pair for pair in zip(mine, others, strict=True) if pair[0] != pair[1]]  # a name occurs once
    return [here for here, _ in pairs], [there for _, there in pairs]


def _shown(entries: list[str]) -> str:
    rest = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return (", ".join(entries[:SHOWN]) or "none of them") + rest
