"""Tensors of any dtypes as one vector of bytes: how the buffers of a model are handed out and pushed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ormo_rpc.server.buffer_rules import NEWEST, Rule, RuleKind

ALIGNMENT = 16
"""The address of each tensor is a multiple of it, in bytes: no dtype is larger."""


def aligned(size: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor, uint8, flat: a view of it where its values lie in order, else a copy."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell if two tensors have equal bits, shapes and dtypes; NaN equals NaN."""
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(as_bytes(one), as_bytes(other))


def copy_all(into: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Copy to tensors from those of the same names, shapes and dtypes; on a GPU with a call for each dtype."""
    groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for name, tensor in into.items():
        if tensor.device.type == "cpu":
            tensor.copy_(values[name])
        else:
            tensors, sources = groups.setdefault(tensor.dtype, ([], []))
            tensors.append(tensor)
            sources.append(values[name])
    for tensors, sources in groups.values():
        torch._foreach_copy_(tensors, sources, non_blocking=True)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # it has no public name


class BufferLayout:
    """Names, shapes and dtypes of tensors that lie in one vector of bytes, each at an aligned place.

    Those of one sort lie side by side, so that a few operations serve them all: averages, variances among them last, then
    counts, then all others; each in the order of names.

    Args:
        tensors: The tensors by name, in their order.
        rules: The rules of some of them.

    Attributes:
        shapes: Of each tensor.
        dtypes: Of each tensor.
        size: Bytes of the vector, a multiple of `ALIGNMENT`.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], rules: Mapping[str, Rule] | None = None) -> None:
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self._matching: BufferLayout | None = None
        """The last one of which `matches` has told so."""
        self.size = 0
        places: dict[str, tuple[int, int]] = {}
        for name in sorted(tensors, key=lambda name: _sort((rules or {}).get(name, NEWEST))):
            length = tensors[name].numel() * tensors[name].dtype.itemsize
            places[name] = (self.size, self.size + length)
            self.size += aligned(length)
        self._spans = {name: places[name] for name in tensors}
        self._strides = {name: torch.empty(shape, device="meta").stride() for name, shape in self.shapes.items()}

    def bytes_of(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The bytes of each tensor by name, as views of ``flat``, uint8, shape (size,)."""
        return {name: flat[start:end] for name, (start, end) in self._spans.items()}

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors by name, as views of ``flat``, uint8, shape (size,); of a copy where its address is not aligned."""
        if flat.storage_offset() % ALIGNMENT or flat.data_ptr() % ALIGNMENT:
            flat = flat.clone()
        assert flat.shape == (self.size,), "as_strided would reach beyond it"
        whole = {dtype: flat.view(dtype) for dtype in set(self.dtypes.values())}
        found: dict[str, torch.Tensor] = {}
        for name, (start, _) in self._spans.items():  # one call for each, since a server does this for every push
            values = whole[self.dtypes[name]]
            offset = values.storage_offset() + start // values.dtype.itemsize
            found[name] = values.as_strided(self.shapes[name], self._strides[name], offset)
        return found

    def matches(self, other: BufferLayout) -> bool:
        """Tell if another layout has the same tensors at the same places; one that is asked for again is known."""
        if other is self or other is self._matching:
            return True
        mine, theirs = ((each._spans, each.shapes, each.dtypes) for each in (self, other))
        if mine != theirs:
            return False
        self._matching = other
        return True

    def span(self, name: str) -> tuple[int, int]:
        """The first byte of a tensor, and the one behind its last."""
        return self._spans[name]

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a copy of tensors of these names, shapes and dtypes, as bytes on their device; zeros between them."""
        device = next((tensor.device for tensor in tensors.values()), None)
        flat = torch.zeros(self.size, dtype=torch.uint8, device=device)
        for name, part in self.bytes_of(flat).items():
            part.copy_(as_bytes(tensors[name]))
        return flat


def _sort(rule: Rule) -> tuple[int, bool]:
    """The place of buffers of a rule among those of others."""
    return (RuleKind.average, RuleKind.count, RuleKind.newest).index(rule.kind), rule.variance


class PackedTensors(dict[str, "torch.Tensor"]):
    """All tensors of a layout by name, as views of the one vector of bytes that holds them; to be read only.

    Args:
        layout: Their places.
        flat: The bytes, uint8, shape (`BufferLayout.size`,), at an aligned address.

    Attributes:
        layout: Their places.
        flat: The bytes.
    """

    def __init__(self, layout: BufferLayout, flat: torch.Tensor) -> None:
        super().__init__(layout.views(flat))
        self.layout = layout
        self.flat = flat
