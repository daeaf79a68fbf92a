"""The buffers of a model among the bytes of a push."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ormo_rpc.server.buffer_layout import BufferLayout, PackedTensors, aligned, copy_all


@dataclass(frozen=True, slots=True)
class WholeBuffers:
    """Buffers that a push reports, in the form in which they are among its bytes.

    Attributes:
        region: The bytes, as `WireBuffers` has them.
        names: The names of those that are reported.
    """

    region: torch.Tensor
    names: frozenset[str]


class WireBuffers:
    """Buffers among the bytes of a push: for each of them a byte that is not 0 where it is reported, then the values of all.

    Args:
        layout: The places of the values.
        region: The bytes, uint8, shape (`size`,), at an aligned address.

    Attributes:
        has_bools: Some are bools, which are read as copies.
    """

    def __init__(self, layout: BufferLayout, region: torch.Tensor) -> None:
        self._region = region
        self._marks = region[: len(layout.shapes)]
        self._views = PackedTensors(layout, region[aligned(len(layout.shapes)) :])
        self.has_bools = torch.bool in layout.dtypes.values()
        self._marked: frozenset[str] | None = None
        """The names that `write` has marked last: mostly those of every push, and marking a GPU's memory waits for it."""

    @staticmethod
    def size(layout: BufferLayout) -> int:
        """The number of bytes."""
        return aligned(len(layout.shapes)) + layout.size

    def write(self, reported: Mapping[str, torch.Tensor] | WholeBuffers) -> dict[str, torch.Tensor]:
        """Put buffers of the layout's dtypes and shapes at their places, and return them as `read` does."""
        if isinstance(reported, WholeBuffers):
            self._region.copy_(reported.region)
            self._marked = reported.names
            return self.views(reported.names)
        names = frozenset(reported)
        copy_all({name: self._views[name] for name in reported}, {name: value.detach() for name, value in reported.items()})
        # A fault may have written over those of the CPU.
        if self._views and (names != self._marked or self._marks.device.type == "cpu"):
            self._marks.copy_(torch.tensor([name in names for name in self._views]))
            self._marked = names
        return self.views(names)

    def views(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The buffers of these names, in their order here, as `read` returns them: packed where they are all."""
        if len(names) == len(self._views) and not self.has_bools:
            return self._views
        return {name: _whole(view) for name, view in self._views.items() if name in names}

    def read(self) -> dict[str, torch.Tensor]:
        """The reported buffers by name, as views of the bytes; bools as copies, as forged ones may be neither 0 nor 1."""
        if not self._views:
            return {}
        return self.views([name for name, mark in zip(self._views, self._marks.tolist(), strict=True) if mark])


def _whole(view: torch.Tensor) -> torch.Tensor:
    return view.view(torch.uint8) != 0 if view.dtype is torch.bool else view
