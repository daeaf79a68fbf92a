"""What has to hold after a run with faults, as pure functions of what was recorded; each returns a `Check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 5
"""How many violations of one kind are named."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: What has to hold.
        figure: What was found, with its number.
        holds: Whether it holds.
    """

    name: str
    figure: str
    holds: bool

    def __str__(self) -> str:
        return f"{'ok    ' if self.holds else 'FAILED'} {self.name}: {self.figure}"


@dataclass(frozen=True)
class Death:
    """One death of the server.

    Attributes:
        applied: How many gradients it had applied, as it had noted outside of the trace.
        resumed: At which iteration its next life went on; None where there was none.
    """

    applied: int
    resumed: int | None


def iterations_in_order(events: Iterable[Mapping[str, Any]], total: int) -> Check:
    """The lineage has the iterations 0 to ``total - 1``, in this order."""
    found = [event["iteration"] for event in events if event["event"] == "apply"]
    wrong = next((place for place, (is_, ought) in enumerate(zip(found, range(total), strict=False)) if is_ != ought), None)
    figure = f"{len(found)} of {total}"
    if wrong is not None:
        figure += f"; {found[wrong]} stands in place of {wrong}"
    return Check("iterations of the final lineage in order", figure, found == list(range(total)))


def tickets_exactly_once(events: Iterable[Mapping[str, Any]], total: int) -> Check:
    """The lineage has every ticket 0 to ``total - 1`` exactly once, and no other one."""
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
    """As many faults of each kind fired as were planned, and at least so many in all."""
    missing = [f"{kind}: {fired.get(kind, 0)} of {count}" for kind, count in planned.items() if fired.get(kind, 0) != count]
    extra = [f"{kind}: {count}, not planned" for kind, count in fired.items() if kind not in planned]
    total = sum(fired.values())
    enough = total >= least
    figure = "; ".join([f"{total}", *missing, *extra, *([] if enough else [f"expected at least {least}"])])
    return Check("every fault fired", figure, enough and not missing and not extra)


def rolled_back_counted(deaths: Sequence[Death], summary: Mapping[str, Any], *, journal: bool) -> Check:
    """The summary has the sum, over all deaths, of what the server had applied beyond where it went on; 0 with a journal."""
    name = "rolled-back updates counted" + (", none with the journal" if journal else "")
    lost = [death.applied - death.resumed for death in deaths if death.resumed is not None]
    whole = len(lost) == len(deaths) and all(each >= 0 for each in lost)
    told = summary.get("rolled_back")
    figure = f"{told} in the summary; {sum(lost)} = {' + '.join(map(str, lost)) or 0}"
    if not whole:
        figure += "; a life of the server is missing, or went on beyond what was applied"
    return Check(name, figure, whole and told == sum(lost) and (not journal or told == 0))


def lives_counted(deaths: Sequence[Death], summary: Mapping[str, Any]) -> Check:
    """The summary counts one life of the server more than it had deaths."""
    lives = summary.get("server_lives")
    return Check("lives of the server", f"{lives} with {len(deaths)} deaths", lives == len(deaths) + 1)


def losses_told(expected: Iterable[int], told: Iterable[int], summary: Mapping[str, Any], last_life: Iterable[int]) -> Check:
    """Every worker that was lost is named in a warning; the summary has those of the server's last life.

    Args:
        expected: Process numbers of members that were killed, stopped or cut off.
        told: Process numbers in the server's warnings.
        summary: Of the run.
        last_life: Those of ``expected`` that were lost in the last life of the server.
    """
    wanted, warned = Counter(expected), Counter(told)
    listed = Counter(loss["process"] for loss in summary.get("evictions") or [])
    silent, absent = list((wanted - warned).elements()), list((Counter(last_life) - listed).elements())
    surplus = list((warned - wanted).elements())
    problems = {"without a warning": silent, "not in the summary": absent, "lost though nothing was done to it": surplus}
    figure = "; ".join(
        [f"{warned.total()} warnings for {wanted.total()} losses", *(f"{_named(p)} {n}" for n, p in problems.items() if p)]
    )
    return Check("every loss is told, and nobody else was lost", figure, not any(problems.values()))


def completed(status: int | None, summary: Mapping[str, Any]) -> Check:
    """The launcher ended with exit status 0, and the run with status completed."""
    said = summary.get("status")
    return Check("the run ended as it should", f"exit status {status}, {said}", status == 0 and said == "completed")


def _named(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN]))
    return f"{shown} and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else shown
