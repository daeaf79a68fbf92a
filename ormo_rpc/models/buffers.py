"""The buffers of a module: which of them are its state, the rule that each follows on the server, and loading them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ormo_rpc.server.buffer_layout import BufferLayout, copy_all
from ormo_rpc.server.buffer_rules import Rule, RuleKind

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import (
        _BatchNorm as BatchNorm,  # pyright: ignore[reportPrivateUsage] # it has no public name
    )


def buffers_of(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """A module's own buffers by their names there: the dictionary itself, empty places included."""
    return module._buffers  # pyright: ignore[reportPrivateUsage] # an assignment to the module makes checks and copies


@dataclass(frozen=True, slots=True)
class Place:
    """A place for a buffer in a module.

    Attributes:
        name: Its name, from the root.
        owner: The module.
        key: Its name there.
        tensor: What was there at construction.
    """

    name: str
    owner: torch.nn.Module
    key: str
    tensor: torch.Tensor | None

    @property
    def now(self) -> torch.Tensor | None:
        """The tensor that is there now; None also where the place is gone."""
        held = buffers_of(self.owner)
        return held[self.key] if self.key in held else None  # noqa: SIM401 - those of a scripted module have no get

    def put_back(self) -> None:
        """Undo an assignment."""
        if self.now is not self.tensor:
            buffers_of(self.owner)[self.key] = self.tensor


class ModelBuffers:
    """The buffers of a module, persistent or not, of any dtype: with the trainable parameters its state.

    One that has several names is known by the first. One that is sparse or quantized is no state: passes must not change it.

    Args:
        module: The module. A buffer that cannot be written to, such as one that was expanded, is replaced by a copy.

    Attributes:
        places: All places for buffers, empty ones and further names included.
        tensors: The buffers at construction, by name; the module keeps these objects.
        constants: Those that are no state, by name.
        norms: The batch norms whose statistics are averaged, by their names with a dot at the end.
        rules: The rules of the buffers of these norms; others have none.
        layout: Where each lies among the bytes that cross to the server.
        initial: These bytes, at construction.

    Raises:
        ValueError: a buffer has no shape yet (lazy modules).
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.places = _places(module)
        self.tensors: dict[str, torch.Tensor] = {}
        self.constants: dict[str, torch.Tensor] = {}
        uses = Counter(id(place.tensor) for place in self.places)
        seen: set[int] = set()
        for place in self.places:
            place.put_back()
            if place.tensor is not None and id(place.tensor) not in seen:
                seen.add(id(place.tensor))
                (self.tensors if is_dense(place.tensor) else self.constants)[place.name] = place.tensor
        self._memory = {name: tensor.data for name, tensor in self.tensors.items()}
        self.norms: dict[str, BatchNorm] = {}
        self.rules: dict[str, Rule] = {}
        for path, child in module.named_modules():
            prefix = f"{path}." if path else ""
            if isinstance(child, _batch_norm()) and _is_averaged(child, uses):
                self.norms[prefix] = child
                count = f"{prefix}num_batches_tracked"
                self.rules[f"{prefix}running_mean"] = Rule(RuleKind.average, child.momentum, count)
                self.rules[f"{prefix}running_var"] = Rule(RuleKind.average, child.momentum, count, variance=True)
                self.rules[count] = Rule(RuleKind.count)
        self.layout = BufferLayout(self.tensors, self.rules)
        self.initial = self.layout.pack(self.tensors)

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Give the module these buffers, by name: copied into its own tensors, where they were before any pass."""
        for place in self.places:
            place.put_back()
        for name, tensor in self.tensors.items():
            own = self._memory[name]
            if tensor.data_ptr() != own.data_ptr():  # a pass assigned to its .data, maybe a view of the parameters
                tensor.data = own
        copy_all(self._memory, values)

    def copy(self) -> dict[str, torch.Tensor]:
        """Return a copy of the buffers by name, as `load` or construction left them."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}


def _places(module: torch.nn.Module) -> list[Place]:
    owned: dict[int, torch.Tensor] = {}
    places: list[Place] = []
    for path, owner in module.named_modules():
        for key, tensor in buffers_of(owner).items():
            name = f"{path}.{key}" if path else key
            if tensor is not None and torch.nn.parameter.is_lazy(tensor):
                raise ValueError(
                    f"model: {name}: got a buffer without a shape, expected all from the start; use no lazy layers"
                )
            if tensor is not None and id(tensor) not in owned:
                owned[id(tensor)] = (
                    tensor if _is_writable(tensor) else tensor.detach().clone(memory_format=torch.contiguous_format)
                )
            places.append(Place(name, owner, key, None if tensor is None else owned[id(tensor)]))
    return places


def is_dense(tensor: torch.Tensor) -> bool:
    """Tell if a tensor is the plain sort, whose bytes are its values."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def _is_writable(tensor: torch.Tensor) -> bool:
    """Tell if its elements can be written to in place; those of an expanded tensor share memory."""
    if not is_dense(tensor):
        return True
    shared = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    return not shared and not tensor.is_inference()


def _batch_norm() -> type[BatchNorm]:
    """The base class of all batch norms."""
    return torch.nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage] # it has no public name


def _is_averaged(norm: BatchNorm, uses: Counter[int]) -> bool:
    """Tell if a batch norm updates statistics of its own as torch's do, and counts its calls."""
    statistics = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    own = all(tensor is not None and uses[id(tensor)] == 1 for tensor in statistics)
    # One that computes otherwise may also update its statistics otherwise, so they follow no rule.
    plain = type(norm).forward in (_batch_norm().forward, torch.nn.SyncBatchNorm.forward) and "forward" not in vars(norm)
    number = norm.momentum is None or isinstance(norm.momentum, (int, float))  # pyright: ignore[reportUnnecessaryIsInstance] # a user may set a tensor
    weighted = number and (norm.momentum is None or 0 <= norm.momentum <= 1)
    return own and plain and weighted
