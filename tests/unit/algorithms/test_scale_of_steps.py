"""The table in docs/algorithms.md that says how far a ticket moves the parameters, against runs with a constant gradient."""

from __future__ import annotations

import math
import re

import pytest
import torch

from ormo_rpc.options import find, parts
from ormo_rpc.server.build import build_server
from tests.support.pages import ROOT
from tests.support.schedule import Run, pushed

K, BETA = 4, 0.9
ROUNDS = 150
"""A momentum is within 0.9^150 = 1e-7 of its limit after the first half of twice as many."""


def stated() -> dict[str, tuple[bool, float]]:
    """Return for each algorithm of the table if the step is an upper bound, and the step with the default options."""
    page = (ROOT / "docs" / "algorithms.md").read_text("utf-8").partition("## What the learning rate multiplies")[2]
    found: dict[str, tuple[bool, float]] = {}
    for names, _, step in re.findall(r"^\| (`\w.*?) \| (.*?) \| (.*?) \|$", page.partition("**Momentum")[0], re.MULTILINE):
        match = re.match(r"(up to )?`(.+?)`", step)
        if match is None:
            continue
        for name in re.findall(r"`(\w+)`", names):
            options = {field: value.default for field, value in find("algorithm", name).declared().items()}
            letters = {
                "B": options.get("batch") or options.get("buffer"),
                "N": options.get("period"),
                "H": options.get("local_steps"),
            }
            values = {"sqrt": math.sqrt, "beta": BETA, "K": K, **options, **letters}
            found[name] = (match[1] is not None, eval(match[2], values))  # noqa: S307 - a page of this repository
    return found


STATED = stated()


def step_of(name: str, **options: str) -> float:
    """Return the step of a ticket when K workers push in turn, in units of ``eta g``."""
    lr = 1e-6  # so small that compensations for what is between two parameters do nothing
    server = build_server(
        algorithm=name,
        params=torch.zeros(1, dtype=torch.float64),
        num_workers=K,
        lr=lr,
        momentum=BETA,
        total_tickets=2 * K * ROUNDS + 50,
        **options,  # pyright: ignore[reportArgumentType] # options of the algorithm
    )
    run = Run(server=server, gradient=pushed(server.algorithm, torch.ones_like), num_workers=K).start()
    places = list[tuple[int, float]]()
    for _ in range(2):
        for _ in range(K * ROUNDS):
            run.push(next(iter(run.outstanding.values())))
        places.append((server.iteration, float(server.params)))
    (began, start), (ended, end) = places
    return (start - end) / lr / (ended - began)


def test_every_algorithm_is_in_the_table() -> None:
    assert sorted(STATED) == sorted(parts("algorithm"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STATED))
def test_a_ticket_moves_the_parameters_as_far_as_the_page_says(name: str) -> None:
    bound, expected = STATED[name]
    got = step_of(name)
    if bound:
        assert 0.1 * expected < got <= expected * (1 + 1e-3)
    else:
        assert got == pytest.approx(expected, rel=0.01)  # a started buffer of B is at most 1 / 200 of the gradients


@pytest.mark.slow
def test_orlomo_that_averages_takes_the_kth_part() -> None:
    assert step_of("orlomo", combine="mean") == pytest.approx(STATED["orlomo"][1] / K, rel=0.01)
