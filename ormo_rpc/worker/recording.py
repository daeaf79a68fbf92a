"""Work for a device that is recorded once and repeated: a CUDA graph."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Generator
from pathlib import Path

import torch

from ormo_rpc.errors import ModelRefused, one_line
from ormo_rpc.seeding import cpu_states, seed_for, seeded

WARM_UPS = 2
"""Passes before the recording: libraries allocate and choose in the first ones."""
_SYNCHRONIZING = "called a synchronizing CUDA operation"
_OTHERWISE = "worker.cuda_graph=false computes it as it is"


class RecordingStream:
    """A stream of a GPU for work that may be recorded; on the CPU, where all is done at once, none.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = None if self.stream is None else torch.cuda.graph_pool_handle()
        """The memory of all recordings, which are repeated one after the other."""

    @contextlib.contextmanager
    def entered(self) -> Generator[None]:
        """Put work onto the stream, behind all that the current one has so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Put what comes next on the current stream behind all that is on this one."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def event(self) -> torch.cuda.Event | None:
        """Make an event."""
        return None if self.stream is None else torch.cuda.Event()

    @contextlib.contextmanager
    def seeded(self, seed: int, purpose: str, number: int) -> Generator[None]:
        """Have what is repeated draw from the start of one stream: on a GPU from its own generator, which nothing else uses."""
        if self.stream is None:
            with seeded(seed, purpose, number):
                yield
        else:
            torch.cuda.default_generators[self.stream.device_index].manual_seed(seed_for(seed, purpose, number))
            yield

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do work a few times, and record it; return what repeats it on the current stream. On the CPU it is done again.

        Raises:
            ModelRefused: it waits for the device, draws random numbers elsewhere, or cannot be recorded.
        """
        if self.stream is None:
            return work
        with self.entered():
            for _ in range(WARM_UPS):
                work()
            with _refused(), _not_waiting(), _not_drawing():
                work()
            graph = torch.cuda.CUDAGraph()
            with _refused(), torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
                work()
        return graph.replay


@contextlib.contextmanager
def _not_waiting() -> Generator[None]:
    """Raise where anything waits for the GPU."""
    former = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(former)


@contextlib.contextmanager
def _not_drawing() -> Generator[None]:
    """Raise where anything draws from a global generator of the CPU: the same would be drawn again and again."""
    before = cpu_states()
    yield
    if cpu_states() != before:
        raise refused(
            "got a pass that draws random numbers on the CPU, or from Python's or numpy's generator, expected draws on the GPU "
            "alone, which alone a recording makes anew"
        )


@contextlib.contextmanager
def _refused() -> Generator[None]:
    """Turn the failure of a pass into one line."""
    try:
        yield
    except ModelRefused:
        raise
    except Exception as error:
        cause = error.__context__ if isinstance(error.__context__, Exception) else error  # the recording's end fails after it
        raise ModelRefused(f"worker.cuda_graph: got a pass that {_failure(cause)}; {_OTHERWISE}") from error


def _failure(error: Exception) -> str:
    """Say why a pass cannot be recorded, and where."""
    own = Path(torch.__file__).parent, Path(__file__).parent
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not _within(each.filename, own)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    if _SYNCHRONIZING in str(error):
        return f"waits for the GPU{where} ({frames[-1].line if frames else 'in torch'}), expected none that does"
    return f"cannot be recorded{where}: {one_line(error)}"


def _within(file: str, folders: tuple[Path, ...]) -> bool:
    return any(folder in Path(file).parents for folder in folders)


def refused(reason: str) -> ModelRefused:
    """Make the refusal of a model that no graph can hold."""
    return ModelRefused(f"worker.cuda_graph: {reason}; {_OTHERWISE}")
