"""Processes and their listening sockets, as the operating system shows them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil


def is_running(process: psutil.Process) -> bool:
    """Tell whether a process runs; one that has exited and is not yet reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pid_is_running(pid: int) -> bool:
    """`is_running` by process id."""
    try:
        return is_running(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def command_line(process: psutil.Process) -> list[str]:
    """Its arguments; empty if it has just exited."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def listening(table: str) -> set[str]:
    """Inodes of the sockets that listen, from ``/proc/net/tcp`` (the fourth column is the state, the tenth the inode)."""
    rows = [line.split() for line in table.splitlines()]
    return {row[9] for row in rows if len(row) > 9 and row[3] == "0A"}


def socket_inodes(processes: Iterable[psutil.Process]) -> set[str]:
    """Inodes of the sockets that these processes hold open."""
    found: set[str] = set()
    for process in processes:
        folder = Path(f"/proc/{process.pid}/fd")
        try:
            for descriptor in folder.iterdir():
                target = str(descriptor.readlink())
                if target.startswith("socket:["):
                    found.add(target[len("socket:[") : -1])
        except OSError:
            continue
    return found
