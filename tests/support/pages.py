"""The code in a page, and the parts of it that do not exist: files, names, keys, links, commands."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from ormo_rpc.composing import compose
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.options.part import PACKAGES, parts
from ormo_rpc.own_loop.command import parse

ROOT = Path(__file__).parents[2]
FOLDERS = ("ormo_rpc", "tests", "benchmarks", "experiments", "examples", "conf", "docs", "results")
RUN_FILES = (
    "config.yaml launch.json metrics.jsonl trace.jsonl trace.rolled_back.jsonl processes.json summary.json evictions.jsonl "
    "fingerprint.json model.pt model_ema.pt buffers.pt manifest.json"
).split()
"""Files that a run writes."""
FILE_ENDINGS = "py md json jsonl yaml toml pt png c gz cff".split()
STANDINS = {"RUN_DIRECTORY": "runs/one", "DIRECTORY": "data", "HOST:PORT": "127.0.0.1:29400", "DATE/TIME": "a/b"}
"""From each placeholder for a value of the reader's to one such value."""
_READERS = ("train.py", "script.py")
"""Scripts of the reader's own."""
_CAPITALS = re.compile(r"\b[A-Z][A-Z_]*\b")
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:python|torchrun|make|ormo-rpc) ")


def code(text: str) -> tuple[list[str], list[str]]:
    """Return the lines of fenced blocks, and the pieces of code within sentences."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()], re.findall(r"`([^`\n]+)`", rest)


# ----------------------------------------------------------------------------------------------------------------- files


def missing_paths(text: str) -> set[str]:
    """Paths of this repository that a text names and that do not exist; a word in capitals stands for anything."""
    lines, pieces = code(text)
    pattern = rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*{{}},-]*"
    named = {path.rstrip(".,") for piece in (*lines, *pieces) for path in re.findall(pattern, piece)}
    return {path for path in named if not any(map(_exists, _alternatives(_CAPITALS.sub("*", path))))}


def broken_links(page: Path, text: str) -> set[str]:
    """Relative links of a page whose file or heading does not exist."""
    found: set[str] = set()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" not in link and not (target.exists() and (not heading or heading in _headings(target.read_text("utf-8")))):
            found.add(link)
    return found


def _exists(pattern: str) -> bool:
    return any(True for _ in ROOT.glob(re.sub(r"\*+", "*", pattern.rstrip("/"))))


def _alternatives(path: str) -> list[str]:
    """Both paths of ``results/a.{json,md}``."""
    braces = re.search(r"\{(.*?)\}", path)
    return [path] if braces is None else [path.replace(braces[0], each) for each in braces[1].split(",")]


def _headings(text: str) -> set[str]:
    """Anchors as forges make them."""
    lines = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in lines}


# ----------------------------------------------------------------------------------------------------------------- names


def unknown_names(text: str) -> set[str]:
    """Dotted names of a text that are neither a key, a class's attribute, a module's attribute, nor a file."""
    pieces = (piece.removesuffix("()") for piece in code(text)[1])
    return {piece for piece in pieces if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", piece) and not _known(piece)}


def wrong_steps(text: str) -> set[str]:
    """Lines ``file.py Class.method`` of a text's blocks for which the package has no such file with such a class."""
    steps = [line.split()[:2] for line in code(text)[0] if re.match(r"\s*[\w/]+\.py [A-Z]\w*\.\w+", line)]
    return {f"{file} {name}" for file, name in steps if not _stands_in(file, *name.split(".")[:2])}


def _stands_in(file: str, class_name: str, member: str) -> bool:
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "ormo_rpc").rglob(file)]
    there = any(isinstance(node, ast.ClassDef) and node.name == class_name for tree in trees for node in ast.walk(tree))
    return there and member in _classes()[class_name]


def _known(name: str) -> bool:
    owner, _, rest = name.partition(".")
    if name.rpartition(".")[2] in FILE_ENDINGS and name in {*RUN_FILES, *_READERS, *_file_names()}:
        return True
    if owner in _classes():
        return rest.split(".")[0] in _classes()[owner]
    return name in _keys() or _importable(name)


@functools.cache
def _file_names() -> set[str]:
    """The names of the repository's files, those of an environment in it left out."""
    return {path.name for path in (*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")))}


def _importable(name: str) -> bool:
    module, attributes = name, list[str]()
    while module:
        try:
            found = importlib.import_module(module)
        except ImportError:
            module, _, last = module.rpartition(".")
            attributes.insert(0, last)
            continue
        for attribute in attributes:
            found = getattr(found, attribute, None)
        return found is not None
    return False


@functools.cache
def _keys() -> frozenset[str]:
    """Every key of a configuration, of whatever part of a group."""
    sections = [(group, part) for group in PACKAGES for part in parts(group).values()]
    sections += [
        (field.name, type(field.default_factory()))
        for field in dataclasses.fields(Config)
        if field.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(field.default_factory())
    ]
    return frozenset(f"{path}.{field.name}" for path, section in sections for field in dataclasses.fields(section)) | {
        f"{group}._target_" for group in PACKAGES
    }


@functools.cache
def _classes() -> dict[str, set[str]]:
    """The names in each class of the package, with those of its bases in the package."""
    own: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for file in (ROOT / "ormo_rpc").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                own.setdefault(node.name, set()).update(_members(node))
                bases.setdefault(node.name, set()).update(base.id for base in node.bases if isinstance(base, ast.Name))

    def with_bases(name: str) -> set[str]:
        return own.get(name, set()).union(*map(with_bases, bases.get(name, ())))

    return {name: with_bases(name) for name in own}


def _members(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
            yield inner.name
        elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == "self":
            yield inner.attr
        elif isinstance(inner, (ast.Assign, ast.AnnAssign)):
            targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


# -------------------------------------------------------------------------------------------------------------- commands


def commands(text: str) -> list[list[str]]:
    """The commands of a text in words, without comments; those with a gap (``...``) are left out."""
    lines, pieces = code(text)
    found: list[list[str]] = []
    for line in (*lines, *pieces):
        if _COMMAND.match(f"{line} ") and "..." not in line:
            for standin, value in STANDINS.items():
                line = line.replace(standin, value)
            found.append(shlex.split(line, comments=True))
    return found


def refusal(command: Sequence[str]) -> str | None:
    """Say why a command cannot be typed as it stands; None where it can. Nothing is started."""
    words = [word for word in command if not re.match(r"[A-Z_]+=", word)]
    program = words[0].rpartition("/")[2]
    if program == "make":
        return next((f"no target {word}" for word in words[1:] if word not in _make_targets()), None)
    if "launch" in words and {"ormo-rpc", "ormo_rpc"} & {program, *words}:  # the script is the reader's own
        return _refused_launch(words[words.index("launch") + 1 :])
    if program == "ormo-rpc" and words[1:2] == ["export"]:
        return None
    if words[1:2] == ["-m"]:
        return None if words[2].split(".")[0] not in FOLDERS or _is_module(words[2]) else f"no module {words[2]}"
    script = next((word for word in words[1:] if word.endswith(".py")), None)
    if script in _READERS:
        return None
    if script is not None and not (ROOT / script).is_file():
        return f"no file {script}"
    if script == "launch.py" or program == "ormo-rpc":
        return _refused_overrides(words[1:] if script is None else words[words.index(script) + 1 :])
    return None


@functools.cache
def _make_targets() -> set[str]:
    rules = re.findall(r"^([a-z][\w -]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    return {target for rule in rules for target in rule.split()}


def _is_module(name: str) -> bool:
    path = ROOT / _CAPITALS.sub("*", name).replace(".", "/")
    return any(map(_exists, (f"{path.relative_to(ROOT)}.py", f"{path.relative_to(ROOT)}/__main__.py")))


def _refused_launch(words: Sequence[str]) -> str | None:
    """Read what stands before the script, and compose the overrides."""
    end = next((at for at, word in enumerate(words) if word.endswith(".py")), len(words))
    try:
        command = parse([*words[:end], str(ROOT / "launch.py")])
    except ConfigError as error:
        return None if "--help" in words else str(error)
    return _refused_overrides(command.overrides)


def _refused_overrides(words: Sequence[str]) -> str | None:
    """Compose the overrides; of a sweep, its first run. Flags are hydra's, and overrides of hydra's own settings too."""
    overrides = [word for word in words if not word.startswith(("-", "hydra", "job"))]
    if "-m" in words:
        overrides = [re.sub(r"=([^\[{,]*),.*", r"=\1", word) for word in overrides]
    return _refused(tuple(overrides))


@functools.cache
def _refused(overrides: tuple[str, ...]) -> str | None:
    """Compose overrides, which many pages have in common."""
    try:
        compose(overrides)
    except ConfigError as error:
        return str(error)
    return None
