"""Addresses of the listener: what is refused, and what a socket is called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous import addresses
from ormo_rpc.rendezvous.addresses import (
    address_of,
    interface_address,
    interface_of,
    listen_at,
    local_address,
    parse_address,
    specific_address,
)


@pytest.mark.parametrize("address", ["", "host", "host:", ":5", "host:x", "host:70000", "host:-1"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"\Aserver\.address: got '.*', expected HOST:PORT\Z"):
        parse_address(address)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "8.8.8.8:0"])
def test_a_public_address_is_refused_without_server_public(address: str) -> None:
    with pytest.raises(ConfigError, match=r"\Aserver\.address: got \S+, reachable from everywhere; .*server\.public=true.*\Z"):
        listen_at(address, public=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_socket_listens_at_the_given_address_and_names_it(host: str) -> None:
    try:
        listener = listen_at(f"[{host}]:0" if ":" in host else f"{host}:0", public=False)
    except ConfigError as error:
        pytest.skip(f"this machine has no such address: {error}")
    with listener:
        assert listener.getsockname()[0] == host
        assert parse_address(address_of(listener)) == listener.getsockname()[:2]
        with pytest.raises(
            ConfigError,
            match=rf"\Aserver\.address: got {re.escape(address_of(listener))}, where the server cannot listen: .*in use.*\Z",
        ):
            listen_at(address_of(listener), public=False)
    with listen_at("0.0.0.0:0", public=True) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"  # noqa: S104 - as asked for


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


def test_an_address_of_ipv6_beside_one_of_ipv4_is_not_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "if_inet6"
    table.write_text("fd000000000000000000000000000002 04 40 00 80     lo\n")
    monkeypatch.setattr(addresses, "_IPV6_ADDRESSES", table)
    assert interface_address("lo") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"has the first address fd00::2, "):
        interface_of("fd00::2")
    monkeypatch.setattr(addresses, "_has_ipv4", lambda _: False)
    assert interface_of("fd00::2") == "lo"
