"""The simulator: a virtual cluster around the same server and worker objects, in this process and in virtual time."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc import console, devices
from ormo_rpc.algorithms._regions import TwoLevels
from ormo_rpc.config.parsing import save_config
from ormo_rpc.config.runtimes import Shares
from ormo_rpc.config.schema import Config
from ormo_rpc.data.tickets import TicketParts
from ormo_rpc.devices import described, peak_bytes
from ormo_rpc.errors import ConfigError, RunFailed, RunInterrupted, one_line
from ormo_rpc.runtimes.configured import time_generator
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.session import Session
from ormo_rpc.runtimes.simulator.clock import EventQueue
from ormo_rpc.runtimes.simulator.cluster import Cluster, GradientSource, Links, Speeds
from ormo_rpc.runtimes.simulator.jobs import SyntheticJob
from ormo_rpc.runtimes.simulator.regions import RegionalCluster
from ormo_rpc.runtimes.simulator.shares import SharedRounds
from ormo_rpc.signals import SignalWatch
from ormo_rpc.storage.summary import unfinished_summary, write_summary
from ormo_rpc.worker.worker import Worker

EVENTS_PER_FLUSH = 32
"""Events of the cluster between two flushes of the records."""
_log = logging.getLogger(__name__)


class InlineExecutor(Executor):
    """Calls submitted functions immediately, so that nothing depends on the speed of threads."""

    @override
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # raised again where the result is asked for
            future.set_exception(error)
        return future


def run(config: Config, run_dir: Path, began: float, job: Job | SyntheticJob) -> dict[str, Any]:
    """Simulate a run to its end and return its summary.

    Args:
        config: Of the run.
        run_dir: Its directory.
        began: When it began, on the monotonic clock.
        job: The job of this configuration.

    Raises:
        RunFailed: it was interrupted, or there is no worker left that could end it; a checkpoint is left. What a user's model
            or data set raises passes.
    """
    server = devices.resolve(config.server.device, key="server.device") if isinstance(job, Job) else torch.device("cpu")
    try:
        with devices.in_front(server):  # of a GPU that it shares with workers, which it would wait for at each push
            return _run(config, run_dir, began, job)
    except (ConfigError, RunFailed):
        raise
    except (Exception, SystemExit) as error:  # of the user's model or data set, or a full disk
        write_summary(run_dir, unfinished_summary(config, "failed", one_line(error), time.monotonic() - began))
        raise


def _run(config: Config, run_dir: Path, began: float, job: Job | SyntheticJob) -> dict[str, Any]:
    sim = config.sim
    torch.set_num_threads(sim.threads)
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    queue = EventQueue()
    terminal = sys.stderr.fileno() if console.on_terminal() else None
    inline = InlineExecutor()

    def state() -> dict[str, Any]:
        return {**session.server.state_dict(replies=True), "cluster": cluster.state_dict()}

    def observe() -> None:
        session.observe(session.server)
        if session.stops_early():
            cluster.finish()

    session = Session(job, run_dir, inline, inline, lambda: queue.now, began=began, state=state, terminal=terminal, inline=True)
    with contextlib.closing(session.directory):
        cluster = _cluster(config, job, session, queue, observe)
        session.open()
        session.training_begins()
        if session.resumed_state is None:
            _schedule(config, queue, cluster)
        else:
            cluster.load_state_dict(session.resumed_state)
            if queue.times_of("finish") != [config.train.max_seconds]:  # else it keeps its place among events of its time
                queue.drop(lambda name, _: name == "finish")
                if config.train.max_seconds is not None and config.train.max_seconds <= queue.now:
                    cluster.finish()  # before a push of this time gets another ticket
                else:
                    _schedule_end(config, queue)
        interrupted = _drive(cluster, session)
        last = state()
        session.write_checkpoint(last)
        cluster.close()
        status: dict[str, str] = {}
        if interrupted is not None:
            status = {"status": "interrupted", "reason": interrupted.name}
        elif not session.server.ended:
            members, least = len(session.server.members), config.runtime.min_workers
            left = f"{members} of runtime.min_workers={least} workers are left" if members else "no worker is left"
            status = {"status": "failed", "reason": f"{left} after {queue.now:g} virtual seconds"}
        entries = {**_loads(cluster, queue.now), **_device(job)}
        summary = session.close(last, wait=True, virtual_seconds=queue.now, **status, **entries)
        resume = f"iteration {last['iteration']} is kept: resume with checkpoint.resume={run_dir}"
        if interrupted is not None:
            raise RunInterrupted(interrupted, resume)
        if status:
            raise RunFailed(f"{status['reason']}; {resume}")
        return summary


def _cluster(
    config: Config, job: Job | SyntheticJob, session: Session, queue: EventQueue, observe: Callable[[], None]
) -> Cluster:
    """Make the virtual cluster: of workers, or of regions that have workers of their own."""
    source: GradientSource = job.worker_here() if isinstance(job, Job) else job.source()
    links, seconds = _links(config, session, job.push_format().size), _compute_seconds(config, job, session)
    algorithm = config.algorithm
    if not isinstance(algorithm, TwoLevels) or algorithm.region_workers is None:
        processes = config.num_processes if config.worker.prefetch else None
        return Cluster(session.server, source, queue, links, seconds, observe, processes=processes)
    if isinstance(source, Worker):
        source.epochs = TicketParts(source.epochs, algorithm.region_parts)
    return RegionalCluster(
        session.server,
        source,
        queue,
        links,
        seconds,
        observe,
        regions=config.num_processes,
        region_workers=algorithm.region_workers,
        local_seconds=config.sim.region_latency_seconds,
        new_region=job.region,
    )


def _schedule(config: Config, queue: EventQueue, cluster: Cluster) -> None:
    """Schedule the configured joins, leaves and end, and start the cluster."""
    for worker, seconds in config.sim.joins.items():
        queue.at(seconds, "join", worker)
    for worker, seconds in config.sim.leaves.items():
        queue.at(seconds, "leave", worker)
    _schedule_end(config, queue)
    cluster.start()


def _schedule_end(config: Config, queue: EventQueue) -> None:
    if config.train.max_seconds is not None:
        queue.at(config.train.max_seconds, "finish")


def _drive(cluster: Cluster, session: Session) -> Signals | None:
    """Process events until the run has ended; return the signal that interrupted it, if there was one."""
    count = 0
    with SignalWatch() as watch:
        while not session.server.ended and not watch.ends and cluster.step():
            count += 1
            asked = watch.take_checkpoint()
            if asked:
                session.copy_state()
            if asked or count % EVENTS_PER_FLUSH == 0:
                session.flush()
            if asked:
                _log.info("wrote the checkpoint that was asked for: %s", session.checkpoints.newest)
        return watch.ends[0] if watch.ends else None


def _links(config: Config, session: Session, push_bytes: int) -> Links:
    params = session.server.params
    sent_dtype = config.wire.params.rounded or params.dtype
    sent_bytes = config.algorithm.VECTORS_SENT * params.numel() * sent_dtype.itemsize
    return Links(
        latency_seconds=config.sim.latency_seconds,
        bandwidth=config.sim.bandwidth,
        push_bytes=push_bytes,
        reply_bytes=sent_bytes + session.server.buffers.snapshot().numel(),
        service_seconds=config.sim.service_seconds,
    )


def _compute_seconds(config: Config, job: Job | SyntheticJob, session: Session) -> Speeds:
    """Make the generator of compute times, as `heterogeneity` has them."""
    shared = _shared_rounds(config, job) if config.sim.shares is Shares.proportional else None

    def seconds(worker: int, generator: torch.Generator) -> float:
        slowdown = config.slowdown(worker, generator)
        if shared is not None:
            slowdown = shared.tickets(session.server.iteration, worker, slowdown)
        return config.sim.compute_seconds * slowdown

    return Speeds(seconds, lambda worker: time_generator(config, worker))


def _shared_rounds(config: Config, job: Job | SyntheticJob) -> SharedRounds:
    size = config.train.batch_size
    slowdowns = [config.mean_slowdown(worker) for worker in range(config.num_workers)]
    samples = (lambda ticket: len(job.epochs.indices(ticket))) if isinstance(job, Job) else lambda _: size
    return SharedRounds(samples, job.total_tickets, size, slowdowns)


def _device(job: Job | SyntheticJob) -> dict[str, Any]:
    """Return the summary's entries about the device of the virtual workers."""
    if not isinstance(job, Job):
        return {}
    device = job.device(0)
    return {"worker_device": described(device), "worker_gpu_bytes": peak_bytes(device) or None}


def _loads(cluster: Cluster, seconds: float) -> dict[str, Any]:
    """Return the summary's entries about the load of workers and server."""
    load = cluster.load
    busy = {str(w): load.computing.get(w, 0.0) / max(load.member[w], 1e-12) for w in sorted(load.member)}
    return {
        # Above 1 by rounding, or where a region ended before its workers did: their last tickets count as a whole.
        "utilisation_per_worker": {worker: min(1.0, part) for worker, part in busy.items()},
        "server_load": load.serving / seconds if seconds else 0.0,
        "server_queue_seconds": load.queueing,
    }
