"""Threads that have given up files and processes, by the filter itself and from within such a thread."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_rpc.control.torch_rpc import confinement
from ormo_rpc.control.torch_rpc.confinement import ARCHITECTURES, CONDITIONAL, DENIED, run_confined

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
THREAD, FORK = 0x003D0F00, 0x01200011
"""The flags of clone with which the C library starts a thread, and a process."""
PROCESS = 4711
ALLOWED, REFUSED, MISSING = 0x7FFF0000, 0x00050000 | errno.EACCES, 0x00050000 | errno.ENOSYS

needs_filters = pytest.mark.skipif(sys.platform != "linux" or os.uname().machine not in ARCHITECTURES, reason="needs seccomp")


def decided(machine: str, number: int, argument: int = 0, architecture: int | None = None) -> int:
    """Run the filter on a call, as the kernel does."""
    data = {0: number, 4: ARCHITECTURES[machine][0] if architecture is None else architecture, 16: argument}
    steps, at, accumulator = confinement.program(machine, PROCESS), 0, 0
    while True:
        code, yes, no, constant = steps[at]
        at += 1
        match code:
            case 0x20:
                accumulator = data[constant]
            case 0x06:
                return constant
            case _:
                holds = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x45: bool(accumulator & constant)}
                at += yes if holds[code] else no


def table(column: int) -> dict[str, int]:
    """The numbers of the refused calls in a column of the table."""
    words = DENIED.split()
    rows = (words[row : row + 3] for row in range(0, len(words), 3))
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_filter_refuses_every_call_of_the_table_and_what_it_does_not_know(machine: str) -> None:
    column = ARCHITECTURES[machine][1]
    numbers = table(column)
    clone, clone3, tgkill, socket_number = (number[column] for number in CONDITIONAL.values())
    assert {decided(machine, number) for number in numbers.values()} == {REFUSED}
    assert {decided(machine, number, architecture=0x40000003) for number in range(500)} == {REFUSED}, "32 bits"
    assert {decided(machine, 0x40000000 + number) for number in range(600)} == {REFUSED}, "x32"
    assert [decided(machine, clone, flags) for flags in (THREAD, FORK)] == [ALLOWED, REFUSED]
    assert decided(machine, clone3) == MISSING
    assert [decided(machine, tgkill, process) for process in (PROCESS, 1)] == [ALLOWED, REFUSED]
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_UNIX)
    assert [decided(machine, socket_number, family) for family in families] == [ALLOWED, ALLOWED, ALLOWED, REFUSED]
    known = {*numbers.values(), clone, clone3, tgkill, socket_number}
    assert {decided(machine, number) for number in set(range(600)) - known} == {ALLOWED}


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip("without the kernel's headers")
    text, column = HEADERS[machine].read_text(), ARCHITECTURES[machine][1]
    header = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    numbers = table(column) | {name: number[column] for name, number in CONDITIONAL.items()}
    younger = {"fchmodat2", "setxattrat", "removexattrat", "file_setattr", "open_tree_attr"} - set(header)
    assert {name: number for name, number in numbers.items() if name not in younger} == {
        name: header[name] for name in numbers if name not in younger
    }
    assert {name for name, *_ in (row.split() for row in _rows()) if name in header} <= set(numbers), "missing on this machine"


def _rows() -> Sequence[str]:
    words = DENIED.split()
    return [" ".join(words[row : row + 3]) for row in range(0, len(words), 3)]


def refused(call: Callable[[], Any]) -> bool:
    """Tell whether a call is refused by the system."""
    try:
        call()
    except PermissionError:
        return True
    return False


@needs_filters
def test_a_confined_thread_has_no_files_no_processes_and_no_sockets_of_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    calls: dict[str, Callable[[], Any]] = {
        "read": file.read_bytes,
        "create": (tmp_path / "new").touch,
        "remove": file.unlink,
        "rename": lambda: file.rename(tmp_path / "other"),
        "truncate": lambda: os.truncate(file, 0),
        "mode": lambda: file.chmod(0o777),
        "times": lambda: os.utime(file),
        "folder": (tmp_path / "folder").mkdir,
        "link": lambda: os.link(file, tmp_path / "link"),
        "change": lambda: os.chdir("/"),
        "list": lambda: list(tmp_path.iterdir()),
        "fork": os.fork,
        "program": lambda: subprocess.Popen([sys.executable, "-c", ""]),
        "exec": lambda: os.execv(sys.executable, ["python"]),  # noqa: S606 - that is the test
        "signal": lambda: os.kill(os.getppid(), 0),
        "unix": lambda: socket.socket(socket.AF_UNIX),
        "torch reads": lambda: torch.from_file(str(file), size=1, dtype=torch.uint8),
    }

    def outcomes() -> dict[str, bool]:
        return {name: refused(call) for name, call in calls.items() if name != "torch reads"}

    assert set(run_confined(outcomes).values()) == {True}
    with pytest.raises(RuntimeError, match="Permission denied"):
        run_confined(calls["torch reads"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "before", "this thread still has its files"


@needs_filters
def test_a_confined_thread_keeps_memory_threads_tcp_and_open_files(tmp_path: Path) -> None:
    def works() -> list[Any]:
        with ThreadPoolExecutor(2) as pool, socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.socket()
            client.connect(listener.getsockname())
            accepted, _ = listener.accept()
            accepted.sendall(b"x")
            received = pool.submit(client.recv, 1).result()
            client.close()
            accepted.close()
        with mmap.mmap(-1, 1 << 20) as memory:
            memory[0] = 1
        signal.pthread_kill(threading.get_ident(), 0)
        opened.write("y")
        return [received, float(torch.ones(1 << 16).sum())]

    with (tmp_path / "log").open("w") as opened:
        assert run_confined(works) == [b"x", 1 << 16]
    assert (tmp_path / "log").read_text() == "y"


@needs_filters
def test_a_thread_that_a_confined_one_starts_is_confined_for_good_and_others_are_not(tmp_path: Path) -> None:
    begin, outcome = threading.Event(), list[bool]()

    def later() -> None:
        begin.wait(20)
        outcome.append(refused((tmp_path / "new").touch))

    def start() -> threading.Thread:
        thread = threading.Thread(target=later)
        thread.start()
        return thread

    thread = run_confined(start)
    begin.set()
    thread.join(20)
    assert outcome == [True]
    assert ThreadPoolExecutor(1).submit(refused, (tmp_path / "new").touch).result() is False
    assert ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 0, "PR_GET_NO_NEW_PRIVS of this thread"


@needs_filters
def test_the_log_says_that_files_are_given_up_and_errors_reach_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ZeroDivisionError):
        run_confined(lambda: 1 // 0)
    assert [record.getMessage() for record in caplog.records] == [
        "the threads of torch.distributed.rpc have given up files and processes (seccomp)"
    ]


def test_without_filters_from_file_is_refused_and_the_log_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[bool] = []
    monkeypatch.setattr(confinement, "ARCHITECTURES", {})
    monkeypatch.setattr(confinement, "refuse_from_file", lambda: made.append(True))
    assert run_confined(lambda: Path(__file__).exists()) is True
    assert made == [True]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.match(
        r"^this system does not let a thread give up files \(.*\): .* only from_file is refused; see", record.getMessage()
    )
