"""The programs in ``examples/`` run as their pages say, from a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def output_of(example: str, folder: Path) -> str:
    """What a program prints; it must end well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "examples" / example)]
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_server_and_two_workers_in_one_process_reach_the_target(tmp_path: Path) -> None:
    *rows, last = output_of("in_process.py", tmp_path).splitlines()
    distances = [float(row.rpartition(" ")[2]) for row in rows]
    assert len(distances) == 6
    assert distances[0] > 0.1
    assert distances[-1] < 0.001
    # 60 gradients; worker 0 makes three in the time in which worker 1 makes one.
    assert last == "completed: worker 0 computed 45 gradients, worker 1 15"


def test_an_algorithm_of_ones_own_trains_beside_ormo(tmp_path: Path) -> None:
    rows = [row.partition(": test accuracy ") for row in output_of("own_algorithm.py", tmp_path).splitlines()]
    assert [name for name, _, _ in rows] == ["DampedMomentum", "ormo"]
    # Ten epochs of digits in the simulator, the same everywhere but for rounding; chance is 10%.
    assert all(float(rest.partition("%")[0]) > 90 for _, _, rest in rows)
