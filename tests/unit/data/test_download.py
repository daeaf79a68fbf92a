"""Downloads: once per machine, only where asked for, and an error that says what to do by hand."""

from __future__ import annotations

import fcntl
import re
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc.data import CIFAR10
from tests.support.datasets import write_cifar10


class Web:
    """A substitute for the web: writes the files and counts how often."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: Exception | None = None) -> None:
        self.visits = 0
        self.fault = fault
        monkeypatch.setattr(CIFAR10, "fetch", lambda section: self.fetch(section.root_folder))

    def fetch(self, root: Path) -> None:
        """Take the place of `CIFAR10.fetch`."""
        self.visits += 1
        with (root / ".download.lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else gets in meanwhile
        if self.fault is not None:
            raise self.fault
        write_cifar10(root)


def test_missing_files_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web = Web(monkeypatch)
    section = CIFAR10(root=str(tmp_path / "new"), download=True, verify=False)
    section.prepare()
    section.prepare()
    assert web.visits == 1
    assert len(section.load().train) == 20


def test_a_process_that_waited_for_the_download_lock_does_not_fetch_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = Web(monkeypatch)

    def flock(_file: Any, _operation: int) -> None:
        write_cifar10(tmp_path)  # the other run finished while this one waited

    monkeypatch.setattr("fcntl.flock", flock)
    CIFAR10(root=str(tmp_path), download=True, verify=False).prepare()
    assert web.visits == 0


def test_nothing_is_fetched_without_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web = Web(monkeypatch)
    CIFAR10(root=str(tmp_path)).prepare()
    with pytest.raises(ValueError, match=r"^dataset\.root: CIFAR10 is not in .*$"):
        CIFAR10(root=str(tmp_path)).load()
    assert web.visits == 0


def test_a_download_that_fails_says_where_to_put_the_files_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Web(monkeypatch, fault=OSError("no route to host"))
    folder = re.escape(str(tmp_path / "cifar-10-batches-py"))
    message = rf"^dataset\.download: CIFAR10 cannot be fetched: no route to host; put the files into {folder} by hand$"
    with pytest.raises(ValueError, match=message):
        CIFAR10(root=str(tmp_path), download=True).prepare()
