"""Page faults of a process that allocates and frees as training steps do, with and without what keeps its memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import ctypes, resource, sys
from ormo_rpc.worker.freed_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def step():
    activations = [libc.malloc(4 << 20) for _ in range(20)]
    for each in activations:
        ctypes.memset(each, 1, 4 << 20)
    for each in activations:
        libc.free(each)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5)
"""


def faults(kept: str) -> float:
    """Page faults a step of 80 MiB."""
    ended = subprocess.run([sys.executable, "-c", STEPS, kept], capture_output=True, text=True, timeout=60, check=True)
    return float(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_steps_reuse_the_memory_of_those_before_them() -> None:
    assert faults("kept") < 20
    assert faults("given back") > 1000, "else there is nothing to keep"
