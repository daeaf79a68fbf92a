"""Models: sizes known from elsewhere, shapes, initial weights as a function of the seed, and clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ormo_rpc.models import (
    MODELS,
    CNNSection,
    CustomSection,
    MLPSection,
    ModelSection,
    ResNet20Section,
    Shortcut,
    TorchvisionSection,
)

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
OURS: list[ModelSection] = [
    MLPSection(),
    MLPSection(depth=0),
    MLPSection(depth=3, dropout=0.5),
    CNNSection(),
    CNNSection(dropout=0.5),
    ResNet20Section(),
    ResNet20Section(shortcut=Shortcut.projection),
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
@pytest.mark.parametrize("section", OURS, ids=repr)
def test_logits_have_one_value_per_class_and_every_parameter_gets_a_gradient(
    section: ModelSection, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = section.build(shape, 7)
    logits: Tensor = model(torch.randn(4, *shape))
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("section", OURS, ids=repr)
def test_initial_weights_are_a_function_of_the_global_seed(section: ModelSection) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(section.build((1, 8, 8), 10).parameters())

    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("section", "shape", "expected"),
    [
        (MLPSection(), (1, 8, 8), 64 * 128 + 128 + 128 * 10 + 10),
        (MLPSection(hidden=5, depth=2), (1, 8, 8), 64 * 5 + 5 + 5 * 5 + 5 + 5 * 10 + 10),
        (MLPSection(depth=0), (1, 8, 8), 64 * 10 + 10),
        # Two 3x3 convolutions, then 32 channels of 7x7 (28 halved twice) or 8x8 (32 halved twice) pixels to 64 features.
        (CNNSection(), (1, 28, 28), (9 * 32 + 32) + (9 * 32 * 32 + 32) + (32 * 49 * 64 + 64) + 650),
        (CNNSection(), (3, 32, 32), (27 * 32 + 32) + (9 * 32 * 32 + 32) + (32 * 64 * 64 + 64) + 650),
        # Three times three blocks of two convolutions (He et al. 2015, section 4.2: 0.27 million): stem 3*16*9, stages
        # 6*16*16*9, 16*32*9 + 5*32*32*9, 32*64*9 + 5*64*64*9, batch norms 2*(7*16 + 6*32 + 6*64), classifier 64*10 + 10.
        (ResNet20Section(), (3, 32, 32), 432 + 13_824 + 50_688 + 202_752 + 1_376 + 650),
        # and two 1x1 convolutions with batch norm: 16*32 + 2*32 + 32*64 + 2*64.
        (ResNet20Section(shortcut=Shortcut.projection), (3, 32, 32), 269_722 + 2_752),
        (TorchvisionSection(arch="squeezenet1_1"), (3, 64, 64), 1_235_496 - 990 * 513),  # documented for 1,000 classes
    ],
    ids=str,
)
def test_parameter_counts(section: ModelSection, shape: tuple[int, ...], expected: int) -> None:
    assert size(section.build(shape, 10)) == expected


def test_the_two_residual_networks_have_the_published_sizes() -> None:
    sizes = [size(ResNet20Section(shortcut=shortcut).build((3, 32, 32), 10)) for shortcut in Shortcut]
    assert sizes == [269_722, 272_474]


def test_convolutions_of_the_residual_network_start_with_the_variance_of_he() -> None:
    torch.manual_seed(0)
    model = ResNet20Section().build((3, 32, 32), 10)
    last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    # 64*64*9 = 36,864 weights of variance 2 / (64*9): the estimate's relative deviation is sqrt(2 / 36,864) = 0.7 %.
    assert last.weight.var().item() == pytest.approx(2 / 576, rel=0.04)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 19  # and the linear layer makes 20


def test_the_identity_shortcut_keeps_every_second_pixel_and_adds_channels_of_zeros() -> None:
    model = ResNet20Section().build((1, 9, 9), 10)
    shortcut = next(module for name, module in model.named_modules() if name == "blocks.3.shortcut")
    x = torch.arange(2 * 16 * 9 * 9, dtype=torch.float32).reshape(2, 16, 9, 9)
    y = shortcut(x)
    assert y.shape == (2, 32, 5, 5)
    assert all(y[n, c, i, j] == x[n, c, 2 * i, 2 * j] for n in (0, 1) for c in (0, 15) for i in range(5) for j in range(5))
    assert not y[:, 16:].any()


def test_dropout_drops_in_training_only() -> None:
    model = CNNSection(dropout=0.5).build((1, 8, 8), 10)
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_model_of_torchvision_is_ready_to_train_and_has_the_asked_classes() -> None:
    model = TorchvisionSection(arch="shufflenet_v2_x0_5").build((3, 32, 32), 5)
    assert model.training
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_trying_the_model_on_zeros_leaves_its_running_statistics_alone() -> None:
    model = TorchvisionSection(arch="shufflenet_v2_x0_5").build((3, 32, 32), 5)
    counts = [value for name, value in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert not any(counts)


def test_an_unknown_classifier_of_torchvision_gets_near_names() -> None:
    message = r"^model\.arch: got 'resnet-18', expected a classifier of torchvision\.models such as resnet18, .*$"
    with pytest.raises(ValueError, match=message):
        TorchvisionSection(arch="resnet-18").build((3, 32, 32), 10)


def test_a_classifier_that_does_not_take_these_images_says_so() -> None:
    message = r"^model\.arch: shufflenet_v2_x0_5 does not take inputs of shape \(1, 28, 28\): .*channels"
    with pytest.raises(ValueError, match=message):
        TorchvisionSection(arch="shufflenet_v2_x0_5").build((1, 28, 28), 10)


@pytest.mark.parametrize(
    ("section", "shape", "message"),
    [
        (CNNSection(), (64,), r"^model\.name: cnn takes images .* of at least 4x4 pixels, but .* have shape \(64,\)$"),
        (CNNSection(), (1, 3, 8), r"^model\.name: cnn takes images .* of at least 4x4 pixels, but .* have shape \(1, 3, 8\)$"),
        (ResNet20Section(), (64,), r"^model\.name: resnet20 takes images .*, but the data set's inputs have shape \(64,\)$"),
    ],
    ids=str,
)
def test_inputs_that_are_no_images_are_refused(section: ModelSection, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section.build(shape, 10)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (MLPSection, {"hidden": 0}, r"^model\.hidden: got 0, expected at least 1$"),
        (MLPSection, {"depth": -1}, r"^model\.depth: got -1, expected at least 0$"),
        (MLPSection, {"dropout": 1.0}, r"^model\.dropout: got 1\.0, expected a number in \[0, 1\)$"),
        (CNNSection, {"dropout": -0.1}, r"^model\.dropout: got -0\.1, expected a number in \[0, 1\)$"),
        (CustomSection, {}, r"^model\._target_: got '', expected a dotted path such as .*$"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(kind: type[ModelSection], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_a_custom_model_is_told_the_problem_if_it_asks_and_given_the_users_keywords() -> None:
    model = CustomSection(_target_=f"{__name__}.linear", kwargs={"scale": 3.0}).build((5,), 2)
    assert isinstance(model, nn.Linear)
    assert model.weight.tolist() == [[3.0] * 5] * 2


def test_the_users_keywords_win_over_the_problem() -> None:
    model = CustomSection(_target_=f"{__name__}.linear", kwargs={"num_classes": 9}).build((5,), 2)
    assert isinstance(model, nn.Linear)
    assert model.out_features == 9


def test_a_custom_class_that_does_not_ask_is_not_told() -> None:
    model = CustomSection(_target_="torch.nn.Linear", kwargs={"in_features": 5, "out_features": 2}).build((5,), 2)
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
            r"'.*\.linear' takes \(.*\).*, not model\.kwargs={'skale': 1}: .* argument 'skale'",
        ),
        (f"{__name__}.not_a_model", {}, r".*\.not_a_model returned int, expected a torch\.nn\.Module"),
    ],
    ids=str,
)
def test_a_custom_model_that_does_not_work_is_one_clear_error(path: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\._target_: {message}$"):
        CustomSection(_target_=path, kwargs=kwargs).build((5,), 2)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_goes_through_a_structured_config_and_back(name: str) -> None:
    assert MODELS[name].__dataclass_fields__["name"].default == name
    node = OmegaConf.structured(MODELS[name])
    OmegaConf.set_readonly(node, False)
    own = {"custom": ["_target_=a.b", "kwargs={x:[1,2]}"], "resnet20": ["shortcut=projection"], "cnn": ["dropout=0.25"]}
    made = OmegaConf.to_object(OmegaConf.merge(node, OmegaConf.from_dotlist(own.get(name, []))))
    expected: dict[str, dict[str, Any]] = {
        "custom": {"_target_": "a.b", "kwargs": {"x": [1, 2]}},
        "resnet20": {"shortcut": Shortcut.projection},
        "cnn": {"dropout": 0.25},
    }
    assert made == MODELS[name](**expected.get(name, {}))
