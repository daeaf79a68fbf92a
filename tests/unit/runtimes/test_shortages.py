"""Errors of a machine that has no more of something: told from others, and with what to do."""

from __future__ import annotations

import errno
import os
import re

import pytest
import torch

from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes.distributed.shortages import MEMORY, limit_reached, reason_of_end, reason_of_start

THREADS = "no further process or thread is allowed: raise ulimit -u, or pids.max of the control group"


def allocate_too_much() -> BaseException:
    """Return what torch raises."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), rf"MemoryError \({MEMORY}\)"),
        (allocate_too_much(), rf"RuntimeError: \[enforce fail at .*you tried to allocate \d+ bytes.* \({MEMORY}\)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), rf"OSError: \[Errno 12\] Cannot allocate memory \({MEMORY}\)"),
        (RuntimeError("a push could not be applied: MemoryError: "), rf"RuntimeError: .*: MemoryError: \({MEMORY}\)"),
        (RuntimeError("can't start new thread"), rf"RuntimeError: can't start new thread \({THREADS}\)"),
        (OSError(errno.EMFILE, "Too many open files"), r"OSError: .* \(no descriptor is left: raise ulimit -n\)"),
        (RuntimeError(f"rv < 0: too many open files {'.' * 500}"), r".{200} \(no descriptor is left: raise ulimit -n\)"),
    ],
)
def test_an_error_that_ends_a_process_says_which_limit_to_raise(error: BaseException, text: str) -> None:
    assert re.fullmatch(text, reason_of_end(error)), reason_of_end(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left"), ConfigError("memory"), KeyError()]
)
def test_any_other_error_is_told_as_it_is(error: BaseException) -> None:
    assert limit_reached(error) == ""
    assert reason_of_end(error) == f"{type(error).__name__}: {error}".removesuffix(": ")


def test_a_start_that_fails_for_another_reason_says_that_alone() -> None:
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/no/python")
    assert reason_of_start(error) == "No such file or directory: /no/python"
