"""What connects the processes of a live run: the check of the initial parameters at the start, by a process group."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import changing
from tests.support.processes import QUIET, launch, summary

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]


def test_workers_that_make_other_initial_parameters_end_the_run_with_their_ranks(tmp_path: Path) -> None:
    """They are drawn from the process number; without the check the run would go on, and do another thing than was meant."""
    run_dir = tmp_path / "run"
    model = (f"model._target_={changing.HERE}.trained_by_process", f"dataset._target_={changing.HERE}.data")
    status, _, err = launch(run_dir, *QUIET, *model, "workers=2", "train.batch_size=8")
    assert status == 1, err
    said = (
        r"Refused: model: the initial parameters or buffers of rank 1 \(worker 0\), rank 2 \(worker 1\) differ from those of "
        r"rank 0 \(the server\); every process must make the same: .*"
    )
    for worker in range(2):
        line = rf"^launch\.py: worker {worker} \(pid \d+\) exited with status 65: {said}; the run continues without it$"
        assert len(re.findall(line, err, re.MULTILINE)) == 1, err
    assert re.search(
        rf"^launch\.py: server \(pid \d+\) exited with status 1: .*no worker is left: .*{said}", err, re.MULTILINE
    ), err
    assert "restarting" not in err
    assert summary(run_dir)["status"] == "failed"
