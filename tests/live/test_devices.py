"""A device that this machine does not have is one line before anything starts, whatever runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.processes import QUIET, launch

LINE = r"launch\.py: worker\.device: got cuda:99, expected [^\n]+\n"


@pytest.mark.live
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "options", [("runtime=rpc",), ("runtime=ddp",), ("role=worker", "server.address=127.0.0.1:1")], ids=["rpc", "ddp", "join"]
)
def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(options: tuple[str, ...], tmp_path: Path) -> None:
    status, out, err = launch(tmp_path / "run", *QUIET, "worker.device=cuda:99", *options)
    assert (status, out) == (2, "")
    assert re.fullmatch(LINE, err)
    assert not (tmp_path / "run" / "trace.jsonl").exists()
