"""``server.device``: refused before anything starts where there is no such device, and named in the summary."""

from __future__ import annotations

from pathlib import Path

import pytest

from ormo_rpc import ConfigError, devices, train

QUADRATIC = {
    "runtime": {"name": "sim", "gradient": "quadratic", "dimension": 5},
    "train": {"max_iterations": 6},
    "logger": "none",
}


@pytest.mark.skipif(devices.gpu_count() > 0, reason="this machine has a GPU")
@pytest.mark.parametrize("runtime", ["sim", "rpc"])
def test_a_gpu_that_is_not_there_is_refused_in_one_line(runtime: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\Aserver\.device: got cuda:3, expected cpu on this machine, .*\Z"):
        train({"runtime": runtime, "logger": "none", "server": {"device": "cuda:3"}}, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_summary_names_the_device(tmp_path: Path) -> None:
    assert train(QUADRATIC, run_dir=tmp_path)["server_device"] == "cpu"


def test_ddp_has_no_server(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\Aserver\.device: got cuda with runtime=ddp, expected cpu: there is no server\Z"):
        train({"runtime": "ddp", "logger": "none", "server": {"device": "cuda"}}, run_dir=tmp_path / "run")
