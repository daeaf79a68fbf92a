"""The live runtime: a server process and worker processes on one machine or many; workers call the server and nobody else.

`run` and `join` are called in the launcher, which starts every process of this machine (``python launch.py``), the one of its
rank (``torchrun``), or a guest of a run elsewhere (``role=worker``) as a child, and fills the place of each one that dies.
Only the children import torch.distributed.rpc, and only with ``wire.transport=uv`` does one have an agent::

    launcher                processes.py starts them, crew.py fills their places, child.py is their entry point
    who is let in           addresses.py, secret.py; wire.py: messages and handshake; door.py: the server's side, with the seats
                            of seats.py; lease.py: the worker's side, and its heartbeat
    the server's process    serve.py; service.py: the lock around the parameter server; answers.py: who waits for a reply
    a worker's process      work.py; loop.py: from reply to push; calls.py: what it asks of the server
    shared memory and TCP   frames.py: what crosses; segments.py: memory that is shared; streams.py: the server's end,
                            stream_calls.py: the worker's end
    torch.distributed.rpc   agent.py; unpickling.py: what it may unpickle; handlers.py: the server's end,
                            rpc_calls.py: the worker's end
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ormo_rpc.config.schema import Config, save_config
from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.runtimes.distributed.launcher.process_monitor import Crew, Post
from ormo_rpc.runtimes.distributed.launcher.processes import guest_crew, local_crew, rank_crew
from ormo_rpc.runtimes.distributed.launcher.supervisor import Supervisor
from ormo_rpc.runtimes.torchrun import Torchrun
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import read_summary, write_summary
from ormo_rpc.storage.summary import unfinished_summary

MET_ITS_END = ("completed", "diverged")
"""How a run ends that a signal has come too late for."""


def run(config: Config, run_dir: Path) -> dict[str, Any]:
    """Start the children of this launcher, keep them at work to the end of the run, and return the summary.

    Raises:
        RunFailed: the run did not meet its end.
    """
    torchrun = Torchrun.from_environment()
    if torchrun is not None and torchrun.rank > 0:
        with Supervisor(_tell) as supervisor:
            crew = _crew(supervisor, config)
            _keep_worker(crew, rank_crew(crew, config, run_dir, torchrun), config)
        return {}
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    with Supervisor(_tell) as supervisor:
        crew = _crew(supervisor, config)
        place = local_crew(crew, config, run_dir) if torchrun is None else rank_crew(crew, config, run_dir, torchrun)
        with place as server:
            failure = _keep_server(crew, server, config)
        interrupted = bool(supervisor.signals)
    summary = read_summary(run_dir)
    if failure is None or (summary is not None and summary["status"] in MET_ITS_END):
        return summary or {}
    if summary is None:
        try:
            write_summary(run_dir, unfinished_summary(config, "interrupted" if interrupted else "failed", str(failure)))
        except OSError as error:  # such as a full disk, which may be what the failure is about
            _tell(f"summary.json cannot be written: {error}")
    raise RunFailed(f"{failure}; {_what_is_left(run_dir)}", failure.exit_status)


def join(config: Config) -> None:
    """Work for a server that runs already, until its run is over or we are asked to leave.

    Raises:
        RunFailed: the worker could not, or was not wanted.
    """
    with Supervisor(_tell) as supervisor:
        crew = _crew(supervisor, config)
        post = _keep_worker(crew, guest_crew(crew, config), config)
    if post.given_up:
        raise RunFailed(post.obituary)


def _crew(supervisor: Supervisor, config: Config) -> Crew:
    options = config.rpc
    return Crew(supervisor, max_restarts=options.max_restarts, backoff_seconds=options.restart_backoff_seconds, tell=_tell)


def _keep_server(crew: Crew, server: Post, config: Config) -> RunFailed | None:
    """Keep the server, and what workers are ours, at work until the run is over; return what went wrong, if anything did."""
    supervisor, patience = crew.supervisor, config.rpc.stop_timeout_seconds
    workers = [post for post in crew.posts if post is not server]
    told: set[tuple[int, str]] = set()
    """Which news each life of the server has had."""

    def tell(**news: Any) -> None:
        if server.child is not None and (server.lives, str(news)) not in told:
            told.add((server.lives, str(news)))
            server.child.tell(**news)

    def over() -> bool:
        crew.tend()
        for post in workers:
            if post.over:
                tell(without=post.worker)
        if workers and all(post.over for post in workers):
            tell(abandoned=next((post.obituary for post in reversed(workers) if post.given_up), "all have left"))
        return server.over

    supervisor.wait(over)
    if server.done:
        # The run is over; whoever is late, because it still computes what nobody wants any more, is killed.
        supervisor.wait(lambda: all(post.child is None or not post.child.running for post in workers), patience)
        return None
    if server.given_up:
        return RunFailed(f"{server.obituary}; the run has ended")
    name = supervisor.signals[0].name
    if server.child is not None:
        server.child.tell(stop={"status": "interrupted", "reason": name})
        _wait_for(supervisor, server, patience)
    return RunFailed(f"interrupted by {name}", exit_status=130)


def _keep_worker(crew: Crew, place: AbstractContextManager[Post], config: Config) -> Post:
    """Keep one worker at work until its work is done, or nobody wants it.

    Raises:
        RunFailed: it was interrupted, and did not leave in time.
    """
    supervisor = crew.supervisor
    with place as post:

        def over() -> bool:
            crew.tend()
            return post.over

        if not supervisor.wait(over):
            name = supervisor.signals[0].name
            if post.child is not None:
                post.child.tell(leave=True)
                _wait_for(supervisor, post, config.rpc.stop_timeout_seconds)
                crew.tend()
            if not post.done:
                raise RunFailed(f"interrupted by {name}", exit_status=130)
            _tell(f"the worker has left, as {name} asked")
    return post


def _wait_for(supervisor: Supervisor, post: Post, patience: float) -> None:
    """Wait until a child that was asked to end has ended; one more signal insists."""
    child = post.child
    supervisor.wait(lambda: child is None or not child.running, patience, signals=len(supervisor.signals))


def _tell(text: str) -> None:
    print(f"launch.py: {text}", file=sys.stderr, flush=True)


def _what_is_left(run_dir: Path) -> str:
    """Where to go on from."""
    try:
        newest = checkpoint.find(run_dir)
    except ConfigError:
        return f"no checkpoint was written, logs are in {run_dir / 'logs'}"
    return f"iteration {checkpoint.iteration_of(newest)} is kept: go on with checkpoint.resume={run_dir}"
