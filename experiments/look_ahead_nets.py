"""Compare look-aheads of ordered momentum on convolution nets: ``python -m experiments.look_ahead_nets --root DIRECTORY``.

Two jobs, simulated with K = 16 workers: ``cnn``, the small convolution net on Fashion-MNIST, 4 epochs; ``resnet20``, ResNet-20
on 12,800 images of CIFAR-10, 12 epochs. Batches of 64, constant rate, momentum 0.9.

Tuning, clocks and what counts are those of the race (`experiments.race`): each rule is run with every rate of one grid with a
seed of its own, and judged by the time to an accuracy on held-out samples; the seeds that are reported are evaluated on the
test split. With ``--device cuda`` each gradient is one captured graph, on data that are on the GPU. The passes of ResNet-20 are
computed under bfloat16 autocast; with ``--precision float32`` as `experiments.reproduce` says.

Every finished run is kept under ``--work``, and not made again: a command that was ended goes on where it was. Earlier results
(``--into``), perhaps of another machine, device or precision, count as well; the table says where each row was made. ``--jobs``
rules are run at once, each in a process that makes their runs one after another. ``--seconds`` begins no run after this time.
``--report`` writes ``look_ahead_nets.json`` and ``.md`` from earlier results and the finished runs of its ``--device`` and
``--precision``, as the end of each rule does.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from benchmarks import gpu_machine
from experiments import common
from experiments.look_ahead_nets_report import page
from experiments.on_device import MACHINE, ON_DEVICE, PRECISIONS, machine_of, note_machine
from experiments.race.contenders import CONTENDERS, Unit
from experiments.race.earlier import earlier_rows
from experiments.race.figures import Row
from experiments.race.runs import Missing, Record, Store
from experiments.race.setup import Setup
from experiments.race.units import MOST_SEEDS, content, outcome
from experiments.resumable import alone
from ormo_rpc import devices
from ormo_rpc.errors import ConfigError, one_line

NAME = "look_ahead_nets"
"""The name of the results' files."""
WORKERS = 16
SETTINGS = ("exponential", "one_slow")
RULES = ("ormo", "ormo_la", "ddp_nesterov", "smega2", "dana", "ddp", "m_sync_nesterov")
"""Names of the race's contenders, in the order in which they are run; the last one has three times the budget."""


def _rates(middle: float) -> dict[int, tuple[float, ...]]:
    """Rates of a step with the mean of a round, in the order in which they are tried."""
    return {WORKERS: (middle, middle / 2, middle * 2, middle / 4, middle * 4)}


@dataclass(frozen=True)
class Net:
    """A job.

    Attributes:
        folder: The folder of its data, in that of the data sets.
        setup: Its job, as the race has them.
        most: Held-out samples by which a rate is chosen, at most; None for all.
        large: Its passes take long: ``--precision`` is for them. Those of others are plain float32.
        workers: K.
    """

    folder: str
    setup: Setup
    most: int | None = None
    large: bool = False
    workers: int = WORKERS


NETS: Mapping[str, Net] = {
    # Whole batches: 53,760 = 840 x 64 samples are trained on.
    "cnn": Net(
        "FashionMNIST",
        Setup(
            job=("dataset=fashion_mnist", "model=cnn", "dataset.validation=6240"),
            epochs=4,
            targets=(0.83, 0.85, 0.87),
            target=0.85,
            tuning_target=0.85,
            rates=_rates(0.04),
            tuning_seeds=(1000,),
        ),
    ),
    "resnet20": Net(
        "cifar-10-batches-py",
        Setup(
            job=("dataset=cifar10", "model=resnet20", "dataset.validation=37200"),
            epochs=12,
            targets=(0.35, 0.4, 0.45),
            target=0.35,
            tuning_target=0.35,
            rates=_rates(0.16),
            tuning_seeds=(1000,),
        ),
        most=5000,
        large=True,
    ),
}


@dataclass(frozen=True)
class Planned:
    """A rule on a net, in a setting."""

    net: str
    unit: Unit

    @override
    def __str__(self) -> str:
        return f"{self.net}, {self.unit.setting}, {CONTENDERS[self.unit.contender].label}"


class NetStore(Store):
    """A store that tells of each run that it makes."""

    @override
    def simulate(self, overrides: Sequence[str], split: str) -> Record:
        began = time.monotonic()
        found = super().simulate(overrides, split)
        told = [each for each in overrides if each.startswith(("model=", "algorithm", "scheduler", "train.lr=", "seed="))]
        took, last = time.monotonic() - began, found.last(3)
        print(f"{took:5.1f} s  {' '.join(told)} on {split}: {found.status}, {last:.2%} in the end", flush=True)
        return found


def planned(nets: Iterable[str], settings: Iterable[str] = SETTINGS, rules: Iterable[str] = RULES) -> list[Planned]:
    """The units in their order: what must not be missing comes first."""
    return sorted(
        (Planned(net, Unit(setting, NETS[net].workers, rule)) for setting in settings for net in nets for rule in rules),
        key=lambda each: (each.unit.contender == RULES[-1], SETTINGS.index(each.unit.setting)),
    )


def setup_of(net: str, a: Namespace) -> Setup:
    """The job of a net on the device and at the precision that were asked for."""
    asked = NETS[net]
    precision = PRECISIONS[a.precision][a.device] if asked.large else ()
    return dataclasses.replace(asked.setup, where=(*precision, *ON_DEVICE[a.device]), seeds=tuple(range(a.seeds)))


def store_of(net: str, a: Namespace, until: float | None) -> Store:
    """The runs of a net.

    Args:
        net: The net.
        a: The arguments of the command line.
        until: Time on the monotonic clock after which no run is begun; None: runs are read, not made.
    """
    asked = NETS[net]
    if until is None:
        return NetStore(a.work, None, most=asked.most)
    root = next((root for root in a.root if (root / asked.folder).is_dir()), a.root[0])
    more = ("dataset.verify=false",) if a.repackaged else ()
    return NetStore(a.work, str(root.absolute()), until, most=asked.most, more=more)


Earlier = Mapping[str, Mapping[Unit, Row]]
"""The rows of earlier results by net."""


def earlier(a: Namespace) -> tuple[Earlier, list[Mapping[str, Any]]]:
    """The rows of earlier results, and their machines.

    Raises:
        ConfigError: they cannot be read, or some of them do not count.
    """
    file = a.into / f"{NAME}.json"
    results = common.read_results(file, ("environments", "nets"))
    if results is None:
        return {}, []
    rows = {
        net: earlier_rows(file, results["nets"].get(net), setup_of(net, a), most=NETS[net].most, replace=a.replace)
        for net in NETS
    }
    return rows, results["environments"]


def run(planned: Planned, a: Namespace, until: float, before: Earlier) -> str:
    """Run a unit in a process of its own, and say how it went."""
    store = store_of(planned.net, a, until)
    try:
        found = outcome(planned.unit, setup_of(planned.net, a), store, before.get(planned.net, {}).get(planned.unit))
    except Missing:
        return f"time is over, after {store.made} new runs"
    return f"{store.made} new runs, rate {found['rate']:g}"


def work_through(plan: Sequence[Planned], a: Namespace) -> list[str]:
    """Run what is left, and write the results after each unit; return a line for each that failed.

    Raises:
        ConfigError: earlier results cannot be read, or some of them do not count.
    """
    began, failed = time.monotonic(), dict[str, str]()
    call = functools.partial(run, a=a, until=began + a.seconds, before=earlier(a)[0])
    for each, done in common.in_processes(call, plan, a.jobs):
        error = done.exception()
        told = done.result() if error is None else one_line(error)
        if error is not None:
            failed.setdefault(told, str(each))
        print(f"{time.monotonic() - began:5.0f} s  {each}: {told}", flush=True)
        if a.device == "cuda" and has_runs(a) and not (a.work / MACHINE).is_file():
            note_machine(a.work, {**gpu_machine.about(), "jobs": a.jobs})
        write(a)
    return [f"{name}: {told}" for told, name in failed.items()]


def has_runs(a: Namespace) -> bool:
    """Say whether runs were made in the folder of the runs."""
    return any(file.name != MACHINE for file in a.work.glob("*.json"))


def write(a: Namespace) -> None:
    """Write the results of all that is finished, whatever was asked for.

    Raises:
        ConfigError: earlier results cannot be read, or some of them do not count.
    """
    before, machines = earlier(a)
    here = [machine_of(a)] if has_runs(a) else []
    nets = dict[str, Any]()
    for net in NETS:
        units = [each.unit for each in planned([net])]
        nets[net] = content(units, setup_of(net, a), store_of(net, a, None), before.get(net, {}))
    found = {"environments": [*machines, *(each for each in here if each not in machines)], "nets": nets}
    common.write_results(a.into / f"{NAME}.json", common.row_by_row(found))
    common.write_results(a.into / f"{NAME}.md", page(found))


def arguments(argv: Sequence[str] | None = None) -> Namespace:
    """The arguments of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--root",
        type=Path,
        nargs="+",
        default=[Path("data")],
        metavar="DIRECTORY",
        help="folders, one of which holds FashionMNIST/raw, one cifar-10-batches-py",
    )
    parser.add_argument("--repackaged", action="store_true", help="take files that differ from the original ones")
    parser.add_argument(
        "--work", type=Path, metavar="DIRECTORY", help="folder of the finished runs, of one device; by default in outputs/"
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=[*NETS], metavar="NAME")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, metavar="SETTING")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES, metavar="RULE")
    parser.add_argument("--seeds", type=common.at_least_one, default=3, metavar="N", help="reported seeds, by default 3")
    parser.add_argument("--device", choices=tuple(ON_DEVICE), default="cpu", help="device of data, workers and server")
    parser.add_argument(
        "--precision", choices=tuple(PRECISIONS), default="bf16", help="precision of the passes of resnet20, by default bf16"
    )
    parser.add_argument("--jobs", type=common.at_least_one, default=1, help="rules that are run at once")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after this time")
    parser.add_argument("--replace", action="store_true", help="leave rows out of the results whose job or rule has changed")
    parser.add_argument("--report", action="store_true", help="write the results of what is finished; run nothing")
    a = parser.parse_args(argv)
    if a.seeds > MOST_SEEDS:
        parser.error(f"argument --seeds: got {a.seeds}, expected at most {MOST_SEEDS}")
    a.work = a.work or Path("outputs") / "-".join([*NAME.split("_"), *([a.device] if a.device != "cpu" else [])])
    return a


def main() -> None:
    """Run, and write the results."""
    a = arguments()
    common.folder(a.into)
    plan = planned(a.nets, a.settings, a.rules)
    try:
        if a.report:
            write(a)
            return
        devices.check(a.device, "--device")
        with alone(a.work):
            failed = work_through(plan, a)
    except ConfigError as error:
        print(f"experiments.look_ahead_nets: {error}", file=sys.stderr)
        sys.exit(2)
    print((a.into / f"{NAME}.md").read_text())
    if failed:
        print("\n".join(f"experiments.look_ahead_nets: {line}" for line in failed), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
