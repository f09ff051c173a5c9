"""The house keeps its shape: who imports whom, what is banned where, and that importing does no work."""

from __future__ import annotations

import ast
import difflib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "calotype"
FILES = sorted(SOURCE.rglob("*.py"))

# Room -> the rooms it may import; the longest matching name is a module's room. A room may always import itself and
# errors. "*" is everything but the rooms in FRONT_ENDS.
ROOMS: dict[str, str] = {
    "errors": "",
    "atomic": "",
    "precision": "",
    "rules": "",
    "samplers": "",
    "schedule": "rules",
    "hashes": "atomic",
    "description": "hashes",
    "parameters": "samplers",
    "images": "",
    "stills": "images parameters atomic",
    "masks": "images",
    "video": "images stills atomic",
    "request": "images samplers rules",
    "nn": "",
    "text.prompt": "",
    "text": "text.prompt nn.clip",
    "text.inversion": "text nn.clip weights.files weights.source hashes rules",
    "sampling": "schedule samplers",
    "families": "nn",
    "weights": "nn schedule samplers text parts families atomic rules precision",
    "parts": "nn text schedule",
    "latents": "images nn",
    "generate": "sampling schedule nn",
    "resolve": "parts sampling samplers schedule request images masks",
    "picture_inputs": "resolve generate parts sampling request images masks latents nn",
    "prepare": "resolve generate picture_inputs parts sampling latents nn",
    "lora": "nn weights parts families text.inversion text.encode hashes rules",
    "result": "request stills images video description latents sampling",
    "run": "prepare resolve generate result latents parts lora nn.call description",
    "batch": "run result request lora nn.call",
    "machine": "",
    "optimize": "nn.attention parts rules precision atomic",
    "bench": "machine optimize weights families text.tokenizer atomic precision rules",
    "bench.peers": "bench engine",
    "engine": "optimize rules run batch resolve result parts weights lora request schedule samplers precision"
    " text.inversion description hashes",
    "training": "generate prepare sampling schedule precision weights lora parts images latents nn text"
    " atomic samplers rules",
    "cli": "*",
    "__main__": "cli",
    "": "*",  # the package itself: it only names what the rooms make
}
FRONT_ENDS = ("cli", "server", "__main__", "")
PEERS = {"diffusers", "transformers", "peft", "accelerate", "openvino", "optimum"}
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
MAX_LINES = 500
MAX_SHARED = 0.3


def module_name(path: Path) -> str:
    """The module of a file, relative to the package: "nn.unet"; "" is the package itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it (also inside functions and for types only)."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                if (node.module, alias.name) == ("calotype", "__version__"):
                    continue  # a text, not a room
                submodule = f"{node.module}.{alias.name}"
                yield submodule if is_module(submodule) else str(node.module)


def is_module(name: str) -> bool:
    path = SOURCE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def room(module: str) -> str:
    """The longest name in ROOMS that `module` lies in."""
    names = [name for name in ROOMS if module == name or (name and module.startswith(f"{name}."))]
    assert names, f"{module} is in no room: add it to ROOMS with what it may import"
    return max(names, key=len)


def may_import(importer: str, imported: str) -> bool:
    own = room(importer)
    if imported == own or imported.startswith(f"{own}.") or imported == "errors":
        return True
    if ROOMS[own] == "*":
        return room(imported) != "server" and (room(imported) not in FRONT_ENDS or imported == "")
    return any(imported == name or imported.startswith(f"{name}.") for name in ROOMS[own].split())


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_room_imports_only_what_its_row_allows(path: Path) -> None:
    own = {name.removeprefix("calotype").lstrip(".") for name in imports(path) if name.split(".")[0] == "calotype"}
    assert [name for name in sorted(own) if not may_import(module_name(path), name)] == []


def test_the_table_forbids_what_it_should() -> None:
    assert may_import("engine", "weights.load")
    assert may_import("cli.generate", "")
    assert not may_import("nn.unet", "weights.load")
    assert not may_import("text.prompt", "nn.clip")
    assert not may_import("text.encode", "nn.unet")
    assert not may_import("engine", "cli.generate")
    assert not may_import("schedule", "")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_peer_is_imported_by_its_own_file_alone(path: Path) -> None:
    found = {name.split(".")[0] for name in imports(path)} & PEERS
    assert found == set() or path.parent == SOURCE / "bench" / "peers"


def faults(path: Path) -> Iterator[str]:
    """What is banned and can be seen in one syntax node."""
    module = module_name(path)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{node.lineno}: bare except"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            yield f"{node.lineno}: .cuda(); say .to(device)"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            if room(module) != "cli" and module != "bench.peer":  # whose lines go to the process that started it
                yield f"{node.lineno}: print outside cli"
        elif isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            if any(isinstance(v, ast.Constant) and type(v.value) in (int, float) for v in node.values[1:]):
                yield f"{node.lineno}: `x or <number>` takes 0 for not given"
        elif isinstance(node, ast.FunctionDef) and node.args.kwarg is not None and room(module) == "nn":
            yield f"{node.lineno}: **{node.args.kwarg.arg} in nn"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_banned_is_used(path: Path) -> None:
    assert list(faults(path)) == []


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("print(1)", "sampling.py"),
        ("x.cuda()", "engine.py"),
        ("try: pass\nexcept: pass", "cli/show.py"),
        ("y = x or 7.5", "generate.py"),
        ("def f(**kwargs): pass", "nn/unet.py"),
    ],
)
def test_the_bans_are_noticed(line: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "tree", lambda path: ast.parse(line))
    assert len(list(faults(SOURCE / where))) == 1


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short_and_named_for_what_they_do(path: Path) -> None:
    assert path.stem not in BANNED_NAMES
    assert path.parent.name not in BANNED_NAMES
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


def test_no_two_files_share_much() -> None:
    """Lines that say something: no blanks, no imports, no lone brackets; files of a few lines say too little."""

    def lines(path: Path) -> list[str]:
        stripped = (line.strip() for line in path.read_text("utf-8").splitlines())
        return [line for line in stripped if len(line) > 4 and not line.startswith(("import ", "from "))]

    texts = {path: text for path in FILES if len(text := lines(path)) >= 15}
    alike = []
    for (one, a), (other, b) in itertools.combinations(texts.items(), 2):
        if len(set(a) & set(b)) <= MAX_SHARED * min(len(set(a)), len(set(b))):  # cheap, and decides nearly all
            continue
        shared = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
        if shared > MAX_SHARED * min(len(a), len(b)):
            alike.append((module_name(one), module_name(other), shared))
    assert alike == []


def python(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_importing_does_no_work(tmp_path: Path) -> None:
    code = "import sys, calotype; heavy = {'torch', 'numpy', 'PIL', 'typer', 'rich', 'huggingface_hub'}; "
    done = python("-c", code + "assert not heavy & set(sys.modules), heavy & set(sys.modules)", folder=tmp_path)
    assert (done.stdout, done.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"]], ids=" ".join)
def test_help_never_waits_for_torch(tmp_path: Path, arguments: list[str]) -> None:
    done = python("-X", "importtime", "-m", "calotype", *arguments, folder=tmp_path)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "calotype.cli" in imported  # the listing is what we think it is
    assert imported & {"torch", "numpy", "PIL", "tokenizers", "huggingface_hub", "safetensors"} == set()
    assert list(tmp_path.iterdir()) == []


def tracked_texts() -> Iterator[tuple[Path, str]]:
    """The texts that people wrote: not data, not models."""
    here = [path for path in ROOT.iterdir() if path.is_file() and path.suffix in (".md", ".toml")]
    folders = ("src", "tests", "scripts", ".ci", "recipes", "benchmarks", "docs", "examples")
    below = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in sorted([*here, *below]):
        if (
            path.suffix in ("", ".py", ".md", ".toml", ".sh", ".txt", ".yml", ".yaml")
            and path.stat().st_size < 1_000_000
        ):
            yield path, path.read_text("utf-8")


def test_nothing_names_a_place_on_one_machine() -> None:
    places = re.compile(r"(?<![\w.}])/(?:work|home|root|farm|Users|mnt)/\w")
    found = [f"{path.relative_to(ROOT)}: {m[0]}" for path, text in tracked_texts() for m in places.finditer(text)]
    assert found == []
    assert places.search("cd /" + "work/main")
