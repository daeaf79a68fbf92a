"""Reading the present state of a run that goes on, by the control plane of its server, without joining it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ormo_rpc.config.schema import Config
from ormo_rpc.control.joining import admitted
from ormo_rpc.errors import ServerLost, StaleSession, WireError
from ormo_rpc.rendezvous.addresses import parse_address
from ormo_rpc.rendezvous.secret import SECRET_VARIABLE, Secret, read_secret
from ormo_rpc.runtimes.distributed.launcher.processes import SECRET_FILE
from ormo_rpc.storage.run_directory import read_address
from ormo_rpc.storage.summary import read_summary

CONNECT_SECONDS = 10.0
"""For each step of reaching the server."""


class NotReadable(Exception):
    """The run seems to go on, but its server does not tell its state; the message says why."""


@dataclass(frozen=True, kw_only=True)
class PresentState:
    """The state of a server.

    Attributes:
        iteration: Applied gradients.
        params: The parameters, shape (D,).
        buffers: The bytes of the model's buffers (`BufferLayout`).
    """

    iteration: int
    params: torch.Tensor
    buffers: torch.Tensor


def present_state(run_dir: Path, config: Config) -> PresentState | None:
    """Ask the server of a run on this machine, or of one whose directory and network this machine shares, for its state.

    Returns:
        A private copy; None where the run has ended, or was none of several processes.

    Raises:
        NotReadable: the run may go on, but its server cannot be asked.
        ConfigError: a file of the run directory is damaged, or the secret cannot be read.
    """
    address = read_address(run_dir)
    if address is None or read_summary(run_dir) is not None:
        return None
    try:
        with admitted(parse_address(address), _secret(run_dir, config), timeout_seconds=CONNECT_SECONDS) as control:
            state = control.present_state()
    except (OSError, EOFError, ServerLost, StaleSession, WireError) as error:
        raise NotReadable(f"its server at {address} cannot be asked: {error or type(error).__name__}") from None
    if state is None:
        raise NotReadable("its server tells no state with runtime.control=socket")
    iteration, params, buffers = state
    return PresentState(iteration=iteration, params=params, buffers=buffers)


def _secret(run_dir: Path, config: Config) -> Secret:
    """The secret of a run: of the file that it names, of the one that it has made, or of the environment.

    Raises:
        NotReadable: there is none.
        ConfigError: a file has no secret.
    """
    own, named = run_dir / SECRET_FILE, config.server.secret_file
    secret = read_secret(str(own) if named is None and own.exists() else named)
    if secret is None:
        raise NotReadable(f"its secret is not in {own}; where it was given by {SECRET_VARIABLE}, set that here, too")
    return secret
