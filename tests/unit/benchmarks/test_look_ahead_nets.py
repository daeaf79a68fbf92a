"""The experiment on look-aheads of convolution nets, on digits."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from experiments import look_ahead_nets
from experiments.look_ahead_nets import Net, arguments, page, planned, setup_of, work_through, write
from experiments.race.runs import QUIET, machine, passes
from experiments.race.setup import Setup
from ormo_rpc.composing import compose
from ormo_rpc.report.table import MISSING
from ormo_rpc.worker.options import WorkerOptions
from tests.support.processes import PATIENCE_SECONDS, gone, wait_until
from tests.support.race import DIGITS

TINY = Net(
    "digits",
    Setup(
        job=DIGITS,
        epochs=3,
        batch_size=32,
        every=16,
        targets=(0.2, 0.9999),
        target=0.2,
        tuning_target=0.2,
        rates={4: (0.08, 0.16)},
        beyond=0,
        tuning_seeds=(1000,),
    ),
    most=100,
    large=True,
    workers=4,
)


def test_what_must_not_be_missing_is_run_first() -> None:
    plan = planned(look_ahead_nets.NETS)
    assert [str(each) for each in plan[:3]] == [
        "cnn, exponential, ormo",
        "cnn, exponential, ormo_la",
        "cnn, exponential, DDP, Nesterov",
    ]
    assert len({*plan}) == len(plan) == 2 * 2 * 7
    assert {each.unit.contender for each in plan[-4:]} == {"m_sync_nesterov"}


def workers_of(net: str, *words: str) -> WorkerOptions:
    """The options of the workers of a net's runs."""
    setup = setup_of(net, arguments(words))
    return compose((*QUIET, *setup.job, *setup.where)).worker


def test_runs_are_on_the_device_and_at_the_precision_that_were_asked_for() -> None:
    for device in ("cpu", "cuda"):
        found = workers_of("resnet20", "--device", device)
        assert (found.device, found.cuda_graph, found.autocast.value) == (device, device == "cuda", "bf16")
    precise = workers_of("resnet20", "--precision", "float32")
    assert (precise.autocast.value, precise.compile) == ("none", "inductor")
    assert workers_of("cnn", "--precision", "float32") == workers_of("cnn"), "a small net is always computed in plain float32"


def test_where_a_row_was_made_says_how_its_passes_differ_from_plain_float32() -> None:
    asked = (("cnn", "bf16"), ("resnet20", "bf16"), ("resnet20", "float32"))
    found = [passes(setup_of(net, arguments(["--precision", precision])).where) for net, precision in asked]
    assert found == [[], ["autocast bf16"], ["compile inductor"]]


@pytest.mark.live
def test_sigterm_ends_the_command_and_its_runs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = tmp_path / "begun"

    def outcome(*_: object) -> None:
        begun.with_suffix(".part").write_text(str(os.getpid()))
        begun.with_suffix(".part").replace(begun)
        time.sleep(PATIENCE_SECONDS)

    monkeypatch.setattr(look_ahead_nets, "outcome", outcome)
    monkeypatch.setattr(sys, "argv", ["look_ahead_nets", "--work", str(tmp_path / "work"), "--into", str(tmp_path)])

    def alone() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # another test's command may have set a handler in this process
        look_ahead_nets.main()

    command = multiprocessing.get_context("fork").Process(target=alone)
    command.start()
    try:
        wait_until(begun.is_file, "a run begins")
        child = psutil.Process(int(begun.read_text()))
        command.terminate()
        command.join(PATIENCE_SECONDS / 2)
        assert command.exitcode == -signal.SIGTERM
        wait_until(lambda: gone([child]), "its run ends")
    finally:
        command.kill()


@pytest.mark.slow
@pytest.mark.live
def test_rules_are_tuned_run_and_reported_and_what_is_not_finished_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look_ahead_nets, "NETS", {"tiny": TINY})
    words = ("--nets", "tiny", "--settings", "exponential", "--rules", "ormo", "ormo_la", "ddp_nesterov", "--jobs", "2")
    a = arguments([*words, "--device", "cpu", "--work", str(tmp_path / "work"), "--into", str(tmp_path), "--seeds", "1"])
    plan = planned(a.nets, a.settings, a.rules)
    assert work_through(plan[:2], a) == []
    runs = {file.name for file in a.work.iterdir()}
    assert len(runs) == 2 * (2 + 1)  # two rules; two rates, one seed
    write(a)
    found = json.loads((tmp_path / "look_ahead_nets.json").read_text())
    told = (tmp_path / "look_ahead_nets.md").read_text()
    assert told == page(found)
    assert told.count(f"| {machine(torch.device('cpu'))}, autocast bf16 |") == 2
    assert [row["contender"] for row in found["nets"]["tiny"]["rows"]] == ["ormo", "ormo_la"]
    ormo = next(line for line in told.splitlines() if line.startswith("| ormo |"))
    assert ormo.split(" | ")[5:7] == ["1", MISSING]  # of its own time, and of that of a rule that is missing
    assert "not reached (never)" in ormo
    assert "Not finished, and left out: DDP, Nesterov (exponential), " in told
    a.seconds = 0
    assert work_through(plan, a) == []  # nothing is begun, and nothing is lost
    assert {file.name for file in a.work.iterdir()} == runs
    assert json.loads((tmp_path / "look_ahead_nets.json").read_text()) == found
    # On another machine, which has the results alone, nothing is lost and nothing made again.
    a.work, a.seconds, a.precision = tmp_path / "elsewhere", math.inf, "float32"
    assert work_through(plan[:2], a) == []
    assert [*a.work.glob("*.json")] == []
    assert json.loads((tmp_path / "look_ahead_nets.json").read_text()) == found
