"""The address of the server under torchrun, from the keys: what is listened at, what is looked for, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous import interfaces
from ormo_rpc.runtimes import server_address
from ormo_rpc.runtimes.ranks import TORCHRUN, Ranks

SEVERAL = Ranks(
    launcher=TORCHRUN,
    variables=("RANK", "WORLD_SIZE"),
    job="job",
    rank=0,
    world_size=3,
    master="10.0.0.5:29400",
    attempt=0,
    agent_store=True,
    agent_folder=None,
    one_machine=False,
)
ONE = dataclasses.replace(SEVERAL, one_machine=True)
ADDRESSES = {"lo": "127.0.0.1", "eth0": "10.0.0.5", "eth6": "fd00::5"}


@pytest.fixture(autouse=True)
def interfaces_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: interfaces.parsed(address) for name, address in ADDRESSES.items()}
    monkeypatch.setattr(interfaces.socket, "if_nameindex", lambda: list(enumerate([*ADDRESSES, "bare0"], 1)))
    monkeypatch.setattr(interfaces, "_first_addresses", lambda: found)


def config(address: str | None = None, interface: str | None = None, **values: Any) -> Config:
    return parse_config({"server": {"address": address}, "runtime": {"name": "rpc", "interface": interface}, **values})


@pytest.mark.parametrize(
    ("address", "interface", "ranks", "listens", "looked_for"),
    [
        (None, None, ONE, "127.0.0.1:{}", "127.0.0.1:29400"),
        (":29600", None, ONE, "127.0.0.1:29600", "127.0.0.1:29600"),
        (None, "eth0", SEVERAL, "10.0.0.5:{}", "10.0.0.5:29400"),
        (":29600", "eth0", SEVERAL, "10.0.0.5:29600", "10.0.0.5:29600"),
        ("10.0.0.5:29600", None, SEVERAL, "10.0.0.5:29600", "10.0.0.5:29600"),
        ("node-a:29600", None, SEVERAL, "node-a:29600", "node-a:29600"),
        ("[fd00::5]:29600", None, SEVERAL, "[fd00::5]:29600", "[fd00::5]:29600"),
        (":29600", "eth6", dataclasses.replace(SEVERAL, master="[fd00::5]:29400"), "[fd00::5]:29600", "[fd00::5]:29600"),
    ],
)
def test_rank_0_listens_where_the_keys_say_and_the_others_look_there(
    address: str | None, interface: str | None, ranks: Ranks, listens: str, looked_for: str
) -> None:
    """The others need the second address where torchrun's agents share no store; its port is free then."""
    given, alone = config(address, interface), dataclasses.replace(ranks, agent_store=False)
    for each in (ranks, alone):
        server_address.check(given, each)
    assert server_address.of_rank_0(given, ranks) == listens.format(0)
    assert server_address.of_rank_0(given, alone) == listens.format(29400)
    assert server_address.without_store(given, dataclasses.replace(alone, rank=1)) == looked_for


ON_ALL_RANKS = [
    (
        None,
        "lo",
        "runtime.interface: got lo, by which other nodes cannot be reached (127.0.0.1), expected the interface between ",
    ),
    (":29600", "lo", "runtime.interface: got lo, by which other nodes cannot be reached (127.0.0.1), expected "),
    (None, None, "runtime.interface: got None, expected the interface between the machines, one of lo, eth0, eth6, bare0"),
    (
        "10.0.0.5:29600",
        "eth0",
        "runtime.interface: got eth0 with server.address=10.0.0.5:29600, which names a host; leave one ",
    ),
    ("0.0.0.0:29600", None, "server.address: got 0.0.0.0:29600 under torchrun, expected an address that the other ranks can "),
    (
        "[::]:29600",
        None,
        "server.address: got [::]:29600 under torchrun, expected an address that the other ranks can connect ",
    ),
    (
        "127.0.0.1:29600",
        None,
        "server.address: got 127.0.0.1, which other nodes cannot reach, expected an address of the network",
    ),
    ("[::1]:29600", None, "server.address: got ::1, which other nodes cannot reach, expected an address of the network"),
    ("10.0.0.5", None, "server.address: got '10.0.0.5', expected HOST:PORT"),
]


@pytest.mark.parametrize(("address", "interface", "message"), ON_ALL_RANKS)
@pytest.mark.parametrize("rank", [0, 2])
def test_what_no_other_node_can_reach_is_refused_on_every_rank(
    address: str | None, interface: str | None, message: str, rank: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        server_address.check(config(address, interface), dataclasses.replace(SEVERAL, rank=rank))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        ("nonesuch0", "runtime.interface: got nonesuch0, expected the interface between the machines, one of lo, eth0, "),
        ("bare0", "runtime.interface: got bare0, which has no address "),
    ],
)
def test_an_interface_that_rank_0_cannot_use_is_refused_there(interface: str, message: str) -> None:
    """Other nodes may have interfaces with other names, and do not need the one of rank 0."""
    with pytest.raises(ConfigError) as caught:
        server_address.check(config(None, interface), SEVERAL)
    assert str(caught.value).startswith(message)
    server_address.check(config(None, interface), dataclasses.replace(SEVERAL, rank=1))


def test_a_port_that_is_to_be_chosen_needs_a_store_to_tell_it() -> None:
    server_address.check(config("10.0.0.5:0"), SEVERAL)
    with pytest.raises(ConfigError, match=r"\Aserver\.address: got 10\.0\.0\.5:0, expected a port other than 0"):
        server_address.check(config("10.0.0.5:0"), dataclasses.replace(SEVERAL, agent_store=False))


@pytest.mark.parametrize("master", ["gpu08:19567", "[fd00::5]:29400"])
def test_ranks_without_a_store_meet_at_the_address_that_they_were_told(master: str) -> None:
    told = dataclasses.replace(SEVERAL, launcher="srun", agent_store=False, master=master)
    server_address.check(config(), told)
    assert server_address.of_rank_0(config(), told) == server_address.without_store(config(), told) == master


def test_an_interface_where_the_other_ranks_do_not_look_is_refused() -> None:
    """Without a store they know MASTER_ADDR alone."""
    given, elsewhere = config(None, "eth0"), dataclasses.replace(SEVERAL, agent_store=False, master="10.0.9.9:29400")
    with pytest.raises(ConfigError) as caught:
        server_address.of_rank_0(given, elsewhere)
    assert str(caught.value).startswith(
        "runtime.interface: got eth0, whose address is 10.0.0.5, and the other ranks look for the server at MASTER_ADDR="
    )
    for ranks in (dataclasses.replace(elsewhere, master="node-a:29400"), dataclasses.replace(elsewhere, agent_store=True)):
        assert server_address.of_rank_0(given, ranks).startswith("10.0.0.5:")


def test_loopback_is_enough_on_one_machine() -> None:
    for address, interface in ((None, "lo"), ("127.0.0.1:29600", None), ("localhost:29600", None)):
        server_address.check(config(address, interface), ONE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the server listens at server.address=HOST:PORT"),
        ({"role": "worker"}, "a worker listens on the interface by which it reaches server.address"),
    ],
    ids=["server", "worker"],
)
def test_an_interface_without_torchrun_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        server_address.check(config(interface="eth0", **values), None)
    assert str(caught.value) == f"runtime.interface: got eth0 without torchrun or the like, expected None; {message}"


@pytest.mark.parametrize("address", [":29600", "fd00::1:5", "host"])
def test_a_malformed_address_is_refused_before_anything_starts(address: str) -> None:
    with pytest.raises(ConfigError, match=r"\Aserver\.address: got '.+', expected "):
        server_address.check(config(address), None)
