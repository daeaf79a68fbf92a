"""Elastic workers: they join a run from another shell, work for it, and leave it."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import psutil
import pytest

from tests.support.processes import (
    CALM,
    QUIET,
    descendants,
    events,
    first,
    gone,
    launched,
    processes,
    summary,
    wait_until,
)

HAS_IPV6 = any(address.family == socket.AF_INET6 for address in psutil.net_if_addrs().get("lo", ()))
"""True where the loopback interface has an IPv6 address."""
pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]


def test_an_elastic_worker_without_a_server_is_told_at_once_and_gives_up(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("0123456789abcdef" * 4)
    (tmp_path / "secret").chmod(0o600)
    with socket.socket() as taken:  # bound and not listening, so connections are refused
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        where = ("role=worker", f"server.address={address}", f"server.secret_file={tmp_path / 'secret'}")
        with launched("launch.py", *where, "runtime.start_timeout_seconds=3") as elastic_worker:
            _, err = elastic_worker.communicate(timeout=60)
    assert elastic_worker.returncode == 1
    at_once, end = err.splitlines()
    assert at_once == (f"launch.py: nothing listens at {address}: the run has ended, or not begun; trying for another 1 s")
    assert re.fullmatch(
        rf"launch\.py: no server can be joined at {address}: nothing listens there; gave up after 1\.\d s, a third of "
        r"runtime\.start_timeout_seconds",
        end,
    )


def test_an_elastic_worker_joins_works_and_leaves_on_sigterm(tmp_path: Path) -> None:
    listens = f'server.address="{"[::1]" if HAS_IPV6 else "127.0.0.1"}:0"'
    given = (*QUIET, *CALM, "train.epochs=100000", "workers=1", "transport=gloo", listens)
    with launched("launch.py", f"hydra.run.dir={tmp_path}", *given) as host:
        address = processes(tmp_path)["address"]
        where = ("role=worker", f'server.address="{address}"')
        with launched("launch.py", *where, f"server.secret_file={tmp_path / 'secret'}") as elastic_worker:
            by_elastic_worker = lambda: [event for event in events(tmp_path, "apply") if event["worker"] == 1]  # noqa: E731 - one line
            wait_until(lambda: len(by_elastic_worker()) > 20, "the elastic worker's gradients")
            family = descendants(elastic_worker.pid)
            for process in (psutil.Process(elastic_worker.pid), *family):  # as a manager does
                process.send_signal(signal.SIGTERM)
            _, err = elastic_worker.communicate(timeout=60)
            assert elastic_worker.returncode == 0
            assert err.splitlines() == [
                "launch.py: worker: joined as worker 1; pushes by gloo: asked for",
                "launch.py: the worker left the run on SIGTERM",
            ]
            assert gone(family)
        # The trace is flushed beside training: what has happened last comes to it later.
        wait_until(lambda: any(event["event"] == "leave" for event in events(tmp_path)), "the worker's leave in the trace")
        found = events(tmp_path)
        assert first(found, event="join")["concurrency"] == 2
        assert first(found, event="leave")["concurrency"] == 1
        wrong = tmp_path / "wrong"
        wrong.write_text("x" * 40)
        wrong.chmod(0o600)
        with launched("launch.py", *where, f"server.secret_file={wrong}", "runtime.max_restarts=0") as stranger:
            _, err = stranger.communicate(timeout=60)
            assert stranger.returncode == 1
            assert "x" * 40 not in err
            assert re.fullmatch(
                r"launch\.py: worker \(pid \d+\) exited with status 65: Refused: the server at \S+ refused this worker: .*\n",
                err,
            ), err
        seen = len(events(tmp_path, "apply"))
        wait_until(lambda: len(events(tmp_path, "apply")) > seen + 20, "further updates")
        host.send_signal(signal.SIGINT)
        _, err = host.communicate(timeout=60)
        assert host.returncode == 130
    assert summary(tmp_path)["evictions"] == []
