"""The allow-list: our messages pass as torch pickles them, and nothing else does, by name, by dots or by opcode."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch.distributed.rpc import internal

from ormo_rpc.control.server import ControlServer
from ormo_rpc.control.torch_rpc import unpickling
from ormo_rpc.control.torch_rpc.server import Published
from ormo_rpc.errors import NonFiniteGradient, PushRefused, StaleSession
from tests.support.peer import SYSTEM, Api

FUNCTIONS = (Api.push, Api.fails)
REFUSED = r"^refused: {} is not on the allow-list \(ormo_rpc\.control\.torch_rpc\.unpickling\)$"


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internal, "_unpickler", internal._unpickler)  # pyright: ignore[reportPrivateUsage] # torch has no public name for it
    monkeypatch.setattr(unpickling, "_logged", set[str]())
    unpickling.install(FUNCTIONS)


def crossed(message: Any) -> Any:
    """The message as it arrives, through torch's own two functions."""
    return internal.deserialize(*internal.serialize(message))


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return internal.PythonUDF(function, args, kwargs)


# ------------------------------------------------------------------------------------------------------------- what may cross


def test_a_call_with_texts_bytes_and_tensors_arrives() -> None:
    tensor = torch.ones(2)
    arguments = ("session_id", b"bytes", "x" * 300, "é", b"", tensor, b"y" * 300)
    arrived = crossed(call(Api.push, *arguments))
    assert isinstance(arrived, internal.PythonUDF)
    assert arrived.func is Api.push
    assert [value for value in arrived.args if value is not tensor] == [value for value in arguments if value is not tensor]
    assert [type(value) for value in arrived.args] == [type(value) for value in arguments]
    assert arrived.kwargs == {}


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        (7, "int"),
        (2**40, "int"),
        (None, "NoneType"),
        ((), "tuple"),
        (("nested",), "tuple"),
        ({}, "dict"),
        (PushRefused, "type"),
        (internal.PythonUDF(1, 2, 3), "PythonUDF"),
    ],
)
def test_other_arguments_are_refused(argument: Any, name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=REFUSED.format(f"an argument of type {name}")):
        crossed(call(Api.push, argument))


@pytest.mark.parametrize("argument", [True, 0.5, [], [1], {"a": 1}, {1}, 1j, bytearray(b"x")])
def test_kinds_of_values_that_none_of_our_messages_has_are_refused(argument: Any) -> None:
    with pytest.raises(pickle.UnpicklingError):
        crossed(call(Api.push, argument))


def test_arguments_by_name_are_refused() -> None:
    message = internal.PythonUDF(Api.push, (), ())
    with pytest.raises(pickle.UnpicklingError, match=REFUSED.format("a call without a tuple of arguments by position")):
        crossed(message)
    with pytest.raises(pickle.UnpicklingError, match=r"^a message that is no pickle of ours: KeyError$"):
        crossed(call(Api.push, more="text"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_tensors_travel_beside_and_come_back_in_their_places(dtype: torch.dtype) -> None:
    first, second = torch.arange(3).to(dtype), torch.ones(2, dtype=dtype)
    arrived = crossed(call(Api.push, first, "between", second, first))
    assert [arrived.args[n] is tensor for n, tensor in ((0, first), (2, second), (3, first))] == [True] * 3


@pytest.mark.parametrize(
    "error", [PushRefused, NonFiniteGradient, StaleSession, TimeoutError, RuntimeError, pickle.UnpicklingError]
)
def test_an_exception_of_a_call_is_raised_at_its_caller(error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^why$") as caught:
        internal._handle_exception(crossed(internal.RemoteException("why", error)))  # pyright: ignore[reportPrivateUsage] # torch has no public name for it
    assert type(caught.value) is error


def test_a_worker_answers_no_calls_at_all() -> None:
    unpickling.install()
    with pytest.raises(pickle.UnpicklingError, match=REFUSED.format(r"tests\.support\.peer\.Api\.push")):
        crossed(call(Api.push))
    assert crossed(("value", torch.ones(1)))[0] == "value"


# --------------------------------------------------------------------------------------------------------- what is not to cross


class Evil:
    """Pickles as the given value."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (SYSTEM, "posix.system"),
        (eval, "builtins.eval"),
        (exec, "builtins.exec"),
        (__import__, "builtins.__import__"),
        (subprocess.Popen, "subprocess.Popen"),
        (torch.load, "torch.serialization.load"),
        (torch.from_file, "torch._C._VariableFunctionsClass"),
        (pickle.loads, "_pickle.loads"),
        (setattr, "builtins.setattr"),
        (type, "builtins.type"),
        (Api.hidden, "tests.support.peer.Api.hidden"),
        (Api, "tests.support.peer.Api"),
        (unpickling.install, "ormo_rpc.control.torch_rpc.unpickling.install"),
    ],
)
def test_other_functions_are_refused_and_named_once_in_the_log(
    function: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        with pytest.raises(pickle.UnpicklingError, match=REFUSED.format(name.replace(".", r"\."))):
            crossed(call(function, "x"))
    assert [record.getMessage() for record in caplog.records] == [f"refused from a peer: {name}"]


def stack_global(module: str, name: str) -> bytes:
    """A call of a name, without asking whether it exists."""
    texts = b"".join(pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + texts + pickle.STACK_GLOBAL + b"."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("tests.support.peer", "os.system"),
        ("tests.support.peer", "Api.push.__globals__"),
        ("tests.support.peer", "Api.push.__class__"),
        ("tests.support.peer", "Api"),
        ("tests.support.peer.Api", "push"),
        ("tests.support.peer", "Api.push "),
        ("ormo_rpc.messages", "Reply"),
        ("ormo_rpc.messages", "Tensor"),
        ("torch.distributed.rpc.internal", "sys.modules"),
        ("torch.distributed.rpc.internal", "deserialize"),
        ("torch.distributed.rpc.internal", "_InternalRPCPickler._script_module_receiver"),
        ("builtins", "getattr.__self__"),
        ("builtins", "object"),
        ("__main__", "x"),
        ("", ""),
        ("copyreg", "_reconstructor"),
    ],
)
def test_dotted_chains_and_neighbours_of_what_is_allowed_are_refused(module: str, name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"^refused: "):
        unpickling.loads(stack_global(module, name), FUNCTIONS)


def test_a_refused_module_is_not_even_imported() -> None:
    assert "this" not in sys.modules
    with pytest.raises(pickle.UnpicklingError):
        unpickling.loads(stack_global("this", "s"), FUNCTIONS)
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "way",
    [
        lambda: Evil(getattr, (Api, "hidden")),
        lambda: Evil(getattr, (internal._InternalRPCPickler, "_script_module_receiver")),  # pyright: ignore[reportPrivateUsage] # torch has no public name for it
        lambda: Evil(getattr, (internal._InternalRPCPickler, "__init__")),  # pyright: ignore[reportPrivateUsage] # torch has no public name for it
        lambda: Evil(Api.push, ("called while it is read",)),
        lambda: Evil(RuntimeError, ("made while it is read",)),
        lambda: Evil(internal.PythonUDF, (1, 2, 3)),
    ],
)
def test_no_call_but_that_for_a_tensor_is_made_while_a_message_is_read(way: Callable[[], Evil]) -> None:
    Api.calls.clear()
    with pytest.raises(pickle.UnpicklingError, match=r"^refused: "):
        crossed(call(Api.push, way()))
    assert Api.calls == []


@pytest.mark.parametrize(
    ("target", "state"),
    [
        (Api.push, {"__wrapped__": 1}),
        (Api.push, (None, {"__defaults__": (1,)})),
        (internal.PythonUDF, (None, {"func": 1})),
        (RuntimeError, (None, {"x": 1})),
    ],
)
def test_nothing_of_this_process_can_be_written_to(target: Any, state: Any) -> None:
    # Pickle's own BUILD sets attributes of whatever lies on the stack: a name that is allowed is enough.
    before = dict(vars(target))
    message = pickle.dumps(target, 4)[:-1] + pickle.dumps(state, 4)[2:-1] + pickle.BUILD + b"."
    with pytest.raises(pickle.UnpicklingError, match=r"^a message that is no pickle of ours: KeyError$"):
        unpickling.loads(message, FUNCTIONS)
    assert dict(vars(target)) == before


@pytest.mark.parametrize(
    "opcode", [b"cposix\nsystem\n", b"(iposix\nsystem\n", b"\x82\x01", b"P1\n", b"(cposix\nsystem\no", b"\x8f"]
)
def test_opcodes_that_none_of_our_messages_has_are_refused(opcode: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"^a message that is no pickle of ours: KeyError$"):
        unpickling.loads(b"\x80\x04" + opcode + b".", FUNCTIONS)


@pytest.mark.parametrize("function", [PushRefused, internal.PythonUDF, StaleSession])
def test_a_name_that_may_cross_is_not_thereby_a_function_to_call(function: Any) -> None:
    with pytest.raises(
        pickle.UnpicklingError, match=REFUSED.format("a call of something that is not a function of the service")
    ):
        crossed(call(function, "x"))


def test_a_message_without_its_tensor_is_refused_and_nothing_is_kept() -> None:
    data, _ = internal.serialize(call(Api.push, torch.ones(1)))
    with pytest.raises(pickle.UnpicklingError, match=r"^a message that is no pickle of ours: IndexError$"):
        internal.deserialize(data, [])
    with pytest.raises(pickle.UnpicklingError):
        internal.deserialize(b"\x80\x04", [torch.ones(1)])
    assert internal._thread_local_tensor_tables.recv_tables == []  # pyright: ignore[reportPrivateUsage] # torch has no public name for it
    assert crossed(call(Api.push, torch.ones(1))).args[0].tolist() == [1]


def test_the_log_does_not_grow_with_what_a_peer_sends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for number in range(100):
        with pytest.raises(pickle.UnpicklingError):
            unpickling.loads(stack_global("a\nb\x1b", f"name{number}"), FUNCTIONS)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "refused from a peer: a?b?.name0"
    assert len(messages) == unpickling.NAMES_LOGGED
    assert messages[-1] == "refused from a peer: a?b?.name19; further names are refused without a line"


# ------------------------------------------------------------------------------------------- a stranger at the control plane


def test_the_objects_that_the_rref_refers_to_do_not_leave_the_process() -> None:
    """Anybody may ask for the RRef, and then for its value."""
    nothing = cast("Any", None)
    with pytest.raises(pickle.PicklingError, match=r"^the server's objects stay in its process$"):
        internal.serialize(Published(nothing, nothing, nothing))


@pytest.mark.parametrize("arguments", ["", "[" * 100_000, "{" * 100_000, "1" * 10_000, "null", "{}"])
def test_arguments_without_an_admission_get_one_error_and_no_line_in_the_log(
    arguments: str, caplog: pytest.LogCaptureFixture
) -> None:
    nothing = cast("Any", None)
    control = ControlServer(nothing, nothing, nothing, nothing, nothing)
    for name in ("join", "ask"):
        assert set(json.loads(control.call(name, arguments))) == {"error", "text"}
    assert caplog.records == []
