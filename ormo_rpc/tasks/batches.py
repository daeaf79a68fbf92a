"""Inputs and targets of a batch that is a pair or a mapping, the call of a model with them, and the logits of its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from ormo_rpc.data.collate import TARGET_KEYS, target_key

LOGITS = ("logits", "out")
"""Names of the logits in an output: those of transformers' and of torchvision's segmentation models."""


def inputs_of(batch: Any) -> Any:
    """Return the first of a pair, or a mapping without its targets."""
    if not isinstance(batch, Mapping):
        return batch[0]
    named = cast("Mapping[str, Any]", batch)
    target = target_key(named)
    return {key: value for key, value in named.items() if key != target}


def targets_of(batch: Any) -> Any:
    """Return the second of a pair, or the targets of a mapping."""
    if not isinstance(batch, Mapping):
        return batch[1]
    named = cast("Mapping[str, Any]", batch)
    target = target_key(named)
    return None if target is None else named[target]


def call_model(model: torch.nn.Module, inputs: Any) -> Any:
    """Call a model: a tuple or list has its arguments, a mapping its keywords; a single one is its first argument."""
    if isinstance(inputs, Mapping):
        named = cast("Mapping[str, Any]", inputs)
        return model(*named.values()) if len(named) == 1 else model(**named)
    return model(*inputs) if type(inputs) in (tuple, list) else model(inputs)


def check_form(batch: Any) -> None:
    """Refuse a batch that has no targets.

    Raises:
        ValueError: it is neither a pair nor a mapping with targets.
    """
    expected = f"expected a pair (inputs, targets), or a mapping with one of {', '.join(TARGET_KEYS)}"
    if isinstance(batch, Mapping):
        if target_key(cast("Mapping[str, Any]", batch)) is None:
            raise ValueError(f"the batch has the keys {', '.join(map(str, cast('Mapping[Any, Any]', batch)))}, {expected}")
    elif not isinstance(batch, (tuple, list)):
        raise ValueError(f"the batch is of type {type(batch).__name__}, {expected}")
    elif len(cast("list[Any]", batch)) != 2:
        raise ValueError(f"the batch is a {type(batch).__name__} of {len(cast('list[Any]', batch))}, {expected}")


def logits_of(output: Any) -> Any:
    """Return the logits of an output that is an object or a mapping with one of `LOGITS`; any other output as it is."""
    if isinstance(output, torch.Tensor):
        return output
    for name in LOGITS:
        if isinstance(output, Mapping):
            if name in output:
                return cast("Mapping[str, Any]", output)[name]
        elif hasattr(output, name):
            return getattr(output, name)
    return output
