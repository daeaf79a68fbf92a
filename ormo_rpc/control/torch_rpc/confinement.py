"""Hold back what operators called by name reach: the agent's threads give up files and other processes.

A peer of torch.distributed.rpc may call each of torch's operators by name, with arguments of its own, and no hook of torch's
sees the call. ``aten::from_file`` reads any file and creates it on request, ``aten::save`` writes one. Therefore the agent is
started by a thread that has first set a seccomp filter on itself. The threads that TensorPipe starts inherit it; the rest of
the process does not. Linux alone has it, and we know the numbers of its calls on x86-64 and aarch64; elsewhere ``from_file`` is
replaced, in the whole process, by a function that refuses, which leaves ``aten::save`` open (see SECURITY.md).

Calls that are refused with EACCES, by group:

* opening, creating, removing, renaming and linking files, and changing their size, owner, mode, times and attributes;
* the current directory, the root and mounts, which belong to all threads of a process;
* programs and processes: exec, fork, and clone without CLONE_THREAD. clone3, whose flags lie in memory that a filter cannot
  read, answers ENOSYS, whereupon the C library starts its threads by clone;
* other processes: ptrace, their memory and descriptors, and signals, but for tgkill within this process (``abort`` is one);
* ways round a filter: io_uring, which opens files on behalf of its caller, calls with the numbers of x32 or of another
  architecture; and the kernel's own interfaces: bpf, userfaultfd, perf, modules, kexec, keys;
* sockets of the Unix domain, by which one asks services of this machine.

The agent needs what remains: memory, futexes, threads, clocks, TCP, epoll, and the descriptors that are open already.
Nothing can be opened in these threads by our own functions either, so those only hand work to others (`dispatch`).
"""

from __future__ import annotations

import codecs
import ctypes
import errno
import importlib
import logging
import os
import platform
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_log = logging.getLogger(__name__)

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""For each machine its word in the data of a filter, and its column in the table."""
DENIED = """
open 2 - openat 257 56 openat2 437 437 creat 85 - open_by_handle_at 304 265 name_to_handle_at 303 264 uselib 134 -
memfd_create 319 279 memfd_secret 447 447 mq_open 240 180 inotify_init 253 - inotify_init1 294 26 fanotify_init 300 262
truncate 76 45 unlink 87 - unlinkat 263 35 rmdir 84 - rename 82 - renameat 264 38 renameat2 316 276 mkdir 83 - mkdirat 258 34
mknod 133 - mknodat 259 33 link 86 - linkat 265 37 symlink 88 - symlinkat 266 36 chmod 90 - fchmod 91 52 fchmodat 268 53
fchmodat2 452 452 chown 92 - fchown 93 55 lchown 94 - fchownat 260 54 utime 132 - utimes 235 - utimensat 280 88 futimesat 261 -
setxattr 188 5 lsetxattr 189 6 fsetxattr 190 7 removexattr 197 14 lremovexattr 198 15 fremovexattr 199 16
setxattrat 463 463 removexattrat 466 466 file_setattr 469 469

chdir 80 49 fchdir 81 50 chroot 161 51 pivot_root 155 41 mount 165 40 umount2 166 39 open_tree 428 428 open_tree_attr 467 467
move_mount 429 429 fsopen 430 430 fsconfig 431 431 fsmount 432 432 fspick 433 433 mount_setattr 442 442 setns 308 268
unshare 272 97 swapon 167 224 swapoff 168 225 quotactl 179 60 quotactl_fd 443 443 acct 163 89 reboot 169 142

execve 59 221 execveat 322 281 fork 57 - vfork 58 -

ptrace 101 117 process_vm_readv 310 270 process_vm_writev 311 271 process_madvise 440 440 kcmp 312 272 pidfd_open 434 434
pidfd_getfd 438 438 pidfd_send_signal 424 424 kill 62 129 tkill 200 130 rt_sigqueueinfo 129 138 rt_tgsigqueueinfo 297 240

io_uring_setup 425 425 io_uring_enter 426 426 io_uring_register 427 427 bpf 321 280 userfaultfd 323 282
perf_event_open 298 241 init_module 175 105 finit_module 313 273 delete_module 176 106 kexec_load 246 104
kexec_file_load 320 294 personality 135 92 add_key 248 217 request_key 249 218 keyctl 250 219
"""
"""Refused calls: name, number on x86-64, number on aarch64 (- where there is none)."""
CONDITIONAL = {"clone": (56, 220), "clone3": (435, 435), "tgkill": (234, 131), "socket": (41, 198)}
"""Calls that depend on their first argument, and clone3; the numbers in the same columns."""

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_CLONE_THREAD, _AF_UNIX, _X32 = 0x00010000, 1, 0x40000000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in the data of a filter; the argument's lower half, as both machines are little-endian."""
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_REFUSE = (_RETURN, 0, 0, _ERROR | errno.EACCES)

Instruction = tuple[int, int, int, int]
"""Code, the jumps where a condition holds and where it does not, and a constant."""


def run_confined(function: Callable[[], T]) -> T:
    """Run a function in a thread that has given up files and other processes, and return its value.

    Threads that the function starts have given them up for good. Where the system has no such threads, the function runs
    in an ordinary one, after `refuse_from_file`.

    Raises:
        Exception: that of the function.
    """
    _prime()
    outcome: Future[T] = Future()

    def body() -> None:
        try:
            try:
                _give_up()
            except OSError as error:
                refuse_from_file()
                _log.warning(
                    "this system does not let a thread give up files (%s): of the operators of torch.distributed.rpc only "
                    "from_file is refused; see SECURITY.md, or use transport=tcp, which needs no agent",
                    error.strerror,
                )
            else:
                _log.info("the threads of torch.distributed.rpc have given up files and processes (seccomp)")
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=body, name="confined start")
    thread.start()
    thread.join()
    return outcome.result()


def program(machine: str, process: int) -> Sequence[Instruction]:
    """The filter for a machine of `ARCHITECTURES`; ``process`` is this process's number."""
    architecture, column = ARCHITECTURES[machine]
    words = DENIED.split()
    numbers = [words[row + 1 + column] for row in range(0, len(words), 3)]
    clone, clone3, tgkill, socket = (number[column] for number in CONDITIONAL.values())
    allow, argument = (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, _FIRST_ARGUMENT)
    return [
        (_LOAD, 0, 0, _ARCHITECTURE),
        *((_IF_EQUAL, 1, 0, architecture), _REFUSE),
        (_LOAD, 0, 0, _NUMBER),
        *((_IF_AT_LEAST, 0, 1, _X32), _REFUSE),
        *((_IF_EQUAL, 0, 1, clone3), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)),
        *((_IF_EQUAL, 0, 4, clone), argument, (_IF_BITS, 0, 1, _CLONE_THREAD), allow, _REFUSE),
        *((_IF_EQUAL, 0, 4, tgkill), argument, (_IF_EQUAL, 0, 1, process), allow, _REFUSE),
        *((_IF_EQUAL, 0, 4, socket), argument, (_IF_EQUAL, 1, 0, _AF_UNIX), allow, _REFUSE),
        *(step for number in numbers if number != "-" for step in ((_IF_EQUAL, 0, 1, int(number)), _REFUSE)),
        allow,
    ]


class _Program(ctypes.Structure):
    """The kernel's ``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _give_up() -> None:
    """Set the filter on the calling thread, for good.

    Raises:
        OSError: this system has no filters, or we do not know its numbers.
    """
    machine = platform.machine()
    if sys.platform != "linux" or sys.byteorder != "little" or struct.calcsize("P") != 8 or machine not in ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"{sys.platform} on {machine}")
    steps = program(machine, os.getpid())
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes, prctl.restype = [ctypes.c_int, *[ctypes.c_ulong] * 4], ctypes.c_int
    filter_address = ctypes.addressof(installed := _Program(len(steps), code))
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filter_address, 0, 0)):
        if prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")
    del installed  # alive until here


_overrides: list[torch.library.Library] = []
"""Kept, because torch takes an override back with its library."""


def refuse_from_file() -> None:
    """Make ``aten::from_file`` refuse in the whole process, for us as well."""
    if _overrides:
        return

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("from_file is refused in a process with an agent of torch.distributed.rpc")

    library = torch.library.Library("aten", "IMPL")
    for key in ("CPU", "BackendSelect"):
        library.impl("from_file", refuse, key, allow_override=True)
    _overrides.append(library)


def _prime() -> None:
    """Do what opens files at its first use: imports within torch's RPC, its look at the processor, and the time zone."""
    importlib.import_module("torch.distributed.rpc.rref_proxy")
    codecs.lookup("unicode_escape")  # for the errors of calls, as torch has them
    torch.ones(2).add_(1)
    time.localtime()
