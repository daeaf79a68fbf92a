"""One incarnation of a live server, in this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.messages import Reply
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.session import Session
from ormo_rpc.runtimes.simulator import InlineExecutor


class Incarnation:
    """One incarnation of a server in a run directory, without processes: a session, and pushes to it."""

    def __init__(
        self,
        run_dir: Path,
        number: int,
        *,
        start: bool = True,
        writer: Executor | None = None,
        algorithm: Mapping[str, Any] | None = None,
        evaluate: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        run_dir.mkdir(exist_ok=True)
        config = parse_config(
            {
                "workers": 2,
                "model": {"hidden": 4},
                "train": {"max_iterations": 60, "lr": 0.01, "lr_schedule": "cosine"},
                "algorithm": algorithm or {},
                "evaluate": evaluate or {},
                "dataset": {"validation": 0.2 if evaluate else 0.0},
                "logger": {"name": "none"},
                "checkpoint": {"every_seconds": 0, **options},
            }
        )
        (run_dir / "trace.jsonl").touch()
        job = Job(config)
        self.worker = job.worker()
        self.now = 0.0 if number else 1.5  # until the clock is continued
        self.session = Session(
            *(job, run_dir, InlineExecutor(), writer or InlineExecutor(), lambda: self.now),
            began=0.0,
            continue_clock=lambda seconds: setattr(self, "now", seconds),
        )
        self.session.open(incarnation=number)
        self.server = self.session.server
        self.replies: dict[int, Reply] = {}
        if start:
            self.replies = {reply.worker: reply for reply in self.server.start([0, 1])}
            self.session.journal.start([0, 1], self.server.incarnation)

    def push(self, count: int) -> None:
        """Push this many gradients, the workers taking turns, and flush after each."""
        for _ in range(count):
            worker = self.server.iteration % 2
            push = self.worker.compute(self.replies[worker])
            replies: list[Reply] = self.server.receive(push)
            self.session.journal.push(push, rejected=False)
            self.session.observe(self.server)
            self.session.journal.sync()
            self.replies |= {reply.worker: reply for reply in replies}
            self.session.flush()

    def die(self) -> None:
        """End as after a SIGKILL: nothing more is written."""
        self.session.directory.close()
        if self.session.job.config.checkpoint.journal:
            os.close(self.session.journal._file)  # pyright: ignore[reportPrivateUsage,reportAttributeAccessIssue] # no sync

    def sha(self) -> bytes:
        """Return the bytes of the parameters."""
        return self.server.params.numpy().tobytes()
