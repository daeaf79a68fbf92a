"""An algorithm outside of the package, trained in the simulator: ``python examples/own_algorithm.py``.

On the command line: ``PYTHONPATH=examples python launch.py runtime=sim algorithm._target_=own_algorithm.DampedMomentum``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from ormo_rpc import Algorithm, PushContext, option, train
from ormo_rpc.options import not_negative


@dataclass(kw_only=True)
class DampedMomentum(Algorithm):
    """Heavy ball in which a gradient of delay ``tau`` counts ``(1 + tau)^-power``."""

    power: float = option(
        0.5, "how fast a gradient's weight falls with its delay", valid=not_negative, expected="a number >= 0"
    )

    @override
    def init(self, params: Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.u = self.zeros()

    @override
    def learning_rate(self, context: PushContext) -> float:
        return context.lr * (1 + context.delay) ** -self.power

    @override
    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:
        self.u.mul_(self.momentum).add_(grad, alpha=lr)
        self.params.sub_(self.u)

    @override
    def state_dict(self) -> Mapping[str, Tensor]:
        return {"u": self.u}


def main() -> None:
    """Train on handwritten digits with 8 simulated workers, one of them ten times slower, beside OrMo."""
    for algorithm in (["algorithm._target_=own_algorithm.DampedMomentum", "+algorithm.power=0.5"], ["algorithm=ormo"]):
        with tempfile.TemporaryDirectory() as folder:
            common = ["runtime=sim", "workers=8", "heterogeneity=one_slow", "train.epochs=10", "logger=none"]
            summary = train([*algorithm, *common], run_dir=folder)
        print(f"{summary['algorithm']}: test accuracy {summary['test_accuracy']:.2%}, mean delay {summary['delay_mean']:.1f}")


if __name__ == "__main__":
    main()
