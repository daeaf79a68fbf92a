"""Parts by what a user names: a registered name, or the ``_target_`` of a class or callable of their own.

``_target_`` has the meaning it has for ``hydra.utils.instantiate``: a dotted path to call, with the sibling keys as keywords.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from ormo_rpc.options.imports import DOTTED_PATH, is_dotted_path, locate, path_of
from ormo_rpc.options.part import Part, find, parts
from ormo_rpc.options.section import option
from ormo_rpc.options.values import annotations_of, build, convert, plain


@dataclass(frozen=True, kw_only=True)
class CallsTarget(Part):
    """A part that calls any function or class of the user's, for groups that allow it."""

    _target_: str = option("", "dotted path of what is called", valid=is_dotted_path, expected=DOTTED_PATH)
    kwargs: dict[str, Any] = option({}, "its keywords")
    OWN: ClassVar[tuple[str, ...]] = ()
    """Options that are this part's own, and no keywords, unless the target's signature names them."""

    @property
    @override
    def known_as(self) -> str:
        return self._target_

    def call(self, **offered: Any) -> Any:
        """Call the target with its keywords, and with those of ``offered`` that it takes and the user has not given.

        Raises:
            ValueError: it cannot be imported or called so; what it raises itself passes.
        """
        return instantiate(self.PATH, self._target_, self.kwargs, offered)


def instantiate(path: str, target: str, keywords: Mapping[str, Any], offered: Mapping[str, Any] | None = None) -> Any:
    """Import ``module.name`` and call it; a keyword that has a ``_target_`` itself is instantiated first.

    Args:
        path: Where the target stands in the configuration, such as ``dataset``, for the messages.
        target: The dotted path of a function or class.
        keywords: The user's keywords.
        offered: Further keywords; each is passed only if the signature names it and the user gave no other value.

    Raises:
        ValueError: the target cannot be imported or called, or does not take the keywords. What it raises itself passes.
    """
    function = locate(path, target)
    keywords = {key: _nested(f"{path}.{key}", value) for key, value in keywords.items()}
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in types have none
        return function(**keywords)
    given = {key: value for key, value in (offered or {}).items() if key in signature.parameters} | keywords
    try:
        signature.bind(**given)
    except TypeError as error:
        shown = ", ".join(f"{path}.{key}={value!r}" for key, value in keywords.items()) or "no keywords"
        raise ValueError(f"{path}._target_: {target!r} takes {signature}, not {shown}: {error}") from error
    return function(**given)


def part(group: str, value: Any, default: type[Part], given: Collection[str] = ()) -> Part:
    """Return the part of a group that a value stands for.

    Args:
        group: Such as ``algorithm``.
        value: A part, a class or function, a name, or keys with their values: ``name`` or ``_target_``, and options. Beside a
            ``_target_`` the options of ``name`` count only where they are not its defaults, so that hydra may compose them.
        default: The class where no name is given.
        given: Full keys that count beside a ``_target_`` whatever their values, since a user has typed them.

    Raises:
        ValueError: it stands for none.
    """
    base = base_of(default)
    if isinstance(value, Part) and isinstance(value, base):
        path_of(group, type(value))
        _refuse_undecorated(type(value))
        return value
    if callable(value):
        value = {"_target_": path_of(group, value)}
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{group}: got {value!r}, expected keys with their values, or one of {', '.join(parts(group))}")
    options = {str(key): each for key, each in value.items()}
    target = options.pop("_target_", None)
    if target is not None:
        return _part_of_target(base, target, options, given)
    name = options.pop("name", default.name)
    if not isinstance(name, str):
        raise ValueError(f"{group}: got {name!r}, expected one of {', '.join(parts(group))}")
    cls = find(group, name)
    if issubclass(cls, CallsTarget):
        raise ValueError(f"{group}._target_: got None with {group}={name}, expected {DOTTED_PATH}")
    return build(cls, options)


def values_of(made: Part) -> dict[str, Any]:
    """Return the plain values that `part` makes the same part of.

    Raises:
        ValueError: an option is no plain value, or its class cannot be imported by its name.
    """
    cls = type(made)
    if isinstance(made, CallsTarget):
        own = {name: getattr(made, name) for name in made.OWN if getattr(made, name) != _default(cls.declared()[name])}
        return {"_target_": made.known_as, **{key: plain(made.key(key), each) for key, each in (own | made.kwargs).items()}}
    options = {name: plain(made.key(name), getattr(made, name)) for name in cls.declared()}
    return {"name": cls.name, **options} if is_registered(cls) else {"_target_": path_of(cls.PATH, cls), **options}


def is_registered(cls: type[Part]) -> bool:
    """Tell whether a class has a name in its group."""
    return parts(cls.PATH).get(cls.name) is cls


def base_of(cls: type[Part]) -> type[Part]:
    """Return the base class of the group that `cls` belongs to."""
    return next(each for each in cls.__mro__ if Part in each.__bases__ and each is not CallsTarget)


def _part_of_target(base: type[Part], target: Any, options: dict[str, Any], given: Collection[str]) -> Part:
    group = base.PATH
    found = locate(group, target)
    options = _without_defaults(group, options, given)
    if isinstance(found, type) and issubclass(found, base):
        if inspect.isabstract(found):
            missing = ", ".join(sorted(found.__abstractmethods__))  # pyright: ignore[reportAttributeAccessIssue] # of ABCMeta
            raise ValueError(f"{group}._target_: {target!r} is abstract, expected a class that has {missing}")
        _refuse_undecorated(found)
        try:
            return build(found, options)
        except ValueError:
            raise
        except Exception as error:  # a class of the user's own may have an __init__ that raises anything
            raise ValueError(f"{group}._target_: {target!r} cannot be made: {' '.join(str(error).split())}") from error
    caller = next((each for each in parts(group).values() if issubclass(each, CallsTarget)), None)
    if caller is None:
        raise ValueError(f"{group}._target_: {target!r} is {found!r}, expected a subclass of {base.__module__}.{base.__name__}")
    if isinstance(options.get("kwargs"), Mapping):
        keys = " ".join(f"+{group}.{key}={each}" for key, each in options["kwargs"].items())
        raise ValueError(f"{group}.kwargs: keywords stand beside _target_; use {keys or f'+{group}.KEY=VALUE'}")
    own = {key: options.pop(key) for key in caller.OWN if key in options and key not in _parameters(found)}
    return build(caller, {"_target_": target, "kwargs": options, **own})


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    """The names of a signature; none for a built-in type without one."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return ()


def _refuse_undecorated(cls: type[Part]) -> None:
    """Refuse a class whose options would be ignored, since the decorator is missing.

    Raises:
        ValueError: it is such a class.
    """
    for each in cls.__mro__:
        own = vars(each)
        if "__dataclass_fields__" in own:
            continue
        for name, value in own.items():
            if isinstance(value, dataclasses.Field) or (name in cls.declared() and name in own.get("__annotations__", {})):
                raise ValueError(
                    f"{cls.key(name)}: {each.__module__}.{each.__qualname__} declares it but is no dataclass; "
                    f"write @dataclass(kw_only=True) above the class"
                )


def _without_defaults(group: str, options: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Drop the options beside a ``_target_`` that a file of the group has put there, and that nobody has typed."""
    named = parts(group).get(str(options.get("name")))
    if named is None:
        return options
    defaults = named.declared()
    kinds = annotations_of(named)
    return {
        key: value
        for key, value in options.items()
        if key != "name"
        and (f"{group}.{key}" in given or key not in defaults or not _is_default(defaults[key], kinds[key], value))
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_default(field: dataclasses.Field[Any], kind: Any, value: Any) -> bool:
    try:
        return convert(value, kind) == _default(field)
    except (TypeError, ValueError):
        return False


def _nested(path: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        inner = {str(key): _nested(f"{path}.{key}", each) for key, each in value.items()}
        target = inner.pop("_target_", None)
        return value if target is None else instantiate(path, target, inner)
    return [_nested(path, each) for each in value] if isinstance(value, list) else value
