"""Settings for every test that needs a GPU: its marker, its warnings, and the reason where it is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import selects_gpu

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test of this folder.

    Warnings are no errors here: which ones there are depends on the versions of PyTorch and its driver on the GPU machine.
    """
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True, scope="session")
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """The first GPU; a test is skipped where it cannot have one."""
    if not selects_gpu(request.config):
        pytest.skip("needs a GPU, and only pytest -m gpu shows GPUs to tests")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch sees none")
    return torch.device("cuda", 0)
