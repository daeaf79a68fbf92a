"""The journal: acknowledged calls survive a crash, complete and in order; torn records do not count."""

from __future__ import annotations

import errno
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc import build_server
from ormo_rpc.messages import Push, Reply
from ormo_rpc.server.buffer_rules import Rule, RuleKind
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.loss_scale import LossScale
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.storage.journal import FileJournal, recover
from tests.support.examples import examples

DIMENSION = 5
BUFFERS = {
    "mean": torch.zeros(2, dtype=torch.float64),
    "calls": torch.tensor(0),
    "flags": torch.tensor([True, False, True]),
    "rounded": torch.tensor(0.0).bfloat16(),
    "least": torch.full((2,), float("inf")),
    "constant": torch.arange(3),
}
ALGORITHMS = ("asgd", "ormo", "shifted", "smega2", "dc_asgd", "gap_aware", "fedbuff", "easgd", "heloco", "ringleader", "m_sync")
"""Among them algorithms that read what they sent, that have a state for each worker, that buffer, and that hold workers."""


def server(algorithm: str, events: list[Event] | None = None, loss_scale: LossScale | None = None) -> ParameterServer:
    return build_server(
        algorithm=algorithm,
        params=torch.linspace(-1, 1, DIMENSION, dtype=torch.float64),
        num_workers=3,
        lr=0.1,
        momentum=0.5,
        total_tickets=60,
        buffers=RunningBuffers(BUFFERS, {"mean": Rule(RuleKind.average, None, "calls"), "calls": Rule(RuleKind.count)}),
        record=(lambda _: None) if events is None else events.append,
        loss_scale=loss_scale,
    )


def reported(ticket: int) -> dict[str, Tensor]:
    """Buffers of any dtype, other ones in each push."""
    values = {"calls": torch.tensor(1 + ticket % 3), "flags": torch.tensor([ticket % 2 == 0] * 3)}
    rounded = {"rounded": torch.tensor(ticket / 7).bfloat16(), "least": torch.tensor([float("-inf"), -ticket])}
    mean = {"mean": torch.full((2,), float(ticket), dtype=torch.float64)}
    return mean | (values if ticket % 4 else {}) | (rounded if ticket % 3 else {})


def push(reply: Reply, length: int, *, finite: bool = True) -> Push:
    """Make a push for a reply, with values of its own."""
    assert reply.ticket is not None
    generator = torch.Generator().manual_seed(reply.ticket)
    grad = torch.randn(length, generator=generator, dtype=torch.float64)
    if not finite:
        grad[1] = float("nan")
    return Push(
        worker=reply.worker,
        ticket=reply.ticket,
        stamp=reply.stamp,
        grad=grad,
        loss=0.1 * reply.ticket,
        samples=3,
        buffers=reported(reply.ticket),
        metrics={"tokens": float(reply.ticket), "hits": (0.1, 3.0), "norm": math.inf} if reply.ticket % 3 else {},
        incarnation=reply.incarnation,
        loss_scale=reply.loss_scale,
    )


class Machine:
    """A server with its journal, driven as by the service, and the state after each input."""

    def __init__(self, algorithm: str, run_dir: Path, loss_scale: LossScale | None = None) -> None:
        self.events: list[Event] = []
        self.server = server(algorithm, self.events, loss_scale)
        self.journal = FileJournal(run_dir)
        self.states: list[dict[str, Any]] = [self.server.state_dict(replies=True)]
        self.sizes: list[int] = [0]
        self.held: dict[int, Reply] = {}
        self.file = next(iter((run_dir / "journal").iterdir()))

    def did(self, replies: list[Reply]) -> None:
        """Note the replies, the state, and the journal's length."""
        self.held |= {reply.worker: reply for reply in replies}
        self.states.append(self.server.state_dict(replies=True))
        self.sizes.append(self.file.stat().st_size)

    def start(self) -> None:
        """Start with all workers."""
        replies = self.server.start([0, 1, 2])
        self.journal.start([0, 1, 2], self.server.incarnation)
        self.did(replies)

    def push(self, worker: int, *, finite: bool) -> None:
        """Push for a worker, if it holds a ticket."""
        reply = self.held.get(worker)
        if reply is None or reply.ticket is None or worker not in self.server.members:
            return
        made = push(reply, self.server.algorithm.VECTORS_PUSHED * DIMENSION, finite=finite)
        replies = self.server.receive(made)
        self.journal.push(made, rejected=not finite, overflow=not finite and self.server.loss_scale is not None)
        self.held.pop(worker)
        self.did(replies)

    def join_or_leave(self, worker: int) -> None:
        """Let a member leave (but not the last one), or another worker join."""
        if worker in self.server.members:
            if len(self.server.members) == 1:
                return
            replies = self.server.leave(worker)
            self.journal.leave(worker)
            self.held.pop(worker, None)
        else:
            replies = self.server.join(worker)
            self.journal.join(worker)
        self.did(replies)


def same(a: Any, b: Any) -> bool:
    """Compare two states bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return a == b


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 3)),
        st.tuples(st.just("push"), st.integers(0, 3)),
        st.tuples(st.just("bad"), st.integers(0, 3)),
        st.tuples(st.just("join or leave"), st.integers(0, 3)),
    ),
    max_size=40,
)


@examples(6)
@given(
    algorithm=st.sampled_from(ALGORITHMS),
    loss_scale=st.sampled_from([None, LossScale(initial=4.0, interval=3)]),
    steps=STEPS,
    cut=st.integers(0, 10**9),
    damage=st.sampled_from(["none", "byte", "zeros"]),
)
def test_a_journal_cut_anywhere_recovers_the_state_of_its_last_complete_record(
    tmp_path_factory: pytest.TempPathFactory,
    algorithm: str,
    loss_scale: LossScale | None,
    steps: list[tuple[str, int]],
    cut: int,
    damage: str,
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    machine = Machine(algorithm, run_dir, loss_scale)
    machine.start()
    for what, worker in steps:
        if what == "join or leave":
            machine.join_or_leave(worker)
        else:
            machine.push(worker, finite=what == "push")
    machine.journal.close()
    content = machine.file.read_bytes()
    assert machine.sizes[-1] == len(content)
    at = cut % (len(content) + 1)
    if damage == "byte" and at < len(content):  # a wrong byte, with everything behind it intact
        machine.file.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
    else:
        # Zeros: a file system may have the length and not the data yet when the machine crashes.
        at = machine.sizes[cut % len(machine.sizes)] if damage == "zeros" else at
        machine.file.write_bytes(content[:at] + bytes(40 if damage == "zeros" else 0))
    whole = max(index for index, size in enumerate(machine.sizes) if size <= at)
    events: list[Event] = []
    again = server(algorithm, events, loss_scale)
    assert recover(run_dir, 0, again) == whole
    assert same(again.state_dict(replies=True), machine.states[whole])
    assert [event.line() for event in events] == [event.line() for event in machine.events[: len(events)]]
    applied = [event for event in events if event.kind is Kind.apply]
    assert len(applied) == again.iteration


@pytest.mark.parametrize("algorithm", ["ormo", "dc_asgd"])
@pytest.mark.parametrize("newest_is_good", [True, False])
def test_recovery_chains_segments_from_any_checkpoint(algorithm: str, newest_is_good: bool, tmp_path: Path) -> None:
    machine = Machine(algorithm, tmp_path)
    machine.start()
    checkpoints: list[tuple[int, dict[str, Any]]] = []
    for round_ in range(3):
        for worker in (0, 1, 2, 1):
            machine.push(worker, finite=True)
        machine.journal.rotate()
        checkpoints.append((machine.journal.segment, machine.server.state_dict(replies=True)))
        assert len(checkpoints) == round_ + 1
    for worker in (2, 0):
        machine.push(worker, finite=True)
    machine.journal.close()
    segment, state = checkpoints[-1 if newest_is_good else 0]
    again = server(algorithm)
    again.load_state_dict(state)
    assert recover(tmp_path, segment, again) == (2 if newest_is_good else 10)
    assert same(again.state_dict(replies=True), machine.server.state_dict(replies=True))


def test_segments_after_a_missing_one_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine("asgd", tmp_path)
    machine.start()
    for worker in (0, 1, 2):
        machine.push(worker, finite=True)
        machine.journal.rotate()
    machine.journal.close()
    (tmp_path / "journal" / "000001.log").unlink()
    again = server("asgd")
    assert recover(tmp_path, 0, again) == 2  # the start, and the push of the first segment
    assert again.iteration == 1
    assert "000001.log: is missing; 000002.log is not used" in caplog.text
    assert {file.name for file in (tmp_path / "journal").iterdir()} == {"000000.log", "000002.lost", "000003.lost"}


def test_segments_that_no_checkpoint_needs_are_removed(tmp_path: Path) -> None:
    machine = Machine("asgd", tmp_path)
    machine.start()
    for _ in range(3):
        machine.journal.rotate()
    machine.journal.forget(2)
    assert sorted(file.name for file in (tmp_path / "journal").iterdir()) == ["000002.log", "000003.log"]
    machine.journal.close()
    assert FileJournal(tmp_path).segment == 4  # a new incarnation never appends to a file that may be torn


def test_one_fsync_serves_all_waiting_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = FileJournal(tmp_path)
    force, waiting, released = os.fsync, threading.Event(), threading.Event()
    forces: list[int] = []

    def slow(descriptor: int) -> None:
        forces.append(descriptor)
        waiting.set()
        assert released.wait(30)
        force(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    journal.join(0)
    first = threading.Thread(target=journal.sync)
    first.start()
    assert waiting.wait(30)
    others: list[threading.Thread] = []
    for worker in (1, 2, 3):
        journal.join(worker)
        others.append(threading.Thread(target=journal.sync))
        others[-1].start()
    released.set()
    for thread in (first, *others):
        thread.join(30)
        assert not thread.is_alive()
    assert len(forces) == 2  # the first, and one for all that waited meanwhile
    journal.sync()
    assert len(forces) == 2


def test_a_push_that_cannot_be_made_durable_is_an_error(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path)
    os.close(journal._file)  # pyright: ignore[reportPrivateUsage] # a disk that fails
    with pytest.raises(OSError, match="Bad file descriptor"):
        journal.join(0)


def test_after_a_failed_append_nothing_is_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn record hides all later ones, so they must not look durable on a disk that has room again."""
    journal = FileJournal(tmp_path)
    real = os.write

    def half(descriptor: int, data: Any) -> int:
        if len(data) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left on device"):
        journal.join(0)
    monkeypatch.undo()
    for later in (lambda: journal.join(1), journal.rotate, journal.sync):
        with pytest.raises(OSError, match="No space left on device"):
            later()


@pytest.mark.parametrize("failing", ["fsync", "open"])
def test_after_a_failed_fsync_or_rotation_nothing_is_acknowledged(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells once of a page that it could not write; records in a former segment are not read after a checkpoint."""
    journal = FileJournal(tmp_path)
    journal.join(0)

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, fail)
        with pytest.raises(OSError, match="Input/output error"):
            journal.sync() if failing == "fsync" else journal.rotate()
    for later in (lambda: journal.join(1), journal.rotate, journal.sync, journal.sync):
        with pytest.raises(OSError, match="Input/output error"):
            later()
