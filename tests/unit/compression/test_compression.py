"""The wire form of pushes: compressors and rounding against references, sizes, error feedback, forged bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as published

from ormo_rpc.compression import Compression, Encoder, NoCompression, PushFormat
from ormo_rpc.compression.powersgd import PowerSGD, PowerSGDCompressor, orthogonalise
from ormo_rpc.compression.rounding import round_into
from ormo_rpc.compression.topk import TopK
from ormo_rpc.compression.wire_options import WireDtype
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import ConfigError, PushRefused
from ormo_rpc.messages import Push
from ormo_rpc.models.flat import Layout
from ormo_rpc.options import parts
from ormo_rpc.server.validation import validate_push
from ormo_rpc.worker.faults import FaultInjector

SHAPES = {"conv": (8, 3, 3, 3), "conv_bias": (8,), "linear": (20, 30), "scale": (), "small": (3, 4)}
DIMENSION = 8 * 27 + 8 + 600 + 1 + 12
STATISTICS = {"mean": (5,), "var": (5,)}
COMPRESSIONS: dict[str, Compression] = {
    "none": NoCompression(error_feedback=True),
    "topk": TopK(ratio=0.05),
    "powersgd": PowerSGD(rank=2),
    "topk without feedback": TopK(ratio=0.05, error_feedback=False),
}
CASES = [(name, wire) for name in COMPRESSIONS for wire in WireDtype]


def test_every_registered_compression_is_tested_here() -> None:
    assert {type(compression) for compression in COMPRESSIONS.values()} == set(parts("compression").values())


def layout(shapes: dict[str, tuple[int, ...]]) -> Layout:
    return Layout({name: torch.empty(shape) for name, shape in shapes.items()})


def made(name: str, wire: WireDtype, *, dtype: torch.dtype = torch.float32, vectors: int = 1) -> PushFormat:
    return PushFormat(
        params=layout(SHAPES),
        buffers=layout(STATISTICS),
        dtype=dtype,
        vectors=vectors,
        compression=COMPRESSIONS[name],
        wire=wire,
    )


def gradients(count: int, dtype: torch.dtype = torch.float32, length: int = DIMENSION) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(length, generator=generator, dtype=dtype) for _ in range(count)]


def encoded(encoder: Encoder, gradient: Tensor, worker: int = 0) -> Tensor:
    """A copy of a gradient as the server will decode it."""
    encoder.push.copy_(gradient)
    return encoder.encode(worker).clone()


# -- rounding ----------------------------------------------------------------------------------------------------------


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


# -- top-k -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("wire", [WireDtype.float32, WireDtype.fp16])
def test_topk_is_a_plain_loop(feedback: bool, wire: WireDtype) -> None:
    ratio, k = 0.05, 42  # of 837 values: 41.85
    compression = TopK(ratio=ratio, error_feedback=feedback)
    format_ = PushFormat(params=layout(SHAPES), buffers=layout({}), dtype=torch.float32, compression=compression, wire=wire)
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


# -- PowerSGD ----------------------------------------------------------------------------------------------------------


class Bucket:
    """The methods that the published hook calls on a bucket of gradients."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        return list(layout(MATRICES).views(self.flat).values())


MATRICES = {name: shape for name, shape in SHAPES.items() if shape}  # the published one has no word for a number alone
MATRICES_DIMENSION = DIMENSION - 1


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        store=dist.HashStore(),  # pyright: ignore[reportPrivateImportUsage] # it is documented
        rank=0,
        world_size=1,
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_powersgd_is_torchs_hook_of_one_process(rank: int, feedback: bool) -> None:
    state = published.PowerSGDState(
        None, matrix_approximation_rank=rank, start_powerSGD_iter=2, use_error_feedback=feedback, random_seed=5
    )
    state.iter = 2  # from its first step on
    compression = PowerSGD(rank=rank, error_feedback=feedback)
    format_ = PushFormat(params=layout(MATRICES), buffers=layout({}), dtype=torch.float64, compression=compression)
    factors = format_.compressor
    assert isinstance(factors, PowerSGDCompressor)
    worth = [part for part in factors.parts if part.rank]
    # (n + m) rank 2 < n m: 35 * 2 rank < 216 up to rank 3; 50 * 2 rank < 600 up to rank 5; 7 * 2 rank < 12 never.
    assert [(part.rows, part.columns, part.rank) for part in worth] == [
        *([(8, 27, rank)] if rank < 4 else []),
        (20, 30, rank),
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(np.random.RandomState(5).randint(1_000_000_000))
        start = torch.cat([torch.randn(1, part.columns, rank, dtype=torch.float64).reshape(-1) for part in worth])
    encoder = Encoder(format_)
    encoder.load_state_dict({0: {"compressor": [start], "residual": None}})
    for gradient in gradients(6, torch.float64, MATRICES_DIMENSION):
        bucket: Any = Bucket(gradient.clone())
        expected = published.powerSGD_hook(state, bucket).wait()
        torch.testing.assert_close(encoded(encoder, gradient), expected, rtol=1e-9, atol=1e-11)
        if feedback:
            torch.testing.assert_close(encoder.state_dict()[0]["residual"], state.error_dict[0], rtol=1e-9, atol=1e-11)


def test_orthogonalised_columns_are_orthonormal_or_nothing() -> None:
    matrix = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    matrix[:, 2] = 3 * matrix[:, 0] - matrix[:, 1]
    matrix[:, 3] = 0
    orthogonalise(matrix)
    torch.testing.assert_close(matrix.T @ matrix, torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank_of_gradient", [0, 1])
def test_powersgd_stays_finite_for_gradients_of_lower_rank(rank_of_gradient: int) -> None:
    encoder, first = Encoder(made("powersgd", WireDtype.float32)), torch.zeros(DIMENSION)
    generator = torch.Generator().manual_seed(1)
    if rank_of_gradient:
        thin = torch.outer(torch.randn(20, generator=generator), torch.randn(30, generator=generator))
        layout(SHAPES).views(first)["linear"].copy_(thin)
    seen = encoded(encoder, first)
    torch.testing.assert_close(seen, first, atol=1e-5, rtol=1e-4)  # a matrix of at most that rank is exact
    full = gradients(1)[0]
    for _ in range(200):
        seen = encoded(encoder, full)
        assert torch.isfinite(seen).all()
    # The same gradient again and again: what has arrived is nearly all of it, in every direction.
    arrived = 201 * full - encoder.state_dict()[0]["residual"]
    torch.testing.assert_close(arrived / 201, full, atol=0.3, rtol=0)


# -- error feedback ----------------------------------------------------------------------------------------------------


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


# -- sizes, places, copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wire", "size"),
    [
        # 837 values and 10 statistics of 4 bytes.
        ("none", WireDtype.float32, 837 * 4 + 40),
        # 2 bytes for each value; the statistics begin at a multiple of 4: 1,674 -> 1,676.
        ("none", WireDtype.bf16, 1676 + 40),
        ("topk", WireDtype.float32, 42 * (4 + 4) + 40),
        ("topk", WireDtype.fp16, 42 * (2 + 4) + 40),
        # 2 (8 + 27) + 8 + 2 (20 + 30) + 1 + 12 values.
        ("powersgd", WireDtype.float32, 191 * 4 + 40),
        ("powersgd", WireDtype.bf16, 384 + 40),
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
    encoder.statistics.copy_(torch.arange(10.0))
    push, buffers = format_.unpack(memory, into=torch.zeros(2 * DIMENSION))
    assert push.data_ptr() == memory.data_ptr()
    assert push.tolist() == list(range(2 * DIMENSION))
    assert {name: value.tolist() for name, value in buffers.items()} == {"mean": [0, 1, 2, 3, 4], "var": [5, 6, 7, 8, 9]}
    assert buffers["mean"].data_ptr() == memory.data_ptr() + 2 * DIMENSION * 4


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
        encoder.statistics.copy_(gradient[:10])
        said = encoded(encoder, gradient)
        push, buffers = format_.unpack(encoder.payload.view(torch.uint8).clone(), into)
        assert format_.plain or push is into
        assert push.dtype == format_.pushed_dtype
        assert torch.equal(push, said)
        assert torch.equal(torch.cat([*buffers.values()]), gradient[:10])
        assert torch.equal(format_.unpack(encoder.wire)[0], said)
    if vectors == 3 and not format_.exact:  # each is compressed for itself
        alone = Encoder(made(name, wire, dtype=dtype))
        gradient = gradients(1, dtype, format_.length)[0]
        assert torch.equal(encoded(Encoder(format_), gradient)[:DIMENSION], encoded(alone, gradient[:DIMENSION]))


@pytest.mark.parametrize("rank", [1, 3])
def test_factors_are_decoded_to_the_same_bits_by_any_number_of_threads(rank: int) -> None:
    params = layout({"a": (301, 1_003), "b": (67, 4_001)})
    factors = PowerSGD(rank=rank).build(params)
    values = torch.randn(factors.num_values, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for offset in (0, 1):  # memory that begins elsewhere
                into = torch.empty(params.size + offset)[offset:]
                factors.decompress(values, torch.empty(0, dtype=torch.int32), into)
                seen.append(into.clone())
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(each, seen[0]) for each in seen)
    p, q = values[: 301 * rank].view(301, rank), values[301 * rank : 1304 * rank].view(1_003, rank)
    torch.testing.assert_close(seen[0][: 301 * 1_003].view(301, 1_003), p @ q.T)


# -- forged bytes ------------------------------------------------------------------------------------------------------

SENTINEL = 12345.0


def unpacked(format_: PushFormat, payload: Tensor) -> str:
    """The server's answer to a payload, "taken" or the name of the refusal; nothing beside its place is written."""
    room = torch.full((format_.length + 32,), SENTINEL)
    outcome, said = "taken", "push of worker 3"
    try:
        grad, buffers = format_.unpack(payload, room[16:-16], "push of worker 3")
        push = Push(worker=3, ticket=0, stamp=0, grad=grad, buffers=buffers)
        statistics = {name: torch.empty(shape) for name, shape in STATISTICS.items()}
        validate_push(push, torch.empty(DIMENSION), statistics, dtype=format_.pushed_dtype)
        assert torch.isfinite(grad).all()
    except PushRefused as error:
        outcome, said = type(error).__name__, str(error)
    assert said.startswith("push of worker 3")
    assert (room[:16] == SENTINEL).all()
    assert (room[-16:] == SENTINEL).all()
    return outcome


@pytest.mark.parametrize(("name", "wire"), CASES)
@given(data=st.data())
def test_any_bytes_are_decoded_or_refused(name: str, wire: WireDtype, data: st.DataObject) -> None:
    format_ = made(name, wire)
    if data.draw(st.booleans()):
        payload = torch.tensor(list(data.draw(st.binary(min_size=format_.size, max_size=format_.size))), dtype=torch.uint8)
    else:  # what is nearly right goes deeper
        encoder = Encoder(format_)
        encoded(encoder, gradients(1)[0])
        payload = encoder.wire.clone()
        for place, byte in data.draw(st.lists(st.tuples(st.integers(0, format_.size - 1), st.integers(0, 255)), max_size=6)):
            payload[place] = byte
    assert unpacked(format_, payload) in ("taken", "PushRefused", "NonFiniteGradient")


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


@pytest.mark.parametrize(("name", "wire"), CASES)
def test_other_tensors_than_the_bytes_are_refused(name: str, wire: WireDtype) -> None:
    format_ = made(name, wire)
    good = torch.zeros(format_.size, dtype=torch.uint8)
    bad: list[Any] = [
        good[1:],
        torch.zeros(format_.size + 1, dtype=torch.uint8),
        good.view(1, -1),
        good.to(torch.int8),
        torch.zeros(format_.size),
        torch.empty(format_.size, dtype=torch.uint8, device="meta"),
        good.to_sparse(),
        None,
        b"bytes",
        torch.zeros(0, dtype=torch.uint8),
    ]
    for payload in bad:
        assert unpacked(format_, payload) == "PushRefused"


@pytest.mark.parametrize(("name", "wire"), CASES)
def test_bytes_at_unaligned_addresses_are_decoded(name: str, wire: WireDtype) -> None:
    format_ = made(name, wire)
    encoder = Encoder(format_)
    encoder.statistics.copy_(torch.arange(10.0))
    expected = encoded(encoder, gradients(1)[0])
    shifted = torch.zeros(format_.size + 3, dtype=torch.uint8)[3:]
    scattered = torch.zeros(format_.size, 2, dtype=torch.uint8)[:, 1]
    for payload in (shifted, scattered):
        payload.copy_(encoder.wire)
        push, buffers = format_.unpack(payload)
        assert torch.equal(push, expected)
        assert buffers["var"].tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(("name", "wire"), CASES)
def test_a_payload_that_a_fault_corrupts_is_found_not_finite(name: str, wire: WireDtype) -> None:
    format_, reported = made(name, wire), list[str]()
    encoder = Encoder(format_)
    encoded(encoder, gradients(1)[0])
    assert unpacked(format_, encoder.wire) == "taken"
    FaultInjector(["corrupt@3:0"], 3, 0, reported.append).before_push(encoder.payload)
    assert reported == ["fault corrupt@3:0, push 0"]
    assert unpacked(format_, encoder.wire) == "NonFiniteGradient"


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"compression": {"name": "gzip"}}, f"compression: got 'gzip', expected one of {', '.join(parts('compression'))}"),
        ({"compression": {"name": "topk", "ratio": 0}}, r"compression\.ratio: got 0\.0, expected a number in \(0, 1\]"),
        ({"compression": {"name": "powersgd", "rank": 0}}, r"compression\.rank: got 0, expected a whole number >= 1"),
        (
            {"compression": {"name": "none", "rank": 2}},
            r"compression\.rank: got an unknown key, expected one of error_feedback \(of none\)",
        ),
        ({"wire": {"dtype": "int8"}}, r"wire\.dtype: got 'int8', expected one of float32, bf16, fp16"),
        ({"wire": {"params": "fp16"}}, r"wire\.params: got 'fp16', expected one of float32, bf16"),
    ],
)
def test_options_of_compression_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"\A{said}\Z"):
        parse_config(values)


def test_the_summary_of_a_run_names_its_wire_form() -> None:
    def said(**values: Any) -> str:
        return parse_config(values).wire_form

    assert said() == said(transport="torch_rpc") == "exact"
    assert said(wire={"dtype": "bf16", "params": "bf16"}) == "bf16 params=bf16"
    assert said(compression={"name": "topk", "ratio": 0.1, "error_feedback": False}) == "topk error_feedback=False ratio=0.1"
    assert said(compression={"name": "powersgd"}, wire={"dtype": "fp16"}) == "powersgd fp16"


def test_more_parameters_than_an_index_can_name_are_refused() -> None:
    huge = Layout({"a": torch.empty(1).expand(2**31)})
    with pytest.raises(ValueError, match=r"\Acompression: got topk for 2147483648 parameters, expected at most 2,147,483,647"):
        PushFormat(params=huge, buffers=layout({}), dtype=torch.float32, compression=TopK())


def test_the_places_of_the_parts_are_those_of_the_tensors() -> None:
    factors = PowerSGDCompressor(layout(SHAPES), 2, 2.0)
    ends = list(accumulate(math.prod(shape) for shape in SHAPES.values()))
    assert [part.place.stop for part in factors.parts] == ends
    assert [part.place.start for part in factors.parts] == [0, *ends[:-1]]
