"""Refusals of ``runtime=ddp``: options that it does not have end a run in one line before anything starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ormo_rpc import train
from ormo_rpc.composing import compose
from ormo_rpc.config.parsing import save_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes.prepare import check_resume


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("algorithm=asgd", "algorithm: got asgd with runtime=ddp, expected ormo: its update is that of torch.optim.SGD, "),
        ("scheduler=ssp", "scheduler: got ssp with runtime=ddp, expected async: it is synchronous"),
        ("compression=topk", "compression: got topk with runtime=ddp, expected none: "),
        ("wire.dtype=bf16", "wire.dtype: got bf16 with runtime=ddp, expected float32: "),
        ("wire.params=bf16", "wire.params: got bf16 with runtime=ddp, expected float32: "),
        ("transport=tcp", "transport: got tcp with runtime=ddp, expected auto: "),
        ("server.address=127.0.0.1:9", "server.address: got 127.0.0.1:9 with runtime=ddp, expected None: there is no server"),
        ("worker.dummy=true", "worker.dummy: got True with runtime=ddp, expected False: "),
        ("worker.prefetch=1", "worker.prefetch: got 1 with runtime=ddp, expected 0: "),
        ("train.grad_norm_limit=1", "train.grad_norm_limit: got 1.0 with runtime=ddp, expected None: "),
        ("evaluate.ema=0.9", "evaluate.ema: got 0.9 with runtime=ddp, expected None: "),
        ("checkpoint.every=5", "checkpoint.every: got 5 with runtime=ddp, expected 0: "),
        ("checkpoint.journal=true", "checkpoint.journal: got True with runtime=ddp, expected False: "),
        ("checkpoint.resume=there", "checkpoint.resume: got there with runtime=ddp, expected None: a run of it begins anew"),
        ("role=worker", "role: got worker with runtime=ddp, expected all: "),
        ("train.lr_scaling=mean", "train.lr_scaling: got mean with runtime=ddp, expected none: "),
        ("worker.autocast=fp16", "worker.autocast: got fp16 with runtime=ddp, expected none or bf16: "),
    ],
)
def test_options_that_it_would_ignore_are_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"\A{re.escape(message)}"):
        compose(["runtime=ddp", word])


def test_nesterov_needs_a_momentum() -> None:
    with pytest.raises(
        ConfigError, match=r"\Aruntime\.nesterov: got true with train\.momentum=0, expected false, or a momentum\Z"
    ):
        compose(["runtime=ddp", "runtime.nesterov=true", "train.momentum=0"])


@pytest.mark.parametrize("seconds", ["0", "nan", "1e300"])
def test_a_time_out_that_gloo_cannot_count_is_refused(seconds: str) -> None:
    with pytest.raises(ConfigError, match=r"\Aruntime\.round_timeout_seconds: got .*, expected a number > 0, at most 1e\+06"):
        compose(["runtime=ddp", f"runtime.round_timeout_seconds={seconds}"])


def test_a_run_is_described_by_its_own_update() -> None:
    assert compose(["runtime=ddp"]).update_rule == ("ddp", "sync")
    assert compose(["runtime=ddp", "runtime.nesterov=true", "scheduler=sync"]).update_rule == ("ddp_nesterov", "sync")
    assert compose(["algorithm=asgd"]).update_rule == ("asgd", "async")


def test_its_runs_are_neither_replayed_nor_resumed(tmp_path: Path) -> None:
    save_config(compose(["runtime=ddp"]), tmp_path / "config.yaml")
    (tmp_path / "trace.jsonl").write_text('{"event": "header", "version": 1}\n')
    (tmp_path / "summary.json").write_text('{"final_params_sha256": "0"}')
    got = re.escape(f"got {tmp_path} of a run with runtime=ddp")
    with pytest.raises(ConfigError, match=rf"\Areplay\.run: {got}, expected one with a server, whose steps are replayed\Z"):
        train(["runtime=replay", f"replay.run={tmp_path}", "logger=none"], run_dir=tmp_path / "again")
    with pytest.raises(
        ConfigError, match=rf"\Acheckpoint\.resume: {got}, whose momentum is in no checkpoint, expected one of .*"
    ):
        check_resume(compose(["runtime=sim"]), tmp_path)
