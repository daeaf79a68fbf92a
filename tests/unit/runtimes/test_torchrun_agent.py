"""The agent of torchrun: found among the ancestors of a rank, and missed when it has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from ormo_rpc.runtimes import torchrun_agent
from ormo_rpc.runtimes.torchrun_agent import Agent
from tests.support.processes import wait_until

FIND = "from ormo_rpc.runtimes.torchrun_agent import Agent; print(Agent.of_this_rank())"


@pytest.fixture
def child() -> Generator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def agent_at(pid: int) -> Agent:
    """The agent of this number, with its start from the table of processes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Agent(pid, fields[19])


def test_an_agent_has_ended_with_its_process_and_not_with_its_number(child: subprocess.Popen[bytes]) -> None:
    found = agent_at(child.pid)
    assert found.alive
    assert not replace(found, started="1").alive  # another process has the number now
    child.kill()
    wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, "the end of the process")
    assert not found.alive  # nobody has asked for its status yet
    child.wait()
    assert not found.alive


@pytest.mark.parametrize("shell", [False, True])
def test_the_agent_of_a_rank_is_the_ancestor_without_a_rank(shell: bool) -> None:
    command = [sys.executable, "-c", FIND]
    wrapped = ["sh", "-c", '"$@"; true', "sh", *command] if shell else command
    done = subprocess.run(wrapped, env={**os.environ, "TORCHELASTIC_RUN_ID": "job"}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(agent_at(os.getpid()))


def test_a_rank_is_asked_to_end_when_its_agent_has(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, received = agent_at(child.pid), list[int]()
    former = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        monkeypatch.setattr(Agent, "of_this_rank", classmethod(lambda _: found))
        monkeypatch.setattr(torchrun_agent, "POLL_SECONDS", 0.01)
        torchrun_agent.end_with_agent()
        child.kill()
        wait_until(lambda: received, "SIGTERM")
    finally:
        signal.signal(signal.SIGTERM, former)
        torchrun_agent.end_with_agent.cache_clear()
    assert capsys.readouterr().err == f"launch.py: torchrun's agent (pid {child.pid}) has ended, so this rank ends as well\n"
