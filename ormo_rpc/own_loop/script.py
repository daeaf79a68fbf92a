"""A user's script, as every process of its run runs it; known to the launcher, which does not load PyTorch."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import ormo_rpc
from ormo_rpc.runtimes.distributed.preloading.client import Programs

PROGRAM = "ormo_rpc.own_loop.script_process"
"""The module that runs it, as a preloader or as a child."""
_OPTION = "--script"


@dataclass(frozen=True, kw_only=True)
class Script:
    """A script or module, as it was typed.

    Attributes:
        name: The file, or with ``module`` the dotted name.
        module: The name is that of a module, as after ``python -m``.
        arguments: The script's own arguments.
    """

    name: str
    module: bool = False
    arguments: tuple[str, ...] = ()

    @property
    def programs(self) -> Programs:
        """The programs of its processes."""
        return Programs(preloader=PROGRAM, child=PROGRAM, does="runs the script", words=(_OPTION, self.text))

    @property
    def text(self) -> str:
        """The script as JSON, for `read`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str) -> Self:
        """Read what `text` has written."""
        values = json.loads(text)
        return cls(name=values["name"], module=values["module"], arguments=tuple(values["arguments"]))

    @classmethod
    def of_child(cls, words: Sequence[str]) -> tuple[Self, list[str]] | None:
        """Split a child's command line into its script and the rest; None where it is a preloader's."""
        return (cls.read(words[1]), list(words[2:])) if words[:1] == [_OPTION] else None

    def set_module_path(self) -> None:
        """Give this process, a command of ours, the module path that Python would give to the script.

        The package stays on it, also where the command was found in the current directory.
        """
        if not sys.flags.safe_path:
            folder = Path.cwd() if self.module else Path(self.name).resolve().parent
            if not self.module and Path(self.name).is_dir():
                folder = Path(self.name)
            sys.path[0] = os.fspath(folder)
        ours = os.fspath(Path(ormo_rpc.__file__).resolve().parent.parent)
        if ours not in (os.path.realpath(each) for each in sys.path):
            sys.path.append(ours)
