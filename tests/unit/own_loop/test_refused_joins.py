"""Calls of `join` that are refused, in one line and before anything has started."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ormo_rpc
from ormo_rpc.errors import ConfigError
from ormo_rpc.own_loop.command import OVERRIDES
from tests.support.own_loops import QUIET, joined, net, work_through

REFUSED: dict[tuple[str, ...], str] = {
    ("train.epochs=3",): r"train.epochs: got a value in a loop of your own, expected none: the length of the run is ",
    ("train.batch_size=3",): r"train.batch_size: got a value in a loop of your own, expected none: ",
    ("dataset=mnist",): r"dataset: got a value in a loop of your own, expected none: its dataset is the script's",
    ("model.hidden=3",): r"model.hidden: got a value in a loop of your own, expected none: its model is the script's",
    ("task=regression",): r"task: got a value in a loop of your own, expected none: its task is the script's",
    ("runtime=sim",): r"runtime: got sim in a loop of your own, expected rpc: a simulation ",
    ("runtime=ddp", "algorithm=ormo"): r"runtime: got ddp in a loop of your own, expected rpc: its ranks train a ",
    ("runtime=replay", "replay.run=x"): r"runtime: got replay in a loop of your own, expected rpc: its gradients come from ",
    ("algorithm=orlomo",): r"algorithm: got orlomo in a loop of your own, expected one without local steps, ",
    ("algorithm=easgd",): r"algorithm: got easgd in a loop of your own, expected one without local steps, ",
    ("worker.prefetch=1",): r"worker.prefetch: got 1 in a loop of your own, expected 0: ",
    ("worker.dummy=true",): r"worker.dummy: got a value in a loop of your own, expected none: gradients are the script's",
    ("workers=4",): r"workers: got 4 in a script that runs alone, in one process; start it with ormo-rpc launch --workers N ",
    ("runtime.min_workers=2",): r"runtime.min_workers: got 2 in a script that runs alone, in one process; ",
    ("runtime.faults=[kill@0:1]",): r"runtime.faults: got \['kill@0:1'\] in a script that runs alone, in one process; ",
    ("role=worker",): r"server.address: got None with role=worker, expected HOST:PORT of the running server",
    ("train.no_decay=[nothing.*]",): r"train.no_decay: ",
    ("train.lr=0.1",): r"train.lr: got a value beside lr= in join\(\), expected one of the two",
    ("no.such=1",): r"no: ",
    ("checkpoint.resume=/nowhere",): r"/nowhere: got a path without an intact checkpoint",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_a_loop_of_ones_own_cannot_have_is_refused_in_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        joined(net(), tmp_path, *words)
    assert re.match(REFUSED[words], str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_tickets": 0}, r"total_tickets: got 0 in join\(\), expected a whole number >= 1"),
        ({"total_tickets": 1.5}, r"total_tickets: got 1.5 in join\(\), expected a whole number >= 1"),
        ({"total_tickets": 3, "tickets_per_epoch": 0}, r"tickets_per_epoch: got 0 in join\(\), expected a whole number >= 1"),
        ({"total_tickets": 3, "lr": 0.0}, r"lr: got 0.0 in join\(\), expected a number > 0, or a function "),
        ({"total_tickets": 3, "lr": "0.1"}, r"lr: got '0.1' in join\(\), expected a number > 0, or a function "),
        (
            {"total_tickets": 3, "lr": lambda _: "low"},
            r".*test_refused_joins\.py:\d+: lr: got 'low' at iteration 0 from the function in ",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"\A{message}"):
        ormo_rpc.join(net(), *QUIET, **arguments)  # pyright: ignore[reportArgumentType] # wrong ones on purpose


def test_a_list_of_overrides_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\Agot \['seed=1'\] in join\(\), expected texts KEY=VALUE, such as "):
        ormo_rpc.join(net(), ["seed=1"], total_tickets=1)  # pyright: ignore[reportArgumentType] # wrong on purpose


def test_a_model_that_cannot_be_trained_is_refused() -> None:
    model = net().requires_grad_(False)
    with pytest.raises(ConfigError, match=r"\Amodel: got no trainable parameter, expected at least one\Z"):
        ormo_rpc.join(model, *QUIET, total_tickets=1)


def test_a_model_that_is_elsewhere_or_has_no_gradients_is_refused() -> None:
    with torch.inference_mode():
        inference = net()
    for model, what in ((net().to("meta"), "on meta"), (inference, r"made in torch.inference_mode\(\)")):
        with pytest.raises(ConfigError, match=rf"\Amodel: 0.weight: got a tensor {what}, expected "):
            ormo_rpc.join(model, *QUIET, total_tickets=1)


@pytest.mark.parametrize("form", [json.dumps, " ".join])
def test_the_command_line_is_stronger_than_join(
    form: Callable[[list[str]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OVERRIDES, form(["train.max_iterations=3", "train.lr=0.5", "seed=7"]))
    model, rates = net(), list[float]()
    worker = joined(model, tmp_path, "seed=1", lr=lambda _: 0.1)
    for work in worker:
        rates.append(work.lr)
        worker.push()
    assert rates == [0.5] * 3
    assert "seed: 7" in (tmp_path / "run" / "config.yaml").read_text()
    monkeypatch.setenv(OVERRIDES, "[1]")
    with pytest.raises(ConfigError, match=rf"\A{OVERRIDES}: got '\[1\]' in the environment, expected a list such as "):
        joined(net(), tmp_path)


@pytest.mark.parametrize(
    "word", ["train.lr_scaling=mean", "train.lr_gamma=0.1", "train.lr_milestones=[1]", "train.warmup_epochs=0.5"]
)
def test_a_modifier_on_the_command_line_does_not_replace_a_function(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _, _ = word.partition("=")
    monkeypatch.setenv(OVERRIDES, json.dumps([word]))
    message = rf"\A{key}: got a value beside the function lr= in join\(\), .*, expected train\.lr or train\.lr_schedule .*\Z"
    with pytest.raises(ConfigError, match=message):
        joined(net(), tmp_path, lr=lambda t: 0.1 / (t + 1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=7"], [0.4, 0.2, 0.4 / 3, 0.1]),
        (["train.lr_schedule=cosine"], [0.4 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]),  # from lr(0) on
        (["train.lr=0.8", "train.warmup_epochs=0.5"], [0.4, 0.8, 0.8, 0.8]),  # an epoch is all 4 tickets
    ],
)
def test_a_rate_or_schedule_on_the_command_line_replaces_a_function(
    words: list[str], expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OVERRIDES, json.dumps(words))
    rates = list[float]()
    worker = joined(net(), tmp_path, tickets=4, lr=lambda t: 0.4 / (t + 1))
    for work in worker:
        rates.append(work.lr)
        worker.push()
    assert rates == pytest.approx(expected)


def test_a_run_directory_is_for_one_run(tmp_path: Path) -> None:
    model = net()
    work_through(joined(model, tmp_path, tickets=1), model)
    model = net()
    worker = joined(model, tmp_path, tickets=1)
    with pytest.raises(ConfigError, match=r"got the directory of an earlier run, expected a new one"):
        work_through(worker, model)
