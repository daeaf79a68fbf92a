"""Runs recorded at an earlier version end with the same bits: simulations by their hashes, live runs by replay.

Bits depend on the kernels that PyTorch and its libraries choose for the processor, so that each record names its machine, and
proves nothing on others. `golden/simulated.json` was recorded at commit f625e02 on the first of its machines, and at 31c41f7,
which still has those bits there, on the second; `golden/live/` at f625e02. They are rewritten only on purpose.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc import train
from ormo_rpc.storage.environment import arithmetic

GOLDEN = Path(__file__).parent / "golden"
SIMULATED: dict[str, Any] = json.loads((GOLDEN / "simulated.json").read_text())
LIVE = sorted(file.parent.name for file in GOLDEN.glob("live/*/trace.jsonl.gz"))
LIVE_MACHINE = json.loads((GOLDEN / "live" / "machine.json").read_text())
HERE = arithmetic()


def recorded_on(*machines: dict[str, str]) -> pytest.MarkDecorator:
    """Skip on other machines than these."""
    return pytest.mark.skipif(HERE not in machines, reason=f"recorded with {machines}, this machine has {HERE}")


@recorded_on(*(each["machine"] for each in SIMULATED["recorded"]))
@pytest.mark.parametrize("name", SIMULATED["overrides"])
def test_a_simulation_ends_with_the_recorded_bits(name: str, tmp_path: Path) -> None:
    sha256 = next(each["sha256"][name] for each in SIMULATED["recorded"] if each["machine"] == HERE)
    summary = train(["runtime=sim", "logger=none", *SIMULATED["overrides"][name]], run_dir=tmp_path / "run")
    assert [summary["final_params_sha256"], summary["final_buffers_sha256"]] == sha256


@recorded_on(LIVE_MACHINE)
@pytest.mark.parametrize("name", LIVE)
def test_a_recorded_live_run_replays_to_the_bit(name: str, tmp_path: Path) -> None:
    run = tmp_path / "recorded"
    run.mkdir()
    for file in ("config.yaml", "summary.json"):
        shutil.copy(GOLDEN / "live" / name / file, run)
    (run / "trace.jsonl").write_bytes(gzip.decompress((GOLDEN / "live" / name / "trace.jsonl.gz").read_bytes()))
    again = train(["runtime=replay", f"replay.run={run}", "logger=none"], run_dir=tmp_path / "again")
    assert again["identical"] is True
