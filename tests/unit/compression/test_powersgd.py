"""PowerSGD against torch's hook: factors, orthogonal columns, gradients of low rank, any number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as published

from ormo_rpc.compression import Encoder, PushFormat
from ormo_rpc.compression.powersgd import PowerSGD, PowerSGDCompressor, orthogonalise
from ormo_rpc.compression.wire_options import WireDtype
from tests.support.compression import DIMENSION, SHAPES, buffer_layout, encoded, gradients, layout, made


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
    format_ = PushFormat(params=layout(MATRICES), buffers=buffer_layout({}), dtype=torch.float64, compression=compression)
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


def test_a_column_that_depended_on_others_is_used_again() -> None:
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(20, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    compressor = PowerSGDCompressor(layout({"linear": torch.Size([20, 30])}), 2, 1.0)
    column = torch.randn(30, 1, generator=generator)
    state, seen = torch.cat([column, 2 * column], dim=1).reshape(-1), torch.empty(600)
    errors: list[float] = []
    for _ in range(2):
        pushed = compressor.compress(gradient.reshape(-1), state)
        compressor.decompress(pushed.values, torch.empty(0), seen)
        errors.append(float((seen - gradient.reshape(-1)).norm() / gradient.norm()))
        assert pushed.state is not None
        state = pushed.state
    assert errors[0] > 0.01, "one direction of the first push"
    assert errors[1] < 1e-5, "both of the second: a matrix of rank 2 is exact"


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


def test_the_places_of_the_parts_are_those_of_the_tensors() -> None:
    factors = PowerSGDCompressor(layout(SHAPES), 2, 2.0)
    ends = list(accumulate(math.prod(shape) for shape in SHAPES.values()))
    assert [part.place.stop for part in factors.parts] == ends
    assert [part.place.start for part in factors.parts] == [0, *ends[:-1]]
