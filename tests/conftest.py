"""Settings for every test: one thread, hypothesis without randomness, the order, and no process left behind."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Without randomness a run in CI can be repeated. Another profile: pytest --hypothesis-profile=search --timeout=0
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(  # what fails is not made smaller: that takes minutes
    "quick",
    parent=settings.get_profile("repeatable"),
    max_examples=4,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
settings.register_profile("search", parent=settings.get_profile("repeatable"), derandomize=False, max_examples=400)
settings.load_profile("repeatable")

torch.set_num_threads(1)
for _number in (signal.SIGINT, signal.SIGHUP):  # whoever started the tests may ignore them (nohup), and so would all of ours
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs of this machine from all tests but those of ``-m gpu``: they give the same bits on every machine."""
    if not selects_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def selects_gpu(config: pytest.Config) -> bool:
    """Say whether the expression of ``-m`` names the marker ``gpu`` other than to leave it out."""
    markers: str = config.getoption("markexpr") or ""
    return re.search(r"\bgpu\b", re.sub(r"\bnot\s+gpu\b", "", markers)) is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put live tests last: beside each other, and not beside tests that keep a core busy for the whole time."""
    items.sort(key=lambda item: item.get_closest_marker("live") is not None)


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """Have ``-q`` print nothing of tests that pass."""
    return ("passed", "", "") if report.passed and report.when == "call" and config.get_verbosity() < 0 else None


@pytest.fixture(autouse=True)
def no_child_is_left() -> Generator[None]:
    """Fail a test that leaves a process running which it has started."""
    before = _children()
    yield
    left = [name for pid, name in _children().items() if pid not in before and name and "resource_tracker" not in name]
    assert not left, f"still running after the test: {left}"


def _children() -> dict[int, str]:
    """The processes that this one has started, by number, with their command lines; nothing where Linux does not list them."""
    found: dict[int, str] = {}
    for file in Path("/proc/self/task").glob("*/children"):
        try:
            for pid in map(int, file.read_text().split()):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except OSError:  # the thread, or the child, is gone
            continue
    return found
