"""Learning-rate schedules of the user's: a function of the iteration, or a scheduler of torch, as a table of rates.

The table is made once, for all steps of the run, before anything starts: about 3 microseconds and 8 bytes a step for the
schedulers of torch. So whatever cannot be right is refused then, and the rate is a pure function of the iteration on the
server, in a resumed run and in a replay, although a scheduler of torch can only be stepped forwards.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ormo_rpc.errors import one_line
from ormo_rpc.options.instantiate import instantiate
from ormo_rpc.options.target import TARGET, Target

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

KEY = "train.lr_schedule"
MAX_STEPS = 20_000_000
"""Steps of the longest table: 160 MB, and about a minute for a scheduler of torch."""
_LENGTHS = ("T_max", "total_steps")
"""Keywords of torch's schedulers that are the length of the run, where they are not given."""
_MOMENTUM = 0.9
"""Of the optimizer that only the scheduler sees."""
_COMPARED = 16
"""Number of steps at which a function is called again."""


@dataclass(frozen=True, kw_only=True)
class OwnSchedule:
    """The learning rate of a schedule of the user's, at every iteration.

    Attributes:
        target: Called with its keywords, and with those of ``total`` (the steps), ``batches_per_epoch``, ``base`` and
            ``optimizer`` that its signature names. It returns a function from a step to a factor of ``base``, or is (or
            returns) a scheduler of torch.
        base: ``train.lr``.
        total: T, the iterations of the run.
        batches_per_epoch: Iterations in an epoch.
        per_epoch: A step is an epoch, not an iteration.
    """

    target: Target
    base: float
    total: int
    batches_per_epoch: int
    per_epoch: bool = False

    def __call__(self, iteration: int) -> float:
        """Return the rate at an iteration; from T on that of the last one."""
        return self.rates[min(iteration, self.total - 1) // self._iterations]

    @functools.cached_property
    def rates(self) -> array[float]:
        """The rate of every step.

        Raises:
            ValueError: the schedule cannot be made, or has no finite rate >= 0 for a step; one line with the key.
        """
        if self._steps > MAX_STEPS:
            raise ValueError(
                f"{KEY}: got {self._steps} steps, expected at most {MAX_STEPS} of a {TARGET}; set train.lr_schedule_unit=epoch"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, to users whose optimizer steps as well
            rates = array("d")
            source = self._source()
            for step in range(self._steps):
                try:
                    rate = float(next(source))
                except _Refused:
                    raise
                except Exception as error:  # the user's own may raise anything
                    raise ValueError(f"{self._place(step)}: {one_line(error)}") from error
                if not 0 <= rate < math.inf:
                    raise ValueError(f"{self._place(step)}: got the learning rate {rate:g}, expected a finite number >= 0")
                rates.append(rate)
        return rates

    @property
    def _iterations(self) -> int:
        """Iterations in a step."""
        return self.batches_per_epoch if self.per_epoch else 1

    @property
    def _steps(self) -> int:
        return -(-self.total // self._iterations)

    def _place(self, step: int) -> str:
        return f"{KEY}: {self.target.path}, {'epoch' if self.per_epoch else 'iteration'} {step} of {self._steps}"

    def _source(self) -> Iterator[Any]:
        """Make the schedule, and the rates of its steps, one after the other."""
        from torch.optim.lr_scheduler import LRScheduler

        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.base, momentum=_MOMENTUM)
        made = self._made(optimizer)
        if isinstance(made, LRScheduler):
            return self._stepped(made, optimizer)
        if not callable(made):
            raise ValueError(
                f"{KEY}: {self.target.path} returned {made!r}, expected a function from a step to a factor of train.lr, or a "
                "scheduler of torch"
            )
        return self._called(made)

    def _made(self, optimizer: torch.optim.Optimizer) -> Any:
        offered: dict[str, Any] = {
            "optimizer": optimizer,
            "total": self._steps,
            "batches_per_epoch": self.batches_per_epoch,
            "base": self.base,
        }
        lengths = {} if "epochs" in self.target.keywords else dict.fromkeys(_LENGTHS, self._steps)
        try:
            keywords = {key: _nested(f"{KEY}.{key}", each, offered) for key, each in self.target.keywords.items()}
            return instantiate(KEY, self.target.path, keywords, offered | lengths)
        except ValueError as error:
            if str(error).startswith(KEY):
                raise
            raise ValueError(f"{KEY}: {self.target.path} cannot be made: {one_line(error)}") from error
        except Exception as error:  # the user's own may raise anything
            raise ValueError(f"{KEY}: {self.target.path} cannot be made: {one_line(error)}") from error

    def _called(self, factor: Callable[[int], Any]) -> Iterator[Any]:
        """Call a function for every step, and for some of them again, as it may remember how often it was called."""
        first: dict[int, Any] = {}
        for step in range(self._steps):
            value = factor(step)
            if step < _COMPARED:
                first[step] = value
            if step == min(_COMPARED, self._steps) - 1:
                self._compare(factor, first)
            yield self.base * value

    def _compare(self, factor: Callable[[int], Any], first: Mapping[int, Any]) -> None:
        for step, value in sorted(first.items(), reverse=True):
            again = factor(step)
            if again != value and not (again != again and value != value):
                raise _Refused(
                    f"{KEY}: {self.target.path} gave the factor {value:g} for step {step}, and then {again:g}; expected a "
                    "function of the step alone, since it is computed again when a run is resumed or replayed"
                )

    def _stepped(self, scheduler: LRScheduler, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
        """Step a scheduler of torch."""
        from torch.optim.lr_scheduler import ReduceLROnPlateau

        if isinstance(scheduler, ReduceLROnPlateau):
            raise _Refused(
                f"{KEY}: got {self.target.path}, which follows a metric; expected a schedule that is a function of the "
                "iteration (evaluate.patience ends a run that no longer improves)"
            )
        (group,) = optimizer.param_groups
        others = {key: value for key, value in optimizer.defaults.items() if key != "lr"}
        values_of = operator.itemgetter(*others)
        expected = values_of(others)
        optimizer.step()
        for step in range(self._steps):
            if step:
                scheduler.step()
            if values_of(group) != expected:
                key = next(key for key, value in others.items() if group[key] != value)
                raise _Refused(
                    f"{KEY}: {self.target.path} changes the {key}, expected the learning rate alone, as the server's "
                    f"{key} stays{'; set train.lr_schedule.cycle_momentum=false' * (key == 'momentum')}"
                )
            yield group["lr"]


class _Refused(ValueError):
    """Raised inside of a schedule with a line that is complete."""


def _nested(path: str, value: Any, offered: Mapping[str, Any]) -> Any:
    """Make what a keyword names by a ``_target_``: a scheduler of ``SequentialLR`` sees the same optimizer."""
    if isinstance(value, Mapping):
        inner = {str(key): _nested(f"{path}.{key}", each, offered) for key, each in value.items()}
        target = inner.pop(TARGET, None)
        return inner if target is None else instantiate(path, target, inner, offered)
    return [_nested(path, each, offered) for each in value] if isinstance(value, list) else value
