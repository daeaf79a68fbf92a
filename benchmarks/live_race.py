"""Race live asynchronous training against torch's DistributedDataParallel: ``make live-race``.

Both have the same data, model, seeds, tickets, processes of this machine, and slow worker, which sleeps (f - 1) times its own
processor time. In each round every contender trains once, and the order alternates. What counts is the time to a test accuracy,
as the mean of some evaluations in a row, on the run's clock: from the first ticket to the last gradient of the parameters that
reach it. Evaluations are off that clock: DistributedDataParallel stands still for them (`runtime=ddp`); a parameter server
leaves checkpoints, which are evaluated when the run is over. Writes ``results/live_race.json`` and ``.md`` after every run.

Learning rates are those of ``--lr``. With several for a contender the best is chosen before, by the accuracy on held-out
samples after ``--tuning-iterations`` in the simulator, where `m_sync` stands for DistributedDataParallel: its updates are the
same. With ``--resume`` the runs and learning rates in the results are kept, if they are of the same commit without changes and
of the same machine, and what is missing is run: a round at a time, say.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import in_words, load
from benchmarks.measuring import RESULTS, conditions, exact, exit_on_sigterm, spread
from ormo_rpc import train
from ormo_rpc.config.parsing import load_config
from ormo_rpc.report.table import as_markdown
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.targets import Targets
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import read_trace

TUNING_SEED = 1000
"""Of the simulations that choose a learning rate; the races have the seeds 0, 1, ..."""
VALIDATION = 0.1
"""The part of the training samples by which it is chosen."""
NEVER = 10**9
"""More iterations than a run has: the interval of evaluations that are not to take place, and the checkpoints that are kept."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One side of the race.

    Attributes:
        live: Its overrides.
        simulated: Those of simulations with the same updates.
        lr: Learning rates to choose from.
    """

    live: Sequence[str]
    simulated: Sequence[str]
    lr: Sequence[float]

    @property
    def evaluates(self) -> bool:
        """True where evaluations of the run itself are off its clock."""
        return "runtime=ddp" in self.live


_RATES = (0.02, 0.04, 0.08)
_RATES_OF_SUMS = (0.005, 0.01, 0.02)
"""A quarter of them: with K = 4 gradients each, where DistributedDataParallel has their mean."""
CONTENDERS: Mapping[str, Contender] = {
    "ddp": Contender(live=["runtime=ddp"], simulated=["algorithm=m_sync"], lr=_RATES),
    "ddp_nesterov": Contender(
        live=["runtime=ddp", "runtime.nesterov=true"], simulated=["algorithm=m_sync", "algorithm.nesterov=true"], lr=_RATES
    ),
    "ddp_proportional": Contender(
        live=["runtime=ddp", "runtime.shares=proportional"], simulated=["algorithm=m_sync"], lr=_RATES
    ),
    "ormo": Contender(live=["algorithm=ormo"], simulated=["algorithm=ormo"], lr=_RATES_OF_SUMS),
    "ormo_la": Contender(live=["algorithm=ormo_la"], simulated=["algorithm=ormo_la"], lr=_RATES_OF_SUMS),
}


@dataclass(frozen=True, kw_only=True)
class Race:
    """The setting.

    Attributes:
        overrides: Of every run.
        target: The test accuracy.
        every: Gradients from one evaluation to the next.
        smooth: Evaluations of which the mean counts.
    """

    overrides: Sequence[str]
    target: float
    every: int
    smooth: int

    def run(self, contender: Contender, lr: float, seed: int) -> dict[str, Any]:
        """Train live once; return seconds and gradients to the target, None where it was not reached, and rates."""
        words = [*self._all(lr, seed), *contender.live]
        with tempfile.TemporaryDirectory(prefix="live_race_") as folder:
            run_dir = Path(folder) / "run"
            if contender.evaluates:
                found = train([*words, f"evaluate.every={self.every}"], run_dir=run_dir)
                reached = found
            else:
                kept = [f"checkpoint.every={self.every}", "checkpoint.every_seconds=0", f"checkpoint.keep={NEVER}"]
                found = train([*words, *kept, f"evaluate.every={NEVER}"], run_dir=run_dir)
                reached = evaluated(run_dir)
        return {
            "seconds": reached["seconds_to"][repr(self.target)],
            "gradients": reached["gradients_to"][repr(self.target)],
            "updates_per_second": found["updates_per_second"],
            "test_accuracy": found["test_accuracy"],
            "status": found["status"],
        }

    def tuned(self, contender: Contender, iterations: int) -> tuple[float, dict[str, float]]:
        """Return the learning rate with the best accuracy on held-out samples after so many gradients, and those of all."""
        if len(contender.lr) == 1:
            return contender.lr[0], {}
        accuracy: dict[str, float] = {}
        for lr in contender.lr:
            held_out = [f"dataset.validation={VALIDATION}", f"evaluate.every={NEVER}", f"train.max_iterations={iterations}"]
            with tempfile.TemporaryDirectory(prefix="live_race_") as folder:
                words = [*self._all(lr, TUNING_SEED), *contender.simulated, "runtime=sim", *held_out]
                found = train(words, run_dir=Path(folder) / "run")
            accuracy[str(lr)] = found["val_accuracy"] if found["status"] == "completed" else 0.0
            print(f"{' '.join(contender.simulated)}, lr {lr}: {accuracy[str(lr)]:.4f}", file=sys.stderr, flush=True)
        return max(contender.lr, key=lambda lr: accuracy[str(lr)]), accuracy

    def _all(self, lr: float, seed: int) -> list[str]:
        targets = [f"evaluate.targets=[{self.target}]", f"evaluate.smooth={self.smooth}"]
        return [*self.overrides, *targets, f"train.lr={lr}", f"seed={seed}", "logger=none", "logger.progress=false"]


def evaluated(run_dir: Path) -> dict[str, Any]:
    """Evaluate the checkpoints of a run that is over until its targets are reached; return when they were."""
    config = load_config(run_dir / "config.yaml")
    job = Job(config)
    evaluator, targets = job.evaluator(), Targets(config, job.metric)
    assert evaluator is not None, "its workers compute"
    seconds = {event["iteration"] + 1: event["seconds"] for event in read_trace(run_dir)[1] if event["event"] == "apply"}
    for each in sorted(checkpoint.complete(run_dir), key=checkpoint.iteration_of):
        state = checkpoint.read(each, checkpoint.SERVER)
        targets.add(state["iteration"], seconds[state["iteration"]], evaluator(state["params"], state["buffers"]))
        if None not in targets.summary_entries()["seconds_to"].values():
            break
    return targets.summary_entries()


def ratios(runs: Sequence[Mapping[str, Any]], name: str, other: str) -> list[float]:
    """The time of one contender over that of another, in each round in which both have reached the target."""
    by_round: dict[int, dict[str, float | None]] = {}
    for run in runs:
        by_round.setdefault(run["round"], {})[run["contender"]] = run["seconds"]
    return [mine / its for each in by_round.values() if (mine := each.get(name)) and (its := each.get(other))]


def as_text(content: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    runs: Sequence[Mapping[str, Any]] = content["runs"]
    names = list(dict.fromkeys(run["contender"] for run in runs))  # the first one in the order of `CONTENDERS` is compared with
    rows: list[tuple[str, ...]] = [
        ("contender", "learning rate", "seconds to the target", f"ratio to {names[0]}", "gradients", "gradients/s", "reached")
    ]
    for name in names:
        own = [run for run in runs if run["contender"] == name]
        reached = [run for run in own if run["seconds"] is not None]
        rows.append(
            (
                *(name, f"{own[0]['lr']:g}", spread([run["seconds"] for run in reached], ".1f")),
                spread(ratios(runs, name, names[0]), ".3f"),
                spread([run["gradients"] for run in reached], ",.0f"),
                spread([run["updates_per_second"] for run in own], ",.0f"),
                f"{len(reached)} of {len(own)}",
            )
        )
    about = {**content["machine"], **content["versions"], "load at start": content["load_at_start"]}
    text = [
        *(f"# Live race to a test accuracy of {content['target']:g}, {content['date'][:10]}", ""),
        *(in_words({**about, "load at end": content["load_at_end"]}), ""),
        f"All runs: `{' '.join(content['overrides'])}`.",
        f"An evaluation every {content['every']} gradients, off the clock, and the mean of {content['smooth']} counts. Medians",
        "over rounds, with the lowest and the highest; ratios are within a round.",
        *("", as_markdown(rows)),
    ]
    return "\n".join(text) + "\n"


def write(content: Mapping[str, Any], folder: Path) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "live_race.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "live_race.md").write_text(as_text(content))


def kept(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The runs of the results in a folder, and how their rates were chosen; nothing where setting or code are others."""
    file = folder / "live_race.json"
    former: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    same = all(former.get(key) == content[key] for key in ("overrides", "target", "every", "smooth", "machine", "versions"))
    return {key: former[key] for key in ("tuning", "runs")} if same and exact(content["versions"]["commit"]) else {}


def rates(words: Sequence[str]) -> dict[str, list[float]]:
    """The learning rates by contender, of words such as ``ormo=0.01,0.02``.

    Raises:
        ValueError: a word names no contender, or no numbers.
    """
    found: dict[str, list[float]] = {}
    for word in words:
        name, _, values = word.partition("=")
        if name not in CONTENDERS:
            raise ValueError(f"--lr: got {name!r}, expected one of {', '.join(CONTENDERS)}, as in ormo=0.01,0.02")
        try:
            found[name] = [float(each) for each in values.split(",")]
        except ValueError:
            raise ValueError(f"--lr: got {word!r}, expected numbers after {name}, as in {name}=0.01,0.02") from None
    return found


def run_rounds(
    race: Race, chosen: Mapping[str, tuple[Contender, float]], rounds: int, content: dict[str, Any], folder: Path
) -> None:
    """Run what is missing, the contenders in another order in every second round, and write the results after each run.

    Args:
        race: The setting.
        chosen: The contenders by name, with their learning rates.
        rounds: The number of rounds.
        content: The results, to which runs are added.
        folder: Receives them.
    """
    names, runs = list(CONTENDERS), content["runs"]
    for number in range(rounds):
        for name in chosen if number % 2 == 0 else reversed(list(chosen)):
            contender, lr = chosen[name]
            if any((run["round"], run["contender"]) == (number, name) for run in runs):
                continue
            found = {"round": number, "contender": name, "lr": lr, **race.run(contender, lr, number)}
            runs.append(found)
            runs.sort(key=lambda run: (run["round"], names.index(run["contender"])))
            content["load_at_end"] = load()
            write(content, folder)
            print(f"round {number}, {name}: {found['seconds']} s, {found['gradients']} gradients", file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", metavar="DIRECTORY", help="with the data sets; by default data")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=["ddp", "ormo"], metavar="NAME")
    parser.add_argument("--lr", nargs="+", default=[], metavar="NAME=LR,LR", help="learning rates to choose from, by contender")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--target", type=float, default=0.885, help="test accuracy")
    parser.add_argument("--iterations", type=int, default=4000, help="gradients of a run")
    parser.add_argument("--every", type=int, default=200, help="gradients between evaluations")
    parser.add_argument("--smooth", type=int, default=3, help="evaluations in a row whose mean counts")
    parser.add_argument("--workers", type=int, default=4, metavar="K")
    parser.add_argument("--heterogeneity", default="one_slow")
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--tuning-iterations", type=int, default=1200, help="gradients of a simulation that tries a rate")
    parser.add_argument("--resume", action="store_true", help="keep the runs that there are")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER")
    a = parser.parse_args()
    exit_on_sigterm()
    overrides = [f"dataset={a.dataset}", f"model={a.model}", f"heterogeneity={a.heterogeneity}", f"workers={a.workers}"]
    overrides += ["train.batch_size=64", "train.epochs=100", f"train.max_iterations={a.iterations}"]
    data = [] if a.root is None else [f"dataset.root={a.root}"]
    race = Race(overrides=[*overrides, *data], target=a.target, every=a.every, smooth=a.smooth)
    try:
        given = rates(a.lr)
    except ValueError as error:
        parser.error(str(error))
    content: dict[str, Any] = {**conditions(), "overrides": overrides, "target": a.target, "every": a.every, "smooth": a.smooth}
    content |= {"tuning": {}, "runs": [], "load_at_end": load()}
    if a.resume:
        content |= kept(content, a.into)
    chosen: dict[str, tuple[Contender, float]] = {}
    for name in a.contenders:
        contender = dataclasses.replace(CONTENDERS[name], lr=given.get(name, CONTENDERS[name].lr))
        before = next((run["lr"] for run in content["runs"] if run["contender"] == name), None)
        if before is None:
            before, content["tuning"][name] = race.tuned(contender, a.tuning_iterations)
        chosen[name] = contender, before
    run_rounds(race, chosen, a.rounds, content, a.into)
    print(as_text(content))
    missed = [name for name in a.contenders if not any(r["seconds"] for r in content["runs"] if r["contender"] == name)]
    if missed:
        sys.exit(f"live_race: {', '.join(missed)} never reached {a.target}; --iterations, or other rates (--lr)")


if __name__ == "__main__":
    main()
