"""Settings for every test: one thread, and hypothesis without chance, so that a run in CI can be repeated."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", parent=settings.get_profile("repeatable"), derandomize=False, max_examples=400)
settings.load_profile("repeatable")  # another one: pytest --hypothesis-profile=search

torch.set_num_threads(1)
