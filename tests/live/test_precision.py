"""A live run in lower precision, with compiled passes and deaths, over a checkpoint and the journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from ormo_rpc.server.parameter_server import OVERFLOW
from tests.support.processes import QUIET, check_lineage, events, launch, replayed, summary

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]


def test_a_compiled_run_in_float16_survives_deaths_and_is_replayed_to_the_bit(tmp_path: Path) -> None:
    run_dir, total = tmp_path / "run", 150
    precision = ("worker.compile=eager", "worker.autocast=fp16", "worker.loss_scale=1e9", "worker.loss_scale_interval=20")
    faults = "runtime.faults=[kill@1:5,kill@server:60,corrupt@0:9]"
    options = ("workers=2", f"train.max_iterations={total}", "checkpoint.journal=true", "runtime.max_not_finite=1")
    status, _, err = launch(run_dir, *QUIET, *precision, *options, faults)
    assert status == 0, err
    check_lineage(run_dir, total)
    scales = [float(each["reason"].removeprefix(OVERFLOW)) for each in events(run_dir, "discard") if OVERFLOW in each["reason"]]
    assert scales[0] == 1e9
    assert len(scales) > 5
    result = summary(run_dir)
    assert (result["status"], result["rolled_back"]) == ("completed", 0)
    assert not [each for each in result["evictions"] if "not finite" in each["reason"]]
    assert replayed(run_dir, tmp_path / "again")
