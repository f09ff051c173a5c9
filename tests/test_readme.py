"""What the README shows is run: its first block of Python, its first commands; files and extras it names exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from calotype import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_lines_of_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    exec(compile(block[1], "README.md", "exec"), {})
    with Image.open("astronaut.png") as picture:
        assert picture.size == (128, 128)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 500  # not a blank
    assert sorted(path.name for path in Path().glob("step-*.png")) == [f"step-{i}.png" for i in range(4)]


def test_the_first_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as in a clone: what one writes, the next may read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    block = re.search(r"```\n(calotype .*?)```", README, re.DOTALL)
    assert block is not None
    commands = [shlex.split(line, comments=True) for line in block[1].replace("\\\n", " ").splitlines()]
    assert len(commands) >= 10
    for _, *arguments in commands:
        assert cli.main([*arguments, "--quiet"] if arguments[0] != "show" else arguments) == 0, arguments
    named = [arguments[arguments.index("-o") + 1] for arguments in commands if "-o" in arguments]
    for name in named:
        for path in [tmp_path / name] if name != "heart.png" else sorted(tmp_path.glob("heart-*.png")):
            with Image.open(path) as picture:
                assert picture.size == (128, 128)
                assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 300, path  # not a blank
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "heart-2.png").read_bytes()


def test_commands_for_the_hub_are_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their options are right, up to the model that cannot be had here."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("photo.jpg")
    blocks = re.findall(r"```\n(calotype .*?)```", README, re.DOTALL)
    lines = [line for block in blocks[1:2] for line in block.replace("\\\n", " ").splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert cli.main([*shlex.split(line)[1:], "--offline"]) == 3, line  # no such model


def test_links_and_rooms_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert "://" in link or (ROOT / link).exists(), link
    tree = README.split("src/calotype/\n")[1].split("```")[0]
    for line in tree.splitlines():
        name = line.split("  ")[1] if line.startswith("  ") else line.split()[0]
        folder = ROOT / "src" / "calotype" if line.startswith("  ") else ROOT
        assert (folder / name.strip()).exists(), line


def test_the_extras_that_are_named_are_there() -> None:
    """In the README's commands, and in the hints of errors: those name the extra's package too."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = {extra for found in re.findall(r'pip install "\.\[([\w,]+)\]"', README) for extra in found.split(",")}
    assert named == {"control", "video", "test"}
    assert named <= extras.keys()
    sources = [path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py")]
    hints = [
        hint for text in sources for hint in re.findall(r"missing_package\(['\"](.+?)['\"], ['\"](.+?)['\"]\)", text)
    ]
    assert {extra for _, extra in hints} == {"control", "video"}
    for package, extra in hints:
        assert [re.split(r"[<>=]", each)[0] for each in extras[extra]] == [package]
