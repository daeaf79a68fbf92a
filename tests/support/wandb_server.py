"""The little of wandb's server that a run asks for, until it answers no more."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from typing_extensions import override

PROJECT = {"id": "project", "name": "ormo_rpc", "entity": {"id": "team", "name": "team"}}
ANSWER = {
    "viewer": {"id": "viewer", "entity": "team", "username": "user", "flags": "{}", "teams": {"edges": []}},
    "model": {"bucket": None},
    "upsertBucket": {
        "bucket": {"id": "run", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": 0, "project": PROJECT},
        "inserted": True,
    },
    "createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []},
}
"""To any query: each takes the part that it has asked for."""


class WandbServer(ThreadingHTTPServer):
    """A server on a free port of this machine, which never answers again once a run has begun to send rows.

    Attributes:
        runs: What it was told of each run when that began.
        silent: It answers no more.
        released: Ends the connections that wait for an answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: list[dict[str, Any]] = []
        self.silent = threading.Event()
        self.released = threading.Event()

    @property
    def address(self) -> str:
        """The value of ``WANDB_BASE_URL``."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        """Answer a query, or nothing."""
        server = cast("WandbServer", self.server)
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("file_stream"):
            server.silent.set()
        if server.silent.is_set():
            server.released.wait(60)
            return
        asked = json.loads(content) if self.path == "/graphql" else {}
        if asked.get("operationName") == "UpsertBucket":
            server.runs.append(asked["variables"])
        answer = json.dumps({"data": ANSWER}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    @override
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def wandb_server() -> Generator[WandbServer]:
    """Serve until the end of the context."""
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join(10)
        server.server_close()
