"""Shared memory between real processes: read by the other one, never written, identified reliably, freed with its users."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from ormo_rpc.transports.stream.shared_memory import AVAILABLE, SegmentHandle, SharedMemoryPool, attach
from tests.support.processes import PATIENCE_SECONDS, ROOT, wait_until

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this system has no memfd_create")

SIZE = 3 * mmap.PAGESIZE + 5

READS = """
import sys
from ormo_rpc.transports.stream.shared_memory import SegmentHandle, attach
process, name, descriptor, size = sys.argv[1:]
seen = attach(SegmentHandle(pid=int(process), name=name, descriptor=int(descriptor)), int(size))
print(bytes(seen[:4].tolist()).hex(), seen.sum().item(), flush=True)
for line in sys.stdin:  # again, whenever asked
    if line == "write\\n":
        seen[1] = 9
    print(bytes(seen[:4].tolist()).hex(), flush=True)
"""
MAKES = """
import sys, time
from ormo_rpc.transports.stream.shared_memory import SharedMemoryPool
segments = SharedMemoryPool()
made = segments.vector(int(sys.argv[1]))
made.fill_(7)
print(segments.pid, segments.name, segments.descriptor(made), flush=True)
time.sleep(600)
"""


@contextmanager
def python(code: str, *arguments: object) -> Generator[subprocess.Popen[str]]:
    """Another process, which is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait(PATIENCE_SECONDS)


def asked(process: subprocess.Popen[str], word: str) -> str:
    """The answer of the process to a word; empty where it dies of it."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def said(process: subprocess.Popen[str]) -> list[str]:
    """The words of its next line."""
    assert process.stdout is not None
    return process.stdout.readline().split()


def users(name: str) -> list[int]:
    """The processes that have memory of that name mapped, or a descriptor of it."""
    found: list[int] = []
    for process in psutil.pids():
        here = Path(f"/proc/{process}")
        try:
            mapped = name in (here / "maps").read_text()
            if mapped or any(name in str(each.readlink()) for each in (here / "fd").iterdir()):
                found.append(process)
        except OSError:  # gone meanwhile, or somebody else's
            continue
    return found


def descriptor_of(segments: SharedMemoryPool, size: int = SIZE) -> tuple[torch.Tensor, int]:
    made = segments.vector(size)
    descriptor = segments.descriptor(made)
    assert descriptor is not None
    return made, descriptor


def handle_of(segments: SharedMemoryPool, descriptor: int) -> SegmentHandle:
    return SegmentHandle(pid=segments.pid, name=segments.name, descriptor=descriptor)


@pytest.mark.slow
def test_another_process_reads_what_is_written_and_dies_of_writing() -> None:
    segments = SharedMemoryPool()
    made, descriptor = descriptor_of(segments)
    assert made.numel() == SIZE
    assert not made.any()
    made[:4] = torch.tensor([1, 2, 3, 250], dtype=torch.uint8)
    with python(READS, segments.pid, segments.name, descriptor, SIZE) as reader:
        assert said(reader) == ["010203fa", "256"]
        made[0] = 17
        assert asked(reader, "read") == "110203fa"  # the same memory, not a copy
        assert asked(reader, "write") == ""
        assert reader.wait(PATIENCE_SECONDS) == -signal.SIGSEGV
    assert made[:4].tolist() == [17, 2, 3, 250]
    assert made.sum().item() == 272


@pytest.mark.slow
def test_the_memory_is_freed_with_the_last_process_however_that_ends() -> None:
    before = sorted(path.name for path in Path("/dev/shm").iterdir())  # noqa: S108 - looked at, not written to
    with python(MAKES, SIZE) as maker:
        process, name, descriptor = said(maker)
        with python(READS, process, name, descriptor, SIZE) as reader:
            assert said(reader) == ["07070707", str(7 * SIZE)]
            assert {maker.pid, reader.pid} <= set(users(name))
            maker.kill()
            maker.wait(PATIENCE_SECONDS)
            assert asked(reader, "read") == "07070707"  # it has it still
            assert users(name) == [reader.pid]
            with pytest.raises(OSError, match=r"No such file or directory"):
                attach(SegmentHandle(pid=int(process), name=name, descriptor=int(descriptor)), SIZE)
            reader.kill()
            reader.wait(PATIENCE_SECONDS)
    wait_until(lambda: not users(name), "the end of the memory")
    ours = [path.name for path in Path("/dev/shm").iterdir() if "ormo" in path.name or path.name == name]  # noqa: S108 - looked at, never written to
    assert ours == [each for each in before if "ormo" in each]


def memfd(*, size: int, seals: int, name: str) -> int:
    descriptor = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


NAME = "ormo_rpc_of_this_test"


def a_fifo(folder: Path) -> int:
    os.mkfifo(folder / "fifo")
    return os.open(folder / "fifo", os.O_RDWR)


def a_file(folder: Path) -> int:
    (folder / "file").write_bytes(bytes(SIZE))
    return os.open(folder / "file", os.O_RDONLY)


def a_file_that_is_called_so(folder: Path) -> int:
    (folder / f"memfd:{NAME} (deleted)").write_bytes(bytes(SIZE))
    return os.open(folder / f"memfd:{NAME} (deleted)", os.O_RDONLY)


OTHERS: dict[str, tuple[Callable[[Path], int], str]] = {
    "a fifo": (a_fifo, "is not the segment that was meant"),
    "a file": (a_file, "is not the segment that was meant"),
    "a file of that name": (a_file_that_is_called_so, "is not the segment that was meant"),
    "another name": (
        lambda _: memfd(size=SIZE, seals=fcntl.F_SEAL_SHRINK, name=NAME + "x"),
        "is not the segment that was meant",
    ),
    "not sealed": (lambda _: memfd(size=SIZE, seals=0, name=NAME), "is too small, or its size can change"),
    "too small": (
        lambda _: memfd(size=SIZE - 1, seals=fcntl.F_SEAL_SHRINK, name=NAME),
        "is too small, or its size can change",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_descriptor_of_anything_but_the_segment_is_refused(what: str, tmp_path: Path) -> None:
    make, reason = OTHERS[what]
    descriptor = make(tmp_path)
    gc.collect()  # descriptors of earlier tests, which would be closed meanwhile
    before = len(list(Path("/proc/self/fd").iterdir()))
    try:
        with pytest.raises(OSError, match=rf"\A/proc/{os.getpid()}/fd/{descriptor} {reason}\Z"):
            attach(SegmentHandle(pid=os.getpid(), name=NAME, descriptor=descriptor), SIZE)
        assert len(list(Path("/proc/self/fd").iterdir())) == before  # nothing of it stays open
    finally:
        os.close(descriptor)


def test_a_segment_with_the_right_name_and_seals_is_attached(tmp_path: Path) -> None:  # noqa: ARG001 - as for the others
    """So that the refusals above are for what each of them says."""
    descriptor = memfd(size=SIZE, seals=fcntl.F_SEAL_SHRINK, name=NAME)
    try:
        assert attach(SegmentHandle(pid=os.getpid(), name=NAME, descriptor=descriptor), SIZE).numel() == SIZE
    finally:
        os.close(descriptor)


def test_another_process_number_and_another_descriptor_are_errors() -> None:
    segments = SharedMemoryPool()
    made, descriptor = descriptor_of(segments)
    assert attach(handle_of(segments, descriptor), SIZE).numel() == SIZE
    with pytest.raises(OSError, match=r"No such file|Permission denied|not the segment that was meant"):
        attach(SegmentHandle(pid=os.getppid(), name=segments.name, descriptor=descriptor), SIZE)
    for wrong in (-1, 2**31, 10**30, descriptor + 1000):
        with pytest.raises(OSError, match=r"No such file"):
            attach(handle_of(segments, wrong), SIZE)
    with pytest.raises(OSError, match=r"is too small, or its size can change\Z"):
        attach(handle_of(segments, descriptor), 2 * SIZE)
    assert not made.any()


def test_a_segment_cannot_be_shrunk_or_written_through_its_descriptor() -> None:
    segments = SharedMemoryPool()
    made, descriptor = descriptor_of(segments)
    made.fill_(3)
    other = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    try:
        for size in (0, SIZE - 1, SIZE + mmap.PAGESIZE):
            with pytest.raises(PermissionError):
                os.ftruncate(other, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(other, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(PermissionError):
            mmap.mmap(other, SIZE, flags=mmap.MAP_SHARED)
        with pytest.raises(PermissionError):
            os.pwrite(other, b"\0", 0)
    finally:
        os.close(other)
    assert made.sum().item() == 3 * SIZE


def test_an_older_system_that_cannot_seal_the_content_still_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ormo_rpc.transports.stream.shared_memory._SEAL_FUTURE_WRITE", 1 << 20)  # which no kernel knows
    segments = SharedMemoryPool()
    made, descriptor = descriptor_of(segments)
    made.fill_(3)
    assert attach(handle_of(segments, descriptor), SIZE).sum().item() == 3 * SIZE
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)


def test_descriptors_go_with_the_object_and_the_memory_with_its_tensors() -> None:
    segments = SharedMemoryPool()
    name = segments.name
    made, descriptor = descriptor_of(segments)
    handle = handle_of(segments, descriptor)
    seen = attach(handle, SIZE)
    second, _ = descriptor_of(segments, 0)
    assert second.numel() == 1  # a mapping has a byte at least
    assert segments.descriptor(torch.zeros(3)) is None
    del segments, second
    gc.collect()
    with pytest.raises(OSError, match=r"No such file|not the segment that was meant"):
        attach(handle, SIZE)
    made.fill_(5)
    assert seen.sum().item() == 5 * SIZE
    assert Path("/proc/self/maps").read_text().count(name) == 2
    del made, seen
    gc.collect()
    assert os.getpid() not in users(name)  # nor the duplicates of descriptors that Python keeps with a mapping


def test_memory_is_not_shared_when_descriptors_are_scarce(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    segments = SharedMemoryPool()
    _, last = descriptor_of(segments)
    monkeypatch.setattr("resource.getrlimit", lambda _: (2 * last, 2 * last))
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    for size in (SIZE, 1):
        made = segments.vector(size)
        assert (made.shape, made.sum().item(), segments.descriptor(made)) == ((size,), 0, None)
        made.fill_(3)
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith(f"half of the {2 * last} open files that a process may have (ulimit -n) are open")


def test_attaching_a_segment_emits_no_warning() -> None:
    segments = SharedMemoryPool()
    _, descriptor = descriptor_of(segments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(handle_of(segments, descriptor), SIZE)
