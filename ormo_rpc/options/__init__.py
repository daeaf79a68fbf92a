"""Typed options of every part of a run, and the registration of parts by name."""

from __future__ import annotations

from ormo_rpc.options.instantiate import CallsTarget
from ormo_rpc.options.part import Part, find, parts, register
from ormo_rpc.options.section import Section, at_least_one, not_negative, option, positive

__all__ = ["CallsTarget", "Part", "Section", "at_least_one", "find", "not_negative", "option", "parts", "positive", "register"]
