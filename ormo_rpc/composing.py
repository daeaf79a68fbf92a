"""The configuration that overrides stand for, composed by hydra, which the command line and loops of the user's own share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from ormo_rpc.config.parsing import parse_config, refused_value, unknown_key
from ormo_rpc.config.schema import GROUPS, Config
from ormo_rpc.config.write_conf import conf_dir
from ormo_rpc.errors import ConfigError
from ormo_rpc.options import parts
from ormo_rpc.overrides import keys_of, prepared

_composing = threading.Lock()
"""Guards hydra's state in this process, which is one for all threads."""
EXTRA = "pip install 'ormo-rpc[sweeps]'"
"""Installs hydra's plugins for sweeps."""
_PLUGINS = {"hydra/sweeper": ("optuna",), "hydra/launcher": ("joblib", "submitit_local", "submitit_slurm")}
"""Names that they add to hydra's groups."""


def compose(overrides: Sequence[str] = ()) -> Config:
    """Compose the configuration that ``python launch.py`` would run with these overrides, for use from Python.

    Raises:
        ConfigError: an override is wrong.
    """
    try:
        with _hydra_of_our_own(), hydra.initialize_config_dir(str(conf_dir().absolute()), version_base="1.3"):
            words = prepared(overrides)
            values = hydra.compose("config", words)
        return parse_config(values, keys_of(words))
    except (HydraException, OmegaConfBaseException) as error:
        raise refused(error) from None


def keys_typed(overrides: Sequence[str]) -> set[str]:
    """Return the keys that overrides name.

    Raises:
        ConfigError: one cannot be parsed.
    """
    try:
        return keys_of(prepared(overrides))
    except HydraException as error:
        raise refused(error) from None


@contextlib.contextmanager
def _hydra_of_our_own() -> Generator[None]:
    """Put hydra's one state in this process aside: the caller may be an application of hydra, or another thread."""
    with _composing:
        callers = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            yield
        finally:
            GlobalHydra.instance().hydra = callers


def refused(error: Exception) -> ConfigError:
    """Turn an error of hydra, whose message has several lines, into one line."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if name in _PLUGINS.get(group, ()):
            return ConfigError(f"{group}={name}: needs a plugin of hydra that is not installed; {EXTRA}")
        if group in GROUPS and name in parts(group):
            return ConfigError(f"{group}: {name!r} is registered, but conf/ has no file of it: run make conf")
        if error.options:
            return ConfigError(f"{group}: got {name!r}, expected one of {', '.join(error.options)}")
    if isinstance(error, OverrideParseException) and "=" not in error.override:
        return ConfigError(f"{error.override}: expected KEY=VALUE")
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException):
        return ConfigError(unknown_key(cause) or refused_value(cause))
    return ConfigError(" ".join(f"{error}: {error.__cause__ or ''}".split()).removesuffix(":"))
