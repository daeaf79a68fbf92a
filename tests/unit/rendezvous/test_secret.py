"""The shared secret: its file, what is refused, and the proof of knowing it."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous.secret import PROTOCOL_VERSION, Secret, new_secret, proof, read_secret, verify, write_secret

SECRET = Secret("correct horse battery staple")
REQUEST = {"pid": 17, "torch": "2.14", "rank": None}


def test_a_written_secret_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    secret, file = new_secret(), tmp_path / "secret"
    write_secret(file, secret)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_secret(str(file)) == secret
    assert [path.name for path in tmp_path.iterdir()] == ["secret"], "a partial file is left"
    write_secret(file, SECRET)  # over an older one
    assert read_secret(str(file)) == SECRET != secret


def test_new_secrets_have_256_bits_and_differ() -> None:
    made = {new_secret().reveal() for _ in range(100)}
    assert len(made) == 100
    assert all(len(bytes.fromhex(text)) == 32 for text in made)


def test_a_file_takes_precedence_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORMO_RPC_SECRET", raising=False)
    assert read_secret(None) is None
    monkeypatch.setenv("ORMO_RPC_SECRET", f" {SECRET.reveal()}\n")
    assert read_secret(None) == SECRET
    write_secret(tmp_path / "secret", new_secret())
    assert read_secret(str(tmp_path / "secret")) != SECRET


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_secret_file_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    write_secret(file, SECRET)
    file.chmod(mode)
    with pytest.raises(
        ConfigError, match=rf"^{file}: its mode is {mode:04o}, so others .* expected 0600; run `chmod 600`"
    ) as caught:
        read_secret(str(file))
    assert SECRET.reveal() not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "secret: got 0 characters, expected at least 16; `openssl rand -hex 32` makes one"),
        (b"fifteen letters\n", "secret: got 15 characters, expected at least 16; .*"),
        (b"x" * 4097, "it has more than 4096 bytes, expected a secret of one line"),
        (b"\xff" * 20, "it is not text in UTF-8, expected a secret of one line"),
    ],
)
def test_a_file_without_a_valid_secret_is_refused_by_name(content: bytes, text: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.touch(0o600)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^{file}: {text}$"):
        read_secret(str(file))


def test_a_short_secret_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORMO_RPC_SECRET", "too short")
    with pytest.raises(ConfigError, match=r"^the environment variable ORMO_RPC_SECRET: secret: got 9 characters") as caught:
        read_secret(None)
    assert "too short" not in str(caught.value)


def test_a_missing_file_a_directory_and_a_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"there is no such file, expected the run's secret; `\(umask 077; .*\)` makes a new one$"
    ):
        read_secret(str(tmp_path / "secret"))
    with pytest.raises(ConfigError, match=r"the secret cannot be read: Is a directory$"):
        read_secret(str(tmp_path))
    os.mkfifo(tmp_path / "pipe", 0o600)  # whose opening waits for a writer
    with pytest.raises(ConfigError, match=r"it is not a regular file, expected one with the secret$"):
        read_secret(str(tmp_path / "pipe"))


def test_a_secret_is_not_written_through_a_symbolic_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "secret").symlink_to(target)
    with pytest.raises(
        ConfigError, match=r"secret: it is a symbolic link, expected a regular file; remove it or name another one$"
    ):
        write_secret(tmp_path / "secret", SECRET)
    assert target.read_text() == "mine"
    with pytest.raises(ConfigError, match=r"the secret cannot be written: No such file or directory$"):
        write_secret(tmp_path / "missing" / "secret", SECRET)


def test_a_secret_is_not_shown_copied_or_pickled() -> None:
    for shown in (repr(SECRET), str(SECRET), f"{SECRET}", "%s" % (SECRET,), repr([SECRET]), repr({"secret": SECRET})):  # noqa: UP031 - each way of showing one
        assert "horse" not in shown
    for leak in (pickle.dumps, copy.deepcopy, json.dumps, vars, hash):
        with pytest.raises(TypeError):
            leak(SECRET)  # pyright: ignore[reportArgumentType, reportCallIssue] # that is the test


def test_a_proof_is_the_documented_hmac() -> None:
    said = f'["ormo_rpc rendezvous", {PROTOCOL_VERSION}, "worker", "S", "C", {{"a": 1, "b": null}}]'
    expected = hmac.new(b"correct horse battery staple", said.encode(), hashlib.sha256).hexdigest()
    assert proof(SECRET, "worker", "S", "C", {"b": None, "a": 1}) == expected
    assert verify(expected, SECRET, "worker", "S", "C", {"a": 1, "b": None})


@pytest.mark.parametrize(
    "change",
    [
        {"secret": Secret("correct horse battery stapl!")},
        {"role": "server"},
        {"server_nonce": "s"},
        {"worker_nonce": "c"},
        {"request": {**REQUEST, "pid": 18}},
        {"request": {}},
        {"server_nonce": "C", "worker_nonce": "S"},
    ],
)
def test_a_proof_holds_for_one_secret_role_connection_and_request(change: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "secret": SECRET,
        "role": "worker",
        "server_nonce": "S",
        "worker_nonce": "C",
        "request": REQUEST,
    }
    good = proof(**settings)
    assert verify(good, **settings)
    assert not verify(good, **{**settings, **change})
    for other in (None, 5, good[:-1], good.upper(), good + "0", "é" * 64, [good], "\ud800"):
        assert not verify(other, **settings)
