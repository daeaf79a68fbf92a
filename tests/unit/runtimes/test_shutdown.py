"""The end of a run in the server's process: what it waits for, and in which order."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from ormo_rpc.runtimes.distributed.server_process import shutdown
from ormo_rpc.runtimes.distributed.worker_devices import WorkerDevices
from tests.support.processes import PATIENCE_SECONDS


class Notes:
    """A session and a watchdog that write down what they are asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.control, self.memory = "rpc", dict[str, int]()

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_options: self.calls.append(name)


def test_the_last_evaluation_begins_before_the_checkpoint_and_leaving_workers_are_noticed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutdown, "FLUSH_SECONDS", PATIENCE_SECONDS)
    session, changed, memberships = Notes(), threading.Event(), {"one": 0, "two": 1}

    def leave() -> None:
        session.calls.append("workers may leave")
        for name in [*memberships]:
            threading.Timer(0.02, lambda name=name: (memberships.pop(name), changed.set())).start()

    service: Any = SimpleNamespace(
        change=lambda _: None,
        failure=None,
        release_shutdown=leave,
        memberships=memberships,
        changed=changed,
        transports={},
        evictions=[],
    )
    waiting = threading.Thread(
        target=shutdown.shut_down,
        args=(session, service, Notes(), WorkerDevices()),
        kwargs={"status": {}, "timeout_seconds": PATIENCE_SECONDS},
        daemon=True,
    )
    waiting.start()
    waiting.join(PATIENCE_SECONDS / 2)
    assert not waiting.is_alive()
    begun = session.calls.index("flush")  # which begins evaluations
    assert begun < session.calls.index("write_checkpoint") < session.calls.index("workers may leave")
    assert session.calls[-1] == "close"
