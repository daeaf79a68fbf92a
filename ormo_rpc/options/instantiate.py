"""Calling what the user names by a dotted path: ``dataset._target_`` and ``model._target_``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

DOTTED_PATH = "a dotted path such as my_package.my_module.my_function"
"""What a ``_target_`` has to be, in words."""


def is_dotted_path(target: str) -> bool:
    """Whether a text has the form ``module.name``."""
    return "." in target and all(part.isidentifier() for part in target.split("."))


def call(section: str, target: str, kwargs: Mapping[str, Any], offered: Mapping[str, Any] | None = None) -> Any:
    """Import ``module.name`` and call it.

    Args:
        section: Where the target stands in the configuration, such as ``dataset``, for the messages.
        target: The dotted path of a function or class of a module.
        kwargs: The user's keywords.
        offered: Further keywords; each is passed only if the signature names it and the user gave no other value.

    Raises:
        ValueError: when the target cannot be imported or called, or does not take the keywords. What it raises itself passes.
    """
    where = f"{section}._target_: {target!r}"
    module_name, _, name = target.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
    if not callable(function):
        raise ValueError(f"{where} is {function!r}, expected a function or class")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in types have none
        return function(**kwargs)
    keywords = {key: value for key, value in (offered or {}).items() if key in signature.parameters} | dict(kwargs)
    try:
        signature.bind(**keywords)
    except TypeError as error:
        raise ValueError(f"{where} takes {signature}, not {section}.kwargs={dict(kwargs)!r}: {error}") from error
    return function(**keywords)
