"""MNIST and Fashion-MNIST."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import override

from ormo_rpc.data.sources import TorchvisionImages
from ormo_rpc.options import register


@register("mnist")
@dataclass(frozen=True, kw_only=True)
class MNIST(TorchvisionImages):
    """70,000 handwritten digits of 28x28 pixels in ten classes (LeCun et al. 1998); 10,000 are for testing.

    The md5 sums are those of the packed files and are checked while downloading; the unpacked ones hold no code.
    """

    MEAN = (0.1307,)
    STD = (0.3081,)

    @property
    @override
    def folder(self) -> Path:
        return self.root_folder / type(self).__name__ / "raw"

    @override
    def md5_sums(self) -> dict[str, str | None]:
        return {Path(packed).stem: None for packed, _ in self.torchvision_class.resources}

    @override
    def fetch(self) -> None:
        self.torchvision_class(self.root_folder, download=True)

    @override
    def read(self, *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        from torchvision.datasets.mnist import read_image_file, read_label_file

        half = "train" if train else "t10k"
        images = read_image_file(str(self.folder / f"{half}-images-idx3-ubyte"))
        return images.unsqueeze(1), read_label_file(str(self.folder / f"{half}-labels-idx1-ubyte"))


@register("fashion_mnist")
@dataclass(frozen=True, kw_only=True)
class FashionMNIST(MNIST):
    """70,000 pictures of clothes of 28x28 pixels in ten classes (Xiao, Rasul, Vollgraf 2017); 10,000 are for testing."""

    MEAN = (0.2860,)
    STD = (0.3530,)
