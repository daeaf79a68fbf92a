"""Models and data sets with unusual state, each a thing that people do: runs are compared with plain PyTorch on them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

WIDTH = 16


class Classifier(nn.Module):
    """Features of 8 x 8 pixels, a middle part that a subclass makes, and 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.middle(self.features(inputs)))

    def middle(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


class FrozenNorm(Classifier):
    """Fine-tuning: `train` leaves a pretrained norm in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.norm.running_mean = torch.full((WIDTH,), 0.5)
        self.norm.running_var = torch.full((WIDTH,), 4.0)

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.norm.eval()
        return self

    def middle(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


class SwitchedNorm(FrozenNorm):
    """The forward pass alone decides that the norm is in eval mode."""

    def train(self, mode: bool = True) -> SwitchedNorm:
        nn.Module.train(self, mode)
        return self

    def middle(self, hidden: Tensor) -> Tensor:
        self.norm.eval()
        return self.norm(hidden)


class SometimesFrozenNorm(FrozenNorm):
    """The norm learns its statistics on every other batch, by a draw."""

    def middle(self, hidden: Tensor) -> Tensor:
        self.norm.train(self.training and bool(torch.rand(()) < 0.5))
        return self.norm(hidden)


class StochasticDepth(Classifier):
    """A block with a norm, which half of the training batches skip."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())

    def middle(self, hidden: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 0.5:
            return hidden
        return hidden + self.block(hidden)


class UnusedNorm(Classifier):
    """A norm that training never calls; evaluation does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden if self.training else self.norm(hidden)


class NormCalledTwice(Classifier):
    """One norm, two calls in a pass with different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def middle(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) + self.norm(3 * hidden + 1)


class NormCalledInBothModes(NormCalledTwice):
    """The second call, in eval mode, reads the statistics that the first one has just changed."""

    def middle(self, hidden: Tensor) -> Tensor:
        first = self.norm(hidden)
        mode = self.norm.training
        self.norm.eval()
        second = self.norm(hidden)
        self.norm.train(mode)
        return first + second


class CumulativeNorm(NormCalledTwice):
    """The running statistics are plain averages over all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, momentum=None)


class SharedNorm(NormCalledTwice):
    """The same norm under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.norm

    def middle(self, hidden: Tensor) -> Tensor:
        return self.again(self.norm(hidden))


class CheckpointedNorm(NormCalledTwice):
    """Activation checkpointing: backward runs the norm a second time."""

    def middle(self, hidden: Tensor) -> Tensor:
        made: Any = checkpoint(self.norm, hidden, use_reentrant=False)
        return made


class FunctionalNorm(NormCalledTwice):
    """The norm's buffers without its call."""

    def middle(self, hidden: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, 0.1)


class OldSpectralNorm(Classifier):
    """The spectral norm whose vectors are buffers of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def middle(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden)


class SpectralNorm(OldSpectralNorm):
    """The spectral norm that is a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))


class InstanceNorm(Classifier):
    """Instance norm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)

    def middle(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.view(-1, 4, WIDTH // 4)).flatten(1)


class AverageInPlace(Classifier):
    """An exponential average of the activations in a buffer, which the pass uses."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))

    def middle(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.update(hidden.detach().mean(0))
        return hidden - self.average

    def update(self, mean: Tensor) -> None:
        self.average = self.average.clone()  # autograd has the former values
        self.average.mul_(0.9).add_(mean, alpha=0.1)


class AverageByData(AverageInPlace):
    """The same, out of autograd's sight."""

    def update(self, mean: Tensor) -> None:
        self.average.data = 0.9 * self.average.data + 0.1 * mean


class AverageReassigned(AverageInPlace):
    """The same, as a new tensor each time."""

    def update(self, mean: Tensor) -> None:
        self.average = 0.9 * self.average + 0.1 * mean


class Counters(Classifier):
    """A whole number, a float64 and a mask in buffers, all used."""

    steps: Tensor
    total: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(WIDTH, dtype=torch.bool))

    def middle(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            self.total += hidden.detach().double().mean()
            self.seen |= (hidden.detach() > 1.5).any(0)
        return hidden * (1 + 0.01 * self.steps + self.total.float() * 0.01) + self.seen.float()


class BatchRenorm(Classifier):
    """A norm of one's own, which normalises with its running statistics while it trains."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))

    def middle(self, hidden: Tensor) -> Tensor:
        normalised = (hidden - self.mean) / (self.variance + 1e-5).sqrt()
        if self.training:
            variance, mean = torch.var_mean(hidden.detach(), 0)
            self.mean = self.mean.lerp(mean, 0.1)
            self.variance = self.variance.lerp(variance, 0.1)
        return normalised


class FrozenRandomLayer(Classifier):
    """Random features that a constructor draws from numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)
        self.project.weight = nn.Parameter(
            torch.tensor(np.random.randn(WIDTH, WIDTH) / math.sqrt(WIDTH), dtype=torch.float32),
            requires_grad=False,
        )

    def middle(self, hidden: Tensor) -> Tensor:
        return self.project(hidden).relu()


class RandomBuffer(Classifier):
    """The same as a buffer."""

    project: Tensor

    def __init__(self) -> None:
        super().__init__()
        drawn = np.random.randn(WIDTH, WIDTH) / math.sqrt(WIDTH)
        self.register_buffer("project", torch.tensor(drawn, dtype=torch.float32))

    def middle(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.project).relu()


class Differentiating(Classifier):
    """The forward pass differentiates by its input, as models of forces do."""

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.detach().requires_grad_()
        energy = self.features(inputs).square().sum()
        (force,) = torch.autograd.grad(energy, inputs, create_graph=True)
        return self.head(self.features(inputs) + self.features(force))


class ZeroedInside(Classifier):
    """The forward pass sets all gradients to None, as code for meta-learning may do."""

    def middle(self, hidden: Tensor) -> Tensor:
        self.zero_grad()
        return hidden


class GradientReplaced(Classifier):
    """A hook puts another tensor in the place of a gradient, another one takes a gradient away."""

    def __init__(self) -> None:
        super().__init__()

        def sign(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad = 0.01 * parameter.grad.sign()

        def drop(parameter: Tensor) -> None:
            parameter.grad = None

        self.head.weight.register_post_accumulate_grad_hook(sign)
        self.head.bias.register_post_accumulate_grad_hook(drop)

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden


class LateGrowth(AverageReassigned):
    """A buffer that grows after some passes, when all the trials are over."""

    passes = 0

    def update(self, mean: Tensor) -> None:
        self.passes += 1
        self.average = mean if self.passes < 9 else torch.zeros(1, WIDTH)


class DropoutNet(Classifier):
    """Dropout: random numbers that are drawn in the forward pass."""

    def middle(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, 0.3, self.training)


class Segmentation(nn.Module):
    """Two logits for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


def pixels() -> tuple[TensorDataset, TensorDataset]:
    """Images with a class for each pixel; the border does not count."""
    images = torch.rand(160, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    targets = (images[:, 0] > 0.6).long()
    targets[:, 0] = -100
    return TensorDataset(images[:128], targets[:128]), TensorDataset(images[128:], targets[128:])


class NextToken(nn.Module):
    """A language model of bigrams: logits (N, C, T) of targets (N, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens)).transpose(1, 2)


def tokens() -> tuple[TensorDataset, TensorDataset]:
    """Sequences of 12 tokens, of which each is a function of the one before in four cases of five."""
    drawn = torch.Generator().manual_seed(0)
    text = torch.randint(11, (200, 13), generator=drawn)
    for place in range(1, 13):
        keep = torch.rand(200, generator=drawn) < 0.8
        text[:, place] = torch.where(keep, (3 * text[:, place - 1] + 1) % 11, text[:, place])
    inputs, targets = text[:, :-1], text[:, 1:].clone()
    targets[::3, 6:] = -100  # short sequences
    return TensorDataset(inputs[:160], targets[:160]), TensorDataset(inputs[160:], targets[160:])
