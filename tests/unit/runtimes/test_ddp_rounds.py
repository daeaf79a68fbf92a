"""The samples of each rank in a round of ``runtime=ddp``."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ormo_rpc.data import Epochs
from ormo_rpc.runtimes.ddp.rounds import Rounds
from ormo_rpc.worker.heterogeneity import shares_of


@given(st.integers(0, 400), st.lists(st.floats(1.0, 20.0), min_size=1, max_size=8))
def test_samples_are_divided_by_the_largest_remainders(total: int, slowdowns: list[float]) -> None:
    sizes = shares_of(total, slowdowns)
    exact = [total / slowdown / sum(1 / each for each in slowdowns) for slowdown in slowdowns]
    assert sum(sizes) == total
    assert all(size in (int(share), int(share) + 1) for size, share in zip(sizes, exact, strict=True))
    up = [share - int(share) for size, share in zip(sizes, exact, strict=True) if size > int(share)]
    down = [share - int(share) for size, share in zip(sizes, exact, strict=True) if size == int(share)]
    assert not up or not down or min(up) >= max(down)


def test_one_rank_that_is_ten_times_slower_has_a_tenth_of_the_samples_of_each_other_one() -> None:
    # 256 samples at speeds 1, 1, 1, 0.1: 82.58 for each fast one and 8.26 for the slow one; 82 + 82 + 82 + 8 leave two.
    assert shares_of(256, [1.0, 1.0, 1.0, 10.0]) == [83, 83, 82, 8]


@given(
    samples=st.integers(1, 60), batch=st.integers(1, 9), size=st.integers(1, 5), total=st.integers(1, 40), shared=st.booleans()
)
def test_the_parts_of_a_round_are_its_tickets_and_their_weights_add_up_to_one(
    samples: int, batch: int, size: int, total: int, shared: bool
) -> None:
    epochs = Epochs(samples, batch, 0)
    rounds = Rounds(epochs, total, size, [1.0 + rank for rank in range(size)] if shared else None)
    assert [ticket for number in range(rounds.count) for ticket in rounds.tickets(number)] == list(range(total))
    for number in range(rounds.count):
        parts = [rounds.part(number, rank) for rank in range(size)]
        expected = torch.cat([epochs.indices(ticket) for ticket in rounds.tickets(number)])
        assert torch.cat([part.indices for part in parts]).equal(expected)
        assert abs(sum(part.weight for part in parts) - 1) < 1e-12
        assert all(part.complete == all(len(each.indices) for each in parts) for part in parts)
        assert [part.number for part in parts] == [number * size + rank for rank in range(size)]
        if shared:
            assert all(part.weight == len(part.indices) / len(expected) for part in parts)
