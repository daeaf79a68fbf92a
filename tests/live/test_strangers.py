"""A stranger who knows nothing but the port of an agent of torch.distributed.rpc; see ``tests/support/peer.py``.

The server is ended by rubbish, and by nothing else: neither Python's functions nor torch's operators give files away. The same
stranger gets everything from torch's own agent, which shows that the attempts are real ones.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.support import peer
from tests.support.processes import PATIENCE_SECONDS, launched

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(300)]
SOURCE = Path(peer.__file__).with_name("operators.cpp")
LISTED = r"RuntimeError: Error on Node {}: UnpicklingError: refused: "
OPERATORS = ("read", "read, remote", "write", "write, remote", "write, by its name", "write, out")

Outcomes = Mapping[str, Mapping[str, str]]


def private_folder(tmp_path: Path) -> Path:
    """A folder with a private file and, where there is a compiler, the stranger's client in C++; files of each kind beside."""
    folder = tmp_path / "strangers"
    folder.mkdir()
    (folder / "private").write_text("private")
    compiler, torch_folder = shutil.which("g++"), Path(torch.__file__).parent
    if compiler is not None:
        include = [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
        command = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", "-w", *include, str(SOURCE)]
        subprocess.run([*command, "-o", folder / peer.CLIENT, f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"], check=True)
    return folder


def outcomes(folder: Path) -> Outcomes:
    """The outcome of every attempt, by kind of agent; the stranger ends when it has tried them all."""
    with launched("-m", "tests.support.peer", "serve", *peer.KINDS) as serving:
        assert serving.stdout is not None
        addresses = json.loads(serving.stdout.readline())
        victim = addresses.pop("victim")
        with launched("-m", "tests.support.peer", "attack", json.dumps(addresses), str(folder)) as asking:
            out, err = asking.communicate(timeout=2 * PATIENCE_SECONDS)
        assert asking.returncode == 0, err
        found: dict[str, dict[str, str]] = {kind: {} for kind in addresses}
        for line in out.splitlines():
            kind, attempt, outcome = line.split("\t")
            found[kind][attempt] = outcome
        host, _, port = victim.removeprefix("uv://").rpartition(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            found["victim"] = {"rubbish": serving.stdout.readline().split()[1]}
        assert serving.poll() is None
    return found


def test_a_stranger_runs_and_writes_nothing_and_ends_an_agent_with_one_line(tmp_path: Path) -> None:
    """All in one, as the attempts are dear, and as each process of pytest that had a part of them would make them again."""
    folder = private_folder(tmp_path)
    found = outcomes(folder)
    check_that_other_functions_are_refused_and_the_server_continues_to_serve(found, folder)
    check_that_a_worker_runs_no_function(found)
    for kind in ("server", "worker", "override"):
        check_that_operators_by_name_neither_read_nor_write_files(found, kind)
    if (folder / peer.CLIENT).exists():  # there is a C++ compiler
        check_that_no_operator_with_a_text_among_its_arguments_makes_a_file(found, folder)
    check_that_the_same_stranger_runs_any_code_without_these_protections(found, folder)
    # A failure means that torch has closed a hole, and that SECURITY.md can be shortened.
    assert found["victim"]["rubbish"] == str(-signal.SIGABRT)


def check_that_other_functions_are_refused_and_the_server_continues_to_serve(found: Outcomes, folder: Path) -> None:
    attempts, refused = found["server"], LISTED.format(0)
    assert attempts["permitted"] == attempts["add"] == "[2.0, 2.0]"
    assert attempts["permitted, raises"] == "ValueError: PushRefused: On WorkerInfo(id=0, name=server):"  # torch's way
    expected = {
        "os.system": f"{refused}posix.system",
        "eval": f"{refused}builtins.eval",
        "Popen": f"{refused}subprocess.Popen",
        "pickle.loads": f"{refused}_pickle.loads",
        "dotted": f"{refused}tests.support.peer.Api.push.__globals__.get",
        "hidden in an argument": f"{refused}posix.system",
        "an RRef": f"{refused}the opcode REDUCE on a builtin_function_or_method",
        "asynchronous": f"{refused}posix.system",
    }
    assert {name: attempts[name] for name in expected} == expected
    assert {name: found["override"][name] for name in expected} == expected
    assert list(folder.glob("[!o]*/marker*")) == []


def check_that_a_worker_runs_no_function(found: Outcomes) -> None:
    attempts = found["worker"]
    functions = {name: outcome for name, outcome in attempts.items() if not name.startswith(("schema", *OPERATORS, "add"))}
    assert len(functions) == 10
    assert all(": UnpicklingError: refused: " in outcome for outcome in functions.values())
    assert attempts["add"] == "[2.0, 2.0]", "it still answers"


def check_that_operators_by_name_neither_read_nor_write_files(found: Outcomes, kind: str) -> None:
    attempts = found[kind]
    refusal = "PermissionError: from_file is refused" if kind == "override" else "Permission denied"
    assert {name: refusal in attempts[name] for name in OPERATORS} == dict.fromkeys(OPERATORS, True)
    assert attempts["add"] == "[2.0, 2.0]", "it still answers"


def check_that_no_operator_with_a_text_among_its_arguments_makes_a_file(found: Outcomes, folder: Path) -> None:
    names = {name for name in found["server"] if name.startswith("schema ")}
    # Here are more where a test has imported torchvision, say.
    assert names <= {f"schema {name}.{overload}" for name, overload in peer.schemas()}
    assert len(names) > 250
    assert {name for name in names if found["server"][name] == "no such operator"} == set()
    files = {kind: sorted(path.name for path in (folder / kind).iterdir()) for kind in ("server", "worker", "override")}
    # If this changes, SECURITY.md has to say so.
    assert files == {"server": [], "worker": [], "override": ["aten-save."]}


def check_that_the_same_stranger_runs_any_code_without_these_protections(found: Outcomes, folder: Path) -> None:
    attempts = found["open"]
    assert (attempts["os.system"], attempts["eval"], attempts["read"], attempts["write"]) == ("0", "2", "b'private'", "[0, 0]")
    files = {path.name for path in (folder / "open").iterdir()}
    assert files >= {"marker-system", "marker-argument", "marker-asynchronous", "write", "remote", "name"}
    if (folder / peer.CLIENT).exists():
        assert files >= {"aten-save.", "aten-from_file.out"}
