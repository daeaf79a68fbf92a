"""Parts that a test registers are removed at its end, so that no other test sees them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from ormo_rpc.options import part, parts


@contextlib.contextmanager
def temporary_parts(group: str) -> Generator[None]:
    """Forget, at the end, every part of a group that was registered meanwhile."""
    before = dict(parts(group))
    try:
        yield
    finally:
        registered = part._registered[group]  # pyright: ignore[reportPrivateUsage] # nothing but a test may unregister
        for name in registered.keys() - before:
            del registered[name]
