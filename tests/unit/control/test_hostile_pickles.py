"""Damaged and hostile pickles by the ten thousand: the unpickler refuses each, and nothing runs."""

from __future__ import annotations

import pickle
import random
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.distributed.rpc import internal

from ormo_rpc.control.torch_rpc import unpickling
from ormo_rpc.errors import StaleSession
from tests.support.mutations import MESSAGES, mutated
from tests.support.peer import SYSTEM, Api


class Evil:
    """Pickles as the call of a function."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


_watched: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:  # noqa: ARG001 - the signature of an audit hook
    if _watched is not None:
        _watched.append(event)


sys.addaudithook(_watch)  # there is no taking it back, hence the switch


def test_ten_thousand_mutated_messages_run_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    global _watched
    monkeypatch.setattr(internal, "_unpickler", internal._unpickler)  # pyright: ignore[reportPrivateUsage] # torch has no public name for it
    monkeypatch.setattr(unpickling, "_logged", set[str]())
    functions = (Api.push, Api.fails)
    unpickling.install(functions)
    tensors = [torch.ones(2)]
    honest: list[Any] = [
        internal.PythonUDF(Api.push, ("session_id", b"header", tensors[0]), {}),
        internal.PythonUDF(Api.fails, ("a" * 300, b"c" * 300), {}),
        internal.RemoteException("why", StaleSession),
    ]
    evil: list[Any] = [
        Evil(SYSTEM, ("touch marker",)),
        Evil(eval, ("1 + 1",)),
        Evil(getattr, (Api, "hidden")),
        Evil(setattr, (Api, "push", 1)),
        Evil(Api.push, (1,)),
        internal.PythonUDF(SYSTEM, ("touch marker",), {}),
    ]
    pickles = [internal.serialize(message)[0] for message in honest]
    pieces = [*pickles, *(pickle.dumps(thing, protocol) for thing in evil for protocol in range(5))]
    Api.calls.clear()
    before = [dict(vars(thing)) for thing in (Api, StaleSession, *functions, internal.PythonUDF)]
    chance, outcomes = random.Random(3), Counter[str]()
    with torch.no_grad():
        messages = [*pieces, *(mutated(chance.choice(pickles), chance, pieces) for _ in range(MESSAGES - len(pieces)))]
    _watched = []
    try:
        for data in messages:
            try:
                result = internal.deserialize(data, tensors)
            except pickle.UnpicklingError as error:
                outcomes["refused" if str(error).startswith("refused: ") else "damaged"] += 1
            else:
                assert not isinstance(result, internal.PythonUDF) or result.func in functions
                outcomes[type(result).__name__] += 1
        ran = {event for event in _watched if event.partition(".")[0] not in ("logging", "time", "sys", "object")}
    finally:
        _watched = None
    assert len(messages) == outcomes.total() == MESSAGES
    assert ran == set(), "something was imported, opened, compiled or run"
    assert Api.calls == []
    assert [dict(vars(thing)) for thing in (Api, StaleSession, *functions, internal.PythonUDF)] == before
    assert outcomes["refused"] > 1000
    assert outcomes["damaged"] > 1000
    assert outcomes["PythonUDF"] > 100, "no mutation left a message alive"
    assert len(caplog.records) <= unpickling.NAMES_LOGGED


def test_the_watch_of_the_test_above_sees_what_plain_pickle_runs() -> None:
    global _watched
    _watched = []
    try:
        pickle.loads(pickle.dumps(Evil(eval, ("1 + 1",))))  # noqa: S301 - that is the test
        seen = set(_watched)
    finally:
        _watched = None
    assert {"pickle.find_class", "compile", "exec"} <= seen
