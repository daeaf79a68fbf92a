"""Changes that a forward pass must not make, refused by name; and the trial pass, which sees more and warns of attributes."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from ormo_rpc.models.flat import FlatModel
from ormo_rpc.models.pass_checks import LARGE, check_passes
from tests.support.state import FEATURES, Body, Make, Training, plain

REGISTER = "register buffers with their final shapes, or keep them as plain attributes where they are mere caches"
AS_BUFFER = "got another value from a forward pass, expected the one before; register it as a buffer, which a pass may change"
COPY = (
    "got another value from a forward pass, expected the one before; training alone changes it, so let the pass write to a "
    r"copy \(nn.Embedding: no max_norm\)"
)
OUTSIDE = (
    "its statistics were changed outside of its calls, expected that only calls of the module do so; call the module itself, "
    "neither its forward nor functional.batch_norm"
)


def acts(act: Callable[[Any, Tensor], None], layer: Make = nn.Identity) -> Make:
    """A model with some tensors, whose forward pass does something to them."""

    class Acts(Body):
        def __init__(self) -> None:
            super().__init__(layer())
            self.register_buffer("some", torch.zeros(3))
            self.register_buffer("other", self.get_buffer("some"))
            self.register_buffer("none", None)
            self.register_buffer("graph", torch.eye(3).to_sparse())
            self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(3))

        @override
        def between(self, features: Tensor) -> Tensor:
            act(self, features)
            return self.layer(features)

    return Acts


def norm() -> nn.Module:
    return nn.BatchNorm1d(FEATURES)


@torch.no_grad()
def write_to_scale(self: Any, _: Tensor) -> None:
    self.scale.mul_(0.5)


def with_functional(self: Any, features: Tensor) -> None:
    functional.batch_norm(features, self.layer.running_mean, self.layer.running_var, training=True)


def set_momentum(self: Any, _: Tensor) -> None:
    self.layer.momentum *= 0.9


def drop_statistics(self: Any, _: Tensor) -> None:
    self.layer.running_mean = None


def switch_and_assign(self: Any, _: Tensor) -> None:
    self.some = self.other = self.some + 1
    assert self.layer.training, "as at the beginning of each ticket"
    self.layer.eval()


REFUSED: dict[str, tuple[Make, str]] = {
    "shape": (
        acts(lambda self, _: setattr(self, "some", torch.zeros(4))),
        rf"some: got torch.float32 \(4,\) after a forward pass, expected torch.float32 \(3,\), as at construction; {REGISTER}",
    ),
    "dtype": (
        acts(lambda self, _: setattr(self, "some", self.some.double())),
        rf"some: got torch.float64 \(3,\) after a forward pass, expected torch.float32 \(3,\), as at construction; {REGISTER}",
    ),
    "came": (
        acts(lambda self, _: setattr(self, "none", torch.zeros(2))),
        rf"none: got torch.float32 \(2,\) after a forward pass, expected no buffer, as at construction; {REGISTER}",
    ),
    "went": (
        acts(lambda self, _: setattr(self, "some", None)),
        rf"some: got no buffer after a forward pass, expected torch.float32 \(3,\), as at construction; {REGISTER}",
    ),
    "registered": (
        acts(lambda self, _: self.register_buffer("new", torch.zeros(1))),
        rf"buffers: got .*'new'.* after a forward pass, expected .*; {REGISTER}",
    ),
    "no longer shared": (
        acts(lambda self, _: setattr(self, "other", self.some + 1)),
        "other: got a tensor of its own, expected that of some, as at construction",
    ),
    "sparse": (
        acts(lambda self, _: setattr(self, "graph", self.graph * 2)),
        "graph: got another value from a forward pass, expected the one before; a pass may change buffers that are dense",
    ),
    "frozen": (acts(lambda self, _: self.frozen.add_(1)), f"frozen: {AS_BUFFER}"),
    "frozen, replaced": (
        acts(lambda self, _: setattr(self, "frozen", nn.Parameter(torch.ones(3), requires_grad=False))),
        f"frozen: {AS_BUFFER}",
    ),
    "unfrozen": (
        acts(lambda self, _: self.frozen.requires_grad_()),
        "frozen: got requires_grad=true after a forward pass, expected false, as at construction; what is trained is .*",
    ),
    "trained": (acts(write_to_scale), f"scale: {COPY}"),
    "momentum": (
        acts(set_momentum, norm),
        r"layer.momentum: got 0.09\d* in a forward pass, expected 0.1, as at construction; the server averages with .*",
    ),
    "forward": (acts(lambda self, features: self.layer.forward(features), norm), f"layer: {OUTSIDE}"),
    "functional": (acts(with_functional, norm), f"layer: {OUTSIDE}"),
    "reset": (acts(lambda self, _: self.layer.running_mean.data.zero_().add_(3), norm), f"layer: {OUTSIDE}"),
    "counter": (acts(lambda self, _: self.layer.num_batches_tracked.add_(1), norm), f"layer: {OUTSIDE}"),
    "statistics": (acts(drop_statistics, norm), f"layer: {OUTSIDE}"),
}


def try_pass(training: Training) -> None:
    """Compute as the launcher's trial does."""
    check_passes(training.model.module, training.worker.warm_up)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("trial", [False, True], ids=["ticket", "trial"])
def test_what_a_pass_must_not_change_is_refused_with_its_name(name: str, trial: bool) -> None:
    make, text = REFUSED[name]
    training = Training(make)
    with pytest.raises(ValueError, match=r"^model: ") as caught:
        try_pass(training) if trial else training.step()
    assert re.fullmatch(f"model: {text}", str(caught.value))


def test_a_norm_is_left_as_it_was_where_its_call_fails() -> None:
    training = Training(lambda: Body(nn.BatchNorm1d(FEATURES + 1)))
    with pytest.raises(RuntimeError):
        training.step()
    layer = training.model.module.get_submodule("layer")
    assert isinstance(layer, nn.BatchNorm1d)
    assert layer.momentum == 0.1
    assert layer.running_mean is training.model.buffers.tensors["layer.running_mean"]


OTHERS = (
    r"parameters: a forward pass added, removed or replaced \['{0}.weight', '{0}.bias'\], expected those of construction; "
    "make all of them there"
)
# What escapes torch's version counters, seen by the trial pass alone.
HIDDEN: dict[str, tuple[Make, str]] = {
    "frozen": (acts(lambda self, _: self.frozen.data.add_(1)), f"frozen: {AS_BUFFER}"),
    "trained": (acts(lambda self, _: self.scale.data.add_(1)), f"scale: {COPY}"),
    "new": (acts(lambda self, _: setattr(self, "late", nn.Linear(1, 1))), OTHERS.format("late")),
    "replaced": (acts(lambda self, _: setattr(self, "last", copy.deepcopy(self.last))), OTHERS.format("last")),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_the_trial_pass_sees_what_torch_does_not_count(name: str) -> None:
    make, text = HIDDEN[name]
    with pytest.raises(ValueError, match=r"^model: ") as caught:
        try_pass(Training(make))
    assert re.fullmatch(f"model: {text}", str(caught.value))


LATE = 5
"""Passes after which the models of `HIDDEN_LATE` begin to write through ``.data``, as a constraint does once it bites."""


def late(act: Callable[[Any], None]) -> Make:
    def count(self: Any, _: Tensor) -> None:
        self.passes = getattr(self, "passes", 0) + 1
        if self.passes > LATE:
            act(self)

    return acts(count)


HIDDEN_LATE: dict[str, tuple[Make, str]] = {
    "frozen": (late(lambda self: self.frozen.data.add_(0.1)), f"frozen: {AS_BUFFER}"),
    "trained": (late(lambda self: self.scale.data.mul_(0.9)), f"scale: {COPY}"),
    "bias": (late(lambda self: self.last.bias.data.clamp_(max=-1)), f"last.bias: {COPY}"),
}


@pytest.mark.parametrize("name", HIDDEN_LATE)
def test_what_torch_does_not_count_is_seen_soon_where_it_begins_late(name: str) -> None:
    make, text = HIDDEN_LATE[name]
    training = Training(make).step(LATE)
    with pytest.raises(ValueError, match=r"^model: ") as caught:
        training.step(LATE)
    assert re.fullmatch(f"model: {text}", str(caught.value))


@pytest.mark.parametrize(("name", "said"), [("frozen", f"frozen: {AS_BUFFER}"), ("scale", f"scale: {COPY}")])
def test_other_memory_of_equal_values_is_refused_in_any_pass(name: str, said: str) -> None:
    """The result of `torch.renorm` has the values of a weight that is short enough."""

    def replace_data(self: Any) -> None:
        tensor = getattr(self, name)
        tensor.data = torch.renorm(tensor.data.view(1, -1), p=2, dim=0, maxnorm=1e6).view(-1)

    training = Training(late(replace_data)).step(LATE)
    with pytest.raises(ValueError, match=re.compile(f"^model: {said}$")):
        training.step()


class Attributes(Body):
    """Counts and averages in plain attributes, and keeps caches and results in others."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(FEATURES))
        self.calls = 0
        self.average = torch.zeros(FEATURES)
        self.seen = list[float]()
        self.cache: Tensor | None = None
        self.output: Tensor | None = None
        self.name = "attributes"
        self.itself = list[Any]()
        self.itself.append(self.itself)

    @override
    def between(self, features: Tensor) -> Tensor:
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * features.detach().mean(0)
        self.seen.append(1.0)
        if self.cache is None:
            self.cache = torch.arange(3)
        self.output = result = self.layer(features)
        return result


def test_the_trial_pass_warns_of_attributes_that_every_pass_changes(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(Attributes)
    with caplog.at_level(logging.WARNING):
        try_pass(training)
    warned = [record.message for record in caplog.records]
    assert [text.split(":")[1].strip() for text in warned] == ["Attributes.calls", "Attributes.average", "Attributes.seen"]
    text = "model: .*: each forward pass changes this attribute, of which each process has its own: .* register it as a buffer"
    assert all(re.fullmatch(text, each) for each in warned)


def test_the_trial_pass_warns_of_large_constants(caplog: pytest.LogCaptureFixture) -> None:
    class Tables(Body):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(LARGE // 4 + 1))
            self.register_buffer("mask", torch.ones(LARGE, dtype=torch.bool))
            self.register_buffer("average", torch.zeros(LARGE))

        @override
        def between(self, features: Tensor) -> Tensor:
            self.get_buffer("average").add_(1)
            return features

    try_pass(Training(Tables))
    assert [record.message for record in caplog.records] == [
        "model: table: got a buffer of 4 MB that no pass has changed, and that travels with every ticket all the same; "
        "a constant costs nothing as a parameter with requires_grad=False"
    ]


@pytest.mark.parametrize("make", [Body, lambda: Body(norm()), lambda: Body(nn.utils.spectral_norm(nn.Linear(6, 6)))])
def test_a_trial_pass_leaves_no_trace(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    tried, fresh = Training(make), Training(make)
    try_pass(tried)
    assert not caplog.records
    assert torch.equal(tried.step(3).server.params, fresh.step(3).server.params)
    assert torch.equal(tried.server.buffers.snapshot(), fresh.server.buffers.snapshot())


@pytest.mark.parametrize("layer", [nn.LazyBatchNorm1d, lambda: nn.LazyLinear(6)])
def test_lazy_layers_are_refused(layer: Make) -> None:
    text = r"^model: layer\.\w+: got a parameter without a shape, expected all from the start; use no lazy layers$"
    with pytest.raises(ValueError, match=text):
        FlatModel(Body(layer()))


def test_a_lazy_norm_that_has_its_shape_is_one_like_others() -> None:
    def make() -> nn.Module:
        module = Body(nn.LazyBatchNorm1d())
        module(torch.zeros(2, 1, 4, 4))
        return module

    assert list(FlatModel(make()).buffers.norms) == ["layer."]
    found, expected = Training(make).step(4).exported(), plain(make, 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_buffers_of_another_model_are_refused() -> None:
    training = Training(lambda: Body(norm()))
    with pytest.raises(
        ValueError, match=r"^model: got 48 bytes of buffers from the server, expected 80; server and worker must"
    ):
        training.worker.compute(replace(training.replies[0], buffers=torch.zeros(48, dtype=torch.uint8)))


def test_nothing_is_kept_of_earlier_tickets() -> None:
    """Neither buffers, nor a mode that a pass has switched, nor a tensor that it has assigned."""
    training = Training(acts(switch_and_assign, norm))
    reply = training.replies[0]
    first = {name: value.clone() for name, value in training.worker.compute(reply).buffers.items()}
    assert first["some"].tolist() == [1, 1, 1]
    training.worker.warm_up()
    again = training.worker.compute(reply).buffers
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items())
