"""What is in a file: hashed once, and again when it changes; and what is told of a file that was loaded."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from calotype import hashes
from calotype.hashes import File, sha256


def digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


@pytest.fixture(autouse=True)
def _another_process() -> None:
    hashes._hash.cache_clear()


def test_the_hash_of_a_file_is_kept_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(b"one")
    read = []
    monkeypatch.setattr(hashes, "_keep", lambda *args, keep=hashes._keep: (read.append(1), keep(*args)))
    monkeypatch.chdir(tmp_path)
    assert sha256(file) == sha256(Path("m.safetensors")) == sha256(Path("./m.safetensors")) == digest(b"one")
    hashes._hash.cache_clear()
    assert sha256(file) == digest(b"one")
    assert len(read) == 1
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert sha256(file) == digest(b"two")
    assert len(read) == 2
    (tmp_path / "other.safetensors").write_bytes(b"three")
    sha256(Path("other.safetensors"))
    hashes._hash.cache_clear()
    assert sha256(file) == digest(b"two")
    assert len(read) == 3


@pytest.mark.parametrize("name", ["folder", "gone.safetensors", "\0.safetensors", f"{'long' * 100}/x"])
def test_no_hash(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert sha256(tmp_path / name) is None


def test_a_file_that_is_changed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(b"one")

    def slowly(*args: object) -> object:
        os.utime(file, ns=(1, 1))
        return hashlib.sha256(b"one")

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", slowly)
        assert sha256(file) is None
    assert sha256(file) == digest(b"one")


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"PATH": 3}', '{"PATH": {"state": "x"}}', '{"PATH": {"state": STATE, "hash": "0123456789"}}']
)
def test_a_damaged_cache_is_made_anew(damage: str, tmp_path: Path) -> None:
    """Older versions kept ten digits."""
    file = tmp_path / "m.safetensors"
    file.write_bytes(b"one")
    state = [file.stat().st_size, file.stat().st_mtime_ns]
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "calotype" / "hashes.json"
    cache.parent.mkdir()
    cache.write_text(damage.replace("PATH", str(file)).replace("STATE", str(state)))
    assert sha256(file) == digest(b"one")
    assert json.loads(cache.read_text())[str(file)]["hash"] == digest(b"one")
    assert [path.name for path in cache.parent.iterdir()] == ["hashes.json"]


def test_without_a_place_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "m.safetensors"))  # no folder
    assert sha256(tmp_path / "m.safetensors") == digest(b"one")


def test_a_file_that_was_changed_since_it_was_loaded_has_no_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"one")
    monkeypatch.chdir(tmp_path)
    file = File.of("m.safetensors")
    assert file is not None
    monkeypatch.chdir("/")
    assert file.to_json() == {"name": "m.safetensors", "sha256": digest(b"one")}
    path.write_bytes(b"other")
    assert file.to_json() == {"name": "m.safetensors", "sha256": None}
    path.unlink()
    assert file.to_json() == {"name": "m.safetensors", "sha256": None}


def test_what_is_no_single_file_on_this_machine(tmp_path: Path) -> None:
    cached = tmp_path / "snapshot" / "lora.safetensors"
    cached.parent.mkdir()
    cached.write_bytes(b"")
    assert File.of("owner/name", cached) is None
    assert File.of(tmp_path) is None
    assert File.of(None) is None
    assert File.of(cached.parent, cached) == File.of(cached)
