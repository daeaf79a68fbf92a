"""Checkpoints: complete or absent, the newest few, plain PyTorch, and clear errors about those that cannot be used."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ormo_rpc import build_server
from ormo_rpc.config.parsing import load_config, parse_config
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.evaluate import evaluate_checkpoint
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.prepare import check_resume
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.storage import checkpoint
from ormo_rpc.worker.evaluation import Evaluator

CONFIG = parse_config({"workers": 2, "model": {"hidden": 5}, "train": {"max_iterations": 9}})


def server(**options: Any) -> ParameterServer:
    given: dict[str, Any] = {"params": torch.arange(4.0), "num_workers": 2, "total_tickets": 9, **options}
    return build_server(**given)


def state(iteration: int) -> dict[str, Any]:
    return {**server().state_dict(), "iteration": iteration}


def write(run_dir: Path, iteration: int, *, weight: float = 0.0, keep: int = 3) -> Path:
    return checkpoint.write(run_dir, state(iteration), {"weight": torch.full((2,), weight)}, CONFIG, keep=keep)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def weight(path: Path) -> float:
    return checkpoint.read(path, "model.pt")["weight"][0].item()


# -- complete or absent -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_folder_of_four_files(tmp_path: Path) -> None:
    path = write(tmp_path, 7, weight=2.0)
    assert path == tmp_path / "checkpoints" / "iteration_000000007"
    assert {file.name for file in path.iterdir()} == {"server.pt", "model.pt", "config.yaml", "manifest.json"}
    assert weight(path) == 2.0
    assert load_config(path / "config.yaml") == CONFIG
    read = checkpoint.read(path, "server.pt")
    assert read["iteration"] == 7
    assert torch.equal(read["params"], torch.arange(4.0))


def test_a_write_removes_leftovers_of_a_killed_one_and_restores_a_moved_checkpoint(tmp_path: Path) -> None:
    kept = write(tmp_path, 3, weight=1.0)
    folder = kept.parent
    (folder / ".iteration_000000009.4711").mkdir()
    kept.rename(folder / ".iteration_000000003.4711.former")  # killed between the two renamings
    write(tmp_path, 4)
    assert names(tmp_path) == ["iteration_000000003", "iteration_000000004"]
    assert weight(kept) == 1.0


def test_a_damaged_newer_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    torn = write(tmp_path, 30)
    (torn / "server.pt").write_bytes(b"")
    good = write(tmp_path, 25, keep=1)
    assert checkpoint.locate(tmp_path) == good


class Fault:
    """Fails the n-th call of a function with a full disk; calls the function otherwise, and counts the calls."""

    def __init__(self, function: Any, fails_at: int) -> None:
        self.function = function
        self.fails_at = fails_at
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Fail, or call the function."""
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.function(*args, **kwargs)


FAULTS: list[tuple[Any, str, int]] = [
    *((torch, "save", 1), (torch, "save", 2)),  # server.pt, model.pt
    *((os, "fsync", 1), (os, "fsync", 2)),
    (checkpoint, "save_config", 1),
    (Path, "rename", 1),
]


@pytest.mark.parametrize(
    ("owner", "name", "call", "same"),
    # Only where there is a checkpoint of the same iteration is a second folder renamed.
    [*((*fault, same) for fault in FAULTS for same in (False, True)), (Path, "rename", 2, True)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_failed_write_leaves_the_former_checkpoint_and_nothing_else(
    owner: Any, name: str, call: int, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = write(tmp_path, 3, weight=1.0)
    fault = Fault(getattr(owner, name), call)
    with monkeypatch.context() as patch:
        # A plain function, because a method has to be bound to its path.
        patch.setattr(owner, name, lambda *args, **kwargs: fault(*args, **kwargs))
        with pytest.raises(OSError, match=r"\A\[Errno 28\] No space left on device\Z"):
            write(tmp_path, 3 if same else 4, weight=2.0)
    assert fault.calls >= call
    assert names(tmp_path) == [former.name]
    assert weight(checkpoint.locate(tmp_path)) == 1.0
    assert weight(write(tmp_path, 4, weight=2.0)) == 2.0  # and the next one succeeds


def test_a_checkpoint_of_the_same_iteration_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 3, weight=1.0)
    write(tmp_path, 3, weight=2.0)
    assert names(tmp_path) == ["iteration_000000003"]
    assert weight(checkpoint.locate(tmp_path)) == 2.0


def test_leftovers_of_a_killed_process_are_no_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / "checkpoints" / ".iteration_000000009.4711").mkdir()
    (tmp_path / "checkpoints" / "iteration_000000010").touch()  # not a folder
    assert checkpoint.locate(tmp_path).name == "iteration_000000003"


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_newest_checkpoints_are_kept(keep: int, tmp_path: Path) -> None:
    for iteration in (1, 2, 30, 400):
        write(tmp_path, iteration, keep=keep)
    assert names(tmp_path) == [f"iteration_{iteration:09d}" for iteration in (1, 2, 30, 400)[-keep:]]


# -- finding and reading -----------------------------------------------------------------------------------------------


def test_locate_takes_a_run_directory_or_a_checkpoint(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 9), write(tmp_path, 100)
    assert checkpoint.locate(tmp_path) == newer
    assert checkpoint.locate(older) == older


def test_locate_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        checkpoint.locate(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: got a path without an intact checkpoint, expected a run directory or one of its checkpoints/iteration_*"
    )


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-40]),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "text": lambda file: file.write_text("no archive at all"),
    "objects": lambda file: torch.save(Config(), file),  # of a class that is not to be unpickled
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_reading_a_damaged_file_is_an_error_with_its_name(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    DAMAGES[damage](path / "server.pt")
    with pytest.raises(ConfigError) as caught:
        checkpoint.read(path, "server.pt")
    pattern = rf"{re.escape(str(path / 'server.pt'))}: cannot be read: \S.*; take an older checkpoint"
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


def test_an_error_without_a_message_is_reported_by_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_keywords: Any) -> None:
        raise EOFError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ConfigError) as caught:
        checkpoint.read(tmp_path, "server.pt")
    assert str(caught.value) == f"{tmp_path / 'server.pt'}: cannot be read: EOFError; take an older checkpoint"


# -- plain PyTorch, and resuming ----------------------------------------------------------------------------------------


def test_model_pt_is_a_state_dict_of_plain_pytorch_and_is_evaluated(tmp_path: Path) -> None:
    job = Job(CONFIG)
    running = job.server(lambda _: None, lambda: 0.0)
    for due in running.start():
        running.receive(job.worker().compute(due))
    model = job.model()
    path = checkpoint.write(tmp_path, running.state_dict(), model.state_dict(running.params, {}), CONFIG, keep=1)

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10))  # written by hand
    saved = torch.load(path / "model.pt", weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), saved.values(), strict=True)))
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), running.params)

    found, evaluation = evaluate_checkpoint(tmp_path)
    assert found == path
    assert evaluation == Evaluator(FlatModel(net), job.data)(running.params, {})
    inputs, labels = job.data.test.batch(torch.arange(len(job.data.test)), None)
    with torch.no_grad():
        right = (net(inputs).argmax(1) == labels).float().mean().item()
    assert evaluation.test["accuracy"] == pytest.approx(right)


def test_a_server_resumes_from_its_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    job = Job(CONFIG)
    whole, first, second = (job.server(lambda _: None, lambda: 0.0) for _ in range(3))
    worker = job.worker()

    def work(target: ParameterServer, replies: list[Any], count: int) -> list[Any]:
        for _ in range(count):
            replies += target.receive(worker.compute(replies.pop(0)))
        return replies

    work(whole, whole.start(), 9)
    pending = work(first, first.start(), 5)
    path = checkpoint.write(tmp_path, first.state_dict(), {}, CONFIG, keep=1)
    second.load_state_dict(checkpoint.read(path, "server.pt"))
    work(second, pending, 4)  # with the replies that were under way
    assert second.ended
    assert torch.equal(second.params, whole.params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "asgd"}, "algorithm: got ormo, expected asgd"),
        ({"scheduler": "sync"}, "scheduler: got async, expected sync"),
        (
            {"params": torch.zeros(5)},
            r"params: got \{'params': 'torch\.float32 \(4,\)'\}, expected \{'params': 'torch\.float32 \(5,\)'\}",
        ),
        (
            {"params": torch.zeros(4).double()},
            r"params: got \{'params': 'torch\.float32 \(4,\)'\}, expected \{'params': 'torch\.float64 \(4,\)'\}",
        ),
    ],
    ids=["algorithm", "scheduler", "shape", "dtype"],
)
def test_a_checkpoint_of_another_run_is_refused_unchanged(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path, other = write(tmp_path, 3), server(**options)
    before = other.params.clone()
    with pytest.raises(ValueError, match="state") as caught:
        other.load_state_dict(checkpoint.read(path, "server.pt"))
    assert re.fullmatch(rf"state of a server: {message}; build this server as that one was", str(caught.value))
    assert torch.equal(other.params, before)
    assert other.iteration == 0


@pytest.mark.parametrize(
    ("key", "changes", "got", "expected"),
    [
        ("seed", {"seed": 3}, "3", "0"),
        ("train.batch_size", {"train": {"batch_size": 16}}, "16", "32"),
        ("train.momentum", {"train": {"momentum": 0.5}}, "0.5", "0.9"),
        ("model", {"model": {"hidden": 6}}, r"model=mlp model\.hidden=6 .*", r"model=mlp model\.hidden=5 .*"),
        ("model", {"model": {"name": "cnn"}}, r"model=cnn .*", r"model=mlp .*"),
        ("dataset.name", {"dataset": {"name": "mnist"}}, "mnist", "digits"),
        ("dataset.name", {"dataset": {"_target_": "torch.nn.Identity"}}, r"torch\.nn\.Identity", "digits"),
        ("model", {"model": {"_target_": "torch.nn.Identity"}}, r"model\._target_=torch\.nn\.Identity.*", "model=mlp .*"),
        ("dataset.validation", {"dataset": {"validation": 0.1}}, r"0\.1", r"0\.0"),
        ("algorithm", {"algorithm": {"momentum_correction": True}}, ".*=True", ".*=null"),
        ("scheduler", {"scheduler": {"name": "sync"}}, "scheduler=sync", "scheduler=async"),
    ],
    ids=str,
)
def test_resuming_a_different_run_is_refused_with_the_key(
    key: str, changes: dict[str, Any], got: str, expected: str, tmp_path: Path
) -> None:
    path = write(tmp_path, 3)
    with pytest.raises(ConfigError) as caught:
        check_resume(changed(changes), path)
    pattern = rf"checkpoint\.resume: {re.escape(key)}: got {got}, expected {expected}, as {re.escape(str(path))} has it"
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    "changes", [{}, {"workers": 7}, {"train": {"lr": 0.5, "epochs": 90}}, {"dataset": {"root": "elsewhere"}}], ids=str
)
def test_a_run_resumes_with_other_workers_learning_rate_and_length(changes: dict[str, Any], tmp_path: Path) -> None:
    check_resume(changed(changes), write(tmp_path, 3))


def changed(changes: dict[str, Any]) -> Config:
    """Return the configuration of the checkpoints with some values changed."""
    model = {} if "name" in changes.get("model", {}) else {"hidden": 5}
    train = {"max_iterations": 9, **changes.get("train", {})}
    return parse_config({"workers": 2, **changes, "model": {**model, **changes.get("model", {})}, "train": train})


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state") as caught:
        server(total_tickets=2).load_state_dict(checkpoint.read(write(tmp_path, 3), "server.pt"))
    assert str(caught.value) == "state of a server: iteration: got 3, expected at most 2"
