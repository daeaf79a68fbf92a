"""The difference of gradients that rounding explains, by the dtypes of what passes compute with."""

from __future__ import annotations

import pytest
import torch

from ormo_rpc.worker.arithmetic import arithmetic_kept
from ormo_rpc.worker.comparing import FLOAT32, FLOAT64, SIXTEEN, TF32, difference, tolerance


@pytest.mark.parametrize(
    ("dtypes", "autocast", "expected"),
    [
        ((torch.float64,), None, FLOAT64),
        ((torch.float64, torch.int8), None, FLOAT64),
        ((torch.float64, torch.float32), None, FLOAT32),  # a vector of float64, and passes that are rounded further
        ((torch.float32, torch.float16), None, SIXTEEN),
        ((torch.float32,), torch.bfloat16, SIXTEEN),
    ],
)
def test_the_fewest_bits_count(dtypes: tuple[torch.dtype, ...], autocast: torch.dtype | None, expected: float) -> None:
    parameters = [torch.zeros(2, dtype=dtype) for dtype in dtypes]
    with arithmetic_kept():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        assert tolerance(parameters, autocast) == expected
        torch.backends.cuda.matmul.allow_tf32 = True
        assert tolerance(parameters, autocast) == (TF32 if expected == FLOAT32 else expected)


def test_a_swapped_buffer_or_a_missing_clip_is_more_than_rounding() -> None:
    grad, mean, variance = torch.randn(100), torch.full((4,), 0.3), torch.full((4,), 2.0)
    assert difference("gradient", {"": 2 * grad}, {"": grad}, SIXTEEN) is not None
    assert difference("gradient", {"": 1.001 * grad}, {"": grad}, FLOAT32) is None
    buffers, swapped = {"mean": mean, "var": variance}, {"mean": variance, "var": mean}
    assert difference("buffers", swapped, buffers, 0.1 * SIXTEEN) is not None
