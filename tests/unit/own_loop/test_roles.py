"""The part of a process, from its environment; and what other commands make of the run of a script."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ormo_rpc.composing import compose
from ormo_rpc.errors import ConfigError
from ormo_rpc.evaluate import evaluate_checkpoint
from ormo_rpc.own_loop import alone
from ormo_rpc.own_loop.roles import role
from ormo_rpc.runtimes.prepare import check
from ormo_rpc.storage.summary import read_summary
from ormo_rpc.training import train
from tests.support.own_loops import joined, net, work_through

HAND = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "ORMO_RPC_SECRET": "0123456789abcdef" * 4}


@pytest.mark.parametrize(("rank", "serves", "works"), [("0", True, False), ("2", False, True)])
def test_rank_0_serves_and_the_others_work(rank: str, serves: bool, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**HAND, "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    found = role(compose([]))
    assert (found.serves, found.works, found.alone, found.config.workers) == (serves, works, False, 2)
    with pytest.raises(ConfigError, match=r"\Aworkers: got 5, expected 2 "):
        role(compose(["workers=5"]))
    monkeypatch.delenv("ORMO_RPC_SECRET")
    with pytest.raises(ConfigError, match="secret"):
        role(compose([]))


def test_a_process_by_hand_works_for_a_server_elsewhere() -> None:
    found = role(compose(["role=worker", "server.address=127.0.0.1:29400"]))
    assert (found.serves, found.works, found.alone) == (False, True, False)


def test_without_any_of_them_a_process_is_the_whole_run() -> None:
    found = role(compose([]))
    assert (found.serves, found.works, found.alone, found.config.workers) == (True, True, True, 1)


def test_a_run_of_a_script_is_not_replayed_and_no_run_is_made_of_its_parts(tmp_path: Path) -> None:
    model = net()
    work_through(joined(model, tmp_path, tickets=2), model)
    with pytest.raises(ConfigError, match=r"\Areplay\.run: .*run is a run of a loop of the user's own: its gradients "):
        train(["runtime=replay", f"replay.run={tmp_path / 'run'}"], run_dir=tmp_path / "replay")
    with pytest.raises(ConfigError, match=r"run: got a run of a script's own loop, expected one whose model and data "):
        evaluate_checkpoint(tmp_path / "run")
    for group in ("model", "dataset"):
        with pytest.raises(ConfigError, match=rf"{group}: own_loop is that of a script which calls ormo_rpc\.join"):
            check(compose([f"{group}=own_loop", "workers=1"]), starts_server=False)


def test_the_summary_names_the_error_that_has_ended_a_script_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()

    def before(ticket: int) -> None:
        if ticket == 1:
            raise IndexError("no such batch")

    with pytest.raises(IndexError) as caught:
        work_through(joined(model, tmp_path), model, before)
    monkeypatch.setattr(sys, "last_value", caught.value, raising=False)
    alone._explain(tmp_path / "run")  # pyright: ignore[reportPrivateUsage] # called at the end of the program
    summary = read_summary(tmp_path / "run")
    assert summary is not None
    assert summary["status"] == "failed"
    assert summary["reason"].startswith(f"{__file__}:")
    assert summary["reason"].endswith(": IndexError: no such batch")


def test_weights_that_are_loaded_between_join_and_loop_count(tmp_path: Path) -> None:
    model, other = net(), net(1)
    worker = joined(model, tmp_path, tickets=1)
    model.load_state_dict(other.state_dict())
    for _ in worker:
        assert all(map(torch.equal, model.parameters(), other.parameters()))
        worker.push()


def test_an_override_that_cannot_be_parsed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\Ano viable alternative at input '\{'a\.\*''"):
        joined(net(), tmp_path, "train.lr_factors={'a.*': 0.3}")
