"""Memory of the processes: the order in which the kernel is to kill them, and sizes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import psutil
import pytest

from ormo_rpc.runtimes.distributed import memory
from ormo_rpc.runtimes.distributed.memory import PRELOADER, SERVER, WORKER, raise_oom_score


@pytest.fixture
def adj(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of a process of its own, with 0."""
    monkeypatch.setattr(memory, "_inherited", [])
    file = tmp_path / "self" / "oom_score_adj"
    file.parent.mkdir()
    file.write_text("0\n")
    return file


@pytest.mark.parametrize(
    ("inherited", "by", "raised"),
    [(0, WORKER, 900), (0, SERVER, 200), (-900, WORKER, 0), (700, WORKER, 1000), (1000, SERVER, 1000)],
)
def test_a_role_is_added_to_the_inherited_score(inherited: int, by: int, raised: int, adj: Path, tmp_path: Path) -> None:
    adj.write_text(f"{inherited}\n")
    raise_oom_score(by, tmp_path)
    assert int(adj.read_text()) == raised >= inherited


def test_a_process_that_is_forked_from_a_preloader_has_the_score_of_its_own_role(adj: Path, tmp_path: Path) -> None:
    adj.write_text("50\n")
    raise_oom_score(PRELOADER, tmp_path)
    raise_oom_score(SERVER, tmp_path)  # in the forked process
    assert int(adj.read_text()) == 250
    assert WORKER > PRELOADER > SERVER > 0


def test_a_score_that_cannot_be_written_is_left(monkeypatch: pytest.MonkeyPatch, adj: Path, tmp_path: Path) -> None:
    def refused(self: Path, *_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "write_text", refused)
    raise_oom_score(WORKER, tmp_path)
    assert adj.read_text() == "0\n"
    raise_oom_score(WORKER, tmp_path / "not Linux")


def test_the_resident_memory_of_a_process_is_its_proportional_share() -> None:
    own = memory.proportional_bytes(os.getpid())
    assert own is not None
    measured = psutil.Process().memory_full_info()
    assert own == pytest.approx(measured.pss, rel=0.1)
    assert own <= measured.rss
    assert memory.proportional_bytes(2**30) is None
