"""The part of a process in a run of a script, which every process of the run runs: `join` is the same call in all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ormo_rpc.config.schema import Config
from ormo_rpc.config.schema import Role as LauncherRole
from ormo_rpc.errors import ConfigError
from ormo_rpc.own_loop.script_preloading import child_of_launcher
from ormo_rpc.runtimes import server_address
from ormo_rpc.runtimes.programs.entry_point import Child
from ormo_rpc.runtimes.rank_checks import check_elastic_worker, check_secret, decide_workers
from ormo_rpc.runtimes.ranks import Ranks

LAUNCH = "ormo-rpc launch --workers N script.py, or torchrun"
"""The ways to start several processes, for messages."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """The part of this process; with neither a launcher nor ranks nor a server elsewhere it is the whole run.

    Attributes:
        config: The configuration, with the number of workers decided.
        child: This process as a child of ``ormo-rpc launch``.
        ranks: The ranks of torchrun, srun or the like, and this one.
        elastic: This process was started by hand, as a worker of a run in progress.
    """

    config: Config
    child: Child | None = None
    ranks: Ranks | None = None
    elastic: bool = False

    @property
    def alone(self) -> bool:
        """True where server and worker are in this process."""
        return self.child is None and self.ranks is None and not self.elastic

    @property
    def serves(self) -> bool:
        """True where the server is in this process."""
        if self.child is not None:
            return self.child.serves
        return self.alone or (self.ranks is not None and self.ranks.rank == 0)

    @property
    def works(self) -> bool:
        """True where the loop of this process is given tickets."""
        return self.alone or not self.serves


def role(config: Config) -> Role:
    """Find the part of this process.

    In the preloader of ``ormo-rpc launch`` this ends in its forks alone, each of which is a child.

    Args:
        config: The configuration, checked.

    Raises:
        ConfigError: the configuration does not fit it.
    """
    child = child_of_launcher(config)
    if child is not None:
        return Role(config=config, child=child)
    ranks = Ranks.from_environment()
    if config.role is LauncherRole.worker:
        check_elastic_worker(config, ranks)
        server_address.check(config, ranks)
        return Role(config=config, elastic=True)
    if ranks is None:
        return Role(config=_alone(config))
    config = decide_workers(config, ranks)
    check_secret(config, ranks)
    server_address.check(config, ranks)
    return Role(config=config, ranks=ranks)


def _alone(config: Config) -> Config:
    """The configuration of a run of one process.

    Raises:
        ConfigError: it asks for what takes several.
    """
    wrong = {
        "workers": (config.workers, config.workers in (None, 1)),
        "runtime.min_workers": (config.runtime.min_workers, config.runtime.min_workers == 1),
        "runtime.faults": (config.rpc.faults, not config.rpc.faults),
        "heterogeneity": (config.heterogeneity.name, config.heterogeneity.name == "none"),
    }
    for key, (value, fine) in wrong.items():
        if not fine:
            raise ConfigError(f"{key}: got {value} in a script that runs alone, in one process; start it with {LAUNCH}")
    return dataclasses.replace(config, workers=1)
