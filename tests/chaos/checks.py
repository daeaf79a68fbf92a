"""Guarantees that must hold after a run with faults: pure functions of what was recorded, each returning a `Check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 5
"""Violations of one kind that are named, at most."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: The guarantee.
        figure: What was counted.
        holds: The guarantee was kept.
    """

    name: str
    figure: str
    holds: bool

    def __str__(self) -> str:
        return f"{'ok    ' if self.holds else 'FAILED'} {self.name}: {self.figure}"


@dataclass(frozen=True)
class ServerDeath:
    """One death of the server.

    Attributes:
        applied: Gradients it had applied, by the file ``progress``.
        resumed: Iteration from which the next incarnation resumed; None if there was none.
    """

    applied: int
    resumed: int | None


def iterations_in_order(events: Iterable[Mapping[str, Any]], total: int) -> Check:
    """The final trace applies the iterations 0 to ``total - 1``, in this order."""
    found = [event["iteration"] for event in events if event["event"] == "apply"]
    wrong = next((place for place, (is_, ought) in enumerate(zip(found, range(total), strict=False)) if is_ != ought), None)
    figure = f"{len(found)} of {total}"
    if wrong is not None:
        figure += f"; {found[wrong]} stands in place of {wrong}"
    return Check("iterations of the final trace in order", figure, found == list(range(total)))


def tickets_exactly_once(events: Iterable[Mapping[str, Any]], total: int) -> Check:
    """The final trace applies every ticket 0 to ``total - 1`` exactly once, and no other one."""
    count = Counter(event["ticket"] for event in events if event["event"] == "apply")
    groups = {
        "missing": [ticket for ticket in range(total) if ticket not in count],
        "more than once": sorted(ticket for ticket, times in count.items() if times > 1),
        "never issued": sorted(ticket for ticket in count if not 0 <= ticket < total),
    }
    once = sum(times == 1 and 0 <= ticket < total for ticket, times in count.items())
    figure = "; ".join([f"{once} of {total}", *(f"{_named(tickets)} {name}" for name, tickets in groups.items() if tickets)])
    return Check("every ticket exactly once", figure, not any(groups.values()))


def faults_fired(planned: Mapping[str, int], fired: Mapping[str, int], least: int) -> Check:
    """As many faults of each kind fired as were planned, and at least ``least`` in all."""
    missing = [f"{kind}: {fired.get(kind, 0)} of {count}" for kind, count in planned.items() if fired.get(kind, 0) != count]
    extra = [f"{kind}: {count}, not planned" for kind, count in fired.items() if kind not in planned]
    total = sum(fired.values())
    enough = total >= least
    figure = "; ".join([f"{total}", *missing, *extra, *([] if enough else [f"expected at least {least}"])])
    return Check("every fault fired", figure, enough and not missing and not extra)


def rolled_back_counted(deaths: Sequence[ServerDeath], summary: Mapping[str, Any], *, journal: bool) -> Check:
    """The summary has the sum over all deaths of the gradients applied after the point of resumption; 0 with a journal."""
    name = "rolled-back updates counted" + (", none with the journal" if journal else "")
    rolled_back = [death.applied - death.resumed for death in deaths if death.resumed is not None]
    consistent = len(rolled_back) == len(deaths) and all(each >= 0 for each in rolled_back)
    reported = summary.get("rolled_back")
    figure = f"{reported} in the summary; {sum(rolled_back)} = {' + '.join(map(str, rolled_back)) or 0}"
    if not consistent:
        figure += "; an incarnation of the server is missing, or resumed after what was applied"
    return Check(name, figure, consistent and reported == sum(rolled_back) and (not journal or reported == 0))


def incarnations_counted(deaths: Sequence[ServerDeath], summary: Mapping[str, Any]) -> Check:
    """The summary counts one incarnation of the server more than it had deaths."""
    count = summary.get("incarnations")
    return Check("incarnations of the server", f"{count} with {len(deaths)} deaths", count == len(deaths) + 1)


def evictions_reported(
    expected: Iterable[int], warned: Iterable[int], summary: Mapping[str, Any], last_incarnation: Iterable[int]
) -> Check:
    """Every eviction is logged and no other worker was evicted; the summary lists those of the server's last incarnation.

    Args:
        expected: Process ids of workers that were killed, stopped or cut off.
        warned: Process ids in the server's warnings.
        summary: Of the run.
        last_incarnation: Those of ``expected`` evicted by the last incarnation of the server.
    """
    expected_counts, found = Counter(expected), Counter(warned)
    listed = Counter(eviction["process"] for eviction in summary.get("evictions") or [])
    problems = {
        "without a warning": list((expected_counts - found).elements()),
        "not in the summary": list((Counter(last_incarnation) - listed).elements()),
        "evicted though no fault hit it": list((found - expected_counts).elements()),
    }
    figure = "; ".join(
        [
            f"{found.total()} warnings for {expected_counts.total()} evictions",
            *(f"{_named(pids)} {problem}" for problem, pids in problems.items() if pids),
        ]
    )
    return Check("every eviction reported, no other one", figure, not any(problems.values()))


def transports_taken(transport: str, summary: Mapping[str, Any]) -> Check:
    """Every worker's pushes came over the transport that was asked for."""
    taken = Counter(each["transport"] for each in (summary.get("transports") or {}).values())
    figure = (
        f"control by {summary.get('control')}, {', '.join(f'{count} by {name}' for name, count in taken.items()) or 'none'}"
    )
    return Check("workers over the transport", figure, bool(taken) and (transport == "auto" or set(taken) == {transport}))


def completed(status: int | None, summary: Mapping[str, Any]) -> Check:
    """The launcher ended with exit status 0, and the run with status completed."""
    reported = summary.get("status")
    return Check("the run completed", f"exit status {status}, {reported}", status == 0 and reported == "completed")


def _named(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN]))
    return f"{shown} and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else shown
