"""The wait of an elastic worker for the launcher of its run."""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import RunFailed, RunInterrupted
from ormo_rpc.rendezvous.secret import new_secret, write_secret
from ormo_rpc.runtimes.distributed.launcher.reaching import reach
from ormo_rpc.runtimes.distributed.launcher.supervisor import Supervisor
from ormo_rpc.storage.run_directory import RunDirectory
from ormo_rpc.storage.summary import Summary, write_summary


@pytest.fixture
def bound() -> Generator[socket.socket]:
    """A socket with an address at which it does not listen."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with its secret."""
    RunDirectory.claim(tmp_path)
    write_secret(tmp_path / "secret", new_secret())
    return tmp_path


def address_of(bound: socket.socket) -> str:
    return f"127.0.0.1:{bound.getsockname()[1]}"


def config(bound: socket.socket, run_dir: Path, timeout_seconds: float) -> Config:
    """That of an elastic worker with the run's own secret."""
    server = {"address": address_of(bound), "secret_file": str(run_dir / "secret")}
    runtime = {"name": "rpc", "start_timeout_seconds": timeout_seconds}
    return parse_config({"role": "worker", "server": server, "runtime": runtime})


@pytest.mark.parametrize("status", ["completed", "diverged"])
def test_the_summary_beside_the_secret_tells_the_end_at_once(status: str, bound: socket.socket, run_dir: Path) -> None:
    write_summary(run_dir, Summary(status=status))
    said: list[str] = []
    assert not reach(config(bound, run_dir, 600), Supervisor(), said.append)
    assert said == [f"nothing listens at {address_of(bound)}: the run of {run_dir} has ended ({status})"]


@pytest.mark.parametrize("content", [None, '{"status": "interrupted"}', "{"])
def test_where_the_end_is_not_known_it_waits_for_a_third_of_the_time(
    content: str | None, bound: socket.socket, run_dir: Path
) -> None:
    """An interrupted run may go on in its directory, as torchrun makes it."""
    if content is not None:
        (run_dir / "summary.json").write_text(content)
    said: list[str] = []
    with pytest.raises(
        RunFailed, match=f"no server can be joined at {address_of(bound)}: nothing listens there; gave up"
    ) as ended:
        reach(config(bound, run_dir, 0.9), Supervisor(), said.append)
    assert said == [f"nothing listens at {address_of(bound)}: the run has ended, or not begun; trying for another 0 s"]
    waited = re.search(r"after (\S+) s, a third of runtime.start_timeout_seconds$", str(ended.value))
    assert waited is not None
    assert 0.3 <= float(waited[1]) < 10


def test_a_worker_that_comes_before_its_run_waits_for_it(bound: socket.socket, run_dir: Path) -> None:
    said: list[str] = []
    begin = threading.Timer(0.05, bound.listen)

    def report(text: str) -> None:
        said.append(text)
        begin.start()

    assert reach(config(bound, run_dir, 600), Supervisor(), report)
    assert len(said) == 1


def test_a_server_that_does_not_answer_is_left_to_the_worker(bound: socket.socket, run_dir: Path) -> None:
    write_summary(run_dir, Summary(status="completed"))
    bound.listen()
    answers = threading.Thread(target=lambda: bound.accept()[0].close())
    answers.start()
    said: list[str] = []
    assert reach(config(bound, run_dir, 600), Supervisor(), said.append)
    assert said == []
    answers.join()


def test_a_signal_ends_the_wait(bound: socket.socket, run_dir: Path) -> None:
    supervisor = Supervisor()
    with pytest.raises(RunInterrupted) as ended:
        reach(config(bound, run_dir, 600), supervisor, lambda _: supervisor.signals.append(signal.SIGTERM))
    assert ended.value.exit_status == 128 + signal.SIGTERM
