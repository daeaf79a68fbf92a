"""Forward passes under autocast, and compiled ones."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Generator
from typing import Any

import torch

from ormo_rpc.errors import ConfigError, one_line

INDUCTOR = "inductor"


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None, device_type: str = "cpu") -> Generator[None]:
    """Compute in a dtype where torch's list of operations says so; None for not at all.

    The casts of weights that autocast keeps for a second use end here, also within another autocast, where torch keeps them.
    """
    if dtype is None:
        yield
        return
    try:
        with torch.autocast(device_type, dtype):
            yield
    finally:
        torch.clear_autocast_cache()


def compile_forward(module: torch.nn.Module, backend: str) -> None:
    """Have a module's passes compiled, at the first of them, and again for another batch size (then for any).

    The code is kept for this module alone. Inductor compiles in this process, and draws random numbers as eager passes do.

    Raises:
        ConfigError: there is no such backend.
    """
    options: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # else a process may have no more than 8 of a class
        options["isolate_recompiles"] = True
    if backend == INDUCTOR:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        options["options"] = {"fallback_random": True}
    try:
        module.compile(backend=backend, **options)
    except Exception as error:  # of torch._dynamo, which is not imported for its sake
        raise ConfigError(
            f"worker.compile: got {backend}, expected a backend of torch.compile, such as inductor, aot_eager or eager: "
            f"{one_line(error)}"
        ) from error


@contextlib.contextmanager
def compiled(module: torch.nn.Module, backend: str | None) -> Generator[None]:
    """Compile the passes of a module in the meantime; None for not at all.

    Raises:
        ConfigError: there is no such backend, or it fails.
    """
    if backend is None:
        yield
        return
    compile_forward(module, backend)
    try:
        yield
    finally:
        module._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage] # nothing public undoes `Module.compile`


def compiler_failure(error: BaseException, backend: str | None) -> str | None:
    """Say in one line that a pass has failed in its compiler; None where the error is another one."""
    if backend is None:
        return None
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return None
    cause = getattr(error, "inner_exception", error)
    return f"worker.compile={backend} cannot compile the pass: {one_line(cause)}; with null it runs as it is"
