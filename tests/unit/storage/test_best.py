"""The folder of the best model: complete or absent, replaced in one step, taken along by a run that resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_rpc.config.parsing import load_config, parse_config
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.storage import best, checkpoint

CONFIG = parse_config({"workers": 2})


def record(iteration: int, value: float = 0.5, metric: str = "val_loss") -> best.Record:
    return best.Record(
        metric=metric, value=value, iteration=iteration, evaluated="parameters", test={"loss": 1.0}, validation={"loss": value}
    )


def write(run_dir: Path, iteration: int, **options: Any) -> Path:
    model = {"weight": torch.full((2,), float(iteration))}
    return best.write(run_dir, record(iteration, **options), model, {"seen": torch.tensor(iteration)}, CONFIG, Fingerprint())


def weight(folder: Path) -> float:
    return checkpoint.read(folder, "model.pt")["weight"][0].item()


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_it_is_read_as_it_was_written_and_replaced(tmp_path: Path) -> None:
    assert best.read(tmp_path) is None
    for iteration in (3, 7):
        folder = write(tmp_path, iteration)
        assert best.read(tmp_path) == record(iteration)
        assert (weight(folder), checkpoint.gradients_in(folder)) == (iteration, iteration)
        assert checkpoint.buffers_of(folder) == {"seen": torch.tensor(iteration)}
        assert load_config(folder / "config.yaml") == CONFIG
    assert names(tmp_path) == ["best"]
    assert checkpoint.complete(tmp_path) == [], "it is no checkpoint"


def test_a_write_that_fails_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 3)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 7)
    assert best.read(tmp_path) == record(3)
    assert names(tmp_path) == ["best"]


def test_what_a_killed_writer_has_left_is_put_in_order(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    (folder.parent / ".best.1").mkdir()
    assert best.read(tmp_path) == record(3)
    assert names(tmp_path) == [".best.1", "best"], "others may read while it is written"
    best.recover(tmp_path)
    assert names(tmp_path) == ["best"]
    folder.rename(folder.parent / ".best.1.former")  # killed right before the new one got its name
    best.recover(tmp_path)
    assert best.read(tmp_path) == record(3)
    assert names(tmp_path) == ["best"]


def test_a_damaged_one_does_not_count(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    (folder / "model.pt").write_bytes(b"")
    assert best.read(tmp_path) is None
    write(tmp_path, 7)
    assert best.read(tmp_path) == record(7)


@pytest.mark.parametrize(
    ("metric", "iteration", "taken"), [("val_loss", 3, True), ("val_loss", 2, False), ("test_loss", 9, False)]
)
def test_a_run_that_resumes_takes_it_along_where_it_is_of_its_past(
    metric: str, iteration: int, taken: bool, tmp_path: Path
) -> None:
    source, run_dir = tmp_path / "source", tmp_path / "run"
    for folder in (source, run_dir):
        folder.mkdir()
    best.copy(source, run_dir, metric=metric, iteration=iteration)  # nothing is there yet
    write(source, 3)
    best.copy(source, run_dir, metric=metric, iteration=iteration)
    assert best.read(run_dir) == (record(3) if taken else None)
    assert best.read(source) == record(3)
