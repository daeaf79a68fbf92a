"""Random damage to messages, for tests that send them by the ten thousand."""

from __future__ import annotations

import random

MESSAGES = 10_000
"""Of each kind that crosses the wire."""


def mutated(data: bytes, chance: random.Random, pieces: list[bytes]) -> bytes:
    """A message with something of it changed, dropped, doubled, or put in from another one."""
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5, 20))):
        place, length = chance.randrange(len(result) + 1), chance.choice((1, 1, 2, 4, 16))
        way = chance.randrange(5)
        if way == 0:
            result[place : place + length] = chance.randbytes(length)
        elif way == 1:
            del result[place : place + length]
        elif way == 2:
            result[place:place] = result[place : place + length]
        elif way == 3:
            piece = chance.choice(pieces)
            start = chance.randrange(len(piece))
            result[place : place + length] = piece[start : start + chance.choice((1, 4, 32))]
        elif place < len(result):
            result[place] ^= 1 << chance.randrange(8)
    return bytes(result)
