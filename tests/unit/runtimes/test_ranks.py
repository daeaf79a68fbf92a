"""The environment that torchrun gives a process, and the configurations that cannot run under it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes import run
from ormo_rpc.runtimes.ranks import Ranks

ELASTIC = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_ERROR_FILE": "agent/none_1/attempt_2/0/error.json",
    "RANK": "1",
    "WORLD_SIZE": "3",
    "LOCAL_WORLD_SIZE": "3",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29400",
}
PLACE = Ranks(
    launcher="torchrun",
    variables=("RANK", "WORLD_SIZE"),
    job=None,
    rank=1,
    world_size=3,
    master="host:29400",
    attempt=2,
    agent_store=True,
    agent_folder=Path("agent/none_1"),
    one_machine=True,
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, PLACE),
        ({"LOCAL_WORLD_SIZE": "2"}, dataclasses.replace(PLACE, one_machine=False)),
        ({"LOCAL_WORLD_SIZE": None}, dataclasses.replace(PLACE, one_machine=False)),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, dataclasses.replace(PLACE, agent_store=False)),
        ({"TORCHELASTIC_USE_AGENT_STORE": None}, dataclasses.replace(PLACE, agent_store=False)),
        ({"TORCHELASTIC_ERROR_FILE": ""}, dataclasses.replace(PLACE, agent_folder=None)),
        ({"TORCHELASTIC_RESTART_COUNT": None}, dataclasses.replace(PLACE, attempt=0)),
        ({"TORCHELASTIC_RUN_ID": "job"}, dataclasses.replace(PLACE, job="job")),
    ],
    ids=str,
)
def test_the_rank_of_a_process_is_read_from_torchruns_environment(
    changes: dict[str, str | None], expected: Ranks | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_torchrun(monkeypatch, **changes)
    assert Ranks.from_environment() == expected


def under_torchrun(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    for name, value in {**ELASTIC, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "ranks", "message"),
    [
        ({"runtime": {"name": "sim"}}, 3, "runtime: got sim under torchrun, expected rpc; start it with python launch.py"),
        ({}, 1, "torchrun: got 1 process, expected at least 2; rank 0 serves and the others work"),
        ({"workers": 4}, 3, "workers: got 4, expected 2 under torchrun with 3 processes; leave it out"),
    ],
    ids=str,
)
def test_configurations_that_torchrun_cannot_run_are_refused(
    values: dict[str, Any], ranks: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_torchrun(monkeypatch, RANK="0", WORLD_SIZE=str(ranks))
    with pytest.raises(ConfigError) as caught:
        run(parse_config(values), tmp_path / "run")
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()
