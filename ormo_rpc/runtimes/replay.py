"""Exact replay: compute a recorded run, live or simulated, again from its trace and seeds, event by event.

The trace has the order of the server's inputs; the inputs themselves are computed again, because every gradient is a function
of the parameters in a reply and of (seed, ticket). The server's events must then be the recorded ones, each gradient's sum
included, and the final parameters must have the recorded SHA-256.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ormo_rpc import console
from ormo_rpc.config.parsing import load_config, save_config
from ormo_rpc.config.runtimes import DdpRuntime, GradientKind, SimRuntime
from ormo_rpc.config.schema import Config
from ormo_rpc.devices import described
from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.models.flat import sha256
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.simulator.jobs import SyntheticJob
from ormo_rpc.server.events import Event
from ormo_rpc.server.parameter_server import OVERFLOW
from ormo_rpc.server.validation import ValidatedPush
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.environment import environment
from ormo_rpc.storage.run_directory import read_fingerprint, read_trace
from ormo_rpc.storage.summary import Summary, read_summary, write_summary
from ormo_rpc.tasks.own_loop import NO_REPLAY, OwnLoopTask
from ormo_rpc.worker.worker import Worker

BITS_DEPEND_ON = ("torch", "cpu", "capability", "threads")
"""Entries of the trace's header that decide about the bits of a gradient."""


def run(config: Config, run_dir: Path, began: float) -> dict[str, Any]:
    """Compute ``replay.run`` again; the summary says whether it is identical, and what `recorded` has but for ``wall_seconds``.

    Raises:
        ConfigError: ``replay.run`` is not the directory of a run that has ended.
        RunFailed: an event or the final state differs; the message names the first event that does.
    """
    if config.replay.run is None:
        raise ConfigError("replay.run: got None, expected the run to compute again: replay.run=RUN_DIRECTORY")
    source = Path(config.replay.run)
    recorded = read_summary(source)
    if recorded is None or recorded.get("final_params_sha256") is None:  # None where it ended before it began
        raise ConfigError(f"replay.run: got {source}, expected the directory of a run that has ended")
    header, events = read_trace(source)
    events = [event for event in events if event["event"] != "checkpoint"]  # checkpoints do not change the server
    original = load_config(source / "config.yaml")
    if isinstance(original.runtime, DdpRuntime):
        raise ConfigError(
            f"replay.run: got {source} of a run with runtime=ddp, expected one with a server, whose steps are replayed"
        )
    if isinstance(original.task, OwnLoopTask):
        raise ConfigError(f"replay.run: {source} is a run of a loop of the user's own: {NO_REPLAY}")
    if original.algorithm.workers_are_regions:
        raise ConfigError(
            f"replay.run: {source} had regions with servers of their own (algorithm.region_workers), expected a run "
            f"without: the trace does not have what these did"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    torch.set_num_threads(header["threads"])
    present = environment()
    differences = {key: [header[key], present[key]] for key in BITS_DEPEND_ON if header[key] != present[key]}
    replay = Replay(source, original, header)
    if replay.worker_device is not None and recorded.get("worker_device") not in (None, replay.worker_device):
        differences["worker_device"] = [recorded["worker_device"], replay.worker_device]
    started_at = time.monotonic()
    failure = replay.compare_events(events) or replay.compare_end(recorded)
    summary = dataclasses.replace(
        Summary.from_dict(recorded),
        runtime="replay",
        status="differs" if failure else recorded["status"],
        reason=failure or recorded.get("reason"),
        wall_seconds=time.monotonic() - began,
        start_seconds=started_at - began,
        end_seconds=None,
        replayed=str(source.absolute()),
        elastic_mean=replay.statistics.elastic_mean,
        elastic_max=replay.statistics.elastic_max,
        identical=failure is None,
        environment_differences=differences,
    )
    content = write_summary(run_dir, summary)
    if failure is not None:
        changes = "".join(f"; {key} was {then!r}, here it is {now!r}" for key, (then, now) in differences.items())
        hint = f". Equal bits are not guaranteed in this environment{changes}" if differences else ""
        raise RunFailed(f"replay of {source} differs: {failure}{hint}")
    return content


def _check_fingerprint(source: Path, fingerprint: Fingerprint) -> None:
    """Refuse a replay with another model or data set than the recorded run had.

    Raises:
        ConfigError: names, shapes, frozen values, initial buffers or the data set differ.
    """
    recorded = read_fingerprint(source)
    difference = recorded and recorded.difference(fingerprint, "the recorded run", "this replay", buffer_values=True)
    if difference:
        raise ConfigError(f"replay.run: {difference}; replay with model and data as they were in {source}")


class Replay:
    """A server that receives the inputs of a recorded one again.

    Args:
        source: The directory of the recorded run.
        config: Its configuration.
        header: The first line of its trace.

    Raises:
        ConfigError: it was of another model or data set.
    """

    def __init__(self, source: Path, config: Config, header: Mapping[str, Any]) -> None:
        synthetic = isinstance(config.runtime, SimRuntime) and config.runtime.gradient is not GradientKind.real
        job = SyntheticJob(config) if synthetic else Job(config)
        _check_fingerprint(source, job.fingerprint())
        self.worker = job.source() if isinstance(job, SyntheticJob) else job.worker_here()
        self.worker_device = described(self.worker.model.device) if isinstance(self.worker, Worker) else None
        self.events: list[Event] = []
        """Events of the server that were not compared yet."""
        self.statistics = Statistics()
        self.server = job.server(self.events.append, lambda: 0.0)
        self.started = bool(header["started"])
        """True where the run began with a start, unlike a simulation that was resumed exactly."""
        self.newest_replies: dict[int, Reply] = {}
        if header.get("resumed"):
            state = checkpoint.read(checkpoint.locate(Path(header["resumed"])), "server.pt")
            self.server.load_state_dict(state)
            if not self.started:
                self.statistics.load_state_dict(state["session"]["statistics"])
                self.worker.load_state_dict(state["cluster"].get("source", {}))
            self._deliver([member.reply for member in self.server.members.values() if member.reply is not None])

    def compare_events(self, recorded: list[dict[str, Any]]) -> str | None:
        """Give the server the input behind each recorded event; return the first difference, None where there is none."""
        if self.started and recorded and recorded[0]["event"] != "resume":
            self._deliver(self.server.start())
        shown = tqdm(
            recorded, desc="replay", unit=" events", file=console.best_effort(sys.stderr), disable=not console.on_terminal()
        )
        remaining = iter(shown)
        for number, event in enumerate(remaining):
            if not self.events:
                self._reproduce(event)
            if not self.events:
                return f"event {number} of the trace, {_shown(event)}: the server did nothing"
            happened = self.events.pop(0)
            self.statistics.observe(happened)
            again = json.loads(json.dumps(happened.line()))
            if {**again, "seconds": None} != {**event, "seconds": None}:
                return f"event {number} of the trace, {_shown(event)}: now it is {_shown(again)}"
        if self.events:
            return f"after the last event of the trace: now there is {_shown(self.events[0].line())}"
        return None

    def compare_end(self, recorded: Mapping[str, Any]) -> str | None:
        """Compare the final state with the recorded summary; return the difference, None where there is none."""
        for name, value in (
            ("final_params_sha256", sha256(self.server.params)),
            ("final_ema_sha256", None if self.server.ema is None else sha256(self.server.ema.copy())),
            ("final_buffers_sha256", sha256(*self.server.buffers.current.values())),
        ):
            if recorded.get(name) != value:  # a run of an earlier version has no average
                return f"{name}: was {recorded[name]}, now it is {value}"
        return None

    def _reproduce(self, event: Mapping[str, Any]) -> None:
        """Give the server the input that must have led to an event."""
        kind, worker = event["event"], event.get("worker")
        if kind == "discard" and event["reason"] == "taken away":
            self._repeat_push(event)
        elif kind in ("apply", "discard"):
            assert worker is not None
            if worker not in self.newest_replies:
                return
            self._deliver(self._push(self.worker.compute(self.newest_replies[worker]), event))
        elif kind == "repeat":
            self._repeat_push(event)
        elif kind == "resume":
            self._restart(event)
        elif kind == "join":
            self.worker.forget(event["worker"])
            self._deliver(self.server.join(event["worker"]))
        elif kind == "leave":
            self._deliver(self.server.leave(event["worker"]))
        elif kind == "finish":
            self._deliver(self.server.finish())
        elif kind == "end":
            self._deliver(self.server.stop())

    def _push(self, push: Push, event: Mapping[str, Any]) -> list[Reply]:
        """Push to the server; one that was damaged on its way, as this one is not, is rejected as it was then."""
        reason = str(event.get("reason", ""))
        if reason.startswith(("not finite", OVERFLOW)):
            return self.server.reject(push, overflow=reason.startswith(OVERFLOW))
        return self.server.receive(push)

    def _restart(self, event: Mapping[str, Any]) -> None:
        """Start the server as at a ``resume`` event: of a later incarnation, or of the first one with few workers."""
        self.worker.forget()
        if event["incarnation"] == 0:
            self._deliver(self.server.start(event["workers"]))
            return
        self.server.load_state_dict(self.server.state_dict())
        self.server.resume_as(event["incarnation"])
        self.newest_replies.clear()
        self._deliver(self.server.start(event["workers"]))

    def _repeat_push(self, event: Mapping[str, Any]) -> None:
        """Repeat a push; it is not applied, so its gradient does not matter."""
        numbers = {name: event[name] for name in ("worker", "ticket", "stamp")}
        nothing = torch.zeros(0)
        scale = float(event.get("loss_scale", 1.0))
        push = Push(**numbers, grad=nothing, incarnation=self.server.incarnation, loss_scale=scale)
        self._deliver(self.server.commit(push, ValidatedPush(nothing, 0.0)))

    def _deliver(self, replies: list[Reply]) -> None:
        self.newest_replies |= {reply.worker: reply for reply in replies if reply.ticket is not None}


def _shown(event: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in event.items() if key != "seconds"})
