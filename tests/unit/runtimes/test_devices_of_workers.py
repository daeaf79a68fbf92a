"""The devices of workers and ranks: what they tell, the backend between ranks, and what each machine chooses for itself."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch

from ormo_rpc.composing import compose
from ormo_rpc.data.placing import placed
from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.configured import configured_device
from ormo_rpc.runtimes.ddp.rank_devices import GLOO, NCCL, backend
from ormo_rpc.runtimes.distributed.worker_devices import WorkerDevices
from ormo_rpc.runtimes.distributed.worker_process.context import WorkerArgs, own_config
from ormo_rpc.worker.arithmetic import arithmetic_kept, set_arithmetic
from ormo_rpc.worker.options import WorkerOptions
from tests.support.user_sets import Counting


def test_the_summary_has_what_workers_have_told() -> None:
    devices = WorkerDevices()
    devices.answer({"worker": 1, "device": "cuda:0 (a card)", "peak_bytes": 100})
    devices.answer({"worker": 1, "device": "cuda:0 (a card)", "peak_bytes": 70})
    assert devices.summary_entries([0, 1]) == {
        "devices": {"0": "cpu", "1": "cuda:0 (a card)"},
        "worker_device": "cpu, cuda:0 (a card)",
        "worker_gpu_bytes": 100,
    }


@pytest.mark.parametrize("wrong", [{"worker": -1}, {"worker": True}, {"device": 3}, {"peak_bytes": 1.5}, {"peak_bytes": None}])
def test_a_malformed_report_is_refused(wrong: dict[str, Any]) -> None:
    devices = WorkerDevices()
    with pytest.raises(ValueError, match=r"^devices: got a malformed request"):
        devices.answer({"worker": 0, "device": "cpu", "peak_bytes": 0, **wrong})
    assert devices.summary_entries([0])["devices"] == {"0": "cpu"}


def test_ranks_with_a_card_each_reduce_over_nccl_and_others_over_gloo() -> None:
    assert backend(["here 1", "here 2", "there 1"]) == NCCL
    assert backend(["here 1", "here 1"]) == GLOO, "NCCL cannot serve two ranks on one card"
    assert backend(["", ""]) == GLOO
    with pytest.raises(ConfigError, match=r"^worker\.device: got a CPU on rank 1 and a GPU on others with runtime=ddp"):
        backend(["here 1", "", "here 2"])


def test_a_machine_that_joins_has_a_device_of_its_own() -> None:
    text = compose(["workers=1", "worker.device=cuda:3"]).yaml
    args = WorkerArgs(
        address=("", 0),
        secret=Secret("a secret that only we two know"),
        preferred_worker=None,
        slot_id="",
        restart_count=0,
        data_root=None,
        timeout_seconds=1.0,
        report=lambda _: None,
        on_joined=lambda: None,
    )
    assert own_config(args, text).worker.device == "cuda:3"
    assert own_config(dataclasses.replace(args, device="cpu"), text).worker.device == "cpu"


def test_workers_that_compute_nothing_need_no_gpu() -> None:
    for words in (["worker.dummy=true"], ["algorithm=halos", "algorithm.region_workers=2"]):
        config = compose(["workers=2", "worker.device=cuda:99", *words])
        assert configured_device(config, 0) == torch.device("cpu")
        with pytest.raises(ConfigError, match=r"^worker\.device: got cuda:99"):
            configured_device(compose(["workers=2", "worker.device=cuda:99"]), 0)


def test_samples_of_other_code_cannot_be_on_a_device() -> None:
    split: Any = Counting(3)
    assert placed(split, torch.device("cuda", 0), None) is split
    assert placed(split, torch.device("cpu"), True) is split, "there is no other place"
    with pytest.raises(ConfigError, match=r"^worker\.data_on_device: got true, expected null or false"):
        placed(split, torch.device("cuda", 0), True)


def test_a_program_gets_its_own_arithmetic_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with arithmetic_kept():
        set_arithmetic(WorkerOptions(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
