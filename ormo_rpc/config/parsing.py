"""A tree of plain values to a `Config`, and back to YAML."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ormo_rpc.algorithms._regions import TwoLevels
from ormo_rpc.config.ddp_refusals import refuse_with_ddp
from ormo_rpc.config.evaluating import When
from ormo_rpc.config.renamed import translate_renamed
from ormo_rpc.config.runtimes import ControlKind, DdpRuntime, RpcRuntime, Shares, SimRuntime
from ormo_rpc.config.saving import to_tree
from ormo_rpc.config.schema import GROUPS, Config
from ormo_rpc.config.training import LRScaling
from ormo_rpc.errors import ConfigError
from ormo_rpc.options import Part, Section, parts
from ormo_rpc.options.imports import path_of
from ormo_rpc.options.instantiate import part
from ormo_rpc.options.values import build, refuse_key
from ormo_rpc.schedulers import incompatibility

_PLAIN = (type(None), bool, int, float, str, bytes, PurePath, Enum)
"""Types of values that need no dotted path."""


def parse_config(values: DictConfig | Mapping[str, Any], given: Collection[str] = ()) -> Config:
    """Check a tree of values against the schema.

    Args:
        values: Nested plain values, such as a composed hydra configuration or a loaded ``config.yaml``. What is missing takes
            its default. A group is a name, keys with their values (``name`` or ``_target_``, and options), or a part.
        given: Full keys that a user has typed. Beside a ``_target_`` they are its options even where their values are those
            that the group's file has put there.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is out of range; one line with the full key.
    """
    try:
        config = build(Config, _resolved(values), functools.partial(_section, given))
        to_tree(config)  # a configuration that cannot be saved is refused before anything starts
    except OmegaConfBaseException as error:
        raise ConfigError(refused_value(error)) from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _refuse_together(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write a configuration as resolved YAML, which `load_config` reads."""
    path.write_text(config.yaml, encoding="utf-8")


def load_config(path: Path) -> Config:
    """Read what `save_config` wrote, now or in an earlier version.

    Raises:
        ConfigError: the file is missing, or does not fit the schema.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file, expected the config.yaml of a run")
    try:
        return parse_text(path.read_text(encoding="utf-8"))
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_text(text: str, *, data_root: str | None = None, transport: Mapping[str, Any] | None = None) -> Config:
    """Read the text that `save_config` wrote.

    Args:
        text: YAML.
        data_root: The folder of the data set on this machine; by default the one in the text.
        transport: Keys and values of another transport; by default the one in the text.

    Raises:
        ConfigError: the text does not fit the schema.
    """
    values = read_values(text)
    config = parse_config(values if transport is None else {**values, "transport": transport})
    if data_root is None:
        return config
    return dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, root=data_root))


def read_values(text: str) -> dict[str, Any]:
    """Read the text that `save_config` wrote, now or in an earlier version, as nested plain values under the present names.

    Raises:
        ConfigError: it is no YAML, or has no keys.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # of omegaconf or of its parser of YAML
        raise ConfigError(f"cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"got {values!r}, expected keys with their values")
    return translate_renamed({str(key): value for key, value in values.items()})


def refused_value(error: OmegaConfBaseException) -> str:
    """Return OmegaConf's message with the full key in front, on one line."""
    message = str(error.msg or error).splitlines()[0]
    if message == "Cannot merge DictConfig with ListConfig":
        message = "got a list, expected a dictionary, as in {KEY: VALUE}"
    return f"{error.full_key}: {message}" if error.full_key else message


def unknown_key(error: OmegaConfBaseException) -> str | None:
    """Explain hydra's refusal of an unknown key on one line; None where the error is another one."""
    if "is not in struct" not in str(error.msg) or not isinstance(error.parent_node, DictConfig):
        return None
    path, _, name = str(error.full_key).rpartition(".")
    refusal = refuse_key(path, name, [str(key) for key in error.parent_node])
    if "_target_" not in error.parent_node:
        return refusal
    return f"{refusal}{' An' if refusal.endswith('?') else '; an'} option of your own class: +{error.full_key}=VALUE"


def _resolved(values: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Resolve every interpolation; parts, classes and functions stay as they are."""
    objects: dict[str, Any] = {}
    if not isinstance(values, DictConfig):
        _refuse_dotted(values)
        objects = {key: value for key, value in values.items() if isinstance(value, Section) or callable(value)}
        values = OmegaConf.create({key: _with_paths(key, value) for key, value in values.items() if key not in objects})
    resolved = OmegaConf.to_container(values, resolve=True)
    assert isinstance(resolved, dict)
    return {**{str(key): value for key, value in resolved.items()}, **objects}


def _refuse_dotted(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if "." in str(key):
            nested = repr(value)
            for name in reversed(key.split(".")):
                nested = f"{{{name!r}: {nested}}}"
            raise ConfigError(f"{key}: got a key with a dot; nest it, {nested}, or pass a list of overrides, ['{key}={value}']")


def _with_paths(key: str, value: Any) -> Any:
    """Replace each class and function by its dotted path."""
    if isinstance(value, Mapping):
        return {each: _with_paths(key, inner) for each, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_paths(key, inner) for inner in value]
    return path_of(key, value) if callable(value) or (key in GROUPS and not isinstance(value, _PLAIN)) else value


def _section(given: Collection[str], key: str, kind: Any, value: Any, default: Any) -> Any:
    """Make the section or part that a value stands for."""
    if issubclass(kind, Part):
        return part(key, value, default, given)
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: got {value!r}, expected keys with their values")
    return build(kind, {str(each): inner for each, inner in value.items()})


def _refuse_together(config: Config) -> None:
    """Refuse options that cannot be combined.

    Raises:
        ConfigError: there are some; the message has the key to change.
    """
    refused = incompatibility(config.algorithm, config.scheduler)
    if refused is not None:
        raise ConfigError(refused)
    algorithm, factors = config.algorithm, config.train.lr_factors
    if factors and algorithm.REFUSES_LR_FACTORS is not None:
        with_it = f"expected none with algorithm={algorithm.known_as}"
        raise ConfigError(f"train.lr_factors: got {factors}, {with_it}: {algorithm.REFUSES_LR_FACTORS}")
    prefetch = config.worker.prefetch
    if prefetch and config.scheduler.BARRIER:
        raise ConfigError(
            f"worker.prefetch: got {prefetch} with scheduler={config.scheduler.name}, whose barrier waits for all tickets, "
            f"those ahead as well; expected 0, or a scheduler without a barrier: {', '.join(_without_barrier())}"
        )
    if prefetch and algorithm.REFUSES_PREFETCH is not None:
        with_it = f"expected 0 with algorithm={algorithm.known_as}"
        raise ConfigError(f"worker.prefetch: got {prefetch}, {with_it}: {algorithm.REFUSES_PREFETCH}")
    if config.train.lr_scaling is LRScaling.mean and algorithm.REFUSES_MEAN_LR is not None:
        with_it = f"expected none with algorithm={algorithm.known_as}"
        raise ConfigError(f"train.lr_scaling: got mean, {with_it}: {algorithm.REFUSES_MEAN_LR}")
    if config.evaluate.patience is not None and config.evaluate.when is When.after:
        raise ConfigError(
            f"evaluate.when: got after with evaluate.patience={config.evaluate.patience}, expected during: nothing can stop a "
            "run early that is evaluated after its end"
        )
    if algorithm.cancels:
        _refuse_cancelling(config)
    if algorithm.workers_are_regions:
        _refuse_regions(config)
    if isinstance(config.runtime, RpcRuntime):
        _refuse_control(config)
    if isinstance(config.runtime, SimRuntime) and config.runtime.shares is Shares.proportional:
        _refuse_shares(config, config.runtime)
    if isinstance(config.runtime, DdpRuntime):
        refuse_with_ddp(config, config.runtime)


def _refuse_cancelling(config: Config) -> None:
    """Refuse an algorithm that cancels computations where that cannot be done.

    Raises:
        ConfigError: it cannot.
    """
    algorithm = config.algorithm.known_as
    if not isinstance(config.runtime, SimRuntime):
        raise ConfigError(
            f"runtime: got {config.runtime.name}, expected sim with algorithm={algorithm}, which cancels what slow workers "
            f"compute: a live worker cannot be interrupted in a backward pass"
        )
    if config.worker.prefetch:
        raise ConfigError(
            f"worker.prefetch: got {config.worker.prefetch}, expected 0 with algorithm={algorithm}, which cancels what slow "
            f"workers compute"
        )


def _refuse_shares(config: Config, runtime: SimRuntime) -> None:
    """Refuse to divide the samples of a round where there is none of all workers.

    Raises:
        ConfigError: there is none, or the workers change.
    """
    algorithm, scheduler = config.algorithm, config.scheduler
    whole = (algorithm.whole_rounds or scheduler.WHOLE_ROUNDS) and not algorithm.workers_are_regions
    if not whole or algorithm.steps > 1:
        raise ConfigError(
            f"runtime.shares: got proportional with algorithm={algorithm.known_as} scheduler={scheduler.known_as}, expected "
            "equal: only the samples of a step with the gradients of all workers can be divided, as under scheduler=sync"
        )
    if runtime.joins or runtime.leaves:
        raise ConfigError("runtime.shares: got proportional with runtime.joins or runtime.leaves, expected equal, or neither")


def _refuse_regions(config: Config) -> None:
    """Refuse workers that are regions where they cannot be.

    Raises:
        ConfigError: they cannot.
    """
    if not isinstance(config.algorithm, TwoLevels):
        raise ConfigError(
            f"algorithm: got {config.algorithm.known_as}, whose workers_are_regions is true, expected halos, hiermo, or a "
            "class of your own that derives from one of them: no other algorithm has a rule for a region's own server"
        )
    if not isinstance(config.runtime, (SimRuntime, RpcRuntime)):
        raise ConfigError(f"runtime: got {config.runtime.name}, expected rpc or sim with algorithm.region_workers")
    if isinstance(config.runtime, RpcRuntime) and config.worker.prefetch:
        raise ConfigError(
            f"worker.prefetch: got {config.worker.prefetch}, expected 0 with algorithm.region_workers: a live region works for "
            f"one ticket at a time"
        )
    if config.wire_form != "exact":
        raise ConfigError(f"wire, compression: got {config.wire_form}, expected exact with algorithm.region_workers")


def _refuse_control(config: Config) -> None:
    """Refuse a carrier of the control plane that the transport cannot do with.

    Raises:
        ConfigError: it is such a one.
    """
    if config.rpc.control is ControlKind.socket and config.transport.NEEDS_RPC:
        why = f"transport={config.transport.name} needs the agents that rpc starts"
        raise ConfigError(f"runtime.control: got socket, expected rpc, or another transport: {why}")


def _without_barrier() -> list[str]:
    return [name for name, scheduler in parts("scheduler").items() if not scheduler.BARRIER]
