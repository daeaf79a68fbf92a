"""Buffers that forward passes change, trained by a server and one worker, against plain PyTorch on the same batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from ormo_rpc.tasks import Classification
from ormo_rpc.worker.evaluation import Evaluator
from tests.support.state import CLASSES, FEATURES, Body, Make, Training, made, plain, split

STEPS = 10


class InEvalMode(nn.BatchNorm1d):
    """A norm of a frozen backbone."""

    @override
    def train(self, mode: bool = True) -> InEvalMode:
        return super().train(False)


class SwitchedByForward(Body):
    """Its norm is put into eval mode by forward alone."""

    @override
    def between(self, features: Tensor) -> Tensor:
        self.layer.eval()
        return self.layer(features)


class OnlySomeBatches(Body):
    """In training mode for about half of the batches."""

    @override
    def between(self, features: Tensor) -> Tensor:
        return self.layer.train(bool(torch.rand(()) < 0.5))(features)


class Skips(Body):
    """Stochastic depth with p = 0.5."""

    @override
    def between(self, features: Tensor) -> Tensor:
        return features + self.layer(features) if not self.training or torch.rand(()) < 0.5 else features


class NeverCalls(Body):
    """Has a layer that it does not use."""

    @override
    def between(self, features: Tensor) -> Tensor:
        return features


class CallsTwice(Body):
    """Uses its layer twice."""

    @override
    def between(self, features: Tensor) -> Tensor:
        return self.layer(2 * self.layer(features) + 1)


class EvalThenTrain(Body):
    """As in a comparison of both: the second call counts."""

    @override
    def between(self, features: Tensor) -> Tensor:
        return self.layer.eval()(features) + self.layer.train()(features)


class Checkpointed(Body):
    """Recomputes the norm in the backward pass, which counts twice in plain PyTorch."""

    reentrant = False

    @override
    def between(self, features: Tensor) -> Tensor:
        return checkpoint(self.layer, features, use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    """The same by the other implementation."""

    reentrant = True


class OwnForward(nn.BatchNorm1d):
    """Never trains its statistics, though it is in training mode."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return functional.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, training=False)


class OwnUpdate(nn.BatchNorm1d):
    """Updates its statistics by a factor of its own."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return functional.batch_norm(input, self.running_mean, self.running_var, training=True, momentum=0.3)


class CountsFeatures(nn.BatchNorm1d):
    """torch's forward, and a buffer beside the statistics."""

    def __init__(self) -> None:
        super().__init__(FEATURES)
        self.register_buffer("seen", torch.tensor(0))

    @override
    def _check_input_dim(self, input: Tensor) -> None:
        super()._check_input_dim(input)
        self.get_buffer("seen").add_(input.numel())


class OwnBuffers(nn.Module):
    """A norm of one's own, with its statistics in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("variance", torch.ones(FEATURES))

    @override
    def forward(self, features: Tensor) -> Tensor:
        mean, variance = self.get_buffer("mean"), self.get_buffer("variance")
        return functional.batch_norm(features, mean, variance, training=True, momentum=0.2)


class Images(Body):
    """Gives the layer two channels."""

    @override
    def between(self, features: Tensor) -> Tensor:
        return self.layer(features.view(-1, 2, 3)).flatten(1)


class Everything(Body):
    """Buffers of all kinds, each changed in another way; one is not persistent, one never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(FEATURES))
        self.register_buffer("data", torch.zeros(FEATURES))
        self.register_buffer("data_in_place", torch.zeros(FEATURES))
        self.register_buffer("assigned", torch.zeros(FEATURES))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("wide", torch.tensor(1.0, dtype=torch.float64))
        self.register_buffer("rounded", torch.zeros(FEATURES, dtype=torch.bfloat16))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("least", torch.full((FEATURES,), float("inf")))
        self.register_buffer("mask", torch.ones(1, FEATURES).expand(3, FEATURES))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("kept_here", torch.zeros(()), persistent=False)
        self.register_buffer("none", None)
        self.in_place: Tensor
        self.data: Tensor
        self.data_in_place: Tensor
        self.assigned: Tensor
        self.calls: Tensor
        self.wide: Tensor
        self.rounded: Tensor
        self.flags: Tensor
        self.least: Tensor
        self.kept_here: Tensor

    @override
    def between(self, features: Tensor) -> Tensor:
        mean = features.detach().mean(0)
        self.in_place.mul_(0.9).add_(mean, alpha=0.1)
        self.data.data = 0.9 * self.data + 0.1 * mean
        self.data_in_place.data.mul_(0.9).add_(mean, alpha=0.1)
        self.assigned = 0.9 * self.assigned + 0.1 * mean
        self.calls += 1
        self.wide *= 0.5
        self.rounded.copy_(mean)
        self.flags = ~self.flags
        self.least = torch.minimum(self.least, mean)
        self.kept_here += 1
        return features + 0.1 * self.assigned


NORM = nn.BatchNorm1d
MODELS: dict[str, Make] = {
    "norm": lambda: Body(NORM(FEATURES)),
    "synchronised norm": lambda: Body(nn.SyncBatchNorm(FEATURES)),
    "norm without momentum": lambda: Body(NORM(FEATURES, momentum=None)),
    "norm of momentum 0": lambda: Body(NORM(FEATURES, momentum=0.0)),
    "norm of momentum 1": lambda: CallsTwice(NORM(FEATURES, momentum=1.0)),
    "norm without statistics": lambda: Body(NORM(FEATURES, track_running_stats=False)),
    "frozen norm": lambda: Body(InEvalMode(FEATURES)),
    "norm switched by forward": lambda: SwitchedByForward(NORM(FEATURES)),
    "norm in training mode for some batches": lambda: OnlySomeBatches(NORM(FEATURES)),
    "skipped norm": lambda: Skips(NORM(FEATURES)),
    "skipped norm without momentum": lambda: Skips(NORM(FEATURES, momentum=None)),
    "norm never called": lambda: NeverCalls(NORM(FEATURES)),
    "norm called twice": lambda: CallsTwice(NORM(FEATURES)),
    "norm without momentum called twice": lambda: CallsTwice(NORM(FEATURES, momentum=None)),
    "norm in both modes": lambda: EvalThenTrain(NORM(FEATURES)),
    "checkpointed norm": lambda: Checkpointed(NORM(FEATURES)),
    "checkpointed norm, reentrant": lambda: CheckpointedReentrant(NORM(FEATURES)),
    "checkpointed block": lambda: Checkpointed(nn.Sequential(nn.Linear(FEATURES, FEATURES), NORM(FEATURES), nn.Tanh())),
    "norm with a forward of its own": lambda: Body(OwnForward(FEATURES)),
    "norm with an update of its own": lambda: Body(OwnUpdate(FEATURES)),
    "norm with a buffer of its own": lambda: Body(CountsFeatures()),
    "norm of a large momentum": lambda: CallsTwice(NORM(FEATURES, momentum=1.2)),
    "norm of one's own": lambda: Body(OwnBuffers()),
    "spectral norm": lambda: Body(nn.utils.spectral_norm(nn.Linear(FEATURES, FEATURES))),
    "spectral parametrization": lambda: Body(parametrizations.spectral_norm(nn.Linear(FEATURES, FEATURES))),
    "instance norm": lambda: Images(nn.InstanceNorm1d(2, track_running_stats=True)),
    "buffers of all kinds": Everything,
    "no buffers": Body,
}


def same_values(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that they agree to the rounding of the gradients, and exactly where values are no floats."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_the_exported_state_is_that_of_plain_pytorch(name: str) -> None:
    same_values(Training(MODELS[name]).step(STEPS).exported(), plain(MODELS[name], STEPS))


@pytest.mark.parametrize("name", ["norm called twice", "skipped norm", "frozen norm", "spectral norm", "norm of one's own"])
def test_evaluations_see_the_buffers_of_the_server(name: str) -> None:
    training = Training(MODELS[name]).step(STEPS)
    net = made(MODELS[name])
    net.load_state_dict(plain(MODELS[name], STEPS))
    inputs, targets = split().batch(torch.arange(40), None)
    evaluator = Evaluator(training.model, None)  # pyright: ignore[reportArgumentType] # only one batch is evaluated
    batch = inputs, targets
    output = evaluator.output(batch, training.server.params, training.server.buffers.copy())
    found = Classification().sums(output, batch)["loss"]
    with torch.no_grad():
        expected = functional.cross_entropy(net.eval()(inputs), targets, reduction="sum").item()
    assert found.total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["norm never called", "frozen norm", "norm switched by forward"])
def test_a_norm_that_does_not_train_reports_nothing_and_keeps_what_it_had(name: str) -> None:
    training = Training(MODELS[name])
    assert training.worker.compute(training.replies[0]).buffers == {}
    state = training.step(3).exported()
    assert torch.equal(state["layer.running_mean"], torch.full((FEATURES,), 0.5))
    assert torch.equal(state["layer.running_var"], torch.full((FEATURES,), 4.0))


def test_a_constant_buffer_is_not_in_the_push() -> None:
    training = Training(Everything)
    changed = training.worker.compute(training.replies[0]).buffers
    everything = set(training.model.buffers.tensors)
    assert everything - set(changed) == {"mask", "empty"}


@pytest.mark.parametrize("name", ["spectral norm", "spectral parametrization"])
@pytest.mark.parametrize("workers", [1, 4])
def test_the_exported_layer_has_the_spectral_norm_1(name: str, workers: int) -> None:
    training = Training(MODELS[name], workers=workers, lr=0.001).step(60 * workers)  # a power iteration for each push
    net = made(MODELS[name])
    net.load_state_dict(training.exported())
    net.eval()(torch.zeros(1, 1, 4, 4))  # the older of both makes the weight in forward
    layer = net.get_submodule("layer")
    assert isinstance(layer, nn.Linear)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=1e-3)


def test_the_newest_push_decides_under_several_workers() -> None:
    training = Training(Everything, workers=3)
    pushes: list[dict[str, Tensor]] = []
    for worker in (2, 0, 1):  # all of them began with the buffers of the start
        reply = next(reply for reply in training.replies if reply.worker == worker)
        push = training.worker.compute(reply)
        pushes.append({name: value.clone() for name, value in push.buffers.items()})
        training.server.receive(push)
    assert not torch.equal(pushes[0]["assigned"], pushes[2]["assigned"])
    for name, value in pushes[2].items():
        assert torch.equal(training.server.buffers.current[name], value)
    assert training.server.buffers.current["calls"] == 1, "each of them counted from 0"


def test_averages_under_several_workers_are_in_the_order_of_application() -> None:
    training = Training(MODELS["norm called twice"], workers=3)
    mean, variance, calls = torch.full((FEATURES,), 0.5), torch.full((FEATURES,), 4.0), 0
    for _ in range(9):
        push = training.worker.compute(training.replies.pop(0))
        # Two calls of momentum 0.1 leave (1 - 0.1)^2 = 0.81.
        mean = 0.81 * mean + 0.19 * push.buffers["layer.running_mean"]
        variance = 0.81 * variance + 0.19 * push.buffers["layer.running_var"]
        calls += int(push.buffers["layer.num_batches_tracked"])
        training.replies += training.server.receive(push)
    state = training.exported()
    torch.testing.assert_close(state["layer.running_mean"], mean)
    torch.testing.assert_close(state["layer.running_var"], variance)
    assert state["layer.num_batches_tracked"] == calls == 18


def test_every_local_step_counts() -> None:
    training = Training(MODELS["norm"], algorithm="easgd", local_steps=3)
    push = training.worker.compute(training.replies[0])
    assert push.buffers["layer.num_batches_tracked"] == 3


class Pattern(Body):
    """Calls the norm as the test says, pass by pass."""

    patterns: tuple[tuple[bool, ...], ...] = ()
    passes = 0

    @override
    def between(self, features: Tensor) -> Tensor:
        pattern = self.patterns[self.passes]
        self.passes += 1
        for training in pattern:
            features = self.layer.train(training)(features)
        return features


@given(
    patterns=st.lists(st.lists(st.booleans(), max_size=4).map(tuple), min_size=1, max_size=4).map(tuple),
    momentum=st.sampled_from([0.0, 0.1, 0.5, 1.0, None]),
)
def test_any_pattern_of_calls_is_that_of_plain_pytorch(patterns: tuple[tuple[bool, ...], ...], momentum: float | None) -> None:
    def make() -> nn.Module:
        module = Pattern(NORM(FEATURES, momentum=momentum))
        module.patterns = patterns
        return module

    found, expected = Training(make).step(len(patterns)).exported(), plain(make, len(patterns))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_shared_and_tied_norms() -> None:
    class Shared(Body):
        def __init__(self) -> None:
            super().__init__(NORM(FEATURES))
            self.again = self.layer  # the same module under another name

        @override
        def between(self, features: Tensor) -> Tensor:
            return self.again(self.layer(features))

    class Tied(Body):
        def __init__(self) -> None:
            super().__init__(NORM(FEATURES))
            self.other = NORM(FEATURES)
            assert isinstance(self.layer, nn.BatchNorm1d)
            self.other.running_mean = self.layer.running_mean  # two modules with one buffer

        @override
        def between(self, features: Tensor) -> Tensor:
            return self.other(self.layer(features))

    for make in (Shared, Tied):
        same_values(Training(make).step(STEPS).exported(), plain(make, STEPS))


def test_a_buffer_that_becomes_a_view_of_the_parameters_is_never_written_to() -> None:
    class Follows(Body):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shadow", torch.zeros(CLASSES))

        @override
        def between(self, features: Tensor) -> Tensor:
            self.get_buffer("shadow").data = self.last.bias.data
            return features

    training, sent = Training(Follows, workers=3), list[tuple[Tensor, Tensor]]()
    for _ in range(6):
        params = training.replies[0].params
        sent.append((params, params.clone()))
        training.step()
        assert torch.equal(training.server.buffers.current["shadow"], params[-CLASSES:])  # the last parameters are the bias
    assert all(torch.equal(params, before) for params, before in sent)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_norm_follows_no_rule_and_keeps_its_values() -> None:
    training = Training(lambda: Body(torch.jit.script(NORM(FEATURES))))
    assert not training.model.buffers.norms
    same_values(training.step(STEPS).exported(), plain(MODELS["norm"], STEPS))
