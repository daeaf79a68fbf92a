"""The number of examples of a test, in proportion to that of the hypothesis profile."""

from __future__ import annotations

from hypothesis import settings


def examples(times: int) -> settings:
    """Settings with this multiple of the profile's examples: 10 in ``make test``, 4 in ``make quick``, 400 in a search."""
    return settings(max_examples=times * settings().max_examples)
