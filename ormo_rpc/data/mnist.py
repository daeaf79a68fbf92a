"""MNIST and its twin with pictures of clothes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ormo_rpc.data.sources import TorchvisionSection
from ormo_rpc.options import option


@dataclass(frozen=True, kw_only=True)
class MNIST(TorchvisionSection):
    """60,000 and 10,000 handwritten digits of 28 x 28 pixels, one channel (LeCun et al. 1998).

    The md5 sums are those of the packed files and are checked while downloading; the unpacked ones hold no code.
    """

    MEAN = (0.1307,)
    STD = (0.3081,)
    name: str = option("mnist", "70,000 handwritten digits of 28x28 pixels")

    @property
    def folder(self) -> Path:
        """``<root>/MNIST/raw``."""
        return self.root_folder / type(self).__name__ / "raw"

    def md5_sums(self) -> dict[str, str | None]:
        """The four unpacked files, without sums."""
        return {Path(packed).stem: None for packed, _ in self.torchvision_class.resources}

    def fetch(self) -> None:
        """Download from the first of torchvision's mirrors that answers."""
        self.torchvision_class(self.root_folder, download=True)

    def read(self, *, train: bool) -> tuple[Tensor, Tensor]:
        """Read the two idx files of one half."""
        from torchvision.datasets.mnist import read_image_file, read_label_file

        half = "train" if train else "t10k"
        images = read_image_file(str(self.folder / f"{half}-images-idx3-ubyte"))
        return images.unsqueeze(1), read_label_file(str(self.folder / f"{half}-labels-idx1-ubyte"))


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(MNIST):
    """60,000 and 10,000 pictures of clothes in ten classes, 28 x 28 pixels, one channel (Xiao, Rasul, Vollgraf 2017)."""

    MEAN = (0.2860,)
    STD = (0.3530,)
    name: str = option("fashion_mnist", "70,000 pictures of clothes of 28x28 pixels")
