"""The tasks of a job step of Slurm: what ``srun`` tells each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous.addresses import master_address

STEP = "SLURM_STEP_ID"
"""The variable of a step, without which a process is alone."""
_FIRST_RESERVED_STEP = 0xFFFFFFF0
"""Numbers from here on are no steps of srun's: the batch script, an interactive shell, what runs beside the steps."""
_FIRST_PORT, _PORTS = 15000, 10000
"""Ports for rank 0: below those that Linux gives to connections."""


@dataclass(frozen=True)
class Step:
    """This task, and the step that it belongs to.

    Attributes:
        variables: The variables of the rank and of the number of tasks.
        job: The number of the job; None where it is not told.
        rank: The number of this task.
        tasks: The number of tasks, at least 2.
        nodes: The number of nodes.
        master: HOST:PORT where rank 0 is to listen.
        attempt: Restarts of the job, such as by ``scontrol requeue``.
    """

    variables: tuple[str, str]
    job: str | None
    rank: int
    tasks: int
    nodes: int
    master: str
    attempt: int


def step(env: Mapping[str, str]) -> Step | None:
    """Read the environment; None outside of a step of several tasks.

    A batch script is no step, however many tasks its job has: a process that it starts without srun is alone. So is a shell
    on a terminal (``srun --pty``).

    Raises:
        ConfigError: the host of rank 0 is not told, or the numbers do not fit.
    """
    number = env.get(STEP, "")
    if not number.isdecimal() or int(number) >= _FIRST_RESERVED_STEP or "SLURM_PTY_PORT" in env:
        return None
    size = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") if name in env), "")
    tasks, rank = (env.get(name, "") for name in (size, "SLURM_PROCID"))
    if not (tasks.isdecimal() and rank.isdecimal() and int(tasks) > 1):
        return None
    if int(rank) >= int(tasks):
        raise ConfigError(
            f"SLURM_PROCID: got {rank} in the environment of srun, expected a number below {size}={tasks}; for a run of this "
            f"process alone unset {STEP}"
        )
    nodes = _number(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    job = _number(env, "SLURM_JOB_ID")
    port = env.get("MASTER_PORT") or str(_FIRST_PORT + (job + 101 * int(number)) % _PORTS)
    host = env.get("MASTER_ADDR") or ("127.0.0.1" if nodes == 1 else _first_host(env))
    return Step(
        variables=("SLURM_PROCID", size),
        job=str(job) if job else None,
        rank=int(rank),
        tasks=int(tasks),
        nodes=nodes,
        master=master_address(host, port, "unset it, as srun tells enough"),
        attempt=_number(env, "SLURM_RESTART_COUNT"),
    )


def hosts(text: str) -> Iterator[str]:
    """Expand a list of hosts, such as ``login,node[01-03,7]-ib``.

    Raises:
        ValueError: it is of another form.
    """
    for word in re.split(r",(?![^\[]*\])", text):
        if not word:
            raise ValueError("a host without a name")
        yield from _expanded(word)


def _expanded(word: str) -> Iterator[str]:
    head, opening, rest = word.partition("[")
    inside, closing, tail = rest.partition("]")
    if not opening and "]" not in word:
        yield word
        return
    if not closing or "]" in head:
        raise ValueError("brackets without a partner")
    for piece in inside.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", piece, re.ASCII)
        if found is None:
            raise ValueError(f"{piece!r} is no number or range of numbers")
        first, last = found[1], found[2] or found[1]
        for number in range(int(first), int(last) + 1):
            for end in _expanded(tail):
                yield f"{head}{number:0{len(first)}d}{end}"


def _first_host(env: Mapping[str, str]) -> str:
    """The host of rank 0: the first one of the step."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    name = next((each for each in names if env.get(each)), None)
    if name is None and env.get("SLURM_LAUNCH_NODE_IPADDR"):
        return env["SLURM_LAUNCH_NODE_IPADDR"]
    try:
        return next(hosts(env[name] if name else ""))
    except (ValueError, StopIteration) as error:
        given = env.get(name or names[0])
        raise ConfigError(
            f"{name or names[0]}: got {given!r} in the environment of srun, expected a list of hosts ({error}); set "
            f"MASTER_ADDR to the host of rank 0"
        ) from None


def _number(env: Mapping[str, str], *names: str) -> int:
    """The first of some variables that is a number; 0 where none is."""
    return next((int(env[name]) for name in names if env.get(name, "").isdecimal()), 0)
