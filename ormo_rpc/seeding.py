"""Every random draw belongs to a named stream: (seed of the run, purpose, number).

The draws of a ticket or an epoch are then a function of the run's seed and of its own number alone: they are the same in every
process and however often they are made, and one more worker or one more purpose changes no other stream.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Generator

import numpy as np
import torch

_SPARE: list[np.random.MT19937] = []
"""Generators that `seeded` lends to numpy; as many as were ever nested."""


def seed_for(seed: int, purpose: str, number: int) -> int:
    """The seed of one stream, in [0, 2^63): the hash of the three, so neighbouring numbers have nothing in common.

    Args:
        seed: The seed of the run; 0 is a seed like any other.
        purpose: What is drawn, such as ``"order"`` or ``"augment"``.
        number: The number within the purpose: a ticket, an epoch or a worker.
    """
    # The purpose comes last: it may hold the separator, the two integers cannot.
    name = f"{seed}/{number}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A fresh CPU generator at the start of one stream.

    torch's CPU generator reads only the low 32 bits of its seed: among n streams about n^2 / 2^33 pairs coincide (1 pair among
    100,000 tickets), which for an augmentation or a permutation is as harmless as drawing the same twice by chance.
    """
    return torch.Generator().manual_seed(seed_for(seed, purpose, number))


@contextlib.contextmanager
def seeded(seed: int, purpose: str, number: int) -> Generator[None]:
    """Set the global generators of torch, numpy and Python to the start of one stream, and restore them afterwards.

    Of GPUs that of the current one is set, where this process uses one.

    It is for code of others, such as a user's model, which may draw from any of them.
    """
    start = seed_for(seed, purpose, number)
    python, numpy = random.getstate(), np.random.get_bit_generator()  # pyright: ignore[reportAttributeAccessIssue] # its stubs lack it
    # numpy copies a state 100 times slower than it replaces the generator behind its functions by one that is seeded again.
    spare = _SPARE.pop() if _SPARE else np.random.MT19937()
    np.random.set_bit_generator(spare)  # pyright: ignore[reportAttributeAccessIssue] # as above
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            _seed_all(start)
            yield
    finally:
        random.setstate(python)
        np.random.set_bit_generator(numpy)  # pyright: ignore[reportAttributeAccessIssue] # as above
        _SPARE.append(spare)


def reseed(seed: int, purpose: str, number: int) -> None:
    """Set the global generators to the start of another stream, within `seeded`, which restores them; three times faster."""
    _seed_all(seed_for(seed, purpose, number))


def cpu_states() -> tuple[object, ...]:
    """The states of the global generators of torch on the CPU, numpy and Python, to tell if anything was drawn between two."""
    numpy = [np.asarray(each).tobytes() for each in np.random.get_state()]
    return torch.default_generator.get_state().numpy().tobytes(), random.getstate(), numpy


def _seed_all(start: int) -> None:
    torch.default_generator.manual_seed(start)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(start)
    random.seed(start)
    np.random.seed(start % 2**32)
