"""The shared secret of a run: reading and writing it, and the proof by which both sides of a connection authenticate.

The secret itself never crosses the wire. Each side sends a *nonce*, random and never used again, and answers with
``HMAC-SHA256(secret, [label, version, role, nonce of the server, nonce of the worker, request of the worker])``. The role keeps
one side's proof from being sent back to it, the nonces keep an old proof from being replayed, and the rest cannot be changed on
the way.
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

PROTOCOL_VERSION = 6
"""The version of the rendezvous protocol; bound into every proof."""
SECRET_VARIABLE = "ORMO_RPC_SECRET"  # noqa: S105 - the name of a variable
"""The environment variable that holds the secret where no file is named."""
MIN_SECRET_CHARACTERS = 16
"""A shorter secret is refused: after recording one handshake, all of them could be tried."""
MAX_SECRET_BYTES = 4096
"""A longer file holds something else."""
NONCE_CHARACTERS = 64
"""32 bytes in hexadecimal."""

Role = Literal["server", "worker"]


class Secret:
    """A secret that no log, traceback, pickle or JSON file can show by accident.

    Args:
        value: The secret, at least `MIN_SECRET_CHARACTERS` characters.

    Raises:
        ConfigError: it is too short.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        if len(value) < MIN_SECRET_CHARACTERS:
            raise ConfigError(
                f"secret: got {len(value)} characters, expected at least {MIN_SECRET_CHARACTERS}; "
                f"`openssl rand -hex 32` makes one"
            )
        self._value = value

    def reveal(self) -> str:
        """Return the secret itself, for a proof or for `write_secret`; never to be logged."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(not shown)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    __hash__ = None  # pyright: ignore[reportAssignmentType] # Python's way to make it unhashable

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled")


def new_secret() -> Secret:
    """Make a secret for one run: 256 random bits of the operating system."""
    return Secret(secrets.token_hex(32))


def write_secret(path: Path, secret: Secret) -> None:
    """Write a secret to a file that its owner alone can read, completely or not at all.

    Raises:
        ConfigError: the path is a symbolic link, or its directory cannot be written to.
    """
    if path.is_symlink():
        raise ConfigError(f"{path}: it is a symbolic link, expected a regular file; remove it or name another one")
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
    """Read the secret from a file or, where none is named, from the environment variable ORMO_RPC_SECRET.

    White space around it does not count. None where no file is named and the variable is not set.

    Raises:
        ConfigError: the file is missing, can be read by others than its owner, or does not hold a secret.
    """
    if file is not None:
        return _secret(_owned_text(Path(file)), file)
    value = os.environ.get(SECRET_VARIABLE)
    return None if value is None else _secret(value, f"the environment variable {SECRET_VARIABLE}")


def require_secret(file: str | None) -> Secret:
    """Read a secret that the other machines, or ranks, have as well; refuse to go on without.

    Raises:
        ConfigError: no file is named, and the environment has none.
    """
    secret = read_secret(file)
    if secret is None:
        raise ConfigError(
            f"server.secret_file: got None, expected a file with the secret of the run, or the variable {SECRET_VARIABLE}, the "
            "same on every machine; the file of a run on this machine is RUN_DIRECTORY/secret"
        )
    return secret


def nonce() -> str:
    """Make a random value for one connection."""
    return secrets.token_hex(NONCE_CHARACTERS // 2)


def proof(secret: Secret, role: Role, server_nonce: str, worker_nonce: str, request: Mapping[str, Any]) -> str:
    """Prove to know the secret, in one role and on one connection.

    Args:
        secret: The secret.
        role: The side that proves it.
        server_nonce: The server's nonce.
        worker_nonce: The worker's nonce.
        request: The worker's request, of JSON's types.
    """
    content = json.dumps(["ormo_rpc rendezvous", PROTOCOL_VERSION, role, server_nonce, worker_nonce, request], sort_keys=True)
    return hmac.new(secret.reveal().encode(), content.encode(), hashlib.sha256).hexdigest()


def verify(given: object, secret: Secret, role: Role, server_nonce: str, worker_nonce: str, request: Mapping[str, Any]) -> bool:
    """Check ``given``, of any type, against the `proof`, in constant time."""
    expected = proof(secret, role, server_nonce, worker_nonce, request)
    return isinstance(given, str) and given.isascii() and hmac.compare_digest(given, expected)


def _secret(text: str, source: str) -> Secret:
    try:
        return Secret(text.strip())
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _owned_text(path: Path) -> str:
    """Read a small file, which its owner alone must be able to read."""
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())  # of the open file, which cannot be swapped
            content = file.read(MAX_SECRET_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such file, expected the run's secret; "
            "`(umask 077; openssl rand -hex 32 > FILE)` makes a new one"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: the secret cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: it is not a regular file, expected one with the secret")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"{path}: its mode is {stat.S_IMODE(status.st_mode):04o}, so others than its owner may use it, expected 0600; "
            "run `chmod 600` on it, and make a new secret if others may have read this one"
        )
    if len(content) > MAX_SECRET_BYTES:
        raise ConfigError(f"{path}: it has more than {MAX_SECRET_BYTES} bytes, expected a secret of one line")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: it is not text in UTF-8, expected a secret of one line") from None


def _open_nonblocking(name: str, flags: int) -> int:
    """Open a file without blocking, as a pipe without a writer otherwise would."""
    return os.open(name, flags | os.O_NONBLOCK)
