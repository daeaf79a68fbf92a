"""A model as one flat vector: parameters and gradients are views of it; buffers are beside it.

The vector has the widest of float32 and the parameters' dtypes, and is what the server trains (*masters*). A parameter of
another dtype is computed with as a cast copy, which each ticket makes anew. So what is too small for a parameter of 16 bits is
kept in its master, not lost.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from ormo_rpc.models.buffers import ModelBuffers
from ormo_rpc.models.shared_memory import refuse_shared
from ormo_rpc.server.buffer_layout import as_bytes

DTYPES = ("float16", "bfloat16", "float32", "float64")
"""The dtypes that a trainable parameter may have."""


def vector_dtype(trainable: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype of the vector that holds these parameters: float64 if any of them is, else float32.

    Raises:
        ValueError: there are none, or one is of no dtype that is trained.
    """
    if not trainable:
        raise ValueError("model: got no trainable parameter, expected at least one")
    for name, parameter in trainable.items():
        if str(parameter.dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(
                f"model: {name}: got a trainable parameter of {parameter.dtype}, expected one of {', '.join(DTYPES)}; real "
                "pairs take the place of complex numbers"
            )
    return torch.float64 if any(each.dtype is torch.float64 for each in trainable.values()) else torch.float32


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

    A parameter that is not of the vector's dtype is a cast copy in memory of its own, from the first `bind` on. That costs
    these bytes once, and with each ticket a pass over both (below a millisecond for a million parameters).

    Args:
        module: The model; it belongs to this object from now on.
        device: The device that it is moved to; by default the CPU.

    Attributes:
        trainable: The parameters that are trained, by name.
        params: Names and shapes of the trainable ones.
        dtype: Of the vector: float64 if any trainable parameter is, else float32.
        buffers: The buffers.

    Raises:
        ValueError: it has no trainable parameter, one is not of a dtype of `DTYPES`, another tensor lies in the memory of one,
            or a tensor has no shape yet (lazy layers), is neither on the CPU nor on the device, or was made in
            `torch.inference_mode`.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device | None = None) -> None:
        self.module = module
        self.device = device or torch.device("cpu")
        for name, parameter in module.named_parameters():
            if torch.nn.parameter.is_lazy(parameter):
                raise ValueError(
                    f"model: {name}: got a parameter without a shape, expected all from the start; use no lazy layers"
                )
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        everything = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, tensor in everything.items():
            _refuse_place(name, tensor, self.device)
        refuse_shared(self.trainable, {name: each for name, each in everything.items() if name not in self.trainable})
        move(module, self.device)
        self.dtype = vector_dtype(self.trainable)
        self.params = Layout(self.trainable)
        self.buffers = ModelBuffers(module)
        self._copies: dict[str, torch.Tensor] = {}
        """The memory of each parameter that is a cast copy, by name; made when it is needed."""
        self._grad = torch.empty(0)
        """The vector that `bind_grad` was given."""
        self._grads: dict[str, torch.Tensor] = {}
        """The views that `bind_grad` has made."""
        self._addresses: list[int] = []
        """Those of their memory; a view has another one when its ``.data`` was assigned."""

    @property
    def has_half(self) -> bool:
        """True where a trainable parameter is float16, whose gradients need a loss scale."""
        return any(parameter.dtype is torch.float16 for parameter in self.trainable.values())

    def to(self, device: torch.device) -> FlatModel:
        """Return the model on a device; this object is not to be used any more, unless it is there already."""
        return self if device == self.device else FlatModel(self.module, device)

    def flat_params(self) -> torch.Tensor:
        """A copy of the present parameters, shape (D,), of the vector's dtype: after `bind`, cast copies have been rounded."""
        return torch.cat([p.detach().reshape(-1).to(self.dtype) for p in self.trainable.values()])

    def bind(self, params: torch.Tensor) -> None:
        """Make the parameters views of ``params``, shape (D,), or cast copies of these; nothing is written to it."""
        # Casts that autocast has kept are of the values before: it knows a parameter by its address alone.
        torch.clear_autocast_cache()
        for (name, parameter), view in zip(self.trainable.items(), self.params.views(params).values(), strict=True):
            parameter.data = view if parameter.dtype == self.dtype else self._rounded(name, view, parameter.dtype)

    def _rounded(self, name: str, view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Round a part of the vector into the memory of its parameter."""
        copied = self._copies.get(name)
        if copied is None:
            copied = self._copies[name] = torch.empty_like(view, dtype=dtype)
        return copied.copy_(view)

    def bind_grad(self, grad: torch.Tensor) -> None:
        """Make the gradients views of ``grad``, shape (D,), of the vector's dtype: backward adds into it.

        Cast copies get gradients of their own dtype, as in plain PyTorch, which `collect_grad` adds to ``grad``.
        """
        self._grad, self._grads = grad, self.params.views(grad)
        self._addresses = [view.data_ptr() for view in self._grads.values()]
        for parameter, view in zip(self.trainable.values(), self._grads.values(), strict=True):
            parameter.grad = view if parameter.dtype == self.dtype else None

    def zero_grad(self) -> None:
        """Set the gradients, which are bound, to zero; what has been put elsewhere since then is dropped."""
        self._grad.zero_()
        for (name, parameter), address in zip(self.trainable.items(), self._addresses, strict=True):
            if parameter.dtype != self.dtype:
                parameter.grad = None
                continue
            if self._grads[name].data_ptr() != address:
                self._grads[name] = self.params.views(self._grad)[name]
            if parameter.grad is not self._grads[name]:
                parameter.grad = self._grads[name]

    def collect_grad(self) -> None:
        """Add the gradients of cast copies to the vector, and bring back what a pass or a hook has put elsewhere.

        That is done by `zero_grad` of a module, an assignment to ``.grad`` or ``.grad.data``, or a backward pass with
        ``create_graph``. None counts as zero.
        """
        with torch.no_grad():
            for (name, parameter), address in zip(self.trainable.items(), self._addresses, strict=True):
                self._collect(name, parameter, address)

    def _collect(self, name: str, parameter: torch.nn.Parameter, address: int) -> None:
        grad, view = parameter.grad, self._grads[name]
        moved = view.data_ptr() != address
        if grad is view and not moved:
            return
        if moved:
            view = self._grads[name] = self.params.views(self._grad)[name]
        if parameter.dtype != self.dtype:
            if grad is not None:
                view.add_(grad.to(self.dtype).to_dense())
                parameter.grad = None
            return
        if grad is None:
            view.zero_()
        else:
            view.copy_(grad.to_dense())
        parameter.grad = view

    def state_dict(self, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The module's ``state_dict`` in plain PyTorch, as a private copy; each parameter is rounded to its own dtype.

        Args:
            params: The parameters, shape (D,).
            buffers: The buffers by name.
        """
        self.bind(params.to(self.device))
        self.buffers.load(buffers)
        copies: dict[tuple[Any, ...], torch.Tensor] = {}
        return {name: _copied(value, copies) for name, value in self.module.state_dict().items()}


def move(module: torch.nn.Module, device: torch.device) -> None:
    """Move the tensors of a module to a device; one that is there under several names stays one, unlike in ``Module.to``."""
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the former ones, whose numbers would be given anew

    def there(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == device:
            return tensor
        if id(tensor) not in moved:
            moved[id(tensor)] = tensor, tensor.to(device)
        return moved[id(tensor)][1]

    module._apply(there)  # pyright: ignore[reportPrivateUsage] # `Module.to` does this, without looking for further names


def _refuse_place(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Refuse a tensor that is elsewhere than on the CPU or the model's device, or that can have no gradients."""
    if tensor.device.type != "cpu" and tensor.device != device:
        raise ValueError(
            f"model: {name}: got a tensor on {tensor.device}, expected all on the CPU, where a model is built; worker.device "
            f"says where it is moved to (here {device})"
        )
    if tensor.is_inference():
        raise ValueError(
            f"model: {name}: got a tensor made in torch.inference_mode(), expected one made outside, as there are no gradients "
            "of these"
        )


def _copied(value: Any, copies: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    """A private copy of a tensor, on the CPU, or of a module's extra state, which may be anything.

    Args:
        value: The value.
        copies: Those so far, by place and form: tied tensors stay so, which a file then holds once.
    """
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    if not value.numel():
        return value.detach().to("cpu", copy=True)
    place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
    if place not in copies:
        copies[place] = value.detach().to("cpu", copy=True)
    return copies[place]


def sha256(*tensors: torch.Tensor) -> str:
    """The SHA-256 of the tensors' bytes, concatenated, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(as_bytes(tensor).cpu().numpy().data)
    return digest.hexdigest()
