"""Changes by passes in a module beside the gradients: those of buffers are collected, any other is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ormo_rpc.errors import ModelRefused
from ormo_rpc.models.buffers import buffers_of, is_dense
from ormo_rpc.models.flat import FlatModel, sha256
from ormo_rpc.models.norm_calls import NormCalls, are_expected
from ormo_rpc.server.buffer_layout import as_bytes

_REGISTER = "register buffers with their final shapes, or keep them as plain attributes where they are mere caches"


@dataclass(slots=True)
class Guarded:
    """A tensor that no pass may change.

    Attributes:
        name: Its name, from the root.
        owner: The dictionary of a module that holds it.
        key: Its name there.
        tensor: The tensor.
        trained: Whether it has gradients.
        version: Its version at the beginning of the pass.
        address: That of its memory then; 0 where it is not dense.
        digest: The hash of its values, where they are compared: then, or in the first pass where it is not trained.
    """

    name: str
    owner: Mapping[str, torch.Tensor | None]
    key: str
    tensor: torch.Tensor
    trained: bool
    version: int = 0
    address: int = 0
    digest: str | None = None

    def begin(self, *, values: bool) -> None:
        """Take note of it; of its values too, which costs a pass over memory."""
        self.version, self.address = self.tensor._version, _address(self.tensor)
        if values and (self.trained or self.digest is None):
            self.digest = self._hashed()

    def has_changed(self, *, values: bool) -> bool:
        """Tell if it was written to or replaced since, or is now trained where it was not.

        What is written through ``.data`` escapes torch's version: a new tensor there is seen at once, other values where they
        are compared.
        """
        same = self.key in self.owner and self.owner[self.key] is self.tensor and self.tensor.requires_grad == self.trained
        if not same or self.tensor._version != self.version or _address(self.tensor) != self.address:
            return True
        return values and self._hashed() != self.digest

    def _hashed(self) -> str | None:
        return sha256(self.tensor) if self.address else None


class Passes:
    """Watches the passes of a module, ticket by ticket.

    Args:
        model: The model, for these passes alone.
        own_modes: Put it into training mode, and undo switches of modes before each ticket; otherwise they are left alone.
    """

    def __init__(self, model: FlatModel, *, own_modes: bool = True) -> None:
        self.model = model
        self._expected = model.buffers.initial.clone()
        expected = model.buffers.layout.views(self._expected)
        self._norms = [NormCalls(prefix, norm, expected) for prefix, norm in model.buffers.norms.items()]
        self._others = [place for place in model.buffers.places if place.name not in model.buffers.rules]
        first = {id(place.tensor): place for place in reversed(model.buffers.places) if place.tensor is not None}
        self._further_names = [
            (place, first[id(place.tensor)])
            for place in self._others
            if place.tensor is not None and first[id(place.tensor)] is not place
        ]
        self._keys = [
            (path, buffers_of(module), set(buffers_of(module).keys())) for path, module in model.module.named_modules()
        ]
        self._guarded = _guarded(model)
        self._passes = self._tickets = 0
        self._compares_norms = True
        self._handed = model.buffers.initial.clone()
        self._values = model.buffers.layout.views(self._handed)
        self._before = model.buffers.layout.bytes_of(self._handed)
        self._modes: list[tuple[torch.nn.Module, bool]] = []
        if own_modes:
            model.module.train()
            self._modes = [(module, module.training) for module in model.module.modules()]

    def begin(self, handed: torch.Tensor) -> None:
        """Load the buffers that a reply hands out, as bytes, or the initial ones where it has none; undo switches of modes.

        Raises:
            ValueError: they are not those of this model.
        """
        buffers = self.model.buffers
        if handed.numel() not in (0, buffers.layout.size):
            raise ValueError(
                f"model: got {handed.numel()} bytes of buffers from the server, expected {buffers.layout.size}; "
                "server and worker must build the same model"
            )
        for module, mode in self._modes:
            if module.training != mode:
                module.training = mode
        self._handed.copy_(handed if handed.numel() else buffers.initial, non_blocking=True)
        self._expected.copy_(self._handed)
        buffers.load(self._values)
        self._tickets += 1
        self._compares_norms = self.model.device.type == "cpu" or _is_power_of_2(self._tickets)
        for norm in self._norms:
            norm.begin(compares_values=self._compares_norms)

    def begin_pass(self) -> None:
        """Take note of what a pass must not change."""
        self._passes += 1
        for each in self._guarded:
            each.begin(values=self._compares_values)

    def end_pass(self) -> None:
        """Check that it has not.

        Raises:
            ModelRefused: it has; the message has the name and what to do.
        """
        found = self.change()
        if found is not None:
            raise changed(found.name, found.tensor, found.trained)

    def change(self) -> Guarded | None:
        """Return the first tensor that was changed since `begin_pass` and must not be."""
        return next((each for each in self._guarded if each.has_changed(values=self._compares_values)), None)

    def calls(self) -> dict[str, int]:
        """Return the number of calls since `begin` of each batch norm, by its name with a dot at the end."""
        return {norm.prefix: len(norm.batches) for norm in self._norms}

    def close(self) -> None:
        """Leave the module as it was, without hooks; nothing is watched any more."""
        for norm in self._norms:
            norm.close()

    @property
    def _compares_values(self) -> bool:
        """True where values are compared in this pass: in the first, second, fourth, eighth, ... one, as it costs time."""
        return _is_power_of_2(self._passes)

    def collect(self) -> dict[str, torch.Tensor]:
        """Return by name what the passes since `begin` have to report of the buffers; those that are as before are left out.

        Raises:
            ModelRefused: a buffer came, went, or has another shape or dtype, or the statistics of a norm were written to.
        """
        for name, buffers, keys in self._keys:
            if set(buffers.keys()) != keys:
                got, expected = sorted(buffers), sorted(keys)
                raise ModelRefused(
                    f"model: {name or 'buffers'}: got {got} after a forward pass, expected {expected}; {_REGISTER}"
                )
        reported: dict[str, torch.Tensor] = {}
        checked = self.model.device.type != "cpu" and self._compares_norms and are_expected(self._norms)
        for norm in self._norms:
            reported |= norm.report(checked=checked)
        for place in self._others:
            now = place.now
            if _described(now) != _described(place.tensor):
                raise ModelRefused(
                    f"model: {place.name}: got {_described(now)} after a forward pass, expected {_described(place.tensor)}, "
                    f"as at construction; {_REGISTER}"
                )
            if now is not None and place.name in self._before and not torch.equal(as_bytes(now), self._before[place.name]):
                reported[place.name] = now.detach()
        for place, first in self._further_names:
            if place.now is not first.now:
                raise ModelRefused(
                    f"model: {place.name}: got a tensor of its own, expected that of {first.name}, as at construction"
                )
        return reported


def changed(name: str, tensor: torch.Tensor, trained: bool) -> ModelRefused:
    """The refusal of a pass that has changed a parameter, or a buffer that is no state."""
    if tensor.requires_grad != trained:
        got, expected = (str(each).lower() for each in (tensor.requires_grad, trained))
        return ModelRefused(
            f"model: {name}: got requires_grad={got} after a forward pass, expected {expected}, as at construction; "
            "what is trained is decided there"
        )
    if not isinstance(tensor, torch.nn.Parameter):
        remedy = "a pass may change buffers that are dense"
    elif trained:
        remedy = "training alone changes it, so let the pass write to a copy (nn.Embedding: no max_norm)"
    else:
        remedy = "register it as a buffer, which a pass may change"
    return ModelRefused(f"model: {name}: got another value from a forward pass, expected the one before; {remedy}")


def _guarded(model: FlatModel) -> list[Guarded]:
    """Everything but the buffers that are state."""
    found: list[Guarded] = []
    for path, module in model.module.named_modules():
        prefix = f"{path}." if path else ""
        parameters: Mapping[str, torch.Tensor | None] = module._parameters  # pyright: ignore[reportPrivateUsage] # to see a replaced one
        for key, tensor in parameters.items():
            if tensor is not None:
                found.append(Guarded(prefix + key, parameters, key, tensor, tensor.requires_grad))
        for key, tensor in buffers_of(module).items():
            if tensor is not None and prefix + key in model.buffers.constants:
                found.append(Guarded(prefix + key, buffers_of(module), key, tensor, tensor.requires_grad))
    return found


def _is_power_of_2(number: int) -> bool:
    return number & (number - 1) == 0


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if is_dense(tensor) else 0


def _described(tensor: torch.Tensor | None) -> str:
    return "no buffer" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
