"""Names of models become local files: folders, shipped models, the Hub and its cache, with and without a network."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from calotype.errors import CalotypeWarning, ModelNotFoundError, UnsafeFileError
from calotype.weights import source
from calotype.weights.load import load_parts
from calotype.weights.source import HubId, cached_snapshot, choose_file, hub_cache, needed, resolve, resolve_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache(folder: Path, repo: str, revision: str = "main") -> Path:
    """Puts a model folder into the Hub's cache, as huggingface_hub lays it out."""
    root = hub_cache() / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / revision).write_text(COMMIT)
    return Path(shutil.copytree(folder, root / "snapshots" / COMMIT))


# ---- this machine ----


def test_a_folder_is_itself(tiny_sd15: Path) -> None:
    assert resolve(tiny_sd15) == tiny_sd15
    assert resolve(str(tiny_sd15)) == tiny_sd15


def test_a_part_is_a_subfolder_or_the_folder_itself(tiny_sd15: Path) -> None:
    assert resolve(tiny_sd15, subfolder="unet") == tiny_sd15 / "unet"
    assert resolve(tiny_sd15 / "unet", subfolder="unet") == tiny_sd15 / "unet"
    with pytest.raises(ModelNotFoundError, match=r"neither unet/config\.json nor config\.json"):
        resolve(tiny_sd15 / "tokenizer", subfolder="unet")


def test_home_is_expanded(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_sd15.parent))
    assert resolve("~/tiny_sd15") == tiny_sd15


def test_shipped_models_have_names_and_none_is_the_first(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "shipped", lambda: {"icons": tiny_sd15})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "icons").mkdir()  # a folder of that name beside us does not change what the name means
    assert resolve(None) == resolve("icons") == tiny_sd15
    assert resolve("./icons") == Path("icons")


@pytest.mark.parametrize(
    "ref",
    [
        "",
        "   ",
        "nothing",
        "./nothing",
        "/no/such/folder",
        "a\0b",
        "x" * 5000,
        "../..x/y",
        "a/b/c",
        "org/mödel!",
        "~no-one/x",
    ],
)
def test_what_leads_nowhere_is_not_found(ref: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(ref, offline=True)
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) == 1


def test_the_nearest_names_are_suggested(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match=r"nearest: .*tiny_sd15"):
        resolve(tiny_sd15.parent / "tiny_sd51")
    cache(tiny_sd15, "someone/dreamshaper")
    with pytest.raises(ModelNotFoundError, match="nearest: someone/dreamshaper"):
        resolve("someone/dremshaper", offline=True)
    monkeypatch.setattr(source, "shipped", lambda: {"icons": tiny_sd15})
    with pytest.raises(ModelNotFoundError, match="nearest: icons"):
        resolve("icns")


def test_a_local_folder_has_no_revision(tiny_sd15: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no revision 'v2'"):
        resolve(tiny_sd15, revision="v2")


# ---- the cache ----


@pytest.fixture
def no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a connection, or to look up a name, fails."""

    def refused(*args: object, **kwargs: object) -> None:
        pytest.fail(f"a connection was attempted: {args}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.mark.usefixtures("no_connections")
def test_offline_reads_the_cache_without_any_connection(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cache(tiny_sd15, "org/name")
    assert resolve("org/name", offline=True) == snapshot
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("org/name") == snapshot
    assert resolve(f"org/name@{COMMIT}") == resolve("org/name", revision=COMMIT) == snapshot
    assert resolve("org/name", subfolder="unet") == snapshot / "unet"
    assert load_parts("org/name").source == str(snapshot)


@pytest.mark.usefixtures("no_connections")
def test_offline_and_not_cached_is_not_found_with_a_hint(tiny_sd15: Path) -> None:
    cache(tiny_sd15, "org/name")
    for ref in ("org/other", "org/name@v2"):
        with pytest.raises(ModelNotFoundError, match="not in the cache") as caught:
            resolve(ref, offline=True)
        assert caught.value.hint is not None


def test_revisions_are_kept_apart(tiny_sd15: Path) -> None:
    snapshot = cache(tiny_sd15, "org/name", revision="v2")
    assert cached_snapshot(HubId("org/name", "v2")) == snapshot
    assert cached_snapshot(HubId("org/name", "main")) is None
    with pytest.raises(ModelNotFoundError, match="contradict"):
        resolve("org/name@v1", revision="v2", offline=True)
    for revision in ("../..", "/etc", "a b"):
        with pytest.raises(ModelNotFoundError):
            resolve("org/name", revision=revision, offline=True)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/a")
    assert hub_cache() == Path("/a/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/b")
    assert hub_cache() == Path("/b")
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert hub_cache() == Path("/c/huggingface/hub")


def test_a_ref_that_points_out_of_the_cache_is_ignored(tiny_sd15: Path) -> None:
    snapshot = cache(tiny_sd15, "org/name")
    (snapshot.parents[1] / "refs" / "main").write_text("../../..")
    assert cached_snapshot(HubId("org/name", "main")) is None


# ---- which files ----

SDXL = [
    "README.md", "model_index.json", "sd_xl_base.safetensors", "calotype.json", "evil.py",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/model.onnx", "unet/diffusion_pytorch_model.bin",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors",
    "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json",
    "vae_decoder/config.json", "unet/deep/er.json",
]  # fmt: skip


def test_only_what_a_model_takes_is_downloaded() -> None:
    common = {
        "model_index.json", "calotype.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json",
    }  # fmt: skip
    plain = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    half = {"unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"}
    assert set(needed(SDXL, "x", None, None)) == common | plain
    assert set(needed(SDXL, "x", None, "fp16")) == common | half  # the VAE has no fp16: its plain weights
    kept = set(needed(SDXL, "x", None, None, without=("unet",)))
    assert not any(name.startswith("unet/") for name in kept)
    assert "vae/config.json" in kept


def test_a_part_alone_takes_its_own_files_only() -> None:
    assert set(needed(SDXL, "x", "unet", None)) == {
        "model_index.json", "calotype.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    lone = ["config.json", "diffusion_pytorch_model.safetensors", "other.safetensors"]
    assert needed(lone, "x", "unet", None) == lone[:2]


def test_shards_come_with_their_index() -> None:
    stem = "unet/diffusion_pytorch_model"
    plain = [
        f"{stem}.safetensors.index.json",
        f"{stem}-00001-of-00002.safetensors",
        f"{stem}-00002-of-00002.safetensors",
    ]
    new = [f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16-00001-of-00001.safetensors"]
    files = ["model_index.json", *plain, *new]
    assert set(needed(files, "x", None, None)) == {"model_index.json", *plain}
    assert set(needed(files, "x", None, "fp16")) == {"model_index.json", *new}
    assert set(needed(["model_index.json", *new], "x", None, None)) == {"model_index.json", *new}


def test_a_repository_of_pickles_is_refused_before_the_download() -> None:
    with pytest.raises(UnsafeFileError, match=r"org/name/vae/diffusion_pytorch_model\.bin"):
        needed(["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.bin"], "org/name", None, None)


# ---- the Hub, played by a server on this machine ----


@pytest.fixture
def hub(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """A Hub with the one model org/tiny; gives the files that were downloaded so far."""
    import huggingface_hub.constants as constants

    files = {str(path.relative_to(tiny_sd15)): path for path in tiny_sd15.rglob("*") if path.is_file()}
    downloaded: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.respond()

        def do_GET(self) -> None:
            self.respond()

        def respond(self) -> None:
            path = self.path.split("?")[0]
            name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
            if path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
                info = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                self.send(json.dumps(info).encode(), "application/json")
            elif path == f"/api/models/org/tiny/tree/{COMMIT}":
                tree = [
                    {"type": "file", "path": f, "size": p.stat().st_size, "oid": "0" * 40} for f, p in files.items()
                ]
                self.send(json.dumps(tree).encode(), "application/json")
            elif name in files:
                if self.command == "GET":
                    downloaded.append(name)
                self.send(files[name].read_bytes(), "application/octet-stream")
            else:
                missing = "RevisionNotFound" if "/revision/" in path and "org/tiny" in path else "RepoNotFound"
                self.send_response(404)
                self.send_header("X-Error-Code", missing)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hash(body) & (2**64 - 1):016x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield lambda: sorted(downloaded)
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_model_is_downloaded_once_and_then_cached(hub: Callable[[], list[str]]) -> None:
    folder = resolve("org/tiny", without=("vae",))
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert not (folder / "vae").exists()
    assert folder == cached_snapshot(HubId("org/tiny", "main"))
    first = hub()
    assert resolve("org/tiny", without=("vae",)) == folder
    assert hub() == first
    assert load_parts("org/tiny").source == str(folder)
    assert any(name.startswith("vae/") for name in hub())


def test_one_file_of_a_hub_repository(hub: Callable[[], list[str]]) -> None:
    """By its name, with what belongs beside it, and nothing else."""
    wanted = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    path = resolve_file("org/tiny", wanted[1], beside=("config.json",))
    assert hub() == wanted
    assert path == resolve_file("org/tiny", wanted[1], offline=True)
    with pytest.raises(ModelNotFoundError, match=r"org/tiny has no file 'x\.safetensors'"):
        resolve_file("org/tiny", "x.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"org/tiny has no \.safetensors file"):
        resolve_file("org/tiny")
    assert hub() == wanted


def test_which_file_of_several() -> None:
    assert choose_file(["a.safetensors", "b.txt", "c/d.safetensors"], "x", None, ()) == "a.safetensors"
    assert choose_file(["a.safetensors", "b.safetensors"], "x", None, ("c", "b.safetensors")) == "b.safetensors"
    assert choose_file(["a.safetensors", "c/d.safetensors"], "x", "c/d.safetensors", ()) == "c/d.safetensors"
    with pytest.raises(ModelNotFoundError, match=r"several files: a\.safetensors, b\.safetensors"):
        choose_file(["a.safetensors", "b.safetensors"], "x", None, ())
    with pytest.raises(UnsafeFileError, match=r"x/a\.bin"):
        choose_file(["a.bin"], "x", None, ())
    with pytest.raises(UnsafeFileError, match=r"x/a\.pt"):
        choose_file(["b.safetensors"], "x", "a.pt", ())


def test_what_the_hub_does_not_have_is_not_found(hub: Callable[[], list[str]]) -> None:
    with pytest.raises(ModelNotFoundError, match="the Hub has no model org/tinny"):
        resolve("org/tinny")
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'"):
        resolve("org/tiny@v9")
    assert hub() == []


def test_without_a_network_the_cache_is_used_with_a_warning(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    with socket.socket() as unused:  # a port on which nobody listens
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(ModelNotFoundError, match=r"could not be downloaded.*not in the cache"):
        resolve("org/name")
    snapshot = cache(tiny_sd15, "org/name")
    with pytest.warns(CalotypeWarning, match="the copy in the cache is used"):
        assert resolve("org/name") == snapshot
