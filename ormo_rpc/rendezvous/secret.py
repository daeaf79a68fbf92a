"""The shared secret of a run: where it comes from, and how both sides of a connection prove that they know it.

The secret itself never crosses the wire. Each side sends a *nonce*, fresh chance, and answers with
``HMAC-SHA256(secret, [label, version, role, nonce of the server, nonce of the worker, what the worker says of itself])``. The
role keeps one side's proof from being sent back to it, the nonces keep an old proof from being used again, and the rest cannot
be changed on the way.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from ormo_rpc.errors import ConfigError

PROTOCOL = 2
"""The version of what is said at the door; bound into every proof."""
VARIABLE = "ORMO_RPC_SECRET"
"""The environment variable that holds the secret where no file is named."""
SHORTEST = 16
"""A secret of fewer characters is refused: whoever records one handshake could try them all."""
LONGEST_BYTES = 4096
"""A file that is longer holds something else."""
NONCE_CHARACTERS = 64
"""32 bytes in hexadecimal."""

Role = Literal["server", "worker"]


class Secret:
    """A secret that neither a log, a traceback, a pickle nor a JSON file can show by accident.

    Args:
        value: The secret, at least `SHORTEST` characters.

    Raises:
        ConfigError: it is too short.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        if len(value) < SHORTEST:
            raise ConfigError(
                f"secret: got {len(value)} characters, expected at least {SHORTEST}; `openssl rand -hex 32` makes one"
            )
        self._value = value

    def reveal(self) -> str:
        """The secret itself, to be handed to a child or written by `write_secret`; never to be logged."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(not shown)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    __hash__ = None  # pyright: ignore[reportAssignmentType] # as Python has it for what is not to be hashed

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled; hand its text to whom it is for")


def new_secret() -> Secret:
    """A secret for one run: 256 bits of the system's chance."""
    return Secret(secrets.token_hex(32))


def write_secret(path: Path, secret: Secret) -> None:
    """Write a secret where its owner alone can read it, whole or not at all.

    Raises:
        ConfigError: the path is a symbolic link, or its directory cannot be written to.
    """
    if path.is_symlink():
        raise ConfigError(f"{path}: it is a symbolic link, expected a file of our own; remove it or name another one")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(f"{secret.reveal()}\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: the secret cannot be written: {error.strerror}") from None


def read_secret(file: str | None) -> Secret | None:
    """The secret in a file or, where none is named, in the environment variable ORMO_RPC_SECRET; None where there is neither.

    Blanks and the end of the line around it do not count.

    Raises:
        ConfigError: the file is missing, can be read by others than its owner, or what is in it is no secret.
    """
    if file is not None:
        return _secret(_owned_text(Path(file)), file)
    value = os.environ.get(VARIABLE)
    return None if value is None else _secret(value, f"the environment variable {VARIABLE}")


def nonce() -> str:
    """Fresh chance for one connection."""
    return secrets.token_hex(NONCE_CHARACTERS // 2)


def proof(secret: Secret, role: Role, server_nonce: str, worker_nonce: str, hello: Mapping[str, Any]) -> str:
    """What only somebody who knows the secret can say, in this role and on this connection.

    Args:
        secret: The secret.
        role: Who proves it.
        server_nonce: The server's nonce.
        worker_nonce: The worker's.
        hello: What the worker says of itself, of JSON's types.
    """
    said = json.dumps(["ormo_rpc door", PROTOCOL, role, server_nonce, worker_nonce, hello], sort_keys=True)
    return hmac.new(secret.reveal().encode(), said.encode(), hashlib.sha256).hexdigest()


def verify(given: object, secret: Secret, role: Role, server_nonce: str, worker_nonce: str, hello: Mapping[str, Any]) -> bool:
    """Whether ``given``, of any type, is that `proof`; takes the same time wherever it differs."""
    expected = proof(secret, role, server_nonce, worker_nonce, hello)
    return isinstance(given, str) and given.isascii() and hmac.compare_digest(given, expected)


def _secret(text: str, source: str) -> Secret:
    try:
        return Secret(text.strip())
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _owned_text(path: Path) -> str:
    """The text of a small file that nobody but its owner can read."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())  # of the open file, which nobody can swap
            content = file.read(LONGEST_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise ConfigError(f"{path}: the secret cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: it is not a regular file, expected one with the secret")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"{path}: its mode is {stat.S_IMODE(status.st_mode):04o}, so others than its owner may use it, expected 0600; "
            "run `chmod 600` on it, and make a new secret if others may have read this one"
        )
    if len(content) > LONGEST_BYTES:
        raise ConfigError(f"{path}: it has more than {LONGEST_BYTES} bytes, expected a secret of one line")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: it is not text in UTF-8, expected a secret of one line") from None


def _without_waiting(name: str, flags: int) -> int:
    """Opens a file; a pipe that nobody writes to would hold us otherwise."""
    return os.open(name, flags | os.O_NONBLOCK)
