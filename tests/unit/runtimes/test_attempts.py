"""The run that rank 0 continues when torchrun starts the ranks again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ormo_rpc.runtimes.attempts import FormerRun, claimed_by, continues, former_run, remember
from ormo_rpc.runtimes.ranks import Ranks
from ormo_rpc.runtimes.torchrun_agent import Agent
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import RunDirectory


@pytest.fixture
def rank(tmp_path: Path) -> Ranks:
    folder = tmp_path / "agent"
    folder.mkdir()
    return Ranks(
        launcher="torchrun",
        variables=("RANK", "WORLD_SIZE"),
        job="job",
        rank=0,
        world_size=3,
        master="a:1",
        agent_folder=folder,
    )


def run_of(rank: Ranks, run_dir: Path) -> FormerRun:
    """Begin a run, and remember it."""
    RunDirectory.claim(run_dir)
    Launch(job=rank.job).write(run_dir)
    run = FormerRun(run_dir, "10.0.0.5:4000")
    remember(rank, run)
    return run


def test_rank_0_finds_the_run_of_its_former_start(rank: Ranks, tmp_path: Path) -> None:
    assert former_run(rank) is None
    assert not continues(rank, tmp_path / "run")
    run = run_of(rank, tmp_path / "run")
    assert former_run(rank) == run
    assert continues(rank, run.run_dir)
    assert not continues(rank, tmp_path / "other")
    assert former_run(replace(rank, rank=1)) is None


def test_another_agent_and_a_run_without_its_files_continue_nothing(rank: Ranks, tmp_path: Path) -> None:
    run = run_of(rank, tmp_path / "run")
    assert former_run(replace(rank, agent_folder=None)) is None
    (run.run_dir / "trace.jsonl").unlink()
    assert former_run(rank) is None


@pytest.mark.parametrize(
    ("attempt", "job", "expected"), [(1, "job", True), (0, "job", False), (1, "another", False), (1, None, False)]
)
def test_rank_0_on_another_node_continues_in_the_named_directory_of_its_job(
    attempt: int, job: str | None, expected: bool, rank: Ranks, tmp_path: Path
) -> None:
    run = run_of(replace(rank, job="job" if job else None), tmp_path / "run")
    elsewhere = replace(rank, agent_folder=None, attempt=attempt, job=job)
    assert continues(elsewhere, run.run_dir) is expected


@pytest.mark.parametrize("attempt", [0, 1])  # a change of the nodes is no attempt
def test_the_same_agent_continues_in_the_directory_that_it_was_given_without_a_folder_or_a_name(
    attempt: int, rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nameless = replace(rank, agent_folder=None, agent_store=True, attempt=attempt, job=None)
    monkeypatch.setattr(Agent, "of_this_rank", classmethod(lambda _: Agent(7, "100")))
    RunDirectory.claim(tmp_path / "run")
    claimed_by(nameless).write(tmp_path / "run")
    begun = FormerRun(tmp_path / "run", "127.0.0.1:4000")
    remember(nameless, begun)
    assert former_run(nameless) is None
    assert former_run(nameless, begun.run_dir) == begun
    assert continues(nameless, tmp_path / "run")
    monkeypatch.setattr(Agent, "of_this_rank", classmethod(lambda _: Agent(7, "200")))
    assert not continues(nameless, tmp_path / "run")
    monkeypatch.setattr(Agent, "of_this_rank", classmethod(lambda _: None))
    assert not continues(nameless, tmp_path / "run")


def test_a_job_of_slurm_that_is_queued_again_continues_in_its_directory(rank: Ranks, tmp_path: Path) -> None:
    first = replace(rank, launcher="srun", job="1234", agent_folder=None)
    RunDirectory.claim(tmp_path / "run")
    claimed_by(first).write(tmp_path / "run")
    assert not continues(first, tmp_path / "run")  # the same words typed twice in one job
    assert continues(replace(first, attempt=1), tmp_path / "run")
    assert not continues(replace(first, attempt=1, job="1235"), tmp_path / "run")


def test_the_name_of_a_job_is_read_from_run_directories_of_earlier_versions(tmp_path: Path) -> None:
    (tmp_path / "launch.json").write_text('{"overrides": ["workers=2"], "sweep": null, "torchrun": "job"}')
    assert Launch.read(tmp_path) == Launch(overrides=["workers=2"], job="job")
