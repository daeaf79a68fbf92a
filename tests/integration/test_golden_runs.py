"""Runs recorded at an earlier version end with the same bits: simulations by their hashes, live runs by replay.

`golden/simulated.json` and `golden/live/` were recorded at commit f625e02 and are rewritten only on purpose.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_rpc import train

GOLDEN = Path(__file__).parent / "golden"
SIMULATED: dict[str, Any] = json.loads((GOLDEN / "simulated.json").read_text())
LIVE = sorted(folder.name for folder in (GOLDEN / "live").iterdir())
HERE = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}

# Bits of a gradient depend on the kernels that torch chooses for the processor; on other machines they prove nothing.
pytestmark = pytest.mark.skipif(
    SIMULATED["machine"] != HERE, reason=f"recorded with {SIMULATED['machine']}, this machine has {HERE}"
)


@pytest.mark.parametrize("name", SIMULATED["runs"])
def test_a_simulation_ends_with_the_recorded_bits(name: str, tmp_path: Path) -> None:
    recorded = SIMULATED["runs"][name]
    summary = train(["runtime=sim", "logger=none", *recorded["overrides"]], run_dir=tmp_path / "run")
    for key in ("final_params_sha256", "final_buffers_sha256"):
        assert summary[key] == recorded[key], key


@pytest.mark.parametrize("name", LIVE)
def test_a_recorded_live_run_replays_to_the_bit(name: str, tmp_path: Path) -> None:
    run = tmp_path / "recorded"
    run.mkdir()
    for file in ("config.yaml", "summary.json"):
        shutil.copy(GOLDEN / "live" / name / file, run)
    (run / "trace.jsonl").write_bytes(gzip.decompress((GOLDEN / "live" / name / "trace.jsonl.gz").read_bytes()))
    again = train(["runtime=replay", f"replay.run={run}", "logger=none"], run_dir=tmp_path / "again")
    assert again["identical"] is True
