"""Models: sizes known from elsewhere, shapes, initial weights as a function of the seed, and clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ormo_rpc.models import (
    CNN,
    MLP,
    CustomModel,
    Model,
    ResNet20,
    Shortcut,
    Torchvision,
)
from ormo_rpc.models.own_loop import OwnLoopModel
from ormo_rpc.options import parts

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
OURS: list[Model] = [
    MLP(),
    MLP(depth=0),
    MLP(depth=3, dropout=0.5),
    CNN(),
    CNN(dropout=0.5),
    ResNet20(),
    ResNet20(shortcut=Shortcut.projection),
]


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def linear(input_shape: tuple[int, ...], num_classes: int, scale: float = 1.0) -> nn.Module:
    """A user's model that wants to know the problem."""
    layer = nn.Linear(input_shape[0], num_classes)
    nn.init.constant_(layer.weight, scale)
    return layer


def not_a_model(**_keywords: Any) -> int:
    """A user's mistake."""
    return 7


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("model_part", OURS, ids=repr)
def test_logits_have_one_value_per_class_and_every_parameter_gets_a_gradient(model_part: Model, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = model_part.build(shape, 7)
    logits: Tensor = model(torch.randn(4, *shape))
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("model_part", OURS, ids=repr)
def test_initial_weights_are_a_function_of_the_global_seed(model_part: Model) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(model_part.build((1, 8, 8), 10).parameters())

    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("model_part", "shape", "expected"),
    [
        (MLP(), (1, 8, 8), 64 * 128 + 128 + 128 * 10 + 10),
        (MLP(hidden=5, depth=2), (1, 8, 8), 64 * 5 + 5 + 5 * 5 + 5 + 5 * 10 + 10),
        (MLP(depth=0), (1, 8, 8), 64 * 10 + 10),
        # Two 3x3 convolutions, then 32 channels of 7x7 (28 halved twice) or 8x8 (32 halved twice) pixels to 64 features.
        (CNN(), (1, 28, 28), (9 * 32 + 32) + (9 * 32 * 32 + 32) + (32 * 49 * 64 + 64) + 650),
        (CNN(), (3, 32, 32), (27 * 32 + 32) + (9 * 32 * 32 + 32) + (32 * 64 * 64 + 64) + 650),
        # Three times three blocks of two convolutions (He et al. 2015, model_part 4.2: 0.27 million): stem 3*16*9, stages
        # 6*16*16*9, 16*32*9 + 5*32*32*9, 32*64*9 + 5*64*64*9, batch norms 2*(7*16 + 6*32 + 6*64), classifier 64*10 + 10.
        (ResNet20(), (3, 32, 32), 432 + 13_824 + 50_688 + 202_752 + 1_376 + 650),
        # and two 1x1 convolutions with batch norm: 16*32 + 2*32 + 32*64 + 2*64.
        (ResNet20(shortcut=Shortcut.projection), (3, 32, 32), 269_722 + 2_752),
        (Torchvision(arch="squeezenet1_1"), (3, 64, 64), 1_235_496 - 990 * 513),  # documented for 1,000 classes
    ],
    ids=str,
)
def test_parameter_counts(model_part: Model, shape: tuple[int, ...], expected: int) -> None:
    assert size(model_part.build(shape, 10)) == expected


def test_the_two_residual_networks_have_the_published_sizes() -> None:
    sizes = [size(ResNet20(shortcut=shortcut).build((3, 32, 32), 10)) for shortcut in Shortcut]
    assert sizes == [269_722, 272_474]


def test_convolutions_of_the_residual_network_start_with_the_variance_of_he() -> None:
    torch.manual_seed(0)
    model = ResNet20().build((3, 32, 32), 10)
    last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    # 64*64*9 = 36,864 weights of variance 2 / (64*9): the estimate's relative deviation is sqrt(2 / 36,864) = 0.7 %.
    assert last.weight.var().item() == pytest.approx(2 / 576, rel=0.04)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 19  # and the linear layer makes 20


def test_the_identity_shortcut_keeps_every_second_pixel_and_adds_channels_of_zeros() -> None:
    model = ResNet20().build((1, 9, 9), 10)
    shortcut = next(module for name, module in model.named_modules() if name == "blocks.3.shortcut")
    x = torch.arange(2 * 16 * 9 * 9, dtype=torch.float32).reshape(2, 16, 9, 9)
    y = shortcut(x)
    assert y.shape == (2, 32, 5, 5)
    assert all(y[n, c, i, j] == x[n, c, 2 * i, 2 * j] for n in (0, 1) for c in (0, 15) for i in range(5) for j in range(5))
    assert not y[:, 16:].any()


def test_dropout_drops_in_training_only() -> None:
    model = CNN(dropout=0.5).build((1, 8, 8), 10)
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_model_of_torchvision_is_ready_to_train_and_has_the_asked_classes() -> None:
    model = Torchvision(arch="shufflenet_v2_x0_5").build((3, 32, 32), 5)
    assert model.training
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_trying_the_model_on_zeros_leaves_its_running_statistics_alone() -> None:
    model = Torchvision(arch="shufflenet_v2_x0_5").build((3, 32, 32), 5)
    counts = [value for name, value in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert not any(counts)


def test_an_unknown_classifier_of_torchvision_gets_near_names() -> None:
    message = r"^model\.arch: got 'resnet-18', expected a classifier of torchvision\.models such as resnet18, .*$"
    with pytest.raises(ValueError, match=message):
        Torchvision(arch="resnet-18").build((3, 32, 32), 10)


def test_a_classifier_that_does_not_take_these_images_says_so() -> None:
    message = r"^model\.arch: shufflenet_v2_x0_5 does not take inputs of shape \(1, 28, 28\): .*channels"
    with pytest.raises(ValueError, match=message):
        Torchvision(arch="shufflenet_v2_x0_5").build((1, 28, 28), 10)


@pytest.mark.parametrize(
    ("model_part", "shape", "message"),
    [
        (CNN(), (64,), r"^model: cnn takes images .* of at least 4x4 pixels, but .* have shape \(64,\)$"),
        (CNN(), (1, 3, 8), r"^model: cnn takes images .* of at least 4x4 pixels, but .* have shape \(1, 3, 8\)$"),
        (ResNet20(), (64,), r"^model: resnet20 takes images .*, but the data set's inputs have shape \(64,\)$"),
    ],
    ids=str,
)
def test_inputs_that_are_no_images_are_refused(model_part: Model, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_part.build(shape, 10)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (MLP, {"hidden": 0}, r"^model\.hidden: got 0, expected a whole number >= 1$"),
        (MLP, {"depth": -1}, r"^model\.depth: got -1, expected a whole number >= 0$"),
        (MLP, {"dropout": 1.0}, r"^model\.dropout: got 1\.0, expected a number in \[0, 1\)$"),
        (CNN, {"dropout": -0.1}, r"^model\.dropout: got -0\.1, expected a number in \[0, 1\)$"),
        (CustomModel, {}, r"^model\._target_: got '', expected a dotted path such as .*$"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(kind: type[Model], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_a_custom_model_gets_input_shape_and_classes_if_it_takes_them_and_the_users_keywords() -> None:
    model = CustomModel(_target_=f"{__name__}.linear", kwargs={"scale": 3.0}).build((5,), 2)
    assert isinstance(model, nn.Linear)
    assert model.weight.tolist() == [[3.0] * 5] * 2


def test_the_users_keywords_override_input_shape_and_classes() -> None:
    model = CustomModel(_target_=f"{__name__}.linear", kwargs={"num_classes": 9}).build((5,), 2)
    assert isinstance(model, nn.Linear)
    assert model.out_features == 9


def test_a_custom_model_without_these_parameters_does_not_get_them() -> None:
    model = CustomModel(_target_="torch.nn.Linear", kwargs={"in_features": 5, "out_features": 2}).build((5,), 2)
    assert isinstance(model, nn.Linear)


@pytest.mark.parametrize(
    ("path", "kwargs", "message"),
    [
        (
            "no_such_package.f",
            {},
            "'no_such_package.f' cannot be imported: No module named 'no_such_package'; is its folder on.*",
        ),
        ("torch.nn.NoSuch", {}, "'torch.nn.NoSuch' cannot be imported: module 'torch.nn' has no attribute 'NoSuch'.*"),
        ("math.pi", {}, r"'math.pi' is 3\.14\d*, expected a function or class"),
        (
            f"{__name__}.linear",
            {"skale": 1},
            r"'.*\.linear' takes \(.*\).*, not model\.skale=1: .* argument 'skale'",
        ),
        (f"{__name__}.not_a_model", {}, r".*\.not_a_model returned int, expected a torch\.nn\.Module"),
    ],
    ids=str,
)
def test_a_custom_model_that_does_not_work_is_one_clear_error(path: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\._target_: {message}$"):
        CustomModel(_target_=path, kwargs=kwargs).build((5,), 2)


def test_every_registered_model_is_tested_here() -> None:
    assert {type(model) for model in OURS} | {Torchvision, CustomModel, OwnLoopModel} == set(parts("model").values())
