"""The checks of a trial pass, which are too slow for every pass: what it changes behind the back of torch's counters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ormo_rpc.errors import ModelRefused
from ormo_rpc.models.buffers import is_dense
from ormo_rpc.models.flat import sha256

_log = logging.getLogger(__name__)
LARGE = 4_000_000
"""Bytes of a buffer from which a constant one is worth a warning."""
_UNKNOWN = object()
"""Anything that two passes may set to different objects of equal meaning."""


def check_passes(module: torch.nn.Module, compute: Callable[[], None]) -> None:
    """Compute two equal passes, refuse what they must not change, and warn of attributes and constants in the wrong place.

    An attribute that only the first pass changes is a cache, and one with a graph is a result.

    Args:
        module: The model, at parameters that ``compute`` does not replace by others.
        compute: Computes a pass, with the same batch and random draws each time; `Passes` compares the parameters' values.

    Raises:
        ModelRefused: a parameter came or went.
    """
    parameters = dict(module.named_parameters())
    large = _large_buffers(module)
    compute()
    after = dict(module.named_parameters())
    others = [name for name in {**parameters, **after} if after.get(name) is not parameters.get(name)]
    if others:
        raise ModelRefused(
            f"model: parameters: a forward pass added, removed or replaced {others}, expected those of construction; "
            "make all of them there"
        )
    attributes = _attributes(module)
    compute()
    for name, value in _attributes(module).items():
        former = attributes.get(name, _UNKNOWN)
        if value is not _UNKNOWN and former is not _UNKNOWN and value != former:
            _log.warning(
                "model: %s: each forward pass changes this attribute, of which each process has its own: it is neither shared, "
                "saved nor replayed; where it matters, register it as a buffer",
                name,
            )
    for name, (size, value) in _large_buffers(module).items():
        if large.get(name) == (size, value):
            _log.warning(
                "model: %s: got a buffer of %.0f MB that no pass has changed, and that travels with every ticket all the same; "
                "a constant costs nothing as a parameter with requires_grad=False",
                name,
                size / 1e6,
            )


def _large_buffers(module: torch.nn.Module) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of each buffer above `LARGE` by name."""
    found = {name: (buffer.nbytes, buffer) for name, buffer in module.named_buffers() if is_dense(buffer)}
    return {name: (size, sha256(buffer)) for name, (size, buffer) in found.items() if size > LARGE}


def warn_of_views(module: torch.nn.Module, former: Iterable[torch.Tensor]) -> None:
    """Warn of attributes that lie in memory which trainable parameters have left: they no longer follow the parameters.

    Args:
        module: The model, after a pass, which may have computed such attributes anew.
        former: What the parameters were before they were bound to other memory.
    """
    left = {each.untyped_storage().data_ptr() for each in former if each.numel()}
    for name, value in _plain_attributes(module):
        each = value if isinstance(value, torch.Tensor) and is_dense(value) else None
        if each is not None and each.untyped_storage().data_ptr() in left:
            _log.warning(
                "model: %s: this attribute lies in the memory of a trained parameter at construction, and stays as it was "
                "there; where a pass uses it, take it from the parameter in the pass",
                name,
            )


def _attributes(module: torch.nn.Module) -> dict[str, object]:
    """Something equal for equal values of plain attributes, by their names."""
    return {name: _value(value) for name, value in _plain_attributes(module)}


def _plain_attributes(module: torch.nn.Module) -> Generator[tuple[str, object]]:
    """Plain attributes as ``Class.attribute``, with the module's name where it is not the root, and their values."""
    torchs_own = vars(torch.nn.Module()).keys()
    for path, owner in module.named_modules():
        for key, value in vars(owner).items():
            if key not in torchs_own:
                yield f"{type(owner).__name__}.{key}{f' (in {path})' if path else ''}", value


def _value(value: Any, depth: int = 4) -> object:
    """Something equal for equal values: of numbers, text, arrays, tensors without a graph, and collections of them."""
    if depth == 0:  # a collection may hold itself
        return _UNKNOWN
    if value is None or isinstance(value, (bool, int, float, str)):
        return (type(value), value if value == value else "nan")
    if isinstance(value, torch.Tensor):
        plain = is_dense(value) and value.grad_fn is None and not isinstance(value, torch.nn.Parameter)
        return (value.dtype, tuple(value.shape), sha256(value)) if plain else _UNKNOWN
    if isinstance(value, (np.ndarray, np.generic)):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return tuple((str(key), _value(each, depth - 1)) for key, each in value.items())
    return tuple(_value(each, depth - 1) for each in value) if isinstance(value, (list, tuple)) else _UNKNOWN
