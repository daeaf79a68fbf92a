"""Rounding to bf16 and fp16: torch's, but finite values stay finite, and what is lost is fed back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ormo_rpc.compression import Encoder
from ormo_rpc.compression.rounding import round_into
from ormo_rpc.compression.wire_options import WireDtype
from tests.support.compression import DIMENSION, encoded, gradients, made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_rounding_is_torchs_but_finite_values_stay_finite(dtype: torch.dtype, values: list[float]) -> None:
    exact = torch.tensor(values, dtype=torch.float32)
    out = torch.empty_like(exact, dtype=dtype)
    round_into(exact, out)
    largest = torch.finfo(dtype).max
    for value, mine, theirs in zip(values, out.tolist(), exact.to(dtype).tolist(), strict=True):
        if math.isnan(value):
            assert math.isnan(mine)
        elif math.isinf(theirs) and not math.isinf(value):
            assert mine == math.copysign(largest, value)
        else:
            assert mine == theirs


def test_what_fp16_cannot_hold_is_carried_until_it_has_all_arrived() -> None:
    encoder = Encoder(made("none", WireDtype.fp16))
    gradient = torch.zeros(DIMENSION)
    gradient[:3] = torch.tensor([200_000.0, -70_000.0, 2.0**-26])  # the last one is below half of fp16's smallest, 2^-24
    seen = [encoded(encoder, gradient)] + [encoded(encoder, torch.zeros(DIMENSION)) for _ in range(3)]
    assert [push[0].item() for push in seen] == [65504, 65504, 65504, 200_000 - 3 * 65504]
    assert [push[1].item() for push in seen] == [-65504, -70_000 + 65504, 0, 0]
    tiny = [push[2].item() for push in seen] + [encoded(encoder, gradient)[2].item() for _ in range(2)]
    # 1, 1, 1, 1, 2 and, after a tie that is rounded to the even 0, 3 quarters of 2^-24: nothing, and at last a whole one.
    assert tiny == [0, 0, 0, 0, 0, 2.0**-24]


@pytest.mark.parametrize("wire", [WireDtype.bf16, WireDtype.fp16])
def test_rounding_alone_feeds_its_error_back(wire: WireDtype) -> None:
    assert wire.rounded is not None
    encoder, error = Encoder(made("none", wire)), torch.zeros(DIMENSION)
    for gradient in gradients(5):
        corrected = gradient + error
        expected = corrected.to(wire.rounded).to(torch.float32)
        error = corrected - expected
        assert torch.equal(encoded(encoder, gradient), expected)
    assert error.abs().max() > 0
