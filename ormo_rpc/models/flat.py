"""A model as one flat vector: parameters and gradients are views of it, batch-norm statistics are read beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] # the base class of all batch norms


class Layout:
    """Names and shapes of tensors that lie contiguous in a flat vector.

    Args:
        tensors: The tensors by name, in their order.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.size = sum(shape.numel() for shape in self.shapes.values())

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors by name, as views of ``flat``, shape (size,)."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()]) if self.shapes else ()
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class FlatModel:
    """A module whose parameters, gradients and batch-norm statistics are views of the flat vectors that it is bound to.

    Args:
        module: The model; it belongs to this object from now on.

    Raises:
        ValueError: it has no trainable parameter, or they are not all of one dtype.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        dtypes = sorted({p.dtype for p in self.trainable.values()}, key=str)
        if len(dtypes) != 1:
            raise ValueError(f"model: got trainable parameters of the dtypes {dtypes}, expected exactly one dtype")
        self.dtype = dtypes[0]
        self.params = Layout(self.trainable)
        self._norms = {f"{name}.": child for name, child in module.named_modules() if _has_statistics(child)}
        self.buffers = Layout(self.statistics())

    def statistics(self) -> dict[str, Tensor]:
        """The running means and variances of all batch norms by name, as they are now (live)."""
        return {
            prefix + name: tensor
            for prefix, norm in self._norms.items()
            for name, tensor in norm.named_buffers()
            if tensor.is_floating_point()
        }

    def buffer_momentum(self) -> dict[str, float | None]:
        """The ``momentum`` of the batch norm that each statistic belongs to."""
        return {name: self._norms[_prefix(name)].momentum for name in self.buffers.shapes}

    def flat_params(self) -> Tensor:
        """A copy of the present parameters, shape (D,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.trainable.values()])

    def bind(self, params: Tensor) -> None:
        """Make the parameters views of ``params``, shape (D,): nothing is copied, nothing is written to it."""
        for parameter, view in zip(self.trainable.values(), self.params.views(params).values(), strict=True):
            parameter.data = view

    def bind_grad(self, grad: Tensor) -> None:
        """Make the gradients views of ``grad``, shape (D,): backward adds into it."""
        for parameter, view in zip(self.trainable.values(), self.params.views(grad).values(), strict=True):
            parameter.grad = view

    def bind_batch_statistics(self, flat: Tensor) -> dict[str, Tensor]:
        """Let each forward pass write its batch's own statistics into ``flat``, shape (B,); return them by name.

        With ``momentum = 1`` a batch norm overwrites its former statistics: ``0 * old + 1 * batch``. Zero ``flat`` before
        each pass, since 0 times NaN is NaN.
        """
        views = self.buffers.views(flat)
        for name, view in views.items():
            # .data, because views of one tensor share one version counter, by which autograd would see each write as a fault.
            setattr(self._norms[_prefix(name)], name.removeprefix(_prefix(name)), view.data)
        for norm in self._norms.values():
            norm.momentum = 1.0
        return views

    def copy_statistics(self) -> dict[str, Tensor]:
        """The running means and variances by name, as a private copy."""
        return {name: tensor.clone() for name, tensor in self.statistics().items()}

    def load_statistics(self, average: Mapping[str, Tensor]) -> None:
        """Take over running statistics by name, for evaluation or export."""
        for name, tensor in self.statistics().items():
            tensor.copy_(average[name])

    def state_dict(self, params: Tensor, average: Mapping[str, Tensor], updates: int) -> dict[str, Tensor]:
        """The module's ``state_dict`` in plain PyTorch, as a private copy.

        Args:
            params: The parameters, shape (D,).
            average: The running statistics by name.
            updates: The number of batches that they are the average of.
        """
        self.bind(params)
        self.load_statistics(average)
        for norm in self._norms.values():
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(updates)
        return {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}


def _has_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and module.track_running_stats


def _prefix(name: str) -> str:
    return name[: name.rindex(".") + 1]


def sha256(*tensors: Tensor) -> str:
    """The SHA-256 of the tensors' bytes, concatenated, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
