"""A configuration to plain values and YAML."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from ormo_rpc.options import Part, Section
from ormo_rpc.options.instantiate import values_of
from ormo_rpc.options.values import plain


def to_tree(section: Section) -> dict[str, Any]:
    """The nested plain values that `parse_config` makes the same configuration of.

    Raises:
        ValueError: a part is of a class that cannot be imported, or has an option that is no plain value.
    """
    return {name: _plain(section, name) for name in section.declared()}


def to_yaml(section: Section) -> str:
    """The same as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_tree(section)))


def _plain(section: Section, name: str) -> Any:
    value = getattr(section, name)
    if isinstance(value, Part):
        return values_of(value)
    return to_tree(value) if isinstance(value, Section) else plain(section.key(name), value)
