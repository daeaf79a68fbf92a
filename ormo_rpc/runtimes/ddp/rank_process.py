"""The process of one rank: it meets the others in a process group, and trains with them to the end of the run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import Any

import torch.distributed as dist

from ormo_rpc.config.parsing import parse_text
from ormo_rpc.errors import ConfigError, Interrupted, ServerLost
from ormo_rpc.rendezvous.interfaces import interface_of
from ormo_rpc.runtimes.configured import configured_device
from ormo_rpc.runtimes.ddp.meeting import Decision, Verdict, meet
from ormo_rpc.runtimes.ddp.rank_devices import RankDevice, backend
from ormo_rpc.runtimes.ddp.recording import Recording
from ormo_rpc.runtimes.ddp.trainer import Computed, Trainer
from ormo_rpc.runtimes.job import Job, LoadedJob, job_of
from ormo_rpc.runtimes.torchrun_store import connect

Store = dist.Store  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
LOOPBACK = "127.0.0.1"
PREFIX = "ddp"
"""Of the keys in the ranks' store."""
GIVE_UP_SECONDS = 1.0
"""Ranks that wait for another one give it up within this time of each other."""


@dataclass(frozen=True, kw_only=True)
class RankArgs:
    """The arguments of a rank's process.

    Attributes:
        rank: Its number.
        size: The number of ranks.
        run_dir: The run directory, of rank 0.
        began: The start of the run on the monotonic clock.
        store_file: The file of the ranks' store; None where it is that of torchrun.
        store: HOST:PORT of torchrun's store.
        interface: The network interface between the nodes; None for loopback where all ranks are here, else for torch's choice.
        one_machine: All ranks are on this machine.
        timeout_seconds: For all ranks to find one another.
        round_timeout_seconds: For each operation of the process group.
        start: The way in which processes are started, for the summary.
        terminal_fd: A terminal for the progress bar, where there is one.
        loaded: The job that this process was forked with.
    """

    rank: int
    size: int
    run_dir: Path
    began: float
    store_file: Path | None
    store: str | None
    interface: str | None
    one_machine: bool
    timeout_seconds: float
    round_timeout_seconds: float
    start: str
    terminal_fd: int | None
    loaded: LoadedJob | None


@dataclass
class RankProgress:
    """The progress of a rank.

    Attributes:
        store: The store of the ranks, once they have found one another.
        round: The round that it is in; None before the first one.
    """

    store: Store | None = None
    round: int | None = None


class RankProcess:
    """One rank of a run.

    Args:
        args: Its arguments.
    """

    def __init__(self, args: RankArgs) -> None:
        self.args = args
        self._signal = 0
        """The number of the signal that asks this rank to end; set by another thread."""

    def handle(self, message: dict[str, Any]) -> None:
        """Handle a message of the launcher or a signal; called by another thread."""
        if "stop" in message:
            self._signal = Signals[message["stop"]["reason"]].value

    def run(self) -> dict[str, Any]:
        """Train to the end of the run; return the summary on rank 0, elsewhere nothing.

        Raises:
            ServerLost: another rank was lost.
            Interrupted: by a signal.
        """
        args = self.args
        with _lost_ranks_reported(args) as progress:
            store = progress.store = _met(args)
            text = _config(args, store)
            device = configured_device(parse_text(text), args.rank)
            ranks = _told(args, store, RankDevice.of(device))
            with _process_group(args, store, backend([each.card for each in ranks])):
                job = _same_job(args, store, text)
                dist.barrier()
                trainer = Trainer(job, args.rank, args.size, device)
                trainer.warm_up()
                recording = _recording(args, job, trainer, ranks)
                dist.barrier()  # nobody is waited for in the first round
                decision = self._train(trainer, recording, progress)
        summary = {} if recording is None else recording.close()
        if decision.verdict is Verdict.interrupt:
            raise Interrupted(decision.signal)
        return summary

    def _train(self, trainer: Trainer, recording: Recording | None, progress: RankProgress) -> Decision:
        if recording is not None:
            recording.begin()
        number, decision = 0, Decision(Verdict.proceed)
        while decision.verdict is Verdict.proceed:
            computed: list[Computed] = []
            for _ in range(decision.rounds):
                began = 0.0 if recording is None else recording.clock()
                progress.round = number
                computed.append(trainer.round(number))
                number += 1
                if recording is not None:
                    recording.timed(began)
            decision = meet(computed, self._signal, None if recording is None else recording.decide)
            if recording is not None:
                recording.clock.resume()
        return decision


def _recording(args: RankArgs, job: Job, trainer: Trainer, ranks: Sequence[RankDevice]) -> Recording | None:
    if args.rank > 0:
        return None
    return Recording(
        job,
        trainer.model,
        trainer.rounds,
        args.run_dir,
        began=args.began,
        terminal=args.terminal_fd,
        start=args.start,
        devices=ranks,
    )


def _met(args: RankArgs) -> Store:
    """Return the store by which the ranks have found one another.

    Raises:
        ServerLost: not all ranks have come in time.
    """
    interface = interface_of(LOOPBACK) if args.interface is None and args.one_machine else args.interface
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    store = _store(args)
    store.set(f"here {args.rank}", "")
    try:
        store.wait([f"here {rank}" for rank in range(args.size)], timedelta(seconds=args.timeout_seconds))
    except RuntimeError:
        raise ServerLost(
            f"not all {args.size} ranks have come within runtime.start_timeout_seconds={args.timeout_seconds:g}"
        ) from None
    return store


def _told(args: RankArgs, store: Store, device: RankDevice) -> list[RankDevice]:
    """Tell the other ranks the device of this one; return those of all, by rank."""
    store.set(f"device {args.rank}", json.dumps([device.text, device.card]))
    return [RankDevice(*json.loads(store.get(f"device {rank}").decode())) for rank in range(args.size)]


@contextlib.contextmanager
def _process_group(args: RankArgs, store: Store, kind: str) -> Generator[None]:
    """Make torch's default process group."""
    timeout = timedelta(seconds=args.round_timeout_seconds)
    dist.init_process_group(kind, store=store, rank=args.rank, world_size=args.size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _store(args: RankArgs) -> Store:
    if args.store_file is not None:
        return dist.FileStore(str(args.store_file), args.size)  # pyright: ignore[reportPrivateImportUsage] # as above
    assert args.store is not None, "ranks have one store or the other"
    return dist.PrefixStore(PREFIX, connect(args.store, args.timeout_seconds))  # pyright: ignore[reportPrivateImportUsage] # as above


def _config(args: RankArgs, store: Store) -> str:
    """The configuration of rank 0, as YAML."""
    if args.rank == 0:
        store.set("config", (args.run_dir / "config.yaml").read_text(encoding="utf-8"))
    return store.get("config").decode()


def _same_job(args: RankArgs, store: Store, text: str) -> Job:
    """Make the job of rank 0's configuration.

    Raises:
        ConfigError: this rank has built another model, or loaded another data set, than rank 0.
    """
    job = job_of(text, args.loaded, parse_text)
    fingerprint = json.dumps(job.fingerprint().to_dict(), sort_keys=True)
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()
    if args.rank == 0:
        store.set("fingerprint", digest)
    elif store.get("fingerprint").decode() != digest:
        raise ConfigError(
            f"rank {args.rank}: got another model or data set than rank 0, expected the same in every process: {Job.SAME_MODEL}"
        )
    return job


@contextlib.contextmanager
def _lost_ranks_reported(args: RankArgs) -> Generator[RankProgress]:
    """Report a rank that was lost, which Gloo or NCCL raises as an error that is known by its text alone.

    Raises:
        ServerLost: another rank was lost.
    """
    progress = RankProgress()
    try:
        yield progress
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("gloo", "nccl", "connection")):
            raise
        missing = _missing(args, progress)
        if not missing:
            raise ServerLost("the connection with another rank was lost") from error
        raise ServerLost(
            f"rank {', '.join(map(str, missing))} did not come to the end of round {progress.round}, which others waited for "
            f"(runtime.round_timeout_seconds={args.round_timeout_seconds:g})"
        ) from error


def _missing(args: RankArgs, progress: RankProgress) -> list[int]:
    """Tell the other ranks that this one gives up, and return those that do not tell it: those that all others wait for.

    It is empty where that cannot be known, as before the first round, or where the store has ended.
    """
    if progress.store is None or progress.round is None:
        return []
    others = {f"gave up {rank}": rank for rank in range(args.size) if rank != args.rank}
    try:
        progress.store.set(f"gave up {args.rank}", "")
        with contextlib.suppress(RuntimeError):  # that of a rank which does not come
            progress.store.wait([*others], timedelta(seconds=GIVE_UP_SECONDS))
        return [rank for key, rank in others.items() if not progress.store.check([key])]
    except RuntimeError:
        return []
