"""Exact replay: a recorded run, live or simulated, computed again from its trace and seeds, event by event.

The trace says in which order the server heard what; what it heard is computed again, because every gradient is a function of
the parameters that were handed out and of (seed, ticket). The server's events must then be the recorded ones, each gradient's
sum included, and the final parameters must have the recorded SHA-256.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ormo_rpc.config.parsing import load_config, save_config
from ormo_rpc.config.runtimes import GradientKind, SimRuntime
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError, NonFiniteGradient, RunFailed
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import sha256
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.simulator.jobs import SyntheticJob
from ormo_rpc.server.events import Event
from ormo_rpc.server.validation import ValidatedPush
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import environment, read_summary, read_trace, write_summary

BITS_DEPEND_ON = ("torch", "cpu", "capability", "threads")
"""What of the environment decides about the bits of a gradient."""


def run(config: Config, run_dir: Path) -> dict[str, Any]:
    """Compute ``replay.run`` again and return a summary that says whether it is identical.

    Raises:
        ConfigError: there is no finished run to compute again.
        RunFailed: an event or the final state differs; the message names the first event that does.
    """
    if config.replay.run is None:
        raise ConfigError("replay.run: got None, expected the run directory to compute again")
    source = Path(config.replay.run)
    recorded = read_summary(source)
    if recorded is None or recorded.get("final_params_sha256") is None:  # None where it was stopped before it began
        raise ConfigError(f"replay.run: got {source}, expected the directory of a run that has ended")
    header, events = read_trace(source)
    events = [event for event in events if event["event"] != "checkpoint"]  # which changes nothing in the server
    original = load_config(source / "config.yaml")
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    torch.set_num_threads(header["threads"])
    here = environment()
    differences = {key: [header[key], here[key]] for key in BITS_DEPEND_ON if header[key] != here[key]}
    replay = Replay(original, header)
    failure = replay.follow(events) or replay.compare_end(recorded)
    summary = {
        **recorded,
        "runtime": "replay",
        "status": "differs" if failure else recorded["status"],
        "reason": failure,
        "replayed": str(source.absolute()),
        "identical": failure is None,
        "environment_differences": differences,
    }
    write_summary(run_dir, summary)
    if failure is not None:
        elsewhere = "".join(f"; {key} was {then!r}, here it is {now!r}" for key, (then, now) in differences.items())
        promise = f". Bits are not promised here{elsewhere}" if differences else ""
        raise RunFailed(f"replay of {source} differs: {failure}{promise}")
    return summary


class Replay:
    """A server that hears again what a recorded one heard.

    Args:
        config: The configuration of the recorded run.
        header: The first line of its trace.
    """

    def __init__(self, config: Config, header: Mapping[str, Any]) -> None:
        synthetic = isinstance(config.runtime, SimRuntime) and config.runtime.gradient is not GradientKind.real
        job = SyntheticJob(config) if synthetic else Job(config)
        self.worker = job.source() if isinstance(job, SyntheticJob) else job.worker()
        self.produced: list[Event] = []
        self.server = job.server(self.produced.append, lambda: 0.0)
        self.started = bool(header["started"])
        """Whether the run began with a start; a simulation that went on in the midst of it did not."""
        self.held: dict[int, Reply] = {}
        """The newest reply of each worker."""
        if header.get("resumed"):
            state = checkpoint.read(checkpoint.find(Path(header["resumed"])), "server.pt")
            self.server.load_state_dict(state)
            if not self.started:
                self.worker.load_state_dict(state["cluster"].get("source", {}))
            self._take([member.reply for member in self.server.members.values() if member.reply is not None])

    def follow(self, events: list[dict[str, Any]]) -> str | None:
        """Let the server hear what leads to each recorded event; return the first difference, None where there is none."""
        if self.started and events and events[0]["event"] != "resume":
            self._take(self.server.start())
        remaining = iter(tqdm(events, desc="replay", unit=" events", disable=not sys.stderr.isatty()))
        for number, event in enumerate(remaining):
            if not self.produced:
                self._hear(event)
            if not self.produced:
                return f"event {number} of the trace, {_shown(event)}: the server did nothing"
            again = json.loads(json.dumps(self.produced.pop(0).line()))
            if {**again, "seconds": None} != {**event, "seconds": None}:
                return f"event {number} of the trace, {_shown(event)}: now it is {_shown(again)}"
        if self.produced:
            return f"after the last event of the trace: now there is {_shown(self.produced[0].line())}"
        return None

    def compare_end(self, recorded: Mapping[str, Any]) -> str | None:
        """Compare the final state with the recorded summary; return the difference, None where there is none."""
        for name, value in (
            ("final_params_sha256", sha256(self.server.params)),
            ("final_buffers_sha256", sha256(*self.server.buffers.average.values())),
        ):
            if recorded[name] != value:
                return f"{name}: was {recorded[name]}, now it is {value}"
        return None

    def _hear(self, event: Mapping[str, Any]) -> None:
        """Do to the server what must have been done to it before this event."""
        kind, worker = event["event"], event.get("worker")
        if kind == "discard" and event["reason"] == "taken away":
            self._say_again(event)
        elif kind in ("apply", "discard"):
            assert worker is not None
            if worker not in self.held:
                return
            self._take(self._heard(self.worker.compute(self.held[worker]), event))
        elif kind == "repeat":
            self._say_again(event)
        elif kind == "resume":
            self._restart(event)
        elif kind == "join":
            self.worker.forget(event["worker"])
            self._take(self.server.join(event["worker"]))
        elif kind == "leave":
            self._take(self.server.leave(event["worker"]))
        elif kind == "finish":
            self._take(self.server.finish())
        elif kind == "end":
            self._take(self.server.stop())

    def _heard(self, push: Push, event: Mapping[str, Any]) -> list[Reply]:
        """What the server answers to a push. One that came damaged, which ours is not, was rejected as not finite."""
        if str(event.get("reason", "")).startswith("not finite"):
            return self.server.reject(push)
        try:
            return self.server.receive(push)
        except NonFiniteGradient:
            return self.server.reject(push)

    def _restart(self, event: Mapping[str, Any]) -> None:
        """What a new life of the server did with the state of the former one at this point; or the first one, with few.

        Whoever works for it has joined it anew.
        """
        self.worker.forget()
        if event["incarnation"] == 0:
            self._take(self.server.start(event["workers"]))
            return
        self.server.load_state_dict(self.server.state_dict())
        self.server.resume_as(event["incarnation"])
        self.held.clear()
        self._take(self.server.start(event["workers"]))

    def _say_again(self, event: Mapping[str, Any]) -> None:
        """Push once more what is not applied, so its gradient does not matter."""
        place = {name: event[name] for name in ("worker", "ticket", "stamp")}
        nothing = torch.zeros(0)
        push = Push(**place, grad=nothing, incarnation=self.server.incarnation)
        self._take(self.server.commit(push, ValidatedPush(nothing, 0.0)))

    def _take(self, replies: list[Reply]) -> None:
        self.held |= {reply.worker: reply for reply in replies if reply.ticket is not None}


def _shown(event: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in event.items() if key != "seconds"})
