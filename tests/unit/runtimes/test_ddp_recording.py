"""The records that rank 0 of ``runtime=ddp`` makes of what the ranks tell."""

from __future__ import annotations

from pathlib import Path

from ormo_rpc.composing import compose
from ormo_rpc.config.parsing import save_config
from ormo_rpc.runtimes.ddp.meeting import Reports
from ormo_rpc.runtimes.ddp.recording import Recording
from ormo_rpc.runtimes.ddp.rounds import Rounds
from ormo_rpc.runtimes.ddp.trainer import Computed
from ormo_rpc.runtimes.job import Job
from ormo_rpc.storage.run_directory import read_trace


def test_all_samples_of_a_short_round_are_recorded_where_ranks_without_a_ticket_have_a_share(tmp_path: Path) -> None:
    words = ("workers=3", "train.batch_size=30", "train.max_iterations=1", "heterogeneity=one_slow")
    job = Job(compose(["runtime=ddp", "runtime.shares=proportional", "logger=none", "logger.progress=false", *words]))
    save_config(job.config, tmp_path / "config.yaml")
    rounds = Rounds(job.epochs, job.total_tickets, 3, [1.0, 1.0, 10.0])
    recording = Recording(job, job.model(), rounds, tmp_path, began=0.0, terminal=None, start="here")
    recording.begin()
    recording.timed(0.0)
    recording.decide(Reports([[Computed(1.0, 15), Computed(2.0, 14), Computed(17.0, 1)]], 0))
    recording.close()
    _, events = read_trace(tmp_path)
    (applied,) = [event for event in events if event["event"] == "apply"]
    assert (applied["samples"], applied["loss"]) == (30, 2.0)  # (15 + 28 + 17) / 30
