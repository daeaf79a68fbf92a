"""The texts of ``python launch.py --help`` and ``--help-all``."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence

from ormo_rpc.config.schema import GROUPS, Config
from ormo_rpc.config.write_conf import conf_dir, options_of, sections, summary_of
from ormo_rpc.options import Section, parts

WIDTH = 110
LARGEST_SHOWN = 4
"""The size of the largest family of files whose names are listed one by one."""


def help_text(command: str = "python launch.py") -> str:
    """Explain the command on one screen: examples, the groups with their names, and the way to the rest.

    Args:
        command: The command as it is typed: ``python launch.py``, or the name of the console script.
    """
    lines = [
        _HEADER,
        "",
        *_examples(_EXAMPLES, command),
        "",
        *_groups(),
        "",
        *_keys(),
        "",
        *_examples(_MORE, command),
        "",
        _FOOTER,
    ]
    return "\n".join(lines)


def list_of_keys() -> str:
    """List every key with its meaning and default."""
    lines = [
        "Keys, set as KEY=VALUE; the default is in brackets. Those of a group belong to the part named above them.",
        "K is the number of gradients in flight: workers x (1 + worker.prefetch).",
    ]
    for path, choice, section in sections():
        lines += ["", f"{path}={choice}: {summary_of(section)}" if choice else f"{path or 'top level'}: {summary_of(section)}"]
        lines += [_described(section, *option) for option in options_of(section)]
    return "\n".join(lines)


def _groups() -> Iterator[str]:
    yield "Groups, chosen as GROUP=NAME (your own class: GROUP._target_=my_module.MyClass):"
    names = {group: ", ".join(parts(group)) for group in GROUPS}
    extra = {path.name for path in conf_dir().iterdir() if path.is_dir()} - {*GROUPS, "hydra"}
    for group in sorted(extra):
        names[group] = ", ".join(_families(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))))
    for group, text in names.items():
        yield textwrap.fill(text, WIDTH, initial_indent=f"  {group:<15}", subsequent_indent=" " * 17)


def _families(names: Sequence[str]) -> Iterator[str]:
    """Yield sorted names, one entry in place of those of a large family: ``paper_*`` for more than four that begin so."""
    for family, members in itertools.groupby(names, key=lambda name: name.partition("_")[0]):
        several = list(members)
        yield from [f"{family}_*"] if len(several) > LARGEST_SHOWN else several


def _keys() -> Iterator[str]:
    yield "Keys, set as KEY=VALUE:"
    tops = [name for name, _, _ in options_of(Config)]
    yield textwrap.fill(", ".join(tops), WIDTH, initial_indent="  ", subsequent_indent="  ")
    inner = [f"{path}.*" for path, choice, _ in sections() if path and not choice]
    yield textwrap.fill(
        ", ".join([*inner, *(f"{group}.*" for group in GROUPS)]), WIDTH, initial_indent="  ", subsequent_indent="  "
    )


def _described(section: type[Section], name: str, default: object, doc: str) -> str:
    return f"  {section.key(name):<32} {doc} [{'none' if default is None else default}]"


def _examples(examples: Sequence[tuple[str, str]], command: str) -> Iterator[str]:
    script = command.removeprefix("python ")
    for example, doc in examples:
        line = "  " + example.format(command=command, script=script if script != command else f"--no-python {command}")
        yield from [f"{line:<{COLUMN}}{doc}"] if len(line) < COLUMN or not doc else [line, " " * COLUMN + doc]


COLUMN = 53
"""Of the meanings of the examples."""
_HEADER = "Asynchronous data-parallel training with ordered momentum (OrMo): a parameter server and its workers."
_EXAMPLES = [
    ("{command}", "ormo, async, 4 workers, digits, on this machine"),
    ("{command} algorithm=ormo_da workers=8 dataset=fashion_mnist model=cnn train.epochs=5 seed=1", ""),
    ("{command} scheduler=sync", "synchronous SGD with momentum (SSGDm)"),
    ("{command} runtime=ddp", "torch's DistributedDataParallel, to compare with"),
    ("{command} runtime=sim workers=64", "a virtual cluster in this process"),
    ("{command} -m algorithm=asgd,naive seed=0,1", "a sweep of four runs"),
    ("torchrun --standalone --nproc-per-node=4 {script}", "rank 0 serves, ranks 1 to 3 work"),
    (
        "{command} role=worker server.address=HOST:PORT server.secret_file=RUN_DIRECTORY/secret",
        "one more worker for a run in progress",
    ),
    ("ormo-rpc launch --workers 4 script.py", "a training loop of your own: ormo-rpc launch --help"),
    ("{command} runtime=replay replay.run=RUN_DIRECTORY", "a recorded run again, compared bit for bit"),
    ("python -m ormo_rpc.report RUN_DIRECTORY", "picture of a run; of several: table, curves, page"),
    ("python -m ormo_rpc.evaluate RUN_DIRECTORY", "metrics of a run or checkpoint"),
]
_MORE = [
    ("{command} --help-all", "every key with its meaning and default; also in conf/"),
    ("{command} algorithm=dana --cfg job", "the configuration that would run"),
    ("{command} --hydra-help", "options of hydra"),
]
_FOOTER = """\
A run directory, outputs/DATE/TIME, has config.yaml, metrics.jsonl, trace.jsonl, summary.json, checkpoints/.
Exit status: 0 completed, 1 failed (of a sweep: any job), 2 refused, 3 diverged, 130, 143 or 129 interrupted
by Ctrl-C, SIGTERM or SIGHUP (a checkpoint is left; resume with checkpoint.resume=RUN_DIRECTORY).
More in README.md and docs/: algorithms.md, your_code.md (what a model, data set or script may do),
extending.md (your own parts), sweeps.md (parallel, Optuna, wandb), nodes.md (several machines),
environments.md (Slurm, systemd, containers), comparing.md (the report), guarantees.md, glossary.md (words)."""
