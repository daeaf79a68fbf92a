"""Top-k against a plain loop, and indices that it refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ormo_rpc.compression import Encoder, PushFormat
from ormo_rpc.compression.topk import TopK
from ormo_rpc.compression.wire_options import WireDtype
from ormo_rpc.errors import PushRefused
from ormo_rpc.models.flat import Layout
from tests.support.compression import DIMENSION, SHAPES, buffer_layout, encoded, gradients, layout, made


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("wire", [WireDtype.float32, WireDtype.fp16])
def test_topk_is_a_plain_loop(feedback: bool, wire: WireDtype) -> None:
    ratio, k = 0.05, 42  # of 837 values: 41.85
    compression = TopK(ratio=ratio, error_feedback=feedback)
    format_ = PushFormat(
        params=layout(SHAPES), buffers=buffer_layout({}), dtype=torch.float32, compression=compression, wire=wire
    )
    encoder = Encoder(format_)
    error = [np.float32(0)] * DIMENSION
    for gradient in gradients(6):
        corrected = [np.float32(value) + e for value, e in zip(gradient.tolist(), error, strict=True)]
        largest = sorted(range(DIMENSION), key=lambda place: -abs(corrected[place]))[:k]
        expected = [np.float32(0)] * DIMENSION
        for place in largest:
            expected[place] = np.float32(np.float16(corrected[place]) if wire is WireDtype.fp16 else corrected[place])
        if feedback:
            error = [p - d for p, d in zip(corrected, expected, strict=True)]
        assert encoded(encoder, gradient).tolist() == [float(value) for value in expected]
    assert (any(error)) == feedback


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        (lambda good: good - 900, r"got indices from -\d+ to -?\d+, expected rising ones from 0 to 836 at most"),
        (lambda good: good + 900, r"got indices from \d+ to 1\d\d\d, expected rising ones from 0 to 836 at most"),
        (lambda good: good.flip(0), r"got indices from \d+ to \d+ that do not rise, expected rising ones .*"),
        (lambda good: good * 0 + 7, r"got indices from 7 to 7 that do not rise, expected rising ones .*"),
        (lambda good: good * 0 + 2**31 - 1, r"got indices from 2147483647 to 2147483647, expected .*"),
        (lambda good: good.index_fill(0, torch.tensor([5]), 2**31 - 1), r"got indices .* that do not rise, expected .*"),
    ],
)
def test_invalid_indices_are_refused(indices: Callable[[Tensor], Tensor], said: str) -> None:
    format_ = made("topk", WireDtype.float32)
    encoder = Encoder(format_)
    encoded(encoder, gradients(1)[0])
    place = format_.regions[0][1].of(encoder.wire)
    place.copy_(indices(place.clone()))
    with pytest.raises(PushRefused, match=rf"\Apush of worker 1: payload: {said}; worker and server must have .*\Z") as caught:
        format_.unpack(encoder.wire, sender="push of worker 1")
    assert type(caught.value) is PushRefused


def test_more_parameters_than_an_index_can_name_are_refused() -> None:
    huge = Layout({"a": torch.empty(1).expand(2**31)})
    with pytest.raises(ValueError, match=r"\Acompression: got topk for 2147483648 parameters, expected at most 2,147,483,647"):
        PushFormat(params=huge, buffers=buffer_layout({}), dtype=torch.float32, compression=TopK())
