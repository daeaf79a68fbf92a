"""Kills for lack of memory: the counters that the kernel keeps, and which deaths they explain."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ormo_rpc.runtimes.distributed import oom_kills as module
from ormo_rpc.runtimes.distributed.oom_kills import OomKills
from tests.support.cgroups import Group, group, needs_memory_groups

CERTAIN = "by the kernel for lack of memory"


class Machine:
    """A machine of files, on which the test decides how many processes have been killed.

    Args:
        folder: For its files.
        cgroup: The lines of ``/proc/self/cgroup``.
        counter: The file that counts the kills of this process's control group; None where there is none.
    """

    def __init__(self, folder: Path, cgroup: str, counter: str | None) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "cgroup").write_text(cgroup)
        self._group = None if counter is None else self.cgroups / counter
        if self._group is not None:
            self._group.parent.mkdir(parents=True)
        self._kills = [7, 70]
        self.kill(0)

    def kill(self, ours: int, others: int = 0) -> None:
        """Count further kills, of our control group and of others."""
        self._kills = [self._kills[0] + ours, self._kills[1] + ours + others]
        (self.proc / "vmstat").write_text(f"nr_free_pages 5\noom_kill {self._kills[1]}\nswap_ra 0\n")
        if self._group is not None:
            self._group.write_text(f"oom 9\noom_kill {self._kills[0]}\noom_group_kill 3\n")

    def watched(self) -> OomKills:
        """Follow its counter."""
        return OomKills(self.proc, self.cgroups)


GROUPS = {
    "version 2": ("0::/user.slice/run.scope\n", "user.slice/run.scope/memory.events.local"),
    "version 2 of an old kernel": ("0::/user.slice/run.scope\n", "user.slice/run.scope/memory.events"),
    "version 1": ("9:cpu:/\n4:memory,hugetlb:/job/1\n0::/job\n", "memory/job/1/memory.oom_control"),
    "a container whose path is the machine's": ("0::/../docker/5f\n4:memory:/docker/5f\n", "memory/memory.oom_control"),
}


@pytest.mark.parametrize("cgroup", GROUPS.values(), ids=GROUPS)
def test_the_control_group_of_the_launcher_names_what_was_killed_in_it(cgroup: tuple[str, str], tmp_path: Path) -> None:
    machine = Machine(tmp_path, *cgroup)
    kills = machine.watched()
    assert kills.cause(1) == ""
    machine.kill(0, others=5)  # on the same machine, which has nothing to do with it
    assert kills.cause(1) == ""
    machine.kill(1)
    assert kills.cause(1) == CERTAIN
    assert kills.cause(1) == ""  # one kill explains one death


def test_fewer_kills_than_deaths_are_told_as_a_maybe(tmp_path: Path) -> None:
    machine = Machine(tmp_path, *GROUPS["version 2"])
    kills = machine.watched()
    machine.kill(2)
    assert kills.cause(3) == f"maybe {CERTAIN} (kills just now in this control group: 2)"
    machine.kill(3)
    assert kills.cause(2) == CERTAIN
    assert kills.cause(1) == CERTAIN  # which took longer to end


def test_the_counter_of_the_machine_is_told_as_a_maybe(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/\n", None)
    kills = machine.watched()
    assert kills.cause(1) == ""
    machine.kill(0, others=1)
    assert kills.cause(1) == f"maybe {CERTAIN} (kills just now on this machine: 1)"


def test_a_kill_long_ago_explains_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    machine = Machine(tmp_path, *GROUPS["version 2"])
    kills = machine.watched()
    machine.kill(1)
    now += module.LOOK_SECONDS
    kills.look()
    now += module.RELATED_SECONDS
    assert kills.cause(1) == CERTAIN
    machine.kill(1)
    now += module.LOOK_SECONDS
    kills.look()
    now += module.RELATED_SECONDS + 1
    assert kills.cause(1) == ""


def test_a_machine_without_counters_tells_nothing(tmp_path: Path) -> None:
    kills = OomKills(tmp_path, tmp_path)
    kills.look()
    assert kills.cause(1) == ""


@needs_memory_groups
def test_a_real_kill_in_a_real_control_group_is_counted_there(tmp_path: Path) -> None:
    with group("memory") as limited, group("memory") as other:
        watched = {made: OomKills(cgroup_file(tmp_path / str(number), made)) for number, made in enumerate((limited, other))}
        limited.set("memory.limit_in_bytes", 50 << 20)
        script = f"open({str(limited.path / 'cgroup.procs')!r}, 'w').write('0'); bytearray(1 << 30)"
        assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == -signal.SIGKILL
        assert [watched[made].cause(1) for made in (limited, other)] == [CERTAIN, ""]


def cgroup_file(proc: Path, made: Group) -> Path:
    """Make a folder of a process in that control group."""
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(f"4:memory:{made.name}\n")
    return proc
