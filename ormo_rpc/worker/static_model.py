"""A model at fixed addresses: what a recorded pass reads and writes."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from ormo_rpc.compression.wire_buffers import WireBuffers
from ormo_rpc.models.buffers import buffers_of
from ormo_rpc.models.flat import FlatModel


class StaticModel:
    """A model whose parameters, gradient, buffers and loss lie at fixed addresses.

    Images that lie with their channels last want weights that do, too: these are then in memory of their own, filled by one
    pass over the parameters, since the flat vector has everybody's order.

    Batch norms that are called once a pass leave the statistics of their batch in `reported`: they average with the momentum 1,
    and count nothing.

    Args:
        model: The model, for this object alone, on its device.
        norms: The prefixes of the batch norms that each pass calls once.
        channels_last: Lay out weights of four dimensions with their channels last.

    Attributes:
        params: The parameters of the next pass, shape (D,): to be written to.
        grad: The gradient that a pass leaves, shape (D,).
        held: The buffers of the next pass, as bytes: to be written to where `reads_buffers`.
        reads_buffers: There are buffers that a pass may read.
        reported: The buffers that a pass reports, as bytes in the form of `WireBuffers`.
        names: Their names.
        loss: The loss that a pass leaves, a float64.
        scale: The factor to the loss, a float32: to be written to.
        unscale: Its inverse.
    """

    def __init__(self, model: FlatModel, norms: Collection[str], *, channels_last: bool) -> None:
        self.model = model
        self.device, size, layout = model.device, model.params.size, model.buffers.layout
        self.params = torch.zeros(size, dtype=model.dtype, device=self.device)
        self.grad = torch.zeros_like(self.params)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.scale = torch.ones((), dtype=torch.float32, device=self.device)
        self.unscale = torch.ones((), dtype=model.dtype, device=self.device)
        shapes = list(model.params.shapes.values())
        self._order = _order(shapes, self.device) if channels_last and any(len(shape) == 4 for shape in shapes) else None
        self._inverse = None if self._order is None else _inverted(self._order)
        self._weights = self.params if self._order is None else torch.zeros_like(self.params)
        """The parameters as they lie in memory."""
        self._gradients = self.grad if self._order is None else torch.zeros_like(self.grad)
        """Their gradients as they lie in memory."""
        strides = [_strides(shape, last=self._order is not None) for shape in shapes]
        self._grad_views = _views(self._gradients, shapes, strides)
        self._casts: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Parameters of another dtype than the vector's, and what each is a cast copy of."""
        for parameter, view in zip(model.trainable.values(), _views(self._weights, shapes, strides), strict=True):
            if parameter.dtype == model.dtype:
                parameter.data = view
            else:
                parameter.data = torch.empty_like(view, dtype=parameter.dtype)
                self._casts.append((parameter.data, view))
        self.held = model.buffers.initial.clone()
        self.reported = torch.zeros(WireBuffers.size(layout), dtype=torch.uint8, device=self.device)
        self._fresh = torch.zeros_like(self.reported)
        """`reported` before a pass: no statistics, which are averaged with the momentum 1 (0 times NaN would stay)."""
        self._norms = {prefix: model.buffers.norms[prefix].momentum for prefix in norms}
        """Momentum of each norm that is called."""
        self.names = self._put_norms()
        self.reads_buffers = self._put_buffers(norms)
        model.module.train()

    def begin(self) -> None:
        """Do on the device what comes before a forward pass."""
        torch.clear_autocast_cache()  # it knows a parameter by its address alone
        if self._order is not None:
            torch.index_select(self.params, 0, self._order, out=self._weights)
        for cast, view in self._casts:
            cast.copy_(view)
        if self.names:
            self.reported.copy_(self._fresh)
        for parameter in self.model.trainable.values():
            parameter.grad = None  # so that backward passes hand over what they make, and add up nothing

    def end(self, loss: torch.Tensor) -> None:
        """Do on the device what comes after a backward pass: bring the gradient together. Under ``torch.no_grad``."""
        self.loss.copy_(loss)
        into, values = list[torch.Tensor](), list[torch.Tensor]()
        for parameter, view in zip(self.model.trainable.values(), self._grad_views, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                into.append(view)
                values.append(parameter.grad.to_dense())
            parameter.grad = None
        torch._foreach_copy_(into, values)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # it has no public name
        if self._inverse is not None:
            torch.index_select(self._gradients, 0, self._inverse, out=self.grad)

    def counts(self, region: torch.Tensor) -> list[torch.Tensor]:
        """Return the numbers of calls in a region like `reported`."""
        return [self._at(region, prefix, "num_batches_tracked") for prefix in self._norms]

    def statistics(self, region: torch.Tensor) -> dict[float, list[torch.Tensor]]:
        """Return the means and variances in a region like `reported`, by the part of an average that a further call leaves."""
        found: dict[float, list[torch.Tensor]] = {}
        for prefix, momentum in self._norms.items():
            if momentum != 0:
                views = [self._at(region, prefix, name) for name in ("running_mean", "running_var")]
                found.setdefault(1.0 if momentum is None else 1.0 - momentum, []).extend(views)
        return found

    def _at(self, region: torch.Tensor, prefix: str, name: str) -> torch.Tensor:
        return WireBuffers(self.model.buffers.layout, region).views([prefix + name])[prefix + name]

    def _put_norms(self) -> frozenset[str]:
        """Have the norms leave their statistics in `reported`; return the names of all that is reported."""
        names: list[str] = []
        for prefix, momentum in self._norms.items():
            norm = self.model.buffers.norms[prefix]
            held = buffers_of(norm)
            names.append(f"{prefix}num_batches_tracked")
            if momentum != 0:  # no call counts
                names += [f"{prefix}running_mean", f"{prefix}running_var"]
            for name in ("running_mean", "running_var"):
                held[name] = self._at(self.reported, prefix, name)
            held["num_batches_tracked"] = None
            norm.momentum = 1.0
        one = {name: torch.zeros_like(self.model.buffers.tensors[name]) for name in names}
        for name in names:
            if name.endswith("num_batches_tracked"):
                one[name] += 1
        if names:
            WireBuffers(self.model.buffers.layout, self._fresh).write(one)
        return frozenset(names)

    def _put_buffers(self, norms: Collection[str]) -> bool:
        """Have all other buffers lie in `held`; tell if there are any."""
        views = self.model.buffers.layout.views(self.held)
        ours = {f"{prefix}{name}" for prefix in norms for name in ("running_mean", "running_var", "num_batches_tracked")}
        others = {name: tensor for name, tensor in self.model.buffers.tensors.items() if name not in ours}
        for name, tensor in others.items():
            tensor.data = views[name]
        return bool(others)


def _strides(shape: torch.Size, *, last: bool) -> tuple[int, ...]:
    """The strides of a tensor that lies contiguous, in order or with its channels last."""
    empty = torch.empty(shape, device="meta")
    return (empty.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else empty).stride()


def _views(flat: torch.Tensor, shapes: Iterable[torch.Size], strides: Iterable[tuple[int, ...]]) -> list[torch.Tensor]:
    """Tensors that lie one after the other in a vector."""
    found: list[torch.Tensor] = []
    start = 0
    for shape, steps in zip(shapes, strides, strict=True):
        found.append(flat.as_strided(shape, steps, start))
        start += shape.numel()
    return found


def _order(shapes: Iterable[torch.Size], device: torch.device) -> torch.Tensor:
    """The places in the flat vector of the values, in the order in which tensors with channels last have them."""
    parts: list[torch.Tensor] = []
    start = 0
    for shape in shapes:
        places = torch.arange(start, start + shape.numel(), device=device).view(shape)
        parts.append((places.permute(0, 2, 3, 1) if len(shape) == 4 else places).reshape(-1))
        start += shape.numel()
    return torch.cat(parts).to(torch.int32 if start < 2**31 else torch.int64)


def _inverted(order: torch.Tensor) -> torch.Tensor:
    """The order in which `order` is undone."""
    inverse = torch.empty_like(order)
    inverse[order.long()] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return inverse
