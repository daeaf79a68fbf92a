"""Train ResNet-20 on CIFAR by the methods of arXiv 2407.19234: ``python -m experiments.reproduce --root DIRECTORY``.

Runs are simulated, in the settings of ``conf/experiment/paper_*.yaml``: ``het`` has slow workers, ``hom`` none. Without
``--full``: CIFAR-10, K = 16, 15 epochs with milestones and warm-up scaled alike, 2 seeds. With ``--full``: both data sets,
K = 16 and 64, all 160 epochs, 3 seeds; refused where it would take longer than a week, unless ``--force`` is given.

With ``--device cuda`` data, workers and server are on a GPU and each gradient is one captured graph, under the same autocast;
the results then have ``cuda`` in their names. ``--jobs`` runs share the device, each in a process of its own.

Passes are computed under bfloat16 autocast; with ``--precision float32`` in float32, on a CPU compiled by Inductor, for those
that gain nothing from bfloat16. A run that is finished at either precision is not made again; a row of the table names the
precisions of its runs.

Every run has a folder under ``--work``, with checkpoints: a command that was killed goes on where it was when it is started
again, and finished runs are kept. So are those of earlier results (``--into``), perhaps of another machine; where their setting
or a rule has changed since, the command says so, and leaves them out with ``--replace``. The first runs are the comparison of
OrMo with synchronous SGD among slow workers.
``--seconds`` interrupts what runs when the time is up. ``--plan`` prints runs, estimated hours and what is done; ``--report``
writes ``reproduce.json``, ``.md`` and ``.png`` from what is finished, as does the end of the last run.

Each method has one learning rate, which was not tuned: with these a gradient moves the parameters by the same amount in all,
``eta`` without momentum and ``eta / (1 - beta)`` with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import gpu_machine
from benchmarks.measuring import ROOT, exit_on_sigterm
from experiments import at_once, common, reproduce_report
from experiments.on_device import ON_DEVICE, PRECISIONS, note_machine
from experiments.race.versions import run_version
from experiments.reproduce_report import ALL_EPOCHS, Entry, default_epochs
from experiments.resumable import ResumableRun, alone
from ormo_rpc import devices
from ormo_rpc.composing import compose
from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.report.table import as_text
from ormo_rpc.runtimes.job import Job

METHODS = ("ormo", "ssgdm", "asgd", "naive", "shifted", "smega2", "ormo_da")
"""The six of the paper's table, and the synchronous method of its figures; those that are run first come first."""
SETTINGS = ("het", "hom")
RATES = {"asgd": 0.1}
RATE = 0.01
"""The learning rate of a method that `RATES` does not have."""
MILESTONES = (80, 120)
WARMUP = 5
"""The schedule of the paper, in epochs of `ALL_EPOCHS`."""
TOO_LONG = 7 * 24
"""Hours above which a plan is refused without ``--force``."""
CONF = ROOT / "conf" / "experiment"
CHECKPOINTS = {"cpu": "checkpoint.every=200", "cuda": "checkpoint.every_seconds=30"}
"""A killed command loses what came after a checkpoint: 200 gradients are half a minute of an idle core."""
DETERMINED = ("experiment", "method", "seed", "epochs", "precision")
"""Keys of a run, in `Planned` and in the results."""
TIMED_GRADIENTS = 8
EVALUATION = 1 / 3
"""The cost of evaluating a sample, in that of its gradient: the forward pass alone."""


@dataclass(frozen=True)
class Planned:
    """One run of the plan. Runs that differ in precision alone are equal: one of them is enough.

    Attributes:
        experiment: The name of its file in ``conf/experiment``.
        method: One of `METHODS`.
        seed: Its seed.
        epochs: Its length.
        work: The folder of all runs.
        device: The device of data, workers and server.
        precision: That of its passes, one of `PRECISIONS`.
    """

    experiment: str
    method: str
    seed: int
    epochs: int
    work: Path
    device: str = "cpu"
    precision: str = field(default="bf16", compare=False)

    @property
    def lr(self) -> float:
        """Its learning rate."""
        return RATES.get(self.method, RATE)

    @property
    def overrides(self) -> tuple[str, ...]:
        """Those that determine its result."""
        scale = self.epochs / ALL_EPOCHS
        algorithm, scheduler = ("ormo", "sync") if self.method == "ssgdm" else (self.method, "async")
        return (
            *(*common.SIMULATED, f"experiment={self.experiment}", f"algorithm={algorithm}", f"scheduler={scheduler}"),
            *(f"train.epochs={self.epochs}", f"train.warmup_epochs={WARMUP * scale:g}"),
            f"train.lr_milestones=[{','.join(f'{epoch * scale:g}' for epoch in MILESTONES)}]",
            *(f"train.lr={self.lr}", f"seed={self.seed}"),
            *(*PRECISIONS[self.precision][self.device], *ON_DEVICE[self.device]),
        )

    @property
    def version(self) -> str:
        """A digest of what determines its result: overrides, and their `run_version`, which has the setting."""
        stated = [[*self.overrides], run_version(self.overrides)]
        return hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:16]

    @property
    def run(self) -> ResumableRun:
        """Its run."""
        name = "_".join([self.method, f"seed{self.seed}", *([self.precision] if self.precision != "bf16" else [])])
        return ResumableRun(self.work / self.experiment / name, self.overrides, self.version)


def planned(a: Namespace) -> list[Planned]:
    """The runs that are asked for, in their order: seed by seed, slow workers first."""
    datasets = a.datasets or (("cifar10", "cifar100") if a.full else ("cifar10",))
    numbers = a.workers or ((16, 64) if a.full else (16,))
    experiments = [f"paper_{data}_k{k}_{setting}" for data in datasets for k in numbers for setting in a.settings]
    epochs = a.epochs or default_epochs(a)
    return [
        Planned(experiment, method, seed, epochs, a.work, a.device, a.precision)
        for seed in a.seeds or ((0, 1, 2) if a.full else (0, 1))
        for experiment in experiments
        for method in a.methods
    ]


def entries(a: Namespace) -> dict[Planned, Entry]:
    """All runs in the results: those of the whole plan, those that are asked for, and those of earlier results.

    Each is the one that is further, here or in earlier results, at the precision that is asked for or at another one.

    Raises:
        ConfigError: earlier results cannot be read, or some of them, or a folder of a run, were made otherwise.
    """
    file = Path(a.into) / f"{reproduce_report.name_of(a)}.json"
    results = common.read_results(file, ("departures", "runs")) or {"runs": ()}
    runs: list[Entry] = [{"precision": "bf16", **each} for each in results["runs"]]  # older results do not have it
    before = {
        Planned(work=a.work, device=a.device, **{key: each[key] for key in DETERMINED}): each
        for each in runs
        if each["finished"] or each["epochs_done"]
    }
    changed = [each for each, entry in before.items() if not _counts(each, entry)]
    if changed and not a.replace:
        raise ConfigError(
            f"{file}: got {len(changed)} of {len(before)} runs of settings or rules that have changed since, such as "
            f"{changed[0].experiment}, {changed[0].method}, seed {changed[0].seed}, expected runs as they would be made now; "
            "leave them out with --replace, or name another folder by --into"
        )
    defaults = {"datasets": None, "workers": None, "settings": SETTINGS, "seeds": None, "methods": METHODS}
    everything = planned(Namespace(**{**vars(a), **defaults}))
    found = dict[Planned, Entry]()
    counted = {each: entry for each, entry in before.items() if each not in changed}
    for each in dict.fromkeys([*everything, *planned(a), *counted]):
        precisions = sorted(PRECISIONS, key=a.precision.__ne__)
        here = [reproduce_report.entry(replace(each, precision=precision), a) for precision in precisions]
        found[each] = max([*([counted[each]] if each in counted else []), *here], key=_progress)
    return found


def _counts(each: Planned, entry: Entry) -> bool:
    """A run of earlier results is as it would be made now."""
    there = each.method in METHODS and (CONF / f"{each.experiment}.yaml").is_file()
    return there and entry.get("version") == each.version


def _progress(entry: Entry) -> tuple[bool, float]:
    return entry["finished"], entry["epochs_done"]


def gradient_seconds(run: ResumableRun, where: Sequence[str]) -> tuple[float, float]:
    """Measure the time of a gradient here, and compute that of an epoch with its evaluation: the median of a few.

    Raises:
        ConfigError: the data cannot be read.
    """
    torch.set_num_threads(1)
    try:
        job = Job(compose([*run.overrides, *where]))
    except ValueError as error:
        raise ConfigError(f"{error}; dataset.root is --root here, dataset.verify=false is --repackaged") from error
    worker, reply = job.worker_here(), job.server(lambda _: None, lambda: 0.0).start()[0]
    worker.compute(reply)  # the first one is slower
    seconds: list[float] = []
    for _ in range(TIMED_GRADIENTS):
        began = time.perf_counter()
        worker.compute(reply)
        seconds.append(time.perf_counter() - began)
    gradient = statistics.median(seconds)
    evaluations = EVALUATION * len(job.data.test) / job.config.train.batch_size
    return gradient, gradient * (job.batches_per_epoch + evaluations)


def left(plan: Mapping[Planned, Entry]) -> list[Planned]:
    """The runs of a plan that are not finished."""
    return [each for each, entry in plan.items() if not entry["finished"]]


def hours(plan: Mapping[Planned, Entry], epoch_seconds: float) -> float:
    """The hours that what is left of a plan takes here, where a run that is further in earlier results begins anew."""
    return sum(each.epochs - reproduce_report.epochs_done(each.run.rows()) for each in left(plan)) * epoch_seconds / 3600


def show(plan: Mapping[Planned, Entry], where: Sequence[str]) -> None:
    """Print the runs that are asked for and what is done, and then the time that is left.

    Raises:
        ConfigError: the time cannot be measured, as the data cannot be read.
    """
    rows = [("setting", "method", "seed", "lr", "epochs", "done")]
    for each, entry in plan.items():
        done = str(entry["status"]) if entry["finished"] else f"{reproduce_report.epochs_done(each.run.rows()):.1f} epochs"
        rows.append((each.experiment, each.method, str(each.seed), f"{each.lr:g}", str(each.epochs), done))
    print(as_text(rows), flush=True)
    gradient, epoch_seconds = gradient_seconds(next(iter(plan)).run, where)
    hours_left = hours(plan, epoch_seconds)
    print(f"{len(plan)} runs; {gradient * 1000:.3g} ms a gradient here and now: {hours_left:.2g} hours are left")


def arguments(argv: Sequence[str] | None = None) -> Namespace:
    """The arguments of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--root", default="data", metavar="DIRECTORY", help="folder that holds cifar-10-batches-py")
    parser.add_argument("--repackaged", action="store_true", help="take files that differ from the original ones")
    parser.add_argument("--work", type=Path, metavar="DIRECTORY", help="folder of the runs; by default in outputs/")
    parser.add_argument("--full", action="store_true", help="the whole length, both data sets, K = 16 and 64, 3 seeds")
    parser.add_argument("--force", action="store_true", help="also where it takes longer than a week")
    parser.add_argument("--plan", action="store_true", help="print runs, estimated hours and what is done; run nothing")
    parser.add_argument(
        "--replace", action="store_true", help="leave runs out of the results whose setting or rule has changed"
    )
    parser.add_argument("--report", action="store_true", help="write the results of what is finished; run nothing")
    parser.add_argument("--epochs", type=common.at_least_one, help="length of each run; milestones and warm-up are scaled")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--datasets", nargs="+", choices=("cifar10", "cifar100"), metavar="NAME")
    parser.add_argument("--workers", type=int, nargs="+", choices=(16, 64), metavar="K")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, metavar="SETTING")
    parser.add_argument("--device", choices=tuple(ON_DEVICE), default="cpu", help="device of data, workers and server")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="bf16", help="precision of the passes")
    parser.add_argument("--jobs", type=common.at_least_one, default=1, help="runs at once")
    parser.add_argument("--seconds", type=float, default=math.inf, help="interrupt what runs after this time")
    a = parser.parse_args(argv)
    a.work = a.work or Path("outputs") / reproduce_report.name_of(a).replace("_", "-")
    return a


def work_through(plan: Mapping[Planned, Entry], where: Sequence[str], a: Namespace, lock: int) -> None:
    """Run what is left.

    Args:
        plan: The runs, in their order.
        where: Overrides that do not matter for their results.
        a: The arguments of the command line.
        lock: The lock of the folder of the runs.

    Raises:
        ConfigError: it takes too long, or a folder is another run's.
        RunFailed: it was interrupted.
    """
    runs = left(plan)
    if not runs:
        return
    if not a.force:
        gradient, epoch_seconds = gradient_seconds(runs[0].run, where)
        estimate = hours(plan, epoch_seconds)
        if estimate > TOO_LONG:
            raise ConfigError(
                f"--full: {len(runs)} runs at {gradient * 1000:.3g} ms a gradient would take {estimate / 24 / 7:.1f} weeks one "
                f"after another here, on {a.device}, expected at most one; take fewer --methods or --seeds, shorter runs with "
                "--epochs, a GPU with --device cuda, or --force"
            )
        print(f"{len(runs)} of {len(plan)} runs are left: about {estimate:.2g} hours one after another", flush=True)
    try:
        for ended in at_once.work_through([each.run for each in runs], where, jobs=a.jobs, seconds=a.seconds, lock=lock):
            print_ended(runs[ended.number], ended.seconds)
    finally:  # not before: it takes seconds
        if a.device == "cuda":
            note_machine(a.work, {**gpu_machine.about(), "jobs": a.jobs})


def print_ended(each: Planned, seconds: float) -> None:
    """Print what has become of a run."""
    summary = each.run.summary or {"status": "without a summary", "test_accuracy": None}
    accuracy = "no accuracy" if summary["test_accuracy"] is None else f"{summary['test_accuracy']:.2%}"
    took = f"{seconds / 60:.1f} minutes"
    print(f"{each.experiment} {each.method} seed {each.seed}: {summary['status']}, {accuracy}, {took}", flush=True)


def main() -> None:
    """Plan, run, and write the results."""
    a = arguments()
    exit_on_sigterm()
    where = (
        CHECKPOINTS[a.device],
        f"dataset.root={Path(a.root).absolute()}",
        *(["dataset.verify=false"] if a.repackaged else []),
    )
    try:
        found = entries(a)
        asked = {each: found[each] for each in planned(a)}
        if a.plan:
            show(asked, where)
            return
        if not a.report:
            devices.check(a.device, "--device")
            with alone(a.work) as lock:
                work_through(asked, where, a, lock)
        reproduce_report.write([*entries(a).values()], a)
    except ConfigError as error:
        print(f"experiments.reproduce: {error}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"experiments.reproduce: {error}; the same command goes on from there", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
