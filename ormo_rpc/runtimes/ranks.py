"""The ranks of a run that another launcher has started as one process each: torchrun, srun, mpirun, or ``RANK`` set by hand.

Such a process does not start a run of its own beside the others. What it finds in its environment is understood, or refused in
a line that says what to type.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous.addresses import master_address
from ormo_rpc.rendezvous.interfaces import is_loopback
from ormo_rpc.runtimes import slurm

TORCHRUN, SRUN, BY_HAND = "torchrun", "srun", "env://"
"""Names of launchers for messages; the last one is PyTorch's for RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
NO_NAME = "none"
"""The name that every job of torchrun without ``--rdzv-id`` has."""


@dataclass(frozen=True)
class _Variables:
    """The variables by which a launcher numbers its processes.

    Attributes:
        launcher: Its name.
        rank: The number of a process.
        size: The number of all.
        here: The number of those on this machine.
        passing: Options that pass the variables MASTER_ADDR and MASTER_PORT to all processes.
    """

    launcher: str
    rank: str
    size: str
    here: str = ""
    passing: str = ""


_HAND = _Variables(BY_HAND, "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_OTHERS = (
    _Variables(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29400 -x ORMO_RPC_SECRET",
    ),
    _Variables("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", "mpirun -genv MASTER_ADDR HOST -genv MASTER_PORT 29400"),
    _Variables("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    _Variables("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_SIZE"),
    _Variables("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_SIZE"),
    _Variables("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
)
"""Open MPI; MPICH and Intel MPI; MVAPICH; Horovod; LSF; Flux."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of this job, and this process's own.

    Attributes:
        launcher: The name of what has started them.
        variables: The variables of the environment that said so.
        job: The name of the job, such as torchrun's ``--rdzv-id``; None where it has none.
        rank: The rank of this process.
        world_size: The number of ranks.
        master: HOST:PORT of the store of torchrun's agent, or where rank 0 is to listen.
        attempt: Restarts of the ranks after failures; one for a change of the nodes does not count.
        agent_store: Torchrun's agent hosts a store; otherwise nobody does.
        agent_folder: Of torchrun's agent on this node, for this job; None where it has none.
        one_machine: All ranks are on this machine.
    """

    launcher: str
    variables: tuple[str, str]
    job: str | None
    rank: int
    world_size: int
    master: str
    attempt: int = 0
    agent_store: bool = False
    agent_folder: Path | None = None
    one_machine: bool = False

    @classmethod
    def from_environment(cls) -> Ranks | None:
        """Read the environment; None where this process is alone.

        Raises:
            ConfigError: variables are left over from elsewhere, or do not suffice.
        """
        env = os.environ
        if "TORCHELASTIC_RUN_ID" in env:
            return _torchrun(env)
        if "RANK" in env or "WORLD_SIZE" in env:
            return _numbered(env, _HAND)
        step = slurm.step(env)
        for variables in _OTHERS:
            if _is_many(env, variables) and not _same(env, variables, step):
                return _numbered(env, variables)
        if step is not None:
            return cls(
                launcher=SRUN,
                variables=step.variables,
                job=step.job,
                rank=step.rank,
                world_size=step.tasks,
                master=step.master,
                attempt=step.attempt,
                one_machine=step.nodes == 1,
            )
        if env.get("PET_NNODES", "1") not in ("1", "1:1"):
            raise ConfigError(
                f"PET_NNODES: got {env['PET_NNODES']} in the environment without RANK, expected torchrun, which reads this "
                f"variable of Kubeflow; start torchrun launch.py, or unset PET_NNODES"
            )
        return None

    @property
    def under(self) -> str:
        """The launcher, for messages."""
        return f"under {self.launcher}"

    @property
    def alone(self) -> str:
        """The advice to start a run without the other ranks."""
        if self.launcher == TORCHRUN:
            return "start it with python launch.py"
        names = (slurm.STEP,) if self.launcher == SRUN else self.variables
        return f"for a run of its own in each process unset {' and '.join(names)}"


def _torchrun(env: Mapping[str, str]) -> Ranks:
    beside = "TORCHELASTIC_RUN_ID"
    rank, size = _rank_and_size(env, _HAND, beside, f"start it with torchrun, or unset {beside}")
    restarts = env.get("TORCHELASTIC_RESTART_COUNT", "")
    above_error_file = Path(env.get("TORCHELASTIC_ERROR_FILE", "")).parents  # of FOLDER/attempt_0/0/error.json
    name = env[beside]
    return Ranks(
        launcher=TORCHRUN,
        variables=(_HAND.rank, _HAND.size),
        job=None if name == NO_NAME else name,
        rank=rank,
        world_size=size,
        master=_master(env, beside, f"unset {beside}"),
        attempt=int(restarts) if restarts.isdecimal() else 0,
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        agent_folder=above_error_file[2] if len(above_error_file) > 2 else None,
        one_machine=env.get("LOCAL_WORLD_SIZE") == str(size),
    )


def _numbered(env: Mapping[str, str], variables: _Variables) -> Ranks | None:
    names = (variables.rank, variables.size)
    both, found = (" and ".join(each) for each in (names, filter(env.__contains__, names)))
    rank, size = _rank_and_size(env, variables, found, f"set both, or unset {found} for a run of this process alone")
    if size == 1:
        return None
    how = f"{variables.passing} ... does; or unset {both}" if variables.passing else f"set it, or unset {both}"
    master = _master(env, both, how)
    return Ranks(
        launcher=variables.launcher,
        variables=names,
        job=None,
        rank=rank,
        world_size=size,
        master=master,
        one_machine=env.get(variables.here) == str(size) or is_loopback(env["MASTER_ADDR"]),
    )


def _is_many(env: Mapping[str, str], variables: _Variables) -> bool:
    """Tell whether a launcher has started more than this process; a lone rank or number of ranks is of something else."""
    return variables.rank in env and env.get(variables.size, "1") != "1"


def _same(env: Mapping[str, str], variables: _Variables, step: slurm.Step | None) -> bool:
    """Tell whether these numbers are those of a step, as srun sets them for a library of MPI."""
    return step is not None and (env.get(variables.rank), env.get(variables.size)) == (str(step.rank), str(step.tasks))


def _rank_and_size(env: Mapping[str, str], variables: _Variables, beside: str, advice: str) -> tuple[int, int]:
    size = _number(env, variables.size, "a whole number >= 1", beside, advice)
    rank = _number(env, variables.rank, f"a whole number below {variables.size}={size}", beside, advice)
    if rank >= size:
        raise ConfigError(
            f"{variables.rank}: got {rank} in the environment, expected a number below {variables.size}={size}; {advice}"
        )
    return rank, size


def _master(env: Mapping[str, str], beside: str, advice: str) -> str:
    """HOST:PORT of rank 0's machine."""
    host = _given(env, "MASTER_ADDR", "the host of rank 0", beside, advice)
    return master_address(host, _given(env, "MASTER_PORT", "a port of rank 0's host", beside, advice), advice)


def _given(env: Mapping[str, str], name: str, expected: str, beside: str, advice: str) -> str:
    if not env.get(name):
        raise ConfigError(f"{name}: got nothing in the environment beside {beside}, expected {expected}; {advice}")
    return env[name]


def _number(env: Mapping[str, str], name: str, expected: str, beside: str, advice: str) -> int:
    value = _given(env, name, expected, beside, advice)
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"{name}: got {value!r} in the environment, expected {expected}; {advice}")
    return int(value)
