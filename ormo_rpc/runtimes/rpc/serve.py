"""The server's process: builds the parameter server, lets the workers in, and writes down what happens to the end."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public

from ormo_rpc import checkpoint
from ormo_rpc.config import load_config
from ormo_rpc.dashboards import dashboards
from ormo_rpc.evaluation import Evaluation, evaluate
from ormo_rpc.flat import sha256
from ormo_rpc.job import Job
from ormo_rpc.messages import Reply
from ormo_rpc.recorder import Recorder
from ormo_rpc.records import Event, Kind
from ormo_rpc.run_directory import RunDirectory
from ormo_rpc.runtimes.rpc.connection import rpc_group
from ormo_rpc.runtimes.rpc.service import Service, publish
from ormo_rpc.server import ParameterServer

PUMP_SECONDS = 0.1
"""How often events are written down."""


class Stopwatch:
    """Seconds since `start`, 0 before."""

    def __init__(self) -> None:
        self._since: float | None = None

    def start(self) -> None:
        """Begin to count."""
        self._since = time.monotonic()

    def __call__(self) -> float:
        """The seconds."""
        return 0.0 if self._since is None else time.monotonic() - self._since


class Host:
    """Everything in the server's process: the service that the workers reach, and the recording beside it.

    The main thread runs `run`; handlers of the RPC agent call `observe` under the service's lock, which hands copies over
    through queues; evaluations run in a thread of their own.

    Args:
        job: The run.
        run_dir: Its directory.
        terminal: A file descriptor for the progress bar, where there is a terminal.
    """

    def __init__(self, job: Job, run_dir: Path, terminal: int | None) -> None:
        self.job = job
        self.directory = RunDirectory(run_dir)
        self.clock = Stopwatch()
        self.stop_asked = threading.Event()
        self.stop_message: dict[str, str] = {}
        shown = dashboards(job.config, run_dir, job.total_tickets, terminal)
        self.recorder = Recorder(job, self.directory, shown, self.clock, self._lock_times)
        self.server = job.server(self.recorder.record, self.clock)
        self.service = Service(self.server, self.observe)
        self.model = job.model()
        self.checkpoint: Path | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._evaluation_model = job.model()
        self._evaluations: list[tuple[int, float, Future[Evaluation]]] = []
        self._to_evaluate: SimpleQueue[tuple[int, float, Tensor, dict[str, Tensor]]] = SimpleQueue()
        self._to_write: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._seen = 0

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is of another run, or damaged.
        """
        self.server.load_state_dict(checkpoint.read(checkpoint.find(path), "server.pt"))
        self._seen = self.server.iteration

    def observe(self, server: ParameterServer) -> None:
        """Under the lock, after a push: at the end of an epoch and when a checkpoint is due, copy what is needed for it."""
        if server.iteration == self._seen:
            return
        self._seen = server.iteration
        if self._seen % self.job.epochs.batches_per_epoch == 0 or server.ended:
            self._to_evaluate.put((self._seen, self.clock(), server.snapshot(), server.buffers.copy()))
        every = self.job.config.checkpoint.every
        if every and self._seen % every == 0:
            self._to_write.put(server.state_dict())

    def run(self) -> dict[str, Any]:
        """Record until the run is over and the workers are gone; return the summary."""
        config = self.job.config
        self.directory.write_header(
            algorithm=config.algorithm.name, scheduler=config.scheduler.name, num_workers=config.num_workers, seed=config.seed
        )
        while not self.service.started.wait(PUMP_SECONDS):
            if self.stop_asked.is_set():
                return self._finish()
        self.clock.start()
        self.directory.write_processes(os.getpid(), self.service.processes)
        limit = config.train.max_seconds
        while not self.server.ended:
            if self.stop_asked.wait(PUMP_SECONDS):
                break
            if limit is not None and self.clock() >= limit:
                limit = None
                self.service.call(ParameterServer.finish)
            self._pump()
        return self._finish()

    def ask_to_stop(self, message: dict[str, Any]) -> None:
        """Hear the supervisor; called in the thread that listens to it."""
        self.stop_message = message["stop"]
        self.stop_asked.set()

    def _finish(self) -> dict[str, Any]:
        """Write the last checkpoint, let the workers go, and write the summary."""
        seconds, state = self.clock(), dict[str, Any]()

        def stop(server: ParameterServer) -> list[Reply]:
            state.update(server.state_dict())  # in one step with the stop: nothing is applied that is not in the checkpoint
            return server.stop()

        self.service.call(stop)
        self._pump()
        self._write_checkpoint(state)
        if not self.stop_message:
            self._wait_for_workers()
            for iteration, taken, pending in self._evaluations:
                self.recorder.evaluated(iteration, taken, pending.result())
            self._evaluations.clear()
        self.recorder.pump(now=True)
        summary = self._summary(state, seconds)
        self.recorder.close(summary)
        self._pool.shutdown(wait=False, cancel_futures=True)
        return summary

    def _pump(self) -> None:
        """Write down what the handlers have left in the queues."""
        self.recorder.pump()
        for iteration, seconds, params, statistics in _drained(self._to_evaluate):
            future = self._pool.submit(evaluate, self._evaluation_model, params, statistics, self.job.data.test)
            self._evaluations.append((iteration, seconds, future))
        while self._evaluations and self._evaluations[0][-1].done():
            iteration, seconds, future = self._evaluations.pop(0)
            self.recorder.evaluated(iteration, seconds, future.result())
        for state in _drained(self._to_write):
            self._write_checkpoint(state)

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        average = {name.removeprefix("average."): value for name, value in state["buffers"].items() if name != "updates"}
        model = self.model.state_dict(state["params"], average, state["buffers"]["updates"])
        config = self.job.config
        self.checkpoint = checkpoint.write(self.directory.path, state, model, config, keep=config.checkpoint.keep)
        self.recorder.record(Event(Kind.checkpoint, self.clock(), {"iteration": state["iteration"]}))

    def _wait_for_workers(self) -> None:
        """Until all have said goodbye; one that hangs is left to the supervisor."""
        deadline = time.monotonic() + self.job.config.runtime.stop_timeout_seconds
        while len(self.service.gone) < len(self.service.processes) and time.monotonic() < deadline:
            self._pump()
            time.sleep(PUMP_SECONDS / 10)

    def _lock_times(self) -> dict[str, float]:
        return {"lock_wait_seconds": self.service.lock_wait_seconds, "lock_held_seconds": self.service.lock_held_seconds}

    def _summary(self, state: dict[str, Any], seconds: float) -> dict[str, Any]:
        statistics, evaluation = self.recorder.statistics, self.recorder.evaluation
        config = self.job.config
        applied = sum(statistics.delays.values())
        return {
            "status": self.stop_message.get("status", state["status"]),
            "reason": self.stop_message.get("reason"),
            "algorithm": config.algorithm.name,
            "scheduler": config.scheduler.name,
            "runtime": config.runtime.name,
            "dataset": config.dataset.name,
            "model": config.model.name,
            "seed": config.seed,
            "num_workers": config.num_workers,
            "parameters": self.model.params.size,
            "iterations": state["iteration"],
            "gradients_computed": statistics.gradients_computed,
            "discarded": statistics.discarded,
            "repeated": statistics.repeated,
            "epochs": self.job.epoch(state["iteration"]),
            "train_loss": statistics.loss,
            "test_loss": None if evaluation is None else evaluation.loss,
            "test_accuracy": None if evaluation is None else evaluation.accuracy,
            "wall_seconds": seconds,
            "virtual_seconds": None,
            "updates_per_second": applied / seconds if seconds else 0.0,
            "delay_mean": statistics.delay_mean,
            "delay_max": statistics.delay_max,
            "pushes_per_worker": {str(worker): statistics.pushes_per_worker[worker] for worker in range(config.num_workers)},
            **self._lock_times(),
            "final_params_sha256": sha256(state["params"]),
            "final_buffers_sha256": sha256(*(state["buffers"][f"average.{name}"] for name in self.server.buffers.average)),
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
        }


def serve(store: Store, run_dir: Path, *, world_size: int, timeout_seconds: float, terminal: int | None, on_ready: Any) -> None:
    """Be the server of a run from start to end.

    Args:
        store: Where the workers find us, and the configuration.
        run_dir: The run directory, with ``config.yaml``.
        world_size: Workers plus one.
        timeout_seconds: For the start.
        terminal: For the progress bar.
        on_ready: Called with the host as soon as it can be asked to stop.
    """
    config = load_config(run_dir / "config.yaml")
    store.set("config", (run_dir / "config.yaml").read_text())
    job = Job.of(config)
    host = Host(job, run_dir, terminal)
    if config.checkpoint.resume is not None:
        host.resume(Path(config.checkpoint.resume))
    on_ready(host)
    with rpc_group(store, rank=0, world_size=world_size, timeout_seconds=timeout_seconds):
        publish(host.service)
        store.set("service", "published")
        host.run()


def _drained(queue: SimpleQueue[Any]) -> list[Any]:
    items: list[Any] = []
    while True:
        try:
            items.append(queue.get_nowait())
        except Empty:
            return items
