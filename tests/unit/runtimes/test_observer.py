"""Reading the state of a run beside it: what is said where there is nothing to read."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.evaluate import evaluate_present
from ormo_rpc.rendezvous.secret import Secret, write_secret
from ormo_rpc.runtimes.distributed.observer import NotReadable, present_state
from ormo_rpc.runtimes.distributed.server_process.serving import served
from tests.support.rendezvous import serving
from tests.support.service import owner

SECRET = Secret("a secret that only we two know")
CONFIG = parse_config({"workers": 1})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory as of a live run that goes on, but for the address."""
    write_secret(tmp_path / "secret", SECRET)
    (tmp_path / "config.yaml").write_text(CONFIG.yaml)
    return tmp_path


def reach(run_dir: Path, address: tuple[str, int]) -> str:
    """Write the address of a run, and return it."""
    text = f"{address[0]}:{address[1]}"
    (run_dir / "processes.json").write_text(json.dumps({"address": text}))
    return text


def test_a_directory_without_a_live_run_has_no_present_state(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert present_state(run_dir, CONFIG) is None
    assert evaluate_present(tmp_path_factory.mktemp("empty")) is None


def test_a_damaged_address_is_an_error_of_one_line(run_dir: Path) -> None:
    (run_dir / "processes.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"processes\.json: cannot be read: 'address'\Z"):
        present_state(run_dir, CONFIG)


def test_a_server_that_is_gone_is_named_with_the_reason(run_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = reach(run_dir, taken.getsockname()[:2])
    with pytest.raises(NotReadable, match=rf"\Aits server at {address} cannot be asked: refused: nothing listens there\Z"):
        present_state(run_dir, CONFIG)


def test_a_run_whose_secret_is_nowhere_cannot_be_asked(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORMO_RPC_SECRET", raising=False)
    (run_dir / "secret").unlink()
    reach(run_dir, ("127.0.0.1", 1))
    with pytest.raises(NotReadable, match=r"\Aits secret is not in \S+/secret; .*ORMO_RPC_SECRET"):
        present_state(run_dir, CONFIG)


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        (SECRET, r"\Aits server tells no state with runtime\.control=socket\Z"),
        (Secret("another one, of an earlier run"), r"\Aits server at \S+ cannot be asked: .*secret.*\Z"),
    ],
    ids=["control=socket", "another secret"],
)
def test_a_server_that_tells_no_state_keeps_working(
    secret: Secret, said: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret of another run in the environment does not count beside the one that this run has made."""
    monkeypatch.setenv("ORMO_RPC_SECRET", "the secret of some other run")
    service = owner(1).service
    side = CONFIG.transport.server_side()
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(listener.shutdown, socket.SHUT_RDWR)  # wakes the thread that accepts
        stack.enter_context(served(listener, secret, service, side, serving(CONFIG.transport.name)))
        reach(run_dir, listener.getsockname()[:2])
        with pytest.raises(NotReadable, match=said):
            present_state(run_dir, CONFIG)
        assert len(service.memberships) == 0
