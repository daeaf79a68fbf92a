"""Addresses of the listener: what is refused, and what a socket is called."""

from __future__ import annotations

import re

import pytest

from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous.addresses import address_of, listen_at, parse_address, written


@pytest.mark.parametrize("address", ["", "host", "host:", ":5", "[]:5", "[::1:5", "::1]:5", "host:x", "host:70000", "host:-1"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"\Aserver\.address: got '.*', expected HOST:PORT\Z"):
        parse_address(address)


@pytest.mark.parametrize("address", ["::1:5", "fd00::1:29600"])
def test_a_host_of_ipv6_without_brackets_is_refused(address: str) -> None:
    """The end of its host would be a guess."""
    with pytest.raises(ConfigError, match=rf"\Aserver\.address: got '{address}', expected \[HOST\]:PORT, .* in brackets\Z"):
        parse_address(address)


@pytest.mark.parametrize(
    ("address", "parts"), [("[::1]:5", ("::1", 5)), ("[fd00::1]:29600", ("fd00::1", 29600)), ("node-a:0", ("node-a", 0))]
)
def test_an_address_is_read_as_it_is_written(address: str, parts: tuple[str, int]) -> None:
    assert parse_address(address) == parts
    assert written(*parts) == address


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
