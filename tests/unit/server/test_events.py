"""Events that the server records."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ormo_rpc.server.build import build_server
from tests.support.contract import same
from tests.support.trial import Trial, begin, tensor


def test_the_events_of_a_short_run() -> None:
    clock: Callable[[], float] = iter(range(100)).__next__
    trial = begin(num_workers=2, tickets=3, scheduler="sync", clock=clock)
    trial.push(1, tensor(1, 2, 4), loss=0.25, samples=7)
    trial.server.receive(trial.work(1))
    trial.server.join(2)
    trial.note(trial.server.leave(0))
    trial.push(1, tensor(0.1, 0, 0))
    trial.note(trial.server.leave(2))
    trial.push(1)
    expected = [
        ("issue", {"worker": 0, "ticket": 0, "stamp": 0, "bucket": 0}),
        ("issue", {"worker": 1, "ticket": 1, "stamp": 0, "bucket": 0}),
        # 1 + 2 + 4 = 7 = 1.11 (binary) * 2^2
        (
            "apply",
            {
                "iteration": 0,
                "worker": 1,
                "ticket": 1,
                "stamp": 0,
                "bucket": 0,
                "delay": 0,
                "eta": 0.5,
                "loss": 0.25,
                "samples": 7,
                "grad_sum": "0x1.c000000000000p+2",
            },
        ),
        ("repeat", {"worker": 1, "ticket": 1, "stamp": 0}),
        ("join", {"worker": 2, "concurrency": 3}),
        ("leave", {"worker": 0, "concurrency": 2, "tickets": [0]}),
        ("reissue", {"worker": 1, "ticket": 0, "stamp": 1, "bucket": 1}),
        ("issue", {"worker": 2, "ticket": 2, "stamp": 1, "bucket": 1}),
        (
            "apply",
            {
                "iteration": 1,
                "worker": 1,
                "ticket": 0,
                "stamp": 1,
                "bucket": 1,
                "delay": 0,
                "eta": 0.5,
                "loss": None,
                "samples": 1,
                "grad_sum": (0.1).hex(),
            },
        ),
        ("leave", {"worker": 2, "concurrency": 1, "tickets": [2]}),
        # Bucket 1 was opened with K = 2: indices 1 and 2.
        ("reissue", {"worker": 1, "ticket": 2, "stamp": 2, "bucket": 1}),
        (
            "apply",
            {
                "iteration": 2,
                "worker": 1,
                "ticket": 2,
                "stamp": 2,
                "bucket": 1,
                "delay": 0,
                "eta": 0.5,
                "loss": None,
                "samples": 1,
                "grad_sum": (3.0).hex(),
            },
        ),
        ("end", {"iteration": 3, "status": "completed"}),
    ]
    assert [(event.kind.value, dict(event.data)) for event in trial.events] == expected
    assert [event.seconds for event in trial.events] == list(range(len(expected)))


def test_recording_events_does_not_change_the_update() -> None:
    with_records, without = begin(), build_server(params=torch.zeros(3).double(), num_workers=3, lr=0.5, total_tickets=10)
    silent = Trial(without)
    silent.note(without.start())
    for trial in (with_records, silent):
        for worker in (2, 0, 2, 1):
            trial.push(worker)
    assert same(with_records.server.state_dict(), silent.server.state_dict())
