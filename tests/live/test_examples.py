"""Each example trains on three workers, one of which is killed, and reaches the value that plain PyTorch reaches too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KILLED = "worker 1 .* was killed by SIGKILL .* restarting it"


@dataclass(frozen=True)
class Example:
    """An example that prints a metric.

    Attributes:
        file: In ``examples/``.
        metric: The words before the number that it prints.
        value: The value that its docstring states.
        higher_is_better: The direction of the metric.
    """

    file: str
    metric: str
    value: float
    higher_is_better: bool = True

    def reached(self, output: str) -> bool:
        """Tell whether the printed value is at least as good as the stated one."""
        found = re.search(rf"^{self.metric} ([\d.]+)(%?)$", output, re.MULTILINE)
        assert found is not None, output
        got = float(found[1]) / (100 if found[2] else 1)
        return got >= self.value if self.higher_is_better else got <= self.value


EXAMPLES = [
    Example("own_rule.py", "test accuracy", 0.95),
    Example("regression.py", "test rmse", 0.8, higher_is_better=False),
    Example("segmentation.py", "test mean IoU", 0.65),
    Example("language_model.py", "test perplexity", 10, higher_is_better=False),
]


def run(file: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example as from a shell."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / file), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )


@pytest.mark.live
@pytest.mark.timeout(120)
@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.file)
def test_an_example_reaches_its_value_with_a_killed_worker_as_plain_pytorch_does(example: Example) -> None:
    live = run(example.file, "--kill")
    assert len(re.findall(KILLED, live.stderr)) == 1, live.stderr
    assert len(re.findall(r"^evicted: worker 1, ", live.stdout, re.MULTILINE)) == 1, live.stdout
    assert example.reached(live.stdout)
    assert example.reached(run(example.file, "--plain").stdout)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.file)
def test_an_example_is_short_and_states_its_value(example: Example) -> None:
    text = (ROOT / "examples" / example.file).read_text()
    assert len(text.splitlines()) < 100
    stated = f"{example.value:.0%}" if example.higher_is_better else f"{example.value:g}"
    assert stated in text.partition('"""')[2].partition('"""')[0]
