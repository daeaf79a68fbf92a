"""CIFAR-10 and CIFAR-100, whose files are pickles and therefore read with care."""

from __future__ import annotations

import functools
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from ormo_rpc.data.sources import TorchvisionImages
from ormo_rpc.data.splits import DataSet
from ormo_rpc.options import option, register


@register("cifar10")
@dataclass(frozen=True, kw_only=True)
class CIFAR10(TorchvisionImages):
    """60,000 colour photographs of 32x32 pixels in ten classes (Krizhevsky 2009); 10,000 are for testing."""

    MEAN = (0.4914, 0.4822, 0.4465)
    STD = (0.2470, 0.2435, 0.2616)
    augment: bool = option(True, "random crops (4 pixels of padding) and mirror images while training")

    @override
    def load(self) -> DataSet:
        return self._load(augment=self.augment)

    @property
    @override
    def folder(self) -> Path:
        return self.root_folder / self.torchvision_class.base_folder

    @override
    def md5_sums(self) -> dict[str, str | None]:
        # The file with the names of the classes is not needed.
        return dict(self.torchvision_class.train_list + self.torchvision_class.test_list)

    @override
    def fetch(self) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        source = self.torchvision_class
        download_and_extract_archive(source.url, str(self.root_folder), filename=source.filename, md5=source.tgz_md5)

    @override
    def read(self, *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        files = self.torchvision_class.train_list if train else self.torchvision_class.test_list
        batches = [read_arrays(self.folder / name) for name, _ in files]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        # The file of CIFAR-100 has coarse labels as well.
        labels = np.concatenate([batch["labels" if "labels" in batch else "fine_labels"] for batch in batches])
        return torch.from_numpy(images), torch.from_numpy(labels)


@register("cifar100")
@dataclass(frozen=True, kw_only=True)
class CIFAR100(CIFAR10):
    """60,000 colour photographs of 32x32 pixels in a hundred classes (Krizhevsky 2009); 10,000 are for testing."""

    MEAN = (0.5071, 0.4865, 0.4409)
    STD = (0.2673, 0.2564, 0.2762)
    NUM_CLASSES = 100


def read_arrays(path: Path) -> dict[str, Any]:
    """Unpickle a dictionary of plain values and numpy arrays safely, also from an untrusted file.

    Raises:
        pickle.UnpicklingError: when the file asks for anything but an array.
    """
    with path.open("rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()


def _dtype(name: str, align: int = 0, copy: int = 0) -> np.dtype[Any]:
    """``numpy.dtype``, which today refuses the 0 and 1 that old pickles give for its two flags."""
    return np.dtype(name, align=bool(align), copy=bool(copy))


def _latin1(text: str, _encoding: str) -> bytes:
    """``codecs.encode`` for the one encoding in which protocols up to 2 store the bytes of an array."""
    return text.encode("latin1")


@functools.cache
def _allowed() -> dict[tuple[str, str], Any]:
    """All that numpy's pickles need, by module and name."""
    reconstruct, from_buffer = (np.zeros(1).__reduce_ex__(protocol)[0] for protocol in (2, 5))
    return {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _dtype,
        ("_codecs", "encode"): _latin1,
        **{(f"numpy.{core}.multiarray", "_reconstruct"): reconstruct for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): from_buffer for core in ("core", "_core")},
    }


class _ArrayUnpickler(pickle.Unpickler):
    """Knows only what numpy's pickles need, under the old and the new name of numpy's inner package."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Look up the function that the file asks for, if it is a harmless one."""
        try:
            return _allowed()[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is no part of an array: refused") from None
