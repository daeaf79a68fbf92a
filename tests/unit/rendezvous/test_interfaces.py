"""Interfaces of this machine: the address of each, and the one that has an address."""

from __future__ import annotations

import ipaddress
import json
import shutil
import subprocess

import pytest

from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous import interfaces
from ormo_rpc.rendezvous.interfaces import interface_address, interface_of, local_address, specific_address


@pytest.mark.skipif(shutil.which("ip") is None, reason="there is no ip command")
def test_the_addresses_of_all_interfaces_are_those_that_ip_lists() -> None:
    command = [str(shutil.which("ip")), "-json", "address"]
    listed = subprocess.run(command, capture_output=True, check=True, timeout=10).stdout
    expected = {
        (each["ifname"].partition("@")[0], ipaddress.ip_address(address["local"]))
        for each in json.loads(listed)
        for address in each["addr_info"]
    }
    assert set(interfaces._addresses()) == expected  # pyright: ignore[reportPrivateUsage] # the order alone is used elsewhere


def test_an_interface_without_an_address_is_refused_by_name() -> None:
    assert interface_address("lo") == "127.0.0.1"
    for name in (None, "nonesuch0"):
        with pytest.raises(ConfigError, match=rf"\Aruntime\.interface: got {name}, expected the interface .*\blo\b.*\Z"):
            interface_address(name)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "::1", "::ffff:127.0.0.1"])
def test_an_address_of_loopback_belongs_to_the_loopback_interface(host: str) -> None:
    assert interface_of(host) == "lo"


def test_an_address_belongs_to_the_interface_that_has_it_first() -> None:
    own = local_address(("192.0.2.1", 9))
    if own in ("192.0.2.1", "127.0.0.1"):
        pytest.skip("this machine has no way out")
    assert interface_address(interface_of(own)) == own
    assert specific_address("0.0.0.0") == specific_address("::") == specific_address(own) == own  # noqa: S104 - not bound


def test_an_address_without_an_interface_is_one_clear_error() -> None:
    said = (
        r"\Aserver\.address: no network interface of this machine has the first address 192\.0\.2\.1, .*use transport=tcp, .*\Z"
    )
    with pytest.raises(ConfigError, match=said):
        interface_of("192.0.2.1")


@pytest.mark.parametrize(
    ("has", "first"),
    [
        (["fd00::2", "fd00::1", "10.0.0.5"], "10.0.0.5"),
        (["fe80::1", "fd00::2", "2001:db8::3"], "fd00::2"),
        (["169.254.1.2"], "169.254.1.2"),
        (["fe80::1"], None),
        ([], None),
    ],
    ids=str,
)
def test_the_first_address_of_an_interface_counts(has: list[str], first: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of IPv4 come first, as for torch's agent; one that is valid on one link alone is of no use."""
    monkeypatch.setattr(interfaces, "_addresses", lambda: [("lo", ipaddress.ip_address(each)) for each in has])
    if first is None:
        with pytest.raises(ConfigError, match=r"\Aruntime\.interface: got lo, which has no address .*\Z"):
            interface_address("lo")
        return
    assert interface_address("lo") == first
    assert interface_of(first) == "lo"
    for other in {*has} - {first}:
        with pytest.raises(ConfigError, match=rf"has the first address {other}, "):
            interface_of(other)
