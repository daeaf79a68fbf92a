"""Memory of a GPU that other processes open by a handle: CUDA's own calls, since torch has none for memory of one's own.

`torch.multiprocessing` shares the blocks of torch's allocator, counts references to them in files, and keeps a block for good
whose reader was killed. Memory made here is nobody else's, and freed with the process at the latest.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch

from ormo_rpc.devices import card_id

HANDLE_BYTES = 64
GRANULARITY = 2 << 20
"""Smaller allocations share pages, and a handle opens whole pages."""
_LAZY_PEER_ACCESS = 1


class CudaError(RuntimeError):
    """A call of CUDA's has failed."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class Memory:
    """Bytes of a GPU's memory, until the last tensor over them is gone.

    Args:
        device: The GPU.
        handle: Of another process's memory, to open; None to make some.
        size: The number of bytes.

    Raises:
        CudaError: there is no such memory, or no room for it.
    """

    def __init__(self, device: torch.device, size: int, handle: bytes | None = None) -> None:
        self._address = 0
        self._opened = handle is not None
        self._device = device
        address = ctypes.c_void_p()
        with torch.cuda.device(device):
            if handle is None:
                rounded = -(-size // GRANULARITY) * GRANULARITY
                _call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(rounded))
            else:
                given = _Handle.from_buffer_copy(handle)
                _call("cudaIpcOpenMemHandle", ctypes.byref(address), given, ctypes.c_uint(_LAZY_PEER_ACCESS))
        self._address = address.value or 0
        self.__cuda_array_interface__ = {
            "version": 2,
            "typestr": "|u1",
            "shape": (size,),
            "data": (self._address, False),
        }

    def tensor(self) -> torch.Tensor:
        """The bytes, shape (size,); they keep this object."""
        return torch.as_tensor(self, device=self._device)

    def handle(self) -> bytes:
        """The handle by which another process opens the memory.

        Raises:
            CudaError: it cannot be opened by others.
        """
        handle = _Handle()
        with torch.cuda.device(self._device):
            _call("cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(self._address))
        return bytes(handle.reserved)

    def __del__(self) -> None:
        if not self._address or sys.is_finalizing():
            return
        with torch.cuda.device(self._device):
            # Without a look at the result: an error of an earlier kernel shows here, and nobody can be told.
            (_library().cudaIpcCloseMemHandle if self._opened else _library().cudaFree)(ctypes.c_void_p(self._address))
            _library().cudaGetLastError()


def make(device: torch.device, size: int) -> tuple[torch.Tensor, bytes]:
    """Make memory of zero bytes, and return it with the handle by which other processes open it.

    Raises:
        CudaError: there is no room, or it cannot be opened by others.
    """
    memory = Memory(device, size)
    tensor = memory.tensor().zero_()
    torch.cuda.current_stream(device).synchronize()
    return tensor, memory.handle()


def attach(device: torch.device, size: int, handle: bytes) -> torch.Tensor:
    """Open another process's memory of that many bytes.

    Raises:
        CudaError: there is none that this process can open.
    """
    if len(handle) != HANDLE_BYTES:
        raise CudaError(f"got a handle of {len(handle)} bytes, expected {HANDLE_BYTES}")
    return Memory(device, size, handle).tensor()


def device_of(card: str) -> torch.device | None:
    """The GPU with that `card_id`, as this process sees it; None where it does not."""
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return next((device for device in devices if card_id(device) == card), None)


def _call(name: str, *arguments: Any) -> None:
    library = _library()
    error = getattr(library, name)(*arguments)
    if error:
        library.cudaGetLastError()  # clears it, as torch would raise it after its next kernel
        raise CudaError(f"{name}: {library.cudaGetErrorString(error).decode()} (error {error})")


@functools.cache
def _library() -> ctypes.CDLL:
    """CUDA's runtime, as torch has loaded it.

    Raises:
        CudaError: it is not there.
    """
    torch.cuda.init()
    for name in (None, f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}"):
        try:
            library = ctypes.CDLL(name)
            library.cudaIpcOpenMemHandle.argtypes = (ctypes.c_void_p, _Handle, ctypes.c_uint)
            library.cudaGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError):
            continue
        return library
    raise CudaError("CUDA's runtime library (libcudart) is not found in this process")
