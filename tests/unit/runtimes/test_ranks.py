"""The environment that torchrun, srun, mpirun or a hand gives a process, and the configurations that cannot run under it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes.rank_checks import check_elastic_worker
from ormo_rpc.runtimes.ranks import Ranks
from ormo_rpc.runtimes.running import run
from ormo_rpc.runtimes.slurm import hosts

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_ERROR_FILE": "agent/none_1/attempt_2/0/error.json",
    "RANK": "1",
    "WORLD_SIZE": "3",
    "LOCAL_WORLD_SIZE": "3",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29400",
}
UNDER_TORCHRUN = Ranks(
    launcher="torchrun",
    variables=("RANK", "WORLD_SIZE"),
    job=None,
    rank=1,
    world_size=3,
    master="host:29400",
    attempt=2,
    agent_store=True,
    agent_folder=Path("agent/none_1"),
    one_machine=True,
)
HAND = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "29500"}
BY_HAND = Ranks("env://", ("RANK", "WORLD_SIZE"), None, rank=2, world_size=4, master="10.0.0.5:29500")
JOB = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "gpu[07-09,12]",
    "SLURM_NNODES": "4",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_LAUNCH_NODE_IPADDR": "10.1.0.1",
}
"""In a batch script, which is no task of a step."""
TASK = {
    **JOB,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "gpu[08-09,12]",
    "SLURM_PROCID": "5",
}
"""In a task of a step, which has fewer nodes and tasks than the job."""
BY_SRUN = Ranks(
    "srun", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), "1234567", rank=5, world_size=6, master="gpu08:19567", attempt=0
)
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "3"}
MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29400"}
BY_OPEN_MPI = Ranks(
    "mpirun", ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), None, 1, 3, master="node1:29400", one_machine=True
)
BY_MPICH = Ranks("mpirun", ("PMI_RANK", "PMI_SIZE"), None, rank=1, world_size=3, master="node1:29400")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests themselves may run within a job."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_", "PET_", "MASTER_")) or name in HAND:
            monkeypatch.delenv(name)


def within(monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str | None]) -> None:
    for name, value in env.items():
        if value is not None:
            monkeypatch.setenv(name, value)


def without(env: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (TORCHRUN, UNDER_TORCHRUN),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "job"}, replace(UNDER_TORCHRUN, job="job")),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, replace(UNDER_TORCHRUN, one_machine=False)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), replace(UNDER_TORCHRUN, one_machine=False)),
        ({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "False"}, replace(UNDER_TORCHRUN, agent_store=False)),
        (without(TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE"), replace(UNDER_TORCHRUN, agent_store=False)),
        ({**TORCHRUN, "TORCHELASTIC_ERROR_FILE": ""}, replace(UNDER_TORCHRUN, agent_folder=None)),
        ({**TORCHRUN, "TORCHELASTIC_ERROR_FILE": "error.json"}, replace(UNDER_TORCHRUN, agent_folder=None)),
        (without(TORCHRUN, "TORCHELASTIC_RESTART_COUNT"), replace(UNDER_TORCHRUN, attempt=0)),
        ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "x"}, replace(UNDER_TORCHRUN, attempt=0)),
        ({**TASK, **TORCHRUN}, UNDER_TORCHRUN),  # srun started the agents
        (HAND, BY_HAND),
        ({**HAND, "LOCAL_WORLD_SIZE": "4"}, replace(BY_HAND, one_machine=True)),
        ({**HAND, "MASTER_ADDR": "localhost"}, replace(BY_HAND, master="localhost:29500", one_machine=True)),
        ({**HAND, "MASTER_ADDR": "127.0.0.1"}, replace(BY_HAND, master="127.0.0.1:29500", one_machine=True)),
        ({**HAND, "PET_NNODES": "4", "PET_NODE_RANK": "2"}, BY_HAND),  # Kubeflow's PyTorchJob, one process in each pod
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({**TASK, **HAND}, BY_HAND),  # a batch script that exports them for PyTorch
        (MASTER, None),
        (JOB, None),
        ({**JOB, "SLURM_STEP_ID": "4294967291"}, None),  # numbered steps that are a batch script and an interactive shell
        ({**JOB, "SLURM_STEP_ID": "4294967290"}, None),
        ({**JOB, "SLURM_STEP_ID": "batch"}, None),
        ({**TASK, "SLURM_PTY_PORT": "40001"}, None),  # srun --pty bash
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # srun -n1, as submitit does
        (TASK, BY_SRUN),
        ({**TASK, "SLURM_STEP_ID": "3"}, replace(BY_SRUN, master="gpu08:19870")),  # two steps at once
        ({**TASK, "SLURM_RESTART_COUNT": "2"}, replace(BY_SRUN, attempt=2)),
        ({**TASK, "SLURM_RESTART_COUNT": "x"}, BY_SRUN),
        ({**TASK, "SLURM_JOB_ID": "x"}, replace(BY_SRUN, job=None, master="gpu08:15000")),
        ({**TASK, **MASTER}, replace(BY_SRUN, master="node1:29400")),
        ({**TASK, "MASTER_ADDR": "fd00::5"}, replace(BY_SRUN, master="[fd00::5]:19567")),
        ({**TASK, "SLURM_STEP_NUM_NODES": "1"}, replace(BY_SRUN, master="127.0.0.1:19567", one_machine=True)),
        (without(TASK, "SLURM_STEP_NODELIST"), replace(BY_SRUN, master="gpu07:19567")),
        (without(TASK, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), replace(BY_SRUN, master="10.1.0.1:19567")),
        (
            without(TASK, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"),
            replace(BY_SRUN, variables=("SLURM_PROCID", "SLURM_NTASKS"), world_size=8),
        ),
        ({**TASK, "PMI_RANK": "5", "PMI_SIZE": "6"}, BY_SRUN),  # srun --mpi=pmi2
        ({**OPEN_MPI, **MASTER}, BY_OPEN_MPI),
        ({**TASK, **OPEN_MPI, **MASTER}, BY_OPEN_MPI),  # mpirun starts its daemons by srun
        ({**MPICH, **MASTER}, BY_MPICH),
        ({**TASK, **MPICH, **MASTER}, BY_MPICH),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"PMI_RANK": "0"}, None),
        ({"PET_NNODES": "1"}, None),
    ],
    ids=str,
)
def test_the_ranks_are_read_from_the_environment(
    env: Mapping[str, str], expected: Ranks | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    within(monkeypatch, env)
    assert Ranks.from_environment() == expected


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"TORCHELASTIC_RUN_ID": "none"}, ("WORLD_SIZE: got nothing", "TORCHELASTIC_RUN_ID", "unset TORCHELASTIC_RUN_ID")),
        (without(TORCHRUN, "RANK"), ("RANK: got nothing", "start it with torchrun, or unset TORCHELASTIC_RUN_ID")),
        ({**TORCHRUN, "RANK": "x"}, ("RANK: got 'x'", "below WORLD_SIZE=3")),
        (without(TORCHRUN, "MASTER_PORT"), ("MASTER_PORT: got nothing",)),
        ({"RANK": "0"}, ("WORLD_SIZE: got nothing in the environment beside RANK, ", "unset RANK for")),
        ({"RANK": "x"}, ("WORLD_SIZE: got nothing", "unset RANK for")),
        ({"RANK": "", "WORLD_SIZE": "2"}, ("RANK: got nothing", "unset RANK and WORLD_SIZE")),
        ({"WORLD_SIZE": "2"}, ("RANK: got nothing in the environment beside WORLD_SIZE, ",)),
        ({**HAND, "RANK": "x"}, ("RANK: got 'x'", "below WORLD_SIZE=4")),
        ({**HAND, "RANK": "-1"}, ("RANK: got '-1'",)),
        ({**HAND, "RANK": "4"}, ("RANK: got 4", "below WORLD_SIZE=4")),
        ({**HAND, "WORLD_SIZE": "many"}, ("WORLD_SIZE: got 'many'",)),
        (without(HAND, "MASTER_ADDR"), ("MASTER_ADDR: got nothing", "RANK and WORLD_SIZE")),
        ({**TASK, "SLURM_PROCID": "6"}, ("SLURM_PROCID: got 6", "SLURM_STEP_NUM_TASKS=", "unset SLURM_STEP_ID")),
        ({**HAND, "MASTER_PORT": "http"}, ("MASTER_PORT: got 'http'",)),
        ({**HAND, "MASTER_PORT": "65536"}, ("MASTER_PORT: got '65536'", "unset RANK and WORLD_SIZE")),
        ({**HAND, "MASTER_PORT": "0"}, ("MASTER_PORT: got '0'",)),
        ({**HAND, "MASTER_ADDR": "[::1]"}, ("MASTER_ADDR: got '[::1]'", "without brackets")),
        (OPEN_MPI, ("MASTER_ADDR: got nothing", "OMPI_COMM_WORLD_RANK", "mpirun -x MASTER_ADDR=HOST", "ORMO_RPC_SECRET")),
        (MPICH, ("MASTER_ADDR: got nothing", "PMI_RANK", "mpirun -genv MASTER_ADDR HOST")),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}, ("MASTER_ADDR: got nothing", "HOROVOD_RANK")),
        ({**TASK, "SLURM_STEP_NODELIST": "gpu[1-"}, ("SLURM_STEP_NODELIST: got 'gpu[1-'", "set MASTER_ADDR")),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0"}, ("PET_NNODES: got 2", "torchrun launch.py")),  # Kubeflow's Trainer
        ({**TASK, "MASTER_PORT": "http"}, ("MASTER_PORT: got 'http'", "srun")),
        ({**TASK, "MASTER_PORT": "99999"}, ("MASTER_PORT: got '99999'", "srun")),
        ({"PET_NNODES": "1:4"}, ("PET_NNODES: got 1:4",)),
    ],
    ids=str,
)
def test_variables_that_do_not_suffice_are_refused_in_one_line(
    env: Mapping[str, str], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    within(monkeypatch, env)
    with pytest.raises(ConfigError) as caught:
        Ranks.from_environment()
    message = str(caught.value)
    assert message.startswith(words[0])
    assert all(each in message for each in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node", ["node"]),
        ("a,b", ["a", "b"]),
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("node[08-11]-ib,login", ["node08-ib", "node09-ib", "node10-ib", "node11-ib", "login"]),
        ("rack[1-2]n[3,5-6]", ["rack1n3", "rack1n5", "rack1n6", "rack2n3", "rack2n5", "rack2n6"]),
        ("a[099-101]", ["a099", "a100", "a101"]),
        ("[1-2]x", ["1x", "2x"]),
    ],
)
def test_a_list_of_hosts_is_expanded_as_scontrol_does(text: str, expected: list[str]) -> None:
    assert list(hosts(text)) == expected


def test_the_first_host_of_a_long_list_is_found_at_once() -> None:
    assert next(hosts("n[0000000001-9999999999]")) == "n0000000001"


@pytest.mark.parametrize("text", ["", "a,", "a[", "a[1", "a]", "a[1-]", "a[x]", "a[]", "a[1-2]]", "a[1,[2]]"])
def test_a_list_of_hosts_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        list(hosts(text))


@pytest.mark.parametrize(
    ("env", "values", "message"),
    [
        (
            {**TORCHRUN, "RANK": "0"},
            {"runtime": {"name": "sim"}},
            "runtime: got sim under torchrun, expected rpc or ddp; start it with python launch.py",
        ),
        (
            TASK,
            {"runtime": {"name": "sim"}},
            "runtime: got sim under srun, expected rpc or ddp; for a run of its own in each process unset SLURM_STEP_ID",
        ),
        (
            HAND,
            {"runtime": {"name": "sim"}},
            "runtime: got sim under env://, expected rpc or ddp; for a run of its own in each process unset RANK and "
            "WORLD_SIZE",
        ),
        (
            {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"},
            {},
            "torchrun: got 1 process, expected at least 2; rank 0 serves and the others work",
        ),
        (TORCHRUN, {"workers": 4}, "workers: got 4, expected 2 under torchrun with 3 processes; leave it out"),
        (TASK, {"workers": 4}, "workers: got 4, expected 5 under srun with 6 processes; leave it out"),
    ],
    ids=str,
)
def test_configurations_that_ranks_cannot_run_are_refused(
    env: Mapping[str, str], values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    within(monkeypatch, env)
    with pytest.raises(ConfigError) as caught:
        run(parse_config(values), tmp_path / "run")
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_tasks_of_srun_may_be_workers_of_a_run_elsewhere_and_ranks_of_torchrun_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config({"role": "worker", "server": {"address": "10.0.0.5:29400"}})
    within(monkeypatch, TASK)
    check_elastic_worker(config, Ranks.from_environment())
    within(monkeypatch, TORCHRUN)
    with pytest.raises(ConfigError, match=r"^role: got worker under torchrun"):
        check_elastic_worker(config, Ranks.from_environment())


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_without_a_store_need_a_secret_in_common(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    within(monkeypatch, {**HAND, "RANK": str(rank), "MASTER_ADDR": "127.0.0.1"})
    monkeypatch.delenv("ORMO_RPC_SECRET", raising=False)
    with pytest.raises(ConfigError, match=r"^server\.secret_file: got None.*ORMO_RPC_SECRET"):
        run(parse_config({}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
