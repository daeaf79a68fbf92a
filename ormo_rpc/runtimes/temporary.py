"""Temporary folders, and the removal of those that killed processes have left."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import zlib
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def temporary_folder(name: str) -> Generator[Path]:
    """Lend a folder in the temporary directory, which is removed at the end.

    A process that is killed removes nothing. So the name of a folder has the id of its process, and those of the same name
    whose processes are dead are removed first.

    Args:
        name: The beginning of its name.
    """
    prefix = f"{name}_{_processes()}_"
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        number = folder.name.removeprefix(prefix).partition("_")[0]
        if number.isdecimal() and not _lives(int(number)):
            shutil.rmtree(folder, ignore_errors=True)  # another process may be removing it, too
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}_") as folder:
        yield Path(folder)


@functools.cache
def _processes() -> str:
    """Name the space of process ids: containers and machines may share a temporary directory, where an id tells nothing."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink()) + Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:  # not Linux
        space = os.uname().nodename
    return f"{zlib.crc32(space.encode()):08x}"


def _lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
