"""The command line: hydra composes the configuration, the schema checks it, a runtime runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig

from ormo_rpc.config.renamed import refuse_renamed
from ormo_rpc.config.schema import GROUPS, Config, parse_config, schema_of
from ormo_rpc.errors import ConfigError
from ormo_rpc.options import Section
from ormo_rpc.runtimes.torchrun import Torchrun


def config_dir() -> Path:
    """The folder ``conf``: inside the package where it was installed as a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())


def register_schemas() -> None:
    """Tell hydra the typed schema, so that a typo or a wrong type is refused while it composes."""
    store = ConfigStore.instance()
    root = schema_of(Config)
    root.update(dict.fromkeys(GROUPS, MISSING))  # the files of conf/ fill them
    store.store(name="schema", node=root)
    for group, choices in GROUPS.items():
        for name, section in choices.items():
            store.store(group=f"schema/{group}", name=name, node=schema_of(section), package=group)
    store.store(
        group="hydra/help", name="ormo_rpc", node={"app_name": "launch.py", "template": help_text()}, package="hydra.help"
    )


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration that ``python launch.py`` would run with these overrides, for use from Python.

    Raises:
        ConfigError: an override is wrong.
    """
    refuse_renamed(overrides)
    register_schemas()
    with hydra.initialize_config_dir(str(config_dir().absolute()), version_base="1.3"):
        try:
            return parse_config(hydra.compose("config", list(overrides)))
        except HydraException as error:
            raise ConfigError(" ".join(f"{error}: {error.__cause__ or ''}".split())) from None


def help_text() -> str:
    """``launch.py --help``: what it does, the groups, and every key with default and meaning."""
    lines = [_HEADER, "Groups (chosen as GROUP=NAME; the first column is the name):"]
    for group, choices in GROUPS.items():
        described = {name: _descriptions(section) for name, section in choices.items()}
        common = [line for line in next(iter(described.values())) if all(line in lines for lines in described.values())]
        lines += [f"  {group}", *(f"      {line}" for line in common)]
        for name, section in choices.items():
            (doc,) = (f.metadata["doc"] for f in dataclasses.fields(section) if f.name == "name")
            lines.append(f"    {name:<18}{doc}")
            lines += [f"      {line}" for line in described[name] if line not in common]
    for folder in sorted(path for path in config_dir().iterdir() if path.is_dir() and path.name not in GROUPS):
        lines.append(f"  {folder.name:<18}{', '.join(sorted(path.stem for path in folder.glob('*.yaml')))}")
    lines += ["", "Keys (set as KEY=VALUE; defaults in brackets):"]
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            continue
        if field.metadata:
            lines.append(f"  {_describe(Config, field)}")
        else:
            section: type[Section] = field.default_factory  # pyright: ignore[reportAssignmentType] # a class
            lines += [f"  {line}" for line in _descriptions(section)]
    return "\n".join([*lines, "", _FOOTER]).replace("$", "$$")


def _descriptions(section: type[Section]) -> list[str]:
    chosen = section.PATH in GROUPS  # by its name
    return [_describe(section, field) for field in dataclasses.fields(section) if field.name != "name" or not chosen]


def _describe(section: type[Section], field: dataclasses.Field[Any]) -> str:
    made = field.default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING
    default = field.default_factory() if made else field.default  # pyright: ignore[reportCallIssue] # it is one of the two
    shown = getattr(default, "value", default)
    return f"{section.key(field.name):<31} {field.metadata['doc']} [{'none' if shown is None else shown}]"


def main() -> None:
    """Run ``launch.py`` with this process's arguments."""
    for number in range(3):  # a closed standard stream would lend its number to the next file that is attach
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    try:
        refuse_renamed(sys.argv[1:])
    except ConfigError as error:
        print(f"launch.py: {error}", file=sys.stderr)
        sys.exit(2)
    register_schemas()
    torchrun = Torchrun.from_environment()
    if (torchrun is not None and torchrun.rank > 0) or "role=worker" in sys.argv[1:]:
        # Who starts the server alone makes the run directory and its logs.
        sys.argv += [
            "hydra.run.dir=.",
            "hydra.output_subdir=null",
            "hydra/job_logging=disabled",
            "hydra/hydra_logging=disabled",
        ]
    began = False

    @functools.wraps(_job)
    def job(values: DictConfig) -> None:
        nonlocal began
        began = True
        _job(values)

    try:
        with contextlib.suppress(KeyboardInterrupt):
            _hydra_main(job)
            return
        print("launch.py: interrupted before anything was started", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        # Hydra refuses a wrong configuration with status 1, which is ours for a run that failed.
        sys.exit(2 if end.code == 1 and not began else end.code)


def _hydra_main(job: Callable[[DictConfig], None]) -> None:
    """Let hydra compose the configuration from our arguments, and call the job."""
    hydra.main(version_base="1.3", config_path=str(config_dir().absolute()), config_name="config")(job)()


def _job(values: DictConfig) -> None:
    """One job of hydra: a single run, or one of a sweep."""
    from ormo_rpc.runtimes import RunFailed, run  # hydra answers --help without loading the runtimes

    mode = HydraConfig.get()
    sweep = mode.mode is RunMode.MULTIRUN
    try:
        if sweep and Torchrun.from_environment() is not None:
            raise ConfigError("-m: got a sweep under torchrun, expected a single run; start sweeps with python launch.py -m")
        config, run_dir = parse_config(values), Path(mode.runtime.output_dir)
        if _on_terminal():
            print(f"launch.py: starting the processes of {run_dir}", file=sys.stderr)
        summary = run(config, run_dir)
    except (ConfigError, RunFailed) as error:
        print(f"launch.py: {error}", file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, RunFailed) else 2)
    if summary:
        with contextlib.suppress(BrokenPipeError):  # whoever read our output has heard enough
            print(_result(summary, run_dir), flush=True)
    if summary.get("status") == "diverged" and not sweep:
        print("launch.py: the parameters diverged; lower train.lr or train.momentum, or set train.clip_norm", file=sys.stderr)
        sys.exit(3)


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # pyright: ignore[reportUnnecessaryComparison] # None where it was closed


def _result(summary: dict[str, Any], run_dir: Path) -> str:
    accuracy, loss = summary["test_accuracy"], summary["train_loss"]
    return (
        f"{summary['status']}: {summary['algorithm']} ({summary['scheduler']}), {summary['num_workers']} workers, "
        f"{summary['dataset']}, {summary['model']}: {summary['iterations']} iterations in {summary['wall_seconds']:.1f} s, "
        f"mean delay {summary['delay_mean']:.1f}, training loss {'-' if loss is None else f'{loss:.4f}'}, "
        f"test accuracy {'-' if accuracy is None else f'{accuracy:.2%}'}\nrun directory: {run_dir}"
    )


_HEADER = """launch.py - asynchronous data-parallel training with ordered momentum (OrMo)

  python launch.py                                    ormo, async, 4 workers, digits, on this machine
  python launch.py algorithm=ormo_da workers=8 dataset=fashion_mnist model=cnn train.epochs=5 seed=1
  python launch.py scheduler=sync                     synchronous SGD with momentum (SSGDm)
  python launch.py heterogeneity=one_slow             one worker ten times slower than the others
  python launch.py -m algorithm=asgd,naive,ormo seed=0,1,2                   a sweep of nine runs
  torchrun --standalone --nproc-per-node=4 launch.py  rank 0 serves, ranks 1 to 3 work
  python launch.py role=worker server.address=HOST:PORT server.secret_file=RUN_DIRECTORY/secret
                                                      one more worker for a run that goes on
  python -m ormo_rpc.evaluate RUN_DIRECTORY           test accuracy of a run or checkpoint
"""

_FOOTER = """A run directory (outputs/DATE/TIME, printed at the end) holds config.yaml, metrics.jsonl, trace.jsonl,
processes.json, logs/, checkpoints/, summary.json and the wandb run.
Exit status: 0 the run met its end, 1 it could not, 2 wrong configuration, 3 diverged, 130 interrupted
(a checkpoint is left; go on with checkpoint.resume=RUN_DIRECTORY).
--cfg job prints the configuration; further options of hydra: --hydra-help."""
