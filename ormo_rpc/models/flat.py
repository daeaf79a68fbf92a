"""A model as one flat vector: parameters and gradients are views of it; buffers are beside it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from ormo_rpc.models.buffers import ModelBuffers
from ormo_rpc.models.shared_memory import refuse_shared
from ormo_rpc.server.buffer_layout import as_bytes


class Layout:
    """Names and shapes of tensors that lie contiguous in a flat vector.

    Args:
        tensors: The tensors by name, in their order.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.size = sum(shape.numel() for shape in self.shapes.values())

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors by name, as views of ``flat``, shape (size,)."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()]) if self.shapes else ()
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class FlatModel:
    """A module whose trainable parameters and gradients are views of the flat vectors that it is bound to.

    Args:
        module: The model; it belongs to this object from now on.

    Attributes:
        trainable: The parameters that are trained, by name.
        params: Names and shapes of the trainable ones.
        buffers: The buffers.

    Raises:
        ValueError: it has no trainable parameter, they are not all of one dtype, another tensor lies in the memory of one, or a
            tensor has no shape yet (lazy layers).
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        for name, parameter in module.named_parameters():
            if torch.nn.parameter.is_lazy(parameter):
                raise ValueError(
                    f"model: {name}: got a parameter without a shape, expected all from the start; use no lazy layers"
                )
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        everything = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        refuse_shared(self.trainable, {name: each for name, each in everything.items() if name not in self.trainable})
        dtypes = sorted({p.dtype for p in self.trainable.values()}, key=str)
        if len(dtypes) != 1:
            raise ValueError(f"model: got trainable parameters of the dtypes {dtypes}, expected exactly one dtype")
        self.dtype = dtypes[0]
        self.params = Layout(self.trainable)
        self.buffers = ModelBuffers(module)
        self._grads: dict[str, torch.Tensor] = {}
        """The views that `bind_grad` has made."""

    def flat_params(self) -> torch.Tensor:
        """A copy of the present parameters, shape (D,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.trainable.values()])

    def bind(self, params: torch.Tensor) -> None:
        """Make the parameters views of ``params``, shape (D,): nothing is copied, nothing is written to it."""
        for parameter, view in zip(self.trainable.values(), self.params.views(params).values(), strict=True):
            parameter.data = view

    def bind_grad(self, grad: torch.Tensor) -> None:
        """Make the gradients views of ``grad``, shape (D,): backward adds into it."""
        self._grads = self.params.views(grad)
        for parameter, view in zip(self.trainable.values(), self._grads.values(), strict=True):
            parameter.grad = view

    def collect_grad(self) -> None:
        """Bring gradients back that a pass or a hook has put elsewhere, by `zero_grad` or an assignment to ``.grad``.

        None counts as zero.
        """
        for parameter, view in zip(self.trainable.values(), self._grads.values(), strict=True):
            grad = parameter.grad
            if grad is view:
                continue
            if grad is None:
                view.zero_()
            else:
                view.copy_(grad.to_dense())
            parameter.grad = view

    def state_dict(self, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The module's ``state_dict`` in plain PyTorch, as a private copy.

        Args:
            params: The parameters, shape (D,).
            buffers: The buffers by name.
        """
        self.bind(params)
        self.buffers.load(buffers)
        return {name: _copied(value) for name, value in self.module.state_dict().items()}


def _copied(value: Any) -> Any:
    """A private copy of a tensor, or of a module's extra state, which may be anything."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def sha256(*tensors: torch.Tensor) -> str:
    """The SHA-256 of the tensors' bytes, concatenated, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(as_bytes(tensor).numpy().data)
    return digest.hexdigest()
