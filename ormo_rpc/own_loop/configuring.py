"""The configuration of a loop of the user's own: defaults, then the overrides of `join`, then those of the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Collection, Sequence

from ormo_rpc.algorithms import Algorithm
from ormo_rpc.composing import compose, keys_typed
from ormo_rpc.config.runtimes import RpcRuntime
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.own_loop.command import OVERRIDES, SCRIPTS
from ormo_rpc.tasks.own_loop import NO_REPLAY
from ormo_rpc.worker.options import Autocast

EVALUATIONS = 10
"""Evaluations of a run where nobody has said how often, nor how long an epoch is."""
_NOT_LIVE = {
    "sim": "a simulation computes gradients when their pushes are due, which a script's loop does not wait for",
    "ddp": "its ranks train a configured model; a script wraps its own in torch's DistributedDataParallel",
}
"""Runtimes that a loop of the user's own cannot have, beside the replay."""
_NO_MEANING = {
    "train.epochs": "the length of the run is total_tickets, or train.max_iterations",
    "train.batch_size": "a batch is what the script makes of a ticket",
    "worker.accumulate": "a script adds up gradients by itself: each backward() adds to the ticket's",
    "worker.dummy": "gradients are the script's",
    "worker.cuda_graph": "a script records its passes by itself",
    **dict.fromkeys(
        ("worker.device", "worker.data_on_device"),
        "a script puts its model and its batches where it wants them: model.to('cuda') before join()",
    ),
    **dict.fromkeys(
        ("worker.channels_last", "worker.tf32", "worker.deterministic"), "a script sets that by itself, before join()"
    ),
    "worker.compile": "a script compiles its model by itself: join(torch.compile(model), ...)",
}
_REPLACES_LR = ("train.lr", "train.lr_schedule")
"""Keys, with all below the second, that take the place of a function of the script's where the command line has them."""
_MODIFIES_LR = ("train.lr_schedule_unit", "train.warmup_epochs", "train.lr_milestones", "train.lr_gamma", "train.lr_scaling")
"""Keys that modify the learning rate of the configuration."""


def overrides_of_command() -> list[str]:
    """Return the overrides of the command line, as the environment has them.

    Raises:
        ConfigError: it has something else.
    """
    text = os.environ.get(OVERRIDES, "").strip()
    if not text.startswith("["):
        return shlex.split(text)
    try:
        words = json.loads(text)
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f'{OVERRIDES}: got {text!r} in the environment, expected a list such as ["workers=8"], or words')
    return words


@dataclasses.dataclass(frozen=True)
class Composed:
    """A configuration, with the words that it was made of.

    Attributes:
        config: The configuration; the number of workers may still be undecided.
        words: The overrides that were typed, those of the command line last.
        keeps_lr: The learning rate is the script's function, which the command line has not replaced.
    """

    config: Config
    words: Sequence[str]
    keeps_lr: bool


def compose_own_loop(
    overrides: Sequence[str],
    *,
    class_name: str,
    total_tickets: int,
    tickets_per_epoch: int | None,
    lr: float | None,
    lr_is_function: bool,
) -> Composed:
    """Compose the configuration of a loop of the user's own.

    Args:
        overrides: The overrides of `join`.
        class_name: The class of the model.
        total_tickets: T, as `join` has it.
        tickets_per_epoch: As `join` has it.
        lr: The learning rate, as `join` has it.
        lr_is_function: The script gives a function, and ``lr`` is its first value.

    Raises:
        ConfigError: it is no configuration of such a loop.
    """
    wrong = [each for each in overrides if type(each) is not str]
    if wrong:
        raise ConfigError(f"got {wrong[0]!r} in join(), expected texts KEY=VALUE, such as join(model, 'train.lr=0.1', ...)")
    commands = overrides_of_command()
    own = [
        *("model=own_loop", "dataset=own_loop", "task=own_loop", f"model.class_name='{class_name}'"),
        f"train.max_iterations={_whole('total_tickets', total_tickets)}",
        *([] if tickets_per_epoch is None else [f"dataset.tickets_per_epoch={_whole('tickets_per_epoch', tickets_per_epoch)}"]),
        *([] if lr is None else [f"train.lr={lr!r}"]),
    ]
    in_join, typed = keys_typed(overrides), keys_typed(commands)
    for key in sorted(in_join | typed):
        group = key.partition(".")[0]
        if group in SCRIPTS:
            raise ConfigError(f"{key}: got a value in a loop of your own, expected none: its {group} is the script's")
        if key in _NO_MEANING:
            raise ConfigError(f"{key}: got a value in a loop of your own, expected none: {_NO_MEANING[key]}")
    modifies, replaces = set(_MODIFIES_LR), _replaces_lr(typed)
    twice = _replaces_lr(in_join) | in_join & modifies if lr_is_function else in_join & {"train.lr"} if lr is not None else None
    if twice:
        raise ConfigError(f"{min(twice)}: got a value beside lr= in join(), expected one of the two")
    if lr_is_function and typed & modifies and not replaces:
        raise ConfigError(
            f"{min(typed & modifies)}: got a value beside the function lr= in join(), whose rates are final, expected train.lr "
            "or train.lr_schedule with it, in place of the function"
        )
    config = compose([*own, *overrides, *commands])
    if config.evaluate.every is None and tickets_per_epoch is None:
        every = max(1, (config.train.max_iterations or total_tickets) // EVALUATIONS)
        config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, every=every))
    refuse(config)
    return Composed(config, [*overrides, *commands], lr_is_function and not replaces)


def _replaces_lr(keys: Collection[str]) -> set[str]:
    return {key for key in keys if key in _REPLACES_LR or key.startswith("train.lr_schedule.")}


def refuse(config: Config) -> None:
    """Refuse a configuration that a loop of the user's own cannot be trained by.

    Raises:
        ConfigError: a key has a value that does not fit; the message has the key.
    """
    algorithm = config.algorithm
    if not isinstance(config.runtime, RpcRuntime):
        name = config.runtime.name
        raise ConfigError(f"runtime: got {name} in a loop of your own, expected rpc: {_NOT_LIVE.get(name, NO_REPLAY)}")
    if algorithm.steps > 1 or type(algorithm).local is not Algorithm.local:
        raise ConfigError(
            f"algorithm: got {algorithm.name} in a loop of your own, expected one without local steps, which a script's loop "
            "does not take"
        )
    if config.worker.autocast is Autocast.bf16:
        raise ConfigError(
            "worker.autocast: got bf16 in a loop of your own, expected none, or fp16 for worker.scaled(loss): a script opens "
            "torch.autocast by itself"
        )
    if config.worker.prefetch:
        raise ConfigError(
            f"worker.prefetch: got {config.worker.prefetch} in a loop of your own, expected 0: a script has one model, and so "
            "one ticket at a time; more workers have the same effect"
        )


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: got {value!r} in join(), expected a whole number >= 1")
    return value
