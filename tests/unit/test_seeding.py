"""Streams of random numbers: equal for equal names, unrelated for any other."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ormo_rpc.seeding import cpu_states, generator, seed_for, seeded

NUMBERS = st.integers(min_value=0, max_value=2**40)


def test_the_seed_is_this_number_on_every_machine_and_in_every_process() -> None:
    # Python's own hash() of a string differs from process to process; this one must not.
    expected = int(hashlib.blake2b(b"3/17/order", digest_size=8).hexdigest(), 16) // 2
    assert seed_for(3, "order", 17) == expected


@given(NUMBERS, st.text(max_size=8), NUMBERS)
def test_seeds_fit_into_63_bits_and_depend_on_each_of_the_three(seed: int, purpose: str, number: int) -> None:
    derived = seed_for(seed, purpose, number)
    assert 0 <= derived < 2**63
    assert derived not in {
        seed_for(seed + 1, purpose, number),
        seed_for(seed, purpose + "x", number),
        seed_for(seed, purpose, number + 1),
    }


def test_no_two_of_many_neighbouring_streams_share_a_seed() -> None:
    names = list(itertools.product(range(20), ["order", "augment", "1", "1/1"], range(200)))
    assert len({seed_for(*name) for name in names}) == len(names)


def test_seed_zero_is_a_seed_like_any_other() -> None:
    first, again, other = (torch.rand(100, generator=generator(seed, "order", 0)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    # Unrelated: of 100 pairs of uniform numbers, the correlation's standard deviation is 1/sqrt(100) = 0.1.
    assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.4


def test_a_generator_neither_reads_nor_moves_the_global_one() -> None:
    torch.manual_seed(1)
    undisturbed = torch.rand(3)
    torch.manual_seed(1)
    torch.rand(5, generator=generator(1, "order", 0))
    assert torch.equal(torch.rand(3), undisturbed)


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random()


def test_every_global_generator_is_seeded_and_left_where_it_was() -> None:
    with seeded(1, "outer", 0):
        expected = draws(), draws()
    with seeded(1, "outer", 0):
        found = [draws()]
        with seeded(3, "forward", 17):
            inner = draws()
        with pytest.raises(ZeroDivisionError), seeded(3, "forward", 18):
            raise ZeroDivisionError(draws())
        found.append(draws())
    assert tuple(found) == expected
    with seeded(3, "forward", 17):
        assert draws() == inner


@pytest.mark.parametrize("draw", [random.random, np.random.rand, np.random.randn, functools.partial(torch.rand, 1)])
def test_the_states_of_the_cpu_tell_of_each_draw(draw: Callable[[], object]) -> None:
    with seeded(1, "draws", 0):
        before = cpu_states()
        torch.rand(1, generator=torch.Generator().manual_seed(0))
        assert cpu_states() == before
        draw()
        assert cpu_states() != before
