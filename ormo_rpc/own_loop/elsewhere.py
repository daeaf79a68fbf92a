"""The work of a process whose server is another one: a child of ``ormo-rpc launch``, a rank, or started by hand."""

from __future__ import annotations

import contextlib
import platform
import secrets
import threading
from collections.abc import Generator
from typing import Any

from typing_extensions import override

from ormo_rpc.config.parsing import parse_text
from ormo_rpc.config.saving import to_tree
from ormo_rpc.messages import Push, Reply
from ormo_rpc.own_loop.job import OwnJob
from ormo_rpc.own_loop.run import Run, Source, say
from ormo_rpc.own_loop.worker import OwnWorker
from ormo_rpc.rendezvous.addresses import parse_address
from ormo_rpc.rendezvous.secret import read_secret, require_secret
from ormo_rpc.runtimes import server_address
from ormo_rpc.runtimes.distributed.launcher.rank_messages import WorkerRank, server_over
from ormo_rpc.runtimes.distributed.worker_process.context import WorkerArgs, WorkerContext
from ormo_rpc.runtimes.distributed.worker_process.worker_loop import WorkerLoop
from ormo_rpc.runtimes.ranks import TORCHRUN, Ranks
from ormo_rpc.runtimes.torchrun_agent import end_with_agent
from ormo_rpc.runtimes.torchrun_store import ADDRESS, SECRET_FILE, connect, wait_for
from ormo_rpc.transports.auto import Auto


class LoopProcess:
    """A worker's process whose loop is the script's; it leaves when it is asked to.

    Args:
        run: The run.
        args: The arguments of the process.
    """

    def __init__(self, run: Run, args: WorkerArgs) -> None:
        self.run = run
        self.args = args
        self.context = WorkerContext[OwnWorker](args, self._make_job)
        self.loop = WorkerLoop(self.context, args.preferred_worker)
        self.job: OwnJob | None = None

    def leave(self) -> None:
        """Ask to leave; called from another thread."""
        self.context.leaving = True
        self.loop.leave()

    def _make_job(self, text: str) -> OwnJob:
        config = parse_text(text, transport=self.args.transport)
        config.refuse_unavailable()
        if self.job is not None:
            self.job.close()
        self.job = self.run.job(config, trains_here=True)
        return self.job


class WorkerSource(Source):
    """Tickets of a server in another process.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self.summary: dict[str, Any] | None = None
        self._run = run
        self._process: LoopProcess | None = None

    @property
    @override
    def worker(self) -> OwnWorker:
        return self._working.loop.worker

    @override
    def replies(self) -> Generator[Reply, Push]:
        run = self._run
        try:
            with self._entered() as process:
                self._process = process
                yield from process.loop.replies()
        finally:
            if self._process is not None and self._process.job is not None:
                self._process.job.close()
            run.model.release()

    @override
    def before_push(self, seconds: float) -> None:
        self._working.loop.before_push(seconds)

    @property
    def _working(self) -> LoopProcess:
        assert self._process is not None, "there is a reply"
        return self._process

    def _entered(self) -> contextlib.AbstractContextManager[LoopProcess]:
        role = self._run.role
        if role.child is not None:
            return role.child.working(self._made)
        return self._elastic() if role.ranks is None else self._rank(role.ranks)

    def _made(self, args: WorkerArgs) -> LoopProcess:
        return LoopProcess(self._run, args)

    @contextlib.contextmanager
    def _elastic(self) -> Generator[LoopProcess]:
        """Be a worker of a run in progress."""
        config = self._run.role.config
        address = config.server.address
        assert address is not None, "it was checked"
        require_secret(config.server.secret_file)
        say(f"a worker on {platform.node()}, for {server_over(address)}")
        yield self._made(self._args(address, config.server.secret_file, None, 0))

    @contextlib.contextmanager
    def _rank(self, ranks: Ranks) -> Generator[LoopProcess]:
        """Be the worker of a rank, until rank 0 tells the end of the run."""
        config = self._run.role.config
        timeout_seconds = config.rpc.start_timeout_seconds
        if ranks.launcher == TORCHRUN:
            end_with_agent()
        with WorkerRank(ranks, say, config) as rank:
            if ranks.agent_store:
                store = connect(ranks.master, timeout_seconds)
                address, secret_file = wait_for(store, (ADDRESS, SECRET_FILE), timeout_seconds)
            else:
                address, secret_file = server_address.without_store(config, ranks), config.server.secret_file
            process = self._made(self._args(address, secret_file or None, ranks.rank - 1, ranks.attempt))

            def leave_at_the_end() -> None:
                rank.ended.wait()
                process.context.leaving = True  # or it would look for a server that has ended

            threading.Thread(target=leave_at_the_end, name="end of the run", daemon=True).start()
            yield process

    def _args(self, address: str, secret_file: str | None, preferred_worker: int | None, restart_count: int) -> WorkerArgs:
        config = self._run.role.config
        secret = read_secret(secret_file)
        assert secret is not None, "it was checked that there is one"
        return WorkerArgs(
            address=parse_address(address),
            secret=secret,
            preferred_worker=preferred_worker,
            slot_id=secrets.token_hex(8),
            restart_count=restart_count,
            data_root=None,
            transport=None
            if isinstance(config.transport, Auto) or preferred_worker is not None
            else to_tree(config)["transport"],
            timeout_seconds=config.rpc.start_timeout_seconds,
            report=say,
            on_joined=lambda: None,
            announce=preferred_worker is None,
        )
