"""Unpickle a peer's messages by an allow-list of names and opcodes; torch's own unpickler runs anything.

torch pickles the function and the arguments of a call, and its result; tensors travel beside. A pickle is a program: it may
import any name, call it, and set attributes of the result. A list of names alone is therefore not enough. torch's own pickles
of tensors ask for ``builtins.getattr``, which leads from any name to any other; a dotted name does so as well; and the opcode
BUILD writes into classes and functions. Hence this unpickler in Python (a call without its tensors has some 200 bytes), which
knows only the opcodes that our messages are made of and gives the two that do something a narrow meaning:

* REDUCE only fetches a tensor of the message or, in a worker, the reference to the server's service (RRef);
* NEWOBJ only makes a `PythonUDF` or a `RemoteException`.

The arguments of a call are texts, bytes and tensors, by position. A class of exceptions is a value that may cross, not
something that a pickle may call. All messages but the first of a form are read by comparing bytes with it (`known_forms`).

Effects of a refusal, as tried: nothing of the call has run; this process logs it (torch adds the traceback, on standard error)
and continues to serve; the caller of ``rpc_sync`` or ``rpc_async`` gets a RuntimeError whose text begins with "Error on Node 0:
UnpicklingError: refused: posix.system". The caller of a refused ``rpc.remote`` gets an error when its time-out ends. Operators
of torch that are called by name never pass here (see SECURITY.md).
"""

from __future__ import annotations

import io
import logging
import pickle
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch.distributed.rpc import internal

from ormo_rpc import errors
from ormo_rpc.control.torch_rpc.known_forms import FormReader

_log = logging.getLogger(__name__)

EXCEPTIONS: tuple[type[BaseException], ...] = (
    *(errors.PushRefused, errors.NonFiniteGradient, errors.GradientTooLarge, errors.StaleSession, errors.WorkerBanned),
    *(ArithmeticError, AssertionError, AttributeError, EOFError, Exception, IndexError, KeyError, LookupError, MemoryError),
    *(NotImplementedError, OSError, OverflowError, RuntimeError, TimeoutError, TypeError, ValueError, ZeroDivisionError),
    *(BrokenPipeError, ConnectionError, ConnectionResetError, FileNotFoundError, PermissionError, RecursionError),
    pickle.UnpicklingError,
)
"""Classes whose names may cross, as the error of a call."""
NAMES_LOGGED = 20
"""The number of different refusals that are logged, so that a peer cannot fill the disk."""

# The names are torch's own, private but pickled into each of its messages, so they do not change without notice.
_RECEIVER = internal._InternalRPCPickler  # pyright: ignore[reportPrivateUsage] # see above
_TENSOR, _RREF = "_tensor_receiver", "_py_rref_receiver"
_tables = internal._thread_local_tensor_tables  # pyright: ignore[reportPrivateUsage] # see above
_CALLS = (internal.PythonUDF, internal.RemoteException)
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),  # the numbers of tensors and references
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.SHORT_BINBYTES, pickle.BINBYTES),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
    *(pickle.EMPTY_DICT, pickle.STACK_GLOBAL),
)
"""Opcodes that make plain values, with the meaning that pickle gives them."""

_Unpickler = cast("Any", pickle)._Unpickler  # the one written in Python, whose opcodes can be chosen


class AllowListUnpickler(_Unpickler):
    """Unpickles one message.

    Args:
        file: The message.
    """

    functions: ClassVar[Mapping[tuple[str, str], Callable[..., Any]]] = {}
    """The functions that a peer may call in this process, by module and qualified name; set by `install`."""
    references: ClassVar[bool] = False
    """True where a reference to a remote object is allowed; set by `install`."""
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {opcode[0]: _Unpickler.dispatch[opcode[0]] for opcode in _OPCODES}

    def load(self) -> Any:
        """Read the message.

        Raises:
            pickle.UnpicklingError: it is damaged, or asks for something that is not on the list; nothing of it has run.
        """
        try:
            message = super().load()
        except Exception as error:
            _tables.recv_tables = []  # torch would keep the tensors of a message that it could not read
            if isinstance(error, pickle.UnpicklingError):
                raise
            # A damaged message can cause any error in a machine with a stack.
            raise pickle.UnpicklingError(f"a message that is no pickle of ours: {type(error).__name__}") from None
        if isinstance(message, internal.PythonUDF):
            self._check(message)
        return message

    def _check(self, call: internal.PythonUDF) -> None:
        """Refuse a call of another function than those of the service, or with other arguments than these have."""
        function, arguments, named = call
        if not any(function is known for known in self.functions.values()):
            _refuse("a call of something that is not a function of the service")
        if type(arguments) is not tuple or type(named) is not dict or named:
            _refuse("a call without a tuple of arguments by position")
        for argument in arguments:
            if type(argument) not in (str, bytes, torch.Tensor):
                _refuse(f"an argument of type {type(argument).__name__}")

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up as it is: nothing is imported, and no dot leads from one object to another."""
        found = self.functions.get((module, name), _NAMES.get((module, name)))
        if found is None:
            _refuse(f"{module}.{name}")
        return found

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function is getattr and type(arguments) is tuple and len(arguments) == 2:
            owner, name = arguments
            if owner is _RECEIVER and name == _TENSOR:
                self.append(_TensorReceiver)
                return
            if owner is _RECEIVER and name == _RREF and self.references:
                self.append(_ReferenceReceiver)
                return
        if function is _TensorReceiver and type(arguments) is tuple and [type(a) for a in arguments] == [int]:
            self.append(getattr(_RECEIVER, _TENSOR)(arguments[0]))
            return
        if function is _ReferenceReceiver and type(arguments) is tuple and [type(a) for a in arguments] == [tuple]:
            self.append(getattr(_RECEIVER, _RREF)(arguments[0]))
            return
        _refuse(f"the opcode REDUCE on {_described(function)}")

    def _newobj(self) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple or not any(cls is known for known in _CALLS):
            _refuse(f"the opcode NEWOBJ on {_described(cls)}")
        self.append(cls.__new__(cls, *arguments))

    dispatch |= {pickle.REDUCE[0]: _reduce, pickle.NEWOBJ[0]: _newobj}


class _TensorReceiver:
    """A placeholder, while a message is read, for torch's function that fetches a tensor of the message."""


class _ReferenceReceiver:
    """A placeholder, while a message is read, for torch's function that makes a reference to a remote object."""


def install(functions: Iterable[Callable[..., Any]] = (), *, references: bool = False) -> None:
    """Unpickle all messages of torch.distributed.rpc to this process by the allow-list from now on.

    To be called before the agent is started: in the server with the functions that workers call, in a worker without any, but
    with the reference to the server's service.

    Args:
        functions: Functions or static functions of a module, found by peers under their qualified names.
        references: Allow references to remote objects.
    """
    internal._unpickler = FormReader(_for(functions, references))  # pyright: ignore[reportPrivateUsage] # torch has no public place for it


def loads(message: bytes, functions: Iterable[Callable[..., Any]] = ()) -> Any:
    """Unpickle one message without tensors, as after `install`."""
    return _for(functions)(io.BytesIO(message)).load()


def _for(functions: Iterable[Callable[..., Any]], references: bool = False) -> type[AllowListUnpickler]:
    """The unpickler class of a process whose peers may call these functions."""
    named = {(function.__module__, function.__qualname__): function for function in functions}
    return type("Unpickler", (AllowListUnpickler,), {"functions": named, "references": references})


_NAMES: Mapping[tuple[str, str], Any] = {
    ("builtins", "getattr"): getattr,  # only for REDUCE above
    **{(thing.__module__, thing.__qualname__): thing for thing in (_RECEIVER, *_CALLS, *EXCEPTIONS)},
}
_logged: set[str] = set()
_logging = threading.Lock()
"""Guards `_logged`."""


def _refuse(what: str) -> NoReturn:
    shown = "".join(character if character.isprintable() else "?" for character in what[:200])
    with _logging:
        new = shown not in _logged and len(_logged) < NAMES_LOGGED
        if new:
            _logged.add(shown)
            last = len(_logged) == NAMES_LOGGED
            _log.warning("refused from a peer: %s%s", shown, "; further names are refused without a line" if last else "")
    raise pickle.UnpicklingError(f"refused: {shown} is not on the allow-list (ormo_rpc.control.torch_rpc.unpickling)")


def _described(thing: object) -> str:
    """An object of a message in words, without calling anything of it."""
    return str(thing.__qualname__) if isinstance(thing, type) else f"a {type(thing).__name__}"
