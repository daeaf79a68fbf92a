"""The setting of a run: its whole configuration, but for the seed and for what cannot change a result."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ormo_rpc.config.flat import defaults_of, read_flat
from ormo_rpc.config.runtimes import ddp_rule
from ormo_rpc.config.schema import GROUPS, Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import read_trace

WITHOUT_EFFECT: Mapping[str, str] = {
    "seed": "tells the runs of a setting apart",
    "role": "a run is started by role=all, whoever joins it later",
    "dataset.root": "where this machine keeps the files",
    "dataset.download": "whether they are fetched",
    "dataset.verify": "whether their sums are checked",
    "server.address": "where the server listens",
    "server.secret_file": "who may join",
    "server.public": "from where",
    "replay.run": "of a replay, which is no run of its own",
    "checkpoint.keep": "how many old checkpoints stay on disk",
    "evaluate.targets": "which values of the evaluations are looked for",
    "evaluate.smooth": "how many evaluations have to reach them; the report has a column of its own for each number",
    "optimized_metric": "what a sweep is told in the end; it counts where it chooses the best model",
    "logger": "where metrics are shown, and how often",
}
"""Keys that are no part of a setting, with the reason; a group stands for all its options.

When in doubt a key counts: checkpoints and the journal stay in, as they take time from live workers, and so change delays.
"""
MAIN_KEYS = (
    "algorithm",
    "scheduler",
    "workers",
    "dataset",
    "model",
    "heterogeneity",
    "runtime",
    "train.lr",
    "train.batch_size",
)
"""Keys that are said of a comparison even where they have their defaults."""
OF_TASKS = ("train.batch_size", "train.epochs")
"""Keys that a loop of the user's own does not have, whose length is ``train.max_iterations``."""
RESUME = "checkpoint.resume"
MISSING = "-"
"""The value of a key that a run does not have."""
_SECTIONS = ("algorithm", *(field.name for field in fields(Config) if field.name != "algorithm"))


def read_setting(run_dir: Path, resumed: str | None) -> tuple[dict[str, Any], int, int]:
    """Read the setting of a run, its seed, and how many evaluations have to reach its targets.

    A run that was resumed began elsewhere than its seed does, so the checkpoint counts: by its iteration, and by what was
    configured otherwise in the run that wrote it. Its path and seed do not, so that seeds which were each resumed from their
    own run are one setting. Where the checkpoint is gone its path counts.

    Args:
        run_dir: The run directory.
        resumed: The checkpoint that the run began with.

    Raises:
        ConfigError: there is no readable ``config.yaml``.
    """
    options = read_flat(run_dir / "config.yaml")
    setting = _effective(options)
    source = options.get(RESUME)
    if source is not None:
        setting[RESUME] = _source(Path(resumed or source), setting)
    return setting, int(options.get("seed") or 0), int(options.get("evaluate.smooth") or 1)


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the keys in which settings differ: the algorithm first, then in the order of the schema.

    Options of a part that only some settings have are left out where the part's own name says so already, that is, where they
    are defaults and all that have the part agree.
    """
    return [key for key in _ordered(settings) if _is_column(key, settings)]


def shared(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all settings agree in: the `MAIN_KEYS`, and what differs from its default."""
    first, chosen = settings[0], dict[str, Any]()
    defaults = defaults_of(first)
    for key in _ordered(settings):
        if all(key in each and same(each[key], first[key]) for each in settings) and (
            key in MAIN_KEYS or key not in defaults or not same(defaults[key], first[key])
        ):
            chosen[key] = first[key]
    return chosen


def identity(value: Any) -> str:
    """Write a value, or a whole setting, so that two are the same where their texts are; 1 and 1.0 are, 1 and true are not."""
    return json.dumps(_plain(value), sort_keys=True, default=str)


def same(one: Any, other: Any) -> bool:
    """Compare two values of a key by their `identity`."""
    return identity(one) == identity(other)


def shown(value: Any) -> str:
    """Write a value as on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _plain(value: Any) -> Any:
    """Write whole numbers without a fraction, and the types of keys, all of which would be texts in JSON."""
    if isinstance(value, Mapping):
        return {f"{type(key).__name__} {key}": _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _effective(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the seed and what has no effect, of a simulation without a model also model, data and task.

    A run of ``runtime=ddp`` has the algorithm and the scheduler by which it is described, and none of their options. A loop of
    the user's own makes its batches itself.
    """
    found = {key: value for key, value in options.items() if not _without_effect(key, options)}
    if options.get("runtime") == "ddp":
        found = {key: value for key, value in found.items() if key.partition(".")[0] not in ("algorithm", "scheduler")}
        found["algorithm"], found["scheduler"] = ddp_rule(nesterov=bool(options.get("runtime.nesterov")))
    if options.get("runtime") == "sim" and options.get("runtime.gradient", "real") != "real":
        found = {key: value for key, value in found.items() if key.partition(".")[0] not in ("dataset", "model", "task")}
        found["model"] = options["runtime.gradient"]
    if options.get("task") == "own_loop":
        found = {key: value for key, value in found.items() if key not in OF_TASKS}
    return found


def _without_effect(key: str, options: Mapping[str, Any]) -> bool:
    group = key.partition(".")[0]
    if group == "dataset" and "." in str(options.get(group)):
        return False  # of the user's own function, to which a root may mean anything
    if key == "optimized_metric" and (options.get("evaluate.patience") is not None or options.get("checkpoint.best")):
        return False  # it decides when the run stops, or which model is kept
    return key in WITHOUT_EFFECT or group in WITHOUT_EFFECT


def _source(path: Path, setting: Mapping[str, Any]) -> str:
    """Describe a checkpoint: its iteration, and the configuration that wrote it where it is another one; else its path."""
    try:
        then, iteration = _effective(read_flat(path / "config.yaml")), checkpoint.gradients_in(path)
        if then.get(RESUME) is not None:
            earlier = _resumed(path) or Path(then[RESUME])
            then[RESUME] = _source(earlier, then) if checkpoint.gradients_in(earlier) < iteration else str(earlier)
    except (ConfigError, OSError, ValueError, KeyError):
        return str(path)
    now = {**setting, RESUME: None}
    others = [key for key in _ordered([then, now]) if not same(then.get(key, MISSING), now.get(key, MISSING))]
    words = ", ".join(f"{key}={shown(then.get(key, MISSING))}" for key in others)
    return f"iteration {iteration}{f' of {words}' if words else ''}"


def _resumed(path: Path) -> Path | None:
    """Return the checkpoint that the run which wrote this one began with; None where its trace is gone."""
    try:
        found = read_trace(checkpoint.run_directory_of(path))[0].get("resumed")
    except ConfigError:
        return None
    return None if found is None else Path(found)


def _ordered(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """List the keys of all settings: by section, the algorithm's first, and within one as they come."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    places = {name: number for number, name in enumerate(_SECTIONS)}
    return sorted(keys, key=lambda key: places.get(key.partition(".")[0], len(places)))


def _is_column(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    having = [setting for setting in settings if key in setting]
    if any(not same(setting[key], having[0][key]) for setting in having):
        return True
    if len(having) == len(settings):
        return False
    group = key.partition(".")[0]
    if (
        group not in GROUPS
        or key == group
        or _names(group, having) & _names(group, [each for each in settings if key not in each])
    ):
        return True  # the same part without the option: of another version
    defaults = defaults_of(having[0])
    return key not in defaults or not same(defaults[key], having[0][key])


def _names(group: str, settings: Collection[Mapping[str, Any]]) -> set[Any]:
    return {setting.get(group) for setting in settings}
