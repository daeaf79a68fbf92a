"""Weights of training samples, from which each epoch draws them with replacement."""

from __future__ import annotations

import torch

LARGEST = 2**24
"""The number of samples from which ``torch.multinomial`` can draw."""


def checked_weights(weights: object, num_samples: int) -> torch.Tensor:
    """Return weights as float64, shape (N,).

    Raises:
        ValueError: they are not one finite number >= 0 for each sample, some of them > 0.
    """
    try:
        found = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"dataset.weights: got {type(weights).__name__}, expected a tensor of {num_samples} weights: {error}"
        ) from None
    if found.shape != (num_samples,):
        raise ValueError(
            f"dataset.weights: got the shape {tuple(found.shape)}, expected {(num_samples,)}: one for each training sample"
        )
    wrong = found[~(found.isfinite() & (found >= 0))]
    if wrong.numel():
        raise ValueError(f"dataset.weights: got {float(wrong[0])}, expected finite numbers >= 0")
    if not found.any():
        raise ValueError("dataset.weights: got zeros alone, expected at least one weight > 0")
    if num_samples > LARGEST:
        raise ValueError(f"dataset.weights: got {num_samples} training samples, expected at most {LARGEST} with weights")
    return found
