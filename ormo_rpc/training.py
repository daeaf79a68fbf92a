"""Training from Python: what ``launch.py`` does, as one function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.config.schema import Config
from ormo_rpc.options.imports import refuse_while_importing
from ormo_rpc.runtimes.running import run
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import new_path


def train(config: Config | Mapping[str, Any] | Sequence[str] = (), *, run_dir: str | Path | None = None) -> dict[str, Any]:
    """Run a configuration to its end and return its summary.

    Args:
        config: A `Config`; nested values as in ``config.yaml``, such as ``{"algorithm": OrMo(momentum_correction=True),
            "model": "cnn", "train": {"lr": 0.05}}``, where a group is a part, a name, or keys with their values; or overrides
            as on the command line, such as ``["algorithm=ormo_da", "workers=8"]``.
        run_dir: Where the outputs go; ``outputs/DATE/TIME`` by default.

    Returns:
        The content of ``summary.json``; its ``status`` is ``completed`` or ``diverged``.

    Raises:
        ConfigError: the configuration is wrong; nothing was started.
        RunFailed: a process died, or the run was interrupted.
    """
    refuse_while_importing()
    launch = Launch()
    if isinstance(config, Mapping):
        launch = Launch(overrides=tuple(_typed(config)))
        config = parse_config(config)
    elif not isinstance(config, Config):
        from ormo_rpc.composing import compose  # hydra is needed for overrides alone

        launch, config = Launch(overrides=tuple(config)), compose(config)
    return run(config, Path(run_dir or new_path()).expanduser().absolute(), launch)


def _typed(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The plain ones of nested values, as they would be typed."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _typed(value, f"{path}{key}.")
        elif value is None or isinstance(value, (bool, int, float, str)):
            yield f"{path}{key}={value}"
