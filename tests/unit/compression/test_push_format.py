"""The bytes of a push: a fixed size, no copy of an exact form, and decoded as the worker encoded them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ormo_rpc.compression import Encoder
from ormo_rpc.compression.wire_options import WireDtype
from tests.support.compression import CASES, DIMENSION, encoded, gradients, made


def statistics(values: Tensor) -> dict[str, Tensor]:
    return {"mean": values[:5].float(), "var": values[5:].float()}


@pytest.mark.parametrize(
    ("name", "wire", "size"),
    [
        # 837 values of 4 bytes, 3,348 -> 3,360 (16 divides it); then two marks (16 bytes) and two buffers of 5 values (2 * 32)
        ("none", WireDtype.float32, 3360 + 80),
        ("none", WireDtype.bf16, 1680 + 80),  # 837 * 2 = 1,674
        ("topk", WireDtype.float32, 336 + 80),  # 42 * (4 + 4)
        ("topk", WireDtype.fp16, 256 + 80),  # 42 * (2 + 4) = 252
        # 2 (8 + 27) + 8 + 2 (20 + 30) + 1 + 12 = 191 values.
        ("powersgd", WireDtype.float32, 768 + 80),  # 764
        ("powersgd", WireDtype.bf16, 384 + 80),  # 382
    ],
)
def test_the_size_is_fixed_and_known(name: str, wire: WireDtype, size: int) -> None:
    format_ = made(name, wire)
    assert format_.size == size
    assert Encoder(format_).wire.shape == (size,)


def test_an_exact_form_is_the_vector_itself_on_both_sides() -> None:
    places: list[Tensor] = []

    def allocate(size: int) -> Tensor:
        places.append(torch.zeros(size, dtype=torch.uint8))
        return places[-1]

    format_ = made("none", WireDtype.float32, vectors=2)
    encoder = Encoder(format_, allocate)
    (memory,) = places
    assert encoder.wire is memory
    assert encoder.payload.dtype == torch.float32
    assert encoder.push.data_ptr() == encoder.payload.data_ptr() == encoder.encode(0).data_ptr() == memory.data_ptr()
    encoder.push.copy_(torch.arange(2.0 * DIMENSION))
    encoder.buffers.write(statistics(torch.arange(10.0)))
    push, buffers = format_.unpack(memory, into=torch.zeros(2 * DIMENSION))
    assert push.data_ptr() == memory.data_ptr()
    assert push.tolist() == list(range(2 * DIMENSION))
    assert {name: value.tolist() for name, value in buffers.items()} == {"mean": [0, 1, 2, 3, 4], "var": [5, 6, 7, 8, 9]}
    assert buffers["mean"].data_ptr() == memory.data_ptr() + 6704 + 16  # 2 * 837 * 4 = 6,696, to a multiple of 16; the marks


@pytest.mark.parametrize(("name", "wire"), CASES)
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_server_decodes_the_push_that_the_worker_returned(
    name: str, wire: WireDtype, vectors: int, dtype: torch.dtype
) -> None:
    format_ = made(name, wire, vectors=vectors, dtype=dtype)
    encoder = Encoder(format_, lambda size: torch.zeros(size, dtype=torch.uint8))
    into = torch.full((format_.length,), math.nan, dtype=dtype)
    for gradient in gradients(3, dtype, format_.length):
        encoder.buffers.write(statistics(gradient[:10]))
        said = encoded(encoder, gradient)
        push, buffers = format_.unpack(encoder.payload.view(torch.uint8).clone(), into)
        assert format_.plain or push is into
        assert push.dtype == format_.pushed_dtype
        assert torch.equal(push, said)
        assert torch.equal(torch.cat([*buffers.values()]), gradient[:10].float())
        assert torch.equal(format_.unpack(encoder.wire)[0], said)
    if vectors == 3 and not format_.exact:  # each is compressed for itself
        alone = Encoder(made(name, wire, dtype=dtype))
        gradient = gradients(1, dtype, format_.length)[0]
        assert torch.equal(encoded(Encoder(format_), gradient)[:DIMENSION], encoded(alone, gradient[:DIMENSION]))


@pytest.mark.parametrize(("name", "wire"), CASES)
def test_bytes_at_unaligned_addresses_are_decoded(name: str, wire: WireDtype) -> None:
    format_ = made(name, wire)
    encoder = Encoder(format_)
    encoder.buffers.write(statistics(torch.arange(10.0)))
    expected = encoded(encoder, gradients(1)[0])
    shifted = torch.zeros(format_.size + 3, dtype=torch.uint8)[3:]
    scattered = torch.zeros(format_.size, 2, dtype=torch.uint8)[:, 1]
    for payload in (shifted, scattered):
        payload.copy_(encoder.wire)
        push, buffers = format_.unpack(payload)
        assert torch.equal(push, expected)
        assert buffers["var"].tolist() == [5, 6, 7, 8, 9]
