"""The command line of ``ormo-rpc launch``: keys and options first, then the script with arguments of its own."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ormo_rpc.errors import ConfigError
from ormo_rpc.own_loop.script import Script

USAGE = "ormo-rpc launch [--workers N] [--run-dir DIR] [KEY=VALUE ...] script.py [ARGUMENTS]"
HELP = f"""\
Start a script of your own as a run: a server and its workers, each a process that runs the script.

  {USAGE}
  ormo-rpc launch [...] -m package.module [ARGUMENTS]

The script calls ormo_rpc.join(model, ...), and trains on the tickets that it is given:

  worker = ormo_rpc.join(model, "algorithm=ormo", "train.lr=0.02", total_tickets=10_000)
  for work in worker:
      loss = my_loss(model, my_batch(work.ticket))
      loss.backward()
      worker.push(loss)

Options:
  --workers N      workers on this machine; short for workers=N (default 4)
  --run-dir DIR    run directory (default outputs/DATE/TIME of the current directory)
  -m MODULE        run a module, as python -m does
  KEY=VALUE        any key of ormo-rpc --help-all but model, dataset and task, which the script has; stronger than
                   what join says. What stands behind the script belongs to the script.

  ormo-rpc launch --workers 8 train.py --width 64           eight workers; --width is the script's own
  ormo-rpc launch checkpoint.resume=RUN_DIRECTORY train.py  go on from a checkpoint
  ormo-rpc launch role=worker server.address=HOST:PORT server.secret_file=RUN_DIRECTORY/secret train.py
                                                            one more worker for a run in progress
  torchrun --standalone --nproc-per-node=4 -m ormo_rpc launch train.py
                                                            each rank watches one process, rank 0 the server

What the script prints before join is shown once; from then on what each process prints is in RUN_DIRECTORY/logs/.
Exit status: 0 completed, 1 failed, 2 refused, 3 diverged, 130, 143 or 129 interrupted by Ctrl-C, SIGTERM or SIGHUP
(a checkpoint is left). More in docs/own_loop.md."""
OVERRIDES = "ORMO_RPC_OVERRIDES"
"""The variable with overrides that are stronger than those of `join`: a list as JSON, or words as in a shell."""
SCRIPTS = ("model", "dataset", "task")
"""Groups of the configuration whose parts are the script's."""
_KEY = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@-]*=")
_RUN_DIR = "hydra.run.dir"
_SWEEPS = ("--multirun", "-m")
_THREADS = "runtime.threads="


@dataclass(frozen=True, kw_only=True)
class Command:
    """The command line, as it was typed.

    Attributes:
        script: The script.
        overrides: Overrides of the configuration.
        run_dir: The run directory; None for a new one.
    """

    script: Script
    overrides: tuple[str, ...] = ()
    run_dir: str | None = None

    @property
    def threads(self) -> int:
        """The threads of each process, as far as this line tells."""
        given = [word.removeprefix(_THREADS) for word in self.overrides if word.startswith(_THREADS)]
        return int(given[-1]) if given and given[-1].isdecimal() and int(given[-1]) > 0 else 1


def parse(words: Sequence[str]) -> Command:
    """Read the words behind ``launch``.

    Raises:
        ConfigError: they are wrong, or there is no such script.
    """
    overrides: list[str] = []
    run_dir: str | None = None
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if option in ("--workers", "--run-dir"):
            if not equals:
                value = rest.pop(0) if rest else ""
            if option == "--workers":
                overrides.append(f"workers={_whole_number(value)}")
            else:
                run_dir = _folder(option, value)
        elif option == _RUN_DIR:
            run_dir = _folder(option, value)
        elif option.startswith("hydra"):
            raise ConfigError(f"{word}: got an option of hydra's, expected none but {_RUN_DIR}=DIR")
        elif word in _SWEEPS and (word != "-m" or not rest or _KEY.match(rest[0])):
            raise ConfigError(f"{word}: got a sweep, expected a single run: start one after the other; -m MODULE runs a module")
        elif word == "-m":
            return Command(script=_module(rest[0], rest[1:]), overrides=tuple(overrides), run_dir=run_dir)
        elif word.startswith("-"):
            raise ConfigError(f"{word}: got an unknown option, expected {USAGE}")
        elif _KEY.match(word):
            overrides.append(word)
        else:
            return Command(script=_file(word, rest), overrides=tuple(overrides), run_dir=run_dir)
    raise ConfigError(f"launch: got no script, expected {USAGE}")


def _file(name: str, arguments: Sequence[str]) -> Script:
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"{name}: there is no such file, expected a script, or KEY=VALUE")
    if path.is_dir() and not (path / "__main__.py").is_file():
        raise ConfigError(f"{name}: got a folder without __main__.py, expected a script")
    return Script(name=name, arguments=tuple(arguments))


def _module(name: str, arguments: Sequence[str]) -> Script:
    script = Script(name=name, module=True, arguments=tuple(arguments))
    script.set_module_path()
    first = name.partition(".")[0]
    try:
        found = all(each.isidentifier() for each in name.split(".")) and importlib.util.find_spec(first) is not None
    except ValueError:  # it is being run, as __main__
        found = False
    if not found:
        raise ConfigError(f"-m {name}: there is no such module, expected one on the module path")
    return script


def _whole_number(value: str) -> str:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"--workers: got {value or 'nothing'}, expected a whole number >= 1")
    return value


def _folder(option: str, value: str) -> str:
    if not value:
        raise ConfigError(f"{option}: got nothing, expected a folder")
    return value
