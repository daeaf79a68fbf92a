"""Buckets, the paper's groups of K consecutive indices of the parameters (no relation to DDP's buckets)."""

from __future__ import annotations


class Buckets:
    """Assigns the indices of the parameters to buckets of K.

    Index 0 is bucket 0 alone. Index ``t + 1`` goes into the present bucket, or opens the next one when that is full; a bucket
    takes K indices, with K *at the moment when it is opened*, so a worker that joins or leaves changes only later buckets.
    For a constant K the bucket of index ``i`` is ``ceil(i / K)``.

    Attributes:
        current: The bucket of the newest index.
        room: The number of further indices that it takes.
    """

    def __init__(self, current: int = 0, room: int = 0) -> None:
        self.current = current
        self.room = room

    def advance(self, concurrency: int) -> None:
        """Put the next index into its bucket; ``concurrency`` is K at this moment."""
        if self.room == 0:
            self.current += 1
            self.room = concurrency
        self.room -= 1
