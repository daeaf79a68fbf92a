"""The address at which the server of a run is to listen, and where its other ranks look for it: from the keys, before a start.

Where another launcher has started the ranks, such as torchrun, ``server.address`` may be a port alone, ``:29600``, at the
address of ``runtime.interface``, since the same words are typed on every node, and the launcher chooses the one with rank 0.
"""

from __future__ import annotations

from ormo_rpc.config.runtimes import RpcRuntime
from ormo_rpc.config.schema import Config, Role
from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous.addresses import parse_address, written
from ormo_rpc.rendezvous.interfaces import interface_address, parsed
from ormo_rpc.runtimes.ranks import Ranks

LOOPBACK = "127.0.0.1"


def check(config: Config, ranks: Ranks | None) -> None:
    """Refuse ``server.address`` and ``runtime.interface`` where no other node would reach the server, or one would be ignored.

    Every rank comes to the same conclusion by itself where the keys alone tell, so that none waits for another.

    Raises:
        ConfigError: the message says what came and what was expected.
    """
    if not isinstance(config.runtime, RpcRuntime):
        return
    interface, address = config.rpc.interface, config.server.address
    if ranks is None:
        if interface is not None:
            instead = (
                "a worker listens on the interface by which it reaches server.address"
                if config.role is Role.worker
                else "the server listens at server.address=HOST:PORT"
            )
            raise ConfigError(f"runtime.interface: got {interface} without torchrun or the like, expected None; {instead}")
        if address is not None:
            parse_address(address)
        return
    host, port = _given(address)
    if host is not None:
        _check_host(str(address), host, ranks, interface)
    elif interface is not None or (ranks.agent_store and not ranks.one_machine):
        _check_interface(interface, ranks)
    if address is not None and port == 0 and not ranks.agent_store:
        raise ConfigError(f"server.address: got {address}, expected a port other than 0, by which all ranks find the server")


def of_rank_0(config: Config, ranks: Ranks) -> str:
    """HOST:PORT where rank 0 listens.

    Without a store of torchrun's agents it is the address that all ranks were told, where `torch.distributed` would have one.

    Raises:
        ConfigError: the interface is not there, or has no address, or another one than the ranks were told.
    """
    host, port = _given(config.server.address)
    if port is None:
        port = 0 if ranks.agent_store else parse_address(ranks.master)[1]
    if host is None and config.rpc.interface is None and not (ranks.agent_store and not ranks.one_machine):
        host = _told_host(ranks)
    if host is None:
        host = interface_address(config.rpc.interface)
        if not ranks.agent_store:
            _check_master(host, config.rpc.interface, ranks)
    return written(host, port)


def without_store(config: Config, ranks: Ranks) -> str:
    """HOST:PORT where the other ranks look for rank 0's server if torchrun's agents share no store."""
    host, port = _given(config.server.address)
    told_host, told_port = parse_address(ranks.master)
    if host is None:
        host = _told_host(ranks) if config.rpc.interface is None else told_host
    return written(host, told_port if port is None else port)


def check_reachable(host: str, ranks: Ranks) -> None:
    """Refuse an address of rank 0's that its own machine alone reaches, as a name may stand for.

    Raises:
        ConfigError: it is such a one, and there are other machines.
    """
    if parsed(host).is_loopback and not ranks.one_machine:
        raise ConfigError(f"server.address: got {host}, which other nodes cannot reach, expected an address of the network")


def _told_host(ranks: Ranks) -> str:
    """The host of rank 0 without a word from the keys."""
    return LOOPBACK if ranks.one_machine else parse_address(ranks.master)[0]


def _given(address: str | None) -> tuple[str | None, int | None]:
    """Host and port of ``server.address``; None for what is not given."""
    if address is None:
        return None, None
    if address.startswith(":"):
        return None, parse_address(f"{LOOPBACK}{address}")[1]
    return parse_address(address)


def _check_host(address: str, host: str, ranks: Ranks, interface: str | None) -> None:
    port = parse_address(address)[1]
    if interface is not None:
        raise ConfigError(
            f"runtime.interface: got {interface} with server.address={address}, which names a host; leave one of them out, or "
            f"write server.address=:{port}"
        )
    try:
        unspecified = parsed(host).is_unspecified
    except ValueError:  # a name, which rank 0 resolves
        return
    if unspecified:
        raise ConfigError(
            f"server.address: got {address} {ranks.under}, expected an address that the other ranks can connect to, or a port "
            f"alone, :{port}, with runtime.interface"
        )
    check_reachable(host, ranks)


def _check_master(host: str, interface: str | None, ranks: Ranks) -> None:
    """Refuse an interface of rank 0's where the other ranks would not look for the server; a name may stand for any address."""
    master = parse_address(ranks.master)[0]
    try:
        differs = parsed(master) != parsed(host)
    except ValueError:
        return
    if differs:
        raise ConfigError(
            f"runtime.interface: got {interface}, whose address is {host}, and the other ranks look for the server at "
            f"MASTER_ADDR={master}; name the interface that has it, or give both by server.address=HOST:PORT"
        )


def _check_interface(interface: str | None, ranks: Ranks) -> None:
    """Refuse an interface that is for rank 0, as far as this node can tell: other nodes may have other interfaces."""
    try:
        host = interface_address(interface)
    except ConfigError:
        if interface is None or ranks.rank == 0:
            raise
        return
    if parsed(host).is_loopback and not ranks.one_machine:
        raise ConfigError(
            f"runtime.interface: got {interface}, by which other nodes cannot be reached ({host}), expected the interface "
            f"between the machines"
        )
