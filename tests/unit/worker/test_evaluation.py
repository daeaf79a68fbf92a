"""Loss and accuracy against plain PyTorch over the whole set at once, and models that differentiate in their forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from ormo_rpc.data import DataSet, Epochs, Split
from ormo_rpc.messages import Reply
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.options import find
from ormo_rpc.tasks.cross_entropy import IGNORED
from ormo_rpc.worker import evaluation
from ormo_rpc.worker.evaluation import Evaluation, Evaluator
from ormo_rpc.worker.worker import Worker
from tests.support.own_splits import Tensors

CLASSES, SAMPLES = 4, 23


def made(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def numbers(*shape: int, below: int = CLASSES) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(2))


def with_ignored(targets: Tensor) -> Tensor:
    """Every third target does not count, and none of the first batch of five samples does."""
    targets = targets.clone()
    targets.view(-1)[::3] = IGNORED
    targets[:5] = IGNORED
    return targets


class Language(nn.Module):
    """A small language model: token numbers (N, T) to logits (N, C, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, CLASSES)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens)).transpose(1, 2)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, CLASSES))


def segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, CLASSES, 1))


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Tensors]] = {
    "classes": (classifier, Tensors(made(SAMPLES, 6), numbers(SAMPLES))),
    "classes, some ignored": (classifier, Tensors(made(SAMPLES, 6), with_ignored(numbers(SAMPLES)))),
    "int32 classes": (classifier, Tensors(made(SAMPLES, 6), with_ignored(numbers(SAMPLES)).int())),
    "uint8 classes": (classifier, Tensors(made(SAMPLES, 6), numbers(SAMPLES).to(torch.uint8))),
    "boolean classes": (classifier, Tensors(made(SAMPLES, 6), numbers(SAMPLES, below=2).bool())),
    "probabilities": (classifier, Tensors(made(SAMPLES, 6), made(SAMPLES, CLASSES).softmax(1))),
    "probabilities of double precision": (classifier, Tensors(made(SAMPLES, 6), made(SAMPLES, CLASSES).double().softmax(1))),
    "segmentation": (segmenter, Tensors(made(SAMPLES, 1, 5, 6), numbers(SAMPLES, 5, 6))),
    "segmentation, some ignored": (segmenter, Tensors(made(SAMPLES, 1, 5, 6), with_ignored(numbers(SAMPLES, 5, 6)))),
    "segmentation, probabilities": (segmenter, Tensors(made(SAMPLES, 1, 5, 6), made(SAMPLES, CLASSES, 5, 6).softmax(1))),
    "language": (Language, Tensors(numbers(SAMPLES, 9, below=7), numbers(SAMPLES, 9))),
    "language, padded": (Language, Tensors(numbers(SAMPLES, 9, below=7), with_ignored(numbers(SAMPLES, 9)))),
}


def problem(name: str) -> tuple[FlatModel, Tensors]:
    torch.manual_seed(3)
    module, data = PROBLEMS[name]
    return FlatModel(module()), data


def data_set(test: Split, validation: Split | None = None) -> DataSet:
    return DataSet(test, test, (1,), CLASSES, validation)


def evaluated(model: FlatModel, data: DataSet) -> Evaluation:
    return Evaluator(model, data)(model.flat_params(), model.buffers.copy())


def plain(module: nn.Module, data: Tensors) -> tuple[float, float]:
    """Loss and accuracy of plain PyTorch, in one forward pass."""
    module.eval()
    with torch.no_grad():
        logits = module(data.inputs)
    if data.targets.is_floating_point():
        return functional.cross_entropy(logits, data.targets).item(), (
            (logits.argmax(1) == data.targets.argmax(1)).double().mean().item()
        )
    targets = data.targets.long()
    counted = targets != -100
    right = (logits.argmax(1) == targets)[counted].double().mean().item()
    return functional.cross_entropy(logits, targets).item(), right


@pytest.mark.parametrize("size", [1, 5, 7, 500])
@pytest.mark.parametrize("name", PROBLEMS)
def test_loss_and_accuracy_are_means_over_the_targets_that_count(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH_SIZE", size)
    model, data = problem(name)
    loss, accuracy = plain(model.module, data)
    result = evaluated(model, data_set(data))
    assert result.test["loss"] == pytest.approx(loss, rel=1e-5)
    assert result.test["accuracy"] == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_training_loss_and_gradient_are_those_of_torch(name: str) -> None:
    model, data = problem(name)
    for layer in model.module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    params = model.flat_params()
    worker = Worker(model, data, Epochs(SAMPLES, SAMPLES, seed=0), find("algorithm", "asgd")(), seed=0)
    push = worker.compute(Reply(worker=0, ticket=0, stamp=0, params=params, lr=0.1, steps=1, incarnation=0))
    grad = push.grad.clone()
    targets = data.targets if data.targets.is_floating_point() else data.targets.long()
    other, _ = problem(name)
    for layer in other.module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    loss = functional.cross_entropy(other.module.train()(data.inputs), targets)
    loss.backward()
    assert push.loss == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.cat([p.grad.reshape(-1) for p in other.module.parameters() if p.grad is not None])
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_in_which_no_target_counts_has_no_loss_and_a_gradient_of_zero() -> None:
    model, data = problem("language")
    nothing = Tensors(data.inputs, torch.full_like(data.targets, IGNORED))
    worker = Worker(model, nothing, Epochs(SAMPLES, 4, seed=0), find("algorithm", "asgd")(), seed=0)
    push = worker.compute(Reply(worker=0, ticket=0, stamp=0, params=model.flat_params(), lr=0.1, steps=1, incarnation=0))
    assert push.loss is None
    assert not push.grad.any()


@pytest.mark.parametrize("name", ["classes", "segmentation"])
def test_a_split_in_which_no_target_counts_cannot_be_evaluated(name: str) -> None:
    model, data = problem(name)
    nothing = dataclasses.replace(data, targets=torch.full_like(data.targets, IGNORED))
    with pytest.raises(ValueError, match=r"^dataset: no target of the validation split counts$"):
        evaluated(model, data_set(data, nothing))


def test_the_validation_split_is_evaluated_beside_the_test_split() -> None:
    model, data = problem("classes")
    other = Tensors(made(9, 6) + 1, numbers(9))
    result = evaluated(model, data_set(data, other))
    assert tuple(result.test.values()) == pytest.approx(plain(model.module, data), rel=1e-5)
    assert result.validation is not None
    assert tuple(result.validation.values()) == pytest.approx(plain(model.module, other), rel=1e-5)
    without = evaluated(model, data_set(data))
    assert without == Evaluation(result.test)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_added_up_in_double_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    model = FlatModel(nn.Linear(6, CLASSES).to(dtype))
    data = Tensors(made(5000, 6).to(dtype), numbers(5000))
    with torch.no_grad():
        logits = model.module(data.inputs).double()
    result = evaluated(model, data_set(data))
    assert result.test["loss"] == pytest.approx(functional.cross_entropy(logits, data.targets).item(), rel=1e-9)


def test_an_evaluation_changes_neither_parameters_nor_buffers_nor_the_mode_of_another_model() -> None:
    class Counting(nn.Module):
        """Writes a buffer in every forward pass, in either mode."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier()
            self.register_buffer("calls", torch.zeros(()))

        @override
        def forward(self, inputs: Tensor) -> Tensor:
            calls = self.get_buffer("calls")
            calls.add_(1)
            return self.inner(inputs)

    model, training = FlatModel(Counting()), FlatModel(Counting())
    data = PROBLEMS["classes"][1]
    training.module.train()
    params, statistics = training.flat_params(), training.buffers.copy()
    before = params.clone(), {name: value.clone() for name, value in statistics.items()}
    evaluator = Evaluator(model, data_set(data, data))
    assert evaluator(params, statistics) == evaluator(params, statistics)
    torch.testing.assert_close((params, statistics), before, rtol=0, atol=0)
    assert training.module.training
    assert int(training.module.get_buffer("calls")) == 0


class Forces(nn.Module):
    """The negative gradient of an energy by the inputs, as in physics."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(CLASSES, 8), nn.Tanh(), nn.Linear(8, 1))
        self.passes = 0

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        inputs = inputs.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(inputs).sum(), inputs, create_graph=True)[0]


class ForcesOfItsOwn(Forces):
    """Switches gradients on itself."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            return super().forward(inputs)


@pytest.mark.parametrize(("kind", "extra"), [(Forces, 1), (ForcesOfItsOwn, 0)])
def test_a_model_that_differentiates_in_its_forward_pass_is_evaluated(kind: type[Forces], extra: int) -> None:
    torch.manual_seed(5)
    module = kind()
    model, data = FlatModel(module), Tensors(made(1100, CLASSES), numbers(1100))
    module.eval()
    logits = module(data.inputs).detach()
    module.passes = 0
    evaluator = Evaluator(model, data_set(data))
    result = evaluator(model.flat_params(), {})
    assert result.test["loss"] == pytest.approx(functional.cross_entropy(logits, data.targets).item(), rel=1e-5)
    assert module.passes == 3 + extra  # batches of 500; the first is repeated once, where gradients turn out to be needed
    assert evaluator(model.flat_params(), {}) == result
    assert module.passes == 6 + extra


class Merging(nn.Module):
    """An adapter that is added to a frozen weight when the model is put into eval mode, and taken off again to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(made(CLASSES, 6), requires_grad=False)
        self.adapter = nn.Parameter(torch.zeros(CLASSES, 6))
        self.merged = False

    @override
    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.adapter.detach()
            self.merged = not mode
        return self

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight if self.merged else self.weight + self.adapter)


class Caching(nn.Module):
    """A product of the weight, computed in eval mode, is kept until the model trains again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(made(CLASSES, 6))
        self.unit: Tensor | None = None

    @override
    def train(self, mode: bool = True) -> Caching:
        super().train(mode)
        self.unit = None if mode else self.unit
        return self

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        unit = functional.normalize(self.weight, dim=1) if self.unit is None else self.unit
        self.unit = None if self.training else unit.detach()
        return functional.linear(inputs, unit)


@pytest.mark.parametrize("make", [Merging, Caching])
def test_what_a_model_makes_of_its_weights_in_eval_mode_is_made_anew(make: type[nn.Module]) -> None:
    data = data_set(Tensors(made(SAMPLES, 6), numbers(SAMPLES)))
    model = FlatModel(make())
    several = Evaluator(model, data)
    for step in range(3):
        params = model.flat_params() + torch.randn(24, generator=torch.Generator().manual_seed(step))
        once = Evaluator(FlatModel(make()), data)(params, {})
        assert several(params, {}).test["loss"] == pytest.approx(once.test["loss"], rel=1e-5)


def test_an_ordinary_model_is_evaluated_to_the_bit_as_in_inference_mode() -> None:
    model, data = problem("segmentation, some ignored")
    result = evaluated(model, data_set(data))
    with torch.inference_mode():
        logits = model.module(data.inputs)
        loss = functional.cross_entropy(logits, data.targets, reduction="sum").item()
    assert result.test["loss"] == loss / int((data.targets != -100).sum())


def test_a_model_that_fails_with_gradients_too_says_why() -> None:
    model, _ = problem("classes")
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied \(23x5 and 6x8\)$"):
        evaluated(model, data_set(Tensors(made(SAMPLES, 5), numbers(SAMPLES))))
