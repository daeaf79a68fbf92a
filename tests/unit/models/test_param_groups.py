"""Parameter groups by names and shapes of a model's parameters."""

from __future__ import annotations

import re

import pytest
import torch

from ormo_rpc.algorithms.groups import Group, check_groups, uniform
from ormo_rpc.models.flat import Layout
from ormo_rpc.models.param_groups import param_groups

LAYOUT = Layout(
    {
        "embedding.weight": torch.zeros(3, 2),  # 0 to 6
        "body.weight": torch.zeros(2, 2),  # 6 to 10
        "body.bias": torch.zeros(2),  # 10 to 12
        "norm.weight": torch.zeros(2),  # 12 to 14
        "empty": torch.zeros(0, 2),
        "head.weight": torch.zeros(2, 1, 2),  # 14 to 18
        "scale": torch.zeros(()),  # 18 to 19
    }
)


def found(**options: object) -> list[tuple[int, int, float, float]]:
    groups = param_groups(LAYOUT, **options)  # pyright: ignore[reportArgumentType] # the keywords of one test each
    check_groups(groups, LAYOUT.size)
    return [(group.start, group.stop, group.weight_decay, group.lr_factor) for group in groups]


def test_without_options_there_is_one_group() -> None:
    assert param_groups(LAYOUT) == uniform(19)
    assert param_groups(LAYOUT, weight_decay=0.1) == uniform(19, 0.1)


def test_parameters_of_fewer_than_two_dimensions_need_not_decay() -> None:
    assert found(weight_decay=0.1, decay_1d=False) == [(0, 10, 0.1, 1), (10, 14, 0, 1), (14, 18, 0.1, 1), (18, 19, 0, 1)]
    assert found(decay_1d=False) == [(0, 19, 0, 1)]  # nothing decays anyway


def test_patterns_choose_what_does_not_decay() -> None:
    assert found(weight_decay=0.1, no_decay=["embedding.*", "*.bias"]) == [
        *((0, 6, 0, 1), (6, 10, 0.1, 1), (10, 12, 0, 1), (12, 19, 0.1, 1)),
    ]


def test_factors_of_all_patterns_that_match_are_multiplied() -> None:
    assert found(lr_factors={"*": 0.5, "body.*": 0.25, "*.bias": 0.0}) == [
        *((0, 6, 0, 0.5), (6, 10, 0, 0.125), (10, 12, 0, 0), (12, 19, 0, 0.5)),
    ]


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    names = "embedding.weight, body.weight, body.bias, norm.weight, empty, head.weight and 1 more"
    for key, value in (("no_decay", ["*.weight", "*.Bias"]), ("lr_factors", {"*": 1.0, "*.Bias": 2.0})):
        with pytest.raises(ValueError, match="Bias") as caught:
            found(**{key: value})
        expected = "which matches no trainable parameter, expected a pattern of names such as"
        assert str(caught.value) == f"train.{key}: got '*.Bias', {expected} {names}"


@pytest.mark.parametrize(
    "groups",
    [
        (),
        (Group(start=0, stop=3),),
        (Group(start=1, stop=4),),
        (Group(start=0, stop=2), Group(start=3, stop=4)),
        (Group(start=0, stop=3), Group(start=2, stop=4)),
        (Group(start=0, stop=4), Group(start=4, stop=4)),
    ],
)
def test_groups_that_are_not_the_whole_vector_are_refused(groups: tuple[Group, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape("expected 0 to 4 without gap or overlap")):
        check_groups(groups, 4)


def test_negative_decays_and_factors_are_refused() -> None:
    for group in (Group(start=0, stop=4, weight_decay=-0.1), Group(start=0, stop=4, lr_factor=float("nan"))):
        with pytest.raises(ValueError, match="expected finite numbers >= 0"):
            check_groups((group,), 4)
