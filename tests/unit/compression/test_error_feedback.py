"""Error feedback: nothing is lost, each worker has its own state, and a saved one continues to the bit."""

from __future__ import annotations

import math

import pytest
import torch

from ormo_rpc.compression import Encoder
from ormo_rpc.compression.wire_options import WireDtype
from tests.support.compression import CASES, DIMENSION, encoded, gradients, made


@pytest.mark.parametrize(("name", "wire"), [case for case in CASES if "without" not in case[0]])
def test_nothing_is_lost_only_late(name: str, wire: WireDtype) -> None:
    format_ = made(name, wire, dtype=torch.float64)
    encoder = Encoder(format_)
    generator = torch.Generator().manual_seed(2)
    # Whole numbers, whose sums are exact in float64 as long as what is pushed are whole numbers too; PowerSGD's are not.
    sent = [torch.randint(-9999, 10_000, (DIMENSION,), generator=generator).double() for _ in range(20)]
    seen = [encoded(encoder, gradient) for gradient in sent]
    memory = encoder.state_dict().get(0)
    error = torch.zeros(DIMENSION, dtype=torch.float64) if memory is None else memory["residual"]
    late = sum(sent, torch.zeros_like(error)) - sum(seen, torch.zeros_like(error)) - error
    if name == "powersgd":
        # Two roundings a step, g + e and p - C(p), and those of our own sums: at most 4 per step, of values below 20 * 9,999.
        assert late.abs().max() <= 20 * 4 * 20 * 9_999 * 2.0**-53
    else:
        assert not late.any()
    assert format_.exact == (memory is None)
    assert format_.exact or bool(error.any())


@pytest.mark.parametrize(("name", "wire"), CASES)
def test_a_gradient_that_is_not_finite_is_seen_and_leaves_no_trace(name: str, wire: WireDtype) -> None:
    first, second = gradients(2)
    encoder, same = Encoder(made(name, wire)), Encoder(made(name, wire))
    for place, bad in ((0, math.nan), (DIMENSION - 1, math.inf), (300, -math.inf)):
        assert torch.equal(encoded(encoder, first), encoded(same, first))
        spoilt = second.clone()
        spoilt[place] = bad
        assert not torch.isfinite(encoded(encoder, spoilt)).all()
    assert torch.equal(encoded(encoder, second), encoded(same, second))


def test_each_worker_has_its_own_compression_state_which_is_reset_when_it_joins_again() -> None:
    for name in ("none", "topk", "powersgd"):
        encoder = Encoder(made(name, WireDtype.bf16))
        alone = {worker: Encoder(made(name, WireDtype.bf16)) for worker in (0, 7)}
        for number, gradient in enumerate(gradients(8)):
            worker = (0, 7)[number % 2]
            assert torch.equal(encoded(encoder, gradient, worker), encoded(alone[worker], gradient, worker))
        encoder.reset(7)
        gradient = gradients(1)[0]
        fresh = encoded(Encoder(made(name, WireDtype.bf16)), gradient, 7)
        assert torch.equal(encoded(encoder, gradient, 7), fresh)
        assert torch.equal(encoded(encoder, gradient, 0), encoded(alone[0], gradient, 0))
        encoder.reset()
        assert encoder.state_dict() == {}


def test_without_error_feedback_only_factors_are_kept() -> None:
    encoder = Encoder(made("topk without feedback", WireDtype.bf16))
    gradient = gradients(1)[0]
    assert torch.equal(encoded(encoder, gradient), encoded(encoder, gradient))
    assert encoder.state_dict() == {0: {"compressor": [None], "residual": None}}


@pytest.mark.parametrize("name", ["topk", "powersgd"])
def test_a_saved_encoder_state_continues_bit_for_bit(name: str) -> None:
    one, other = Encoder(made(name, WireDtype.fp16)), Encoder(made(name, WireDtype.fp16))
    *before, after = gradients(4)
    for gradient in before:
        encoded(one, gradient, 3)
    state = one.state_dict()
    other.load_state_dict(state)
    first = encoded(one, after, 3)
    assert torch.equal(encoded(other, after, 3), first)
    again = Encoder(made(name, WireDtype.fp16))
    again.load_state_dict(state)  # still the state of then: a private copy, both ways
    assert torch.equal(encoded(again, after, 3), first)
