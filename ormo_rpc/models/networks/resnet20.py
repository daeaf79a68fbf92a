"""The residual network for CIFAR with 20 layers."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from ormo_rpc.models.shortcut import Shortcut

BLOCKS_PER_STAGE = 3
WIDTHS = (16, 32, 64)


class ResNet20Network(nn.Module):
    """A 3x3 convolution, three stages of three residual blocks with 16, 32 and 64 channels, global average, one linear layer.

    For CIFAR-10 269,722 parameters with `Shortcut.identity`, 272,474 with `Shortcut.projection`. Convolutions start from He's
    normal distribution, variance 2 / fan in.

    Source: He, Zhang, Ren, Sun 2015, arXiv 1512.03385, section 4.2.
    """

    def __init__(self, channels: int, num_classes: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.stem = _convolution(channels, WIDTHS[0], kernel=3, stride=1)
        blocks: list[nn.Module] = []
        before = WIDTHS[0]
        for width in WIDTHS:
            for _ in range(BLOCKS_PER_STAGE):
                blocks.append(Block(before, width, shortcut))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (B, classes), of images, shape (B, C, H, W)."""
        features = self.blocks(F.relu(self.stem(images)))
        return self.classifier(features.mean(dim=(2, 3)))


class Block(nn.Module):
    """``relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))``; where the channels grow, the first convolution has stride 2."""

    def __init__(self, before: int, after: int, shortcut: Shortcut) -> None:
        super().__init__()
        grows = after > before
        stride = 2 if grows else 1
        self.first = _convolution(before, after, kernel=3, stride=stride)
        self.second = _convolution(after, after, kernel=3, stride=1)
        self.shortcut: nn.Module = nn.Identity()
        if grows and shortcut is Shortcut.identity:
            self.shortcut = Subsample(after - before)
        elif grows:
            self.shortcut = _convolution(before, after, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) to (B, after, H / stride, W / stride), rounded up."""
        return F.relu(self.shortcut(x) + self.second(F.relu(self.first(x))))


class Subsample(nn.Module):
    """Every second pixel in both directions, and ``extra`` more channels of zeros."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C + extra, H / 2, W / 2), rounded up."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))


def _convolution(before: int, after: int, *, kernel: int, stride: int) -> nn.Sequential:
    """A convolution without bias, which the batch norm after it has anyway."""
    convolution = nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after))
