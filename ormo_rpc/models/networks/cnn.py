"""A small convolution net for small images."""

from __future__ import annotations

from torch import Tensor, nn


class CNNNetwork(nn.Module):
    """Two 3x3 convolutions of 32 channels, each with ReLU and max pooling, then a hidden layer of 64 features.

    110,634 parameters for 28 x 28 grey pixels, 141,930 for 32 x 32 coloured ones. There is no batch norm, so no running
    statistics either: training and evaluation compute the same.

    Args:
        shape: (channels, height, width) of an image, height and width at least 4.
        num_classes: The width of the output.
        dropout: The probability that a feature is dropped before either linear layer.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int, dropout: float) -> None:
        super().__init__()
        channels, height, width = shape
        self.features = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Flatten(), nn.Dropout(dropout), nn.Linear(32 * (height // 4) * (width // 4), 64), nn.ReLU()),
            *(nn.Dropout(dropout), nn.Linear(64, num_classes)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (B, classes), of images, shape (B, C, H, W)."""
        return self.classifier(self.features(images))
