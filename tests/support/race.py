"""A small race on digits, and runs that reach a target when they are told to."""

from __future__ import annotations

from experiments.race.runs import Record
from experiments.race.setup import Setup

DIGITS = ("dataset=digits", "model=mlp", "model.hidden=8", "dataset.validation=0.2")
SMALL = Setup(
    job=DIGITS,
    epochs=2,
    batch_size=32,
    every=8,
    smooth=1,
    targets=(0.2, 0.5),
    target=0.5,
    tuning_target=0.5,
    rates={4: (0.08, 0.16)},
    beyond=0,
    tuning_seeds=(7,),
    seeds=(0, 1, 2),
)


def made(*times: float | None, accuracy: float = 0.5) -> Record:
    """A run that reaches 0.87 at the last of the times given, from the first evaluation on where there is one."""
    reached = [time for time in times if time is not None]
    seconds = [*reached, 1000.0]
    return Record(
        status="completed",
        iterations=[*range(1, len(seconds) + 1)],
        seconds=seconds,
        accuracy=[0.9] * len(seconds) if reached else [accuracy],
        cpu_seconds=0.0,
    )
