"""An engine as JSON and back: what is loaded again, bit for bit; files that were moved or changed; strangers' words."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import calotype
from adapters import low_rank, normal, peft_names, save
from calotype import Control, Request, hashes
from calotype.cli import main
from calotype.description import Description
from calotype.errors import CalotypeError, ModelNotFoundError, UsageError
from calotype.nn.motion import MotionAdapter, MotionConfig
from calotype.nn.t2i_adapter import T2IAdapter, T2IAdapterConfig
from calotype.weights.convert import convert
from calotype.weights.source import hub_cache

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
PICTURE = Image.new("RGB", (64, 64), "teal")
REQUEST = Request("a <toy> fox", steps=2, seed=3, guidance=2.0, controls=(Control("edges", PICTURE),))
CLIP = Request("a fox", steps=2, seed=3, frames=2)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_random(network: torch.nn.Module, path: Path) -> Path:
    state = network.state_dict()
    tensors = {name: t if name.endswith(".pe") else normal(*t.shape) / 4 for name, t in state.items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def files(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single file of each kind, beside each other."""
    folder = tmp_path_factory.mktemp("files")
    convert(tiny_sd15, folder / "model.safetensors")
    unet = calotype.load(tiny_sd15, device="cpu").parts.unet
    for name in ("style", "lcm"):
        tensors = peft_names(low_rank({LINEAR: unet.get_submodule(LINEAR)}, seed=len(name)), "unet.")
        save(folder / f"{name}.safetensors", tensors)
    save(folder / "toy.safetensors", {"<toy>": normal(2, 32)})
    motion = MotionConfig(channels=(32, 64), layers=(1, 1), depths=(1, 1), mid_depth=1, heads=(8, 8), max_frames=8)
    write_random(MotionAdapter(motion), folder / "motion.safetensors")
    return folder


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T2I-Adapter's folder."""
    folder = tmp_path_factory.mktemp("controls") / "edges"
    config = {"_class_name": "T2IAdapter", "channels": [32, 64], "num_res_blocks": 1, "downscale_factor": 8}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    ours = T2IAdapterConfig(channels=(32, 64), layers=1, downscale=8)
    write_random(T2IAdapter(ours), folder / "diffusion_pytorch_model.safetensors")
    return folder


def whole(files: Path, edges: Path) -> calotype.Engine:
    """A single file's model with one or two of each kind of adapter."""
    engine = calotype.load(files / "model.safetensors", device="cpu", dtype="float32")
    engine.set_motion(files / "motion.safetensors")
    engine.add_lora(files / "style.safetensors", scale=0.5)
    engine.add_lora(files, "lcm", weight_name="lcm.safetensors")
    engine.set_loras({"style": 0.5})
    engine.add_embedding(files / "toy.safetensors")
    engine.add_control(edges)
    return engine


def pixels(engine: calotype.Engine, request: Request = REQUEST) -> str:
    """All pictures of a request, as a hash."""
    return hashlib.sha256(b"".join(image.tobytes() for image in engine(request).images)).hexdigest()


def test_what_is_described_is_loaded_again(files: Path, edges: Path) -> None:
    engine = whole(files, edges)
    described = json.loads(json.dumps(engine.describe()))
    again = calotype.load_from(described)
    assert again.describe() == described
    assert again.loras == {"style": 0.5, "lcm": 0.0}, "a request may have it in a mix of its own"
    assert (again.controls, again.embeddings) == (("edges",), ("<toy>",))
    for request in (REQUEST, CLIP, Request("a fox", steps=1, seed=1, loras={"lcm": 1.5})):
        assert pixels(again, request) == pixels(engine, request)
    for other in ({"loras": {}}, {"prompt": "a fox"}, {"controls": ()}):  # each of them acts
        assert pixels(engine, Request(**{**vars(REQUEST), **other})) != pixels(engine)


def test_loras_are_merged_at_their_own_scales_only(tiny_sd15: Path, tmp_path: Path) -> None:
    """At 1 this one leaves the range of float16."""
    engine = calotype.load(tiny_sd15, device="cpu", dtype="float16")
    factors = {LINEAR: (torch.full((1, 32), 1e3), torch.full((32, 1), 1e3))}
    engine.add_lora(save(tmp_path / "huge.safetensors", peft_names(factors, "unet.")), scale=0.01)
    assert calotype.load_from(engine.describe()).loras == {"huge": 0.01}
    with pytest.raises(UsageError, match="leaves the range of float16"):
        engine.set_loras({"huge": 1.0})


def test_files_are_described_by_name_and_hash(files: Path, edges: Path, tiny_sd15: Path) -> None:
    def told(name: str) -> dict[str, str]:
        path = files / f"{name}.safetensors"
        return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    described = whole(files, edges).describe()
    assert described["files"] == {"model": told("model")}
    assert {name: lora["file"] for name, lora in described["loras"].items()} == {n: told(n) for n in ("style", "lcm")}
    assert described["embeddings"]["<toy>"]["file"] == told("toy")
    assert described["motion"]["file"] == told("motion")
    assert "file" not in described["controls"]["edges"], "a folder's gigabytes are not read"
    engine = calotype.load(tiny_sd15, vae=files / "model.safetensors", device="cpu")
    assert engine.describe()["files"] == {"vae": told("model")}


ELSEWHERE = """
import hashlib, pickle, sys
import torch
engine, request, threads = pickle.load(sys.stdin.buffer)
torch.set_num_threads(threads)
print(hashlib.sha256(engine(request).image.tobytes()).hexdigest())
"""


def test_an_engine_is_pickled_by_its_description(files: Path, edges: Path) -> None:
    engine = whole(files, edges)
    drawn, text = pixels(engine), pickle.dumps(engine)
    assert len(text) < 10_000
    assert pixels(pickle.loads(text)) == drawn
    asked = pickle.dumps((engine, REQUEST, torch.get_num_threads()))
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], input=asked, capture_output=True, check=True)
    assert done.stdout.decode().strip() == drawn


def test_an_offline_engine_stays_offline(tiny_sd15: Path) -> None:
    engine = pickle.loads(pickle.dumps(calotype.load(tiny_sd15, offline=True)))
    with pytest.raises(ModelNotFoundError, match="offline, and owner/lora is not in the cache"):
        engine.add_lora("owner/lora")


# ---- files that are not what or where they were ----

KINDS = ("model", "style", "lcm", "toy", "motion", "edges")


@pytest.fixture
def mine(files: Path, edges: Path, tmp_path: Path) -> Path:
    """The files as this test's own, the control as a single file too."""
    shutil.copytree(files, tmp_path / "mine")
    shutil.copy(edges / "diffusion_pytorch_model.safetensors", tmp_path / "mine" / "edges.safetensors")
    return tmp_path / "mine"


def engine_of(folder: Path) -> calotype.Engine:
    return whole(folder, folder / "edges.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_moved_is_found_by_its_name_and_hash(mine: Path, tmp_path: Path, kind: str) -> None:
    engine, name = engine_of(mine), f"{kind}.safetensors"
    drawn, described = pixels(engine), engine.describe()
    deep = tmp_path / "elsewhere" / "deep [1]"
    for folder in (deep, tmp_path / "elsewhere" / "a"):
        folder.mkdir(parents=True)
    (tmp_path / "elsewhere" / "a" / name).write_bytes(b"another of that name")
    shutil.move(mine / name, deep / name)
    with pytest.raises(ModelNotFoundError, match=f"{name}' is not there: '{name}' is needed .SHA-256") as caught:
        calotype.load_from(described, search=[tmp_path / "elsewhere" / "a"])
    assert "\n" not in str(caught.value)
    again = calotype.load_from(described, search=[str(tmp_path / "elsewhere")])
    assert pixels(again) == drawn
    assert str(deep / name) in json.dumps(again.describe())


@pytest.mark.parametrize("kind", KINDS)
def test_another_file_in_its_place_is_noticed(mine: Path, tmp_path: Path, kind: str) -> None:
    engine, path = engine_of(mine), mine / f"{kind}.safetensors"
    described = engine.describe()
    kept = shutil.copytree(mine, tmp_path / "kept")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(ModelNotFoundError, match="is another file now"):
        calotype.load_from(described)
    assert pixels(calotype.load_from(described, search=[kept])) == pixels(engine)


def test_a_file_that_changed_under_the_engine_is_told_by_no_hash(mine: Path) -> None:
    engine = engine_of(mine)
    shutil.copy(mine / "lcm.safetensors", mine / "new")
    (mine / "new").replace(mine / "style.safetensors")
    described = engine.describe()
    assert described["loras"]["style"]["file"] == {"name": "style.safetensors", "sha256": None}
    with pytest.raises(ModelNotFoundError, match="changed before it was hashed"):
        calotype.load_from(described, search=[mine])


def test_drawing_waits_for_no_hash(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(mine)
    read = []
    monkeypatch.setattr(hashes, "_hash", lambda path, state: (read.append(Path(path).name), "0" * 64)[1])
    result = engine(REQUEST)
    assert read == []
    result.save(tmp_path / "fox.png")
    assert {*read} == {f"{kind}.safetensors" for kind in KINDS if kind != "lcm"}, "of a picture, what made it"


def test_a_picture_says_what_made_it_and_not_what_came_later(mine: Path) -> None:
    engine = engine_of(mine)
    result = engine(REQUEST)
    engine.remove_control("edges")
    engine.remove_lora("style")
    engine.set_motion(None)
    engine.remove_embedding("<toy>")
    assert engine.describe().keys() & {"controls", "embeddings", "motion"} == set()
    again = calotype.load_from(result.model)
    assert again.loras == {"style": 0.5}
    assert pixels(again) == hashlib.sha256(result.image.tobytes()).hexdigest()


def test_the_command_notices_too(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, style = mine / "model.safetensors", mine / "style.safetensors"
    drawn = tmp_path / "fox.png"
    asked = ["a fox", "--model", str(model), "--lora", f"{style}:0.5", "--steps", "1", "--seed", "1", "-q"]
    assert main([*asked, "--device", "cpu", "-o", str(drawn)]) == 0
    again = ["--like", str(drawn), "-q", "-o", str(tmp_path / "again.png")]
    assert main(again) == 0
    assert (tmp_path / "again.png").read_bytes() == drawn.read_bytes()
    shutil.copy(mine / "lcm.safetensors", style)
    capsys.readouterr()
    assert main(again) == 3
    assert "is another file now" in capsys.readouterr().err
    assert main([*again, "--lora", str(style)]) == 0, "what is given by itself is meant"
    model.rename(mine / "moved.safetensors")
    assert main([*again, "--lora", str(style)]) == 3
    assert main([*again, "--lora", str(style), "--model", str(mine / "moved.safetensors")]) == 0


# ---- what is in the engine ----


def test_adapters_are_listed_and_taken_out(files: Path, edges: Path, tiny_sd15: Path) -> None:
    engine = calotype.load(tiny_sd15, device="cpu", dtype="float32")
    plain, before = pixels(engine, CLIP_OF_ONE), engine.describe()
    assert (engine.controls, engine.embeddings) == ((), ())
    engine.add_embedding(files / "toy.safetensors")
    engine.add_embedding(files / "toy.safetensors", "<two>")
    engine.add_control(edges, "a")
    assert (engine.controls, engine.embeddings) == (("a",), ("<toy>", "<two>"))
    changed = pixels(engine, CLIP_OF_ONE)
    engine.remove_embedding("<toy>")
    engine.remove_embedding("<two>")
    engine.remove_control("a")
    assert changed != plain
    assert pixels(engine, CLIP_OF_ONE) == plain
    assert engine.describe() == before
    with pytest.raises(UsageError, match="no embedding '<toy>': the engine has none"):
        engine.remove_embedding("<toy>")
    with pytest.raises(UsageError, match="no control 'a': the engine has none"):
        engine.remove_control("a")


CLIP_OF_ONE = Request("a <toy> <two>", steps=1, seed=0)


def test_a_loras_word_is_back_when_the_embedding_is_gone(files: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    engine = calotype.load(tiny_sd15, device="cpu", dtype="float32")
    tensors = peft_names(low_rank({LINEAR: engine.parts.unet.get_submodule(LINEAR)}), "unet.")
    engine.add_lora(save(tmp_path / "it.safetensors", {**tensors, "bundle_emb.<toy>.clip_l": normal(3, 32)}))
    drawn = pixels(engine, CLIP_OF_ONE)
    with pytest.warns(calotype.CalotypeWarning, match="now means this"):
        engine.add_embedding(files / "toy.safetensors")
    assert pixels(engine, CLIP_OF_ONE) != drawn
    engine.remove_embedding("<toy>")
    assert pixels(engine, CLIP_OF_ONE) == drawn


@pytest.mark.parametrize(("kind", "name"), [("embeddings", "learned_embeds"), ("motion", "")])
def test_embeddings_and_motion_have_a_revision(kind: str, name: str, files: Path, tiny_sd15: Path) -> None:
    root = hub_cache() / "models--owner--name"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "v2").write_text(COMMIT)
    engine = calotype.load(tiny_sd15, device="cpu", offline=True)
    add: Callable[..., object] = engine.set_motion
    if kind == "embeddings":
        add = engine.add_embedding
        shutil.copy(files / "toy.safetensors", snapshot / "learned_embeds.safetensors")
    else:
        config = {"_class_name": "MotionAdapter", "block_out_channels": [32, 64], "motion_layers_per_block": 1}
        (snapshot / "config.json").write_text(json.dumps({**config, "motion_max_seq_length": 8}))
        shutil.copy(files / "motion.safetensors", snapshot / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelNotFoundError, match="owner/name is not in the cache"):
        add("owner/name")
    add("owner/name", revision="v2")
    described = engine.describe()[kind]
    told = described if kind == "motion" else described["<toy>"]
    assert (told["ref"], told["revision"]) == ("owner/name", "v2")
    assert "file" not in told, "the Hub's are known by id and revision"
    assert calotype.load_from(engine.describe(), offline=True).describe() == engine.describe()


# ---- strangers ----

FILE = {"name": "x.safetensors", "sha256": "0" * 64}
LORA = {"ref": "x.safetensors"}


@pytest.mark.parametrize(
    "described",
    [
        None,
        [],
        "model",
        {1: 2},
        {"modle": "x"},
        {"model": 5},
        {"model": ["x"]},
        {"model": "a\0b"},
        {"model": "~nobody-of-that-name/x"},
        {"model": "x" * 100_000},
        {"device": "toaster"},
        {"device": 0},
        {"dtype": "int3"},
        {"dtype": {}},
        {"revision": 1},
        {"family": []},
        {"files": 1},
        {"files": {"model": FILE}},
        {"files": {"text": FILE}, "model": "x"},
        {"files": {"model": "x"}, "model": "x"},
        {"files": {"model": FILE}, "model": "x"},
        {"files": {"model": FILE}, "model": "~nobody-of-that-name/x"},
        {"files": {"model": FILE}, "model": "x" * 100_000},
        {"loras": []},
        {"loras": {"a": 1}},
        {"loras": {"a": {}}},
        {"loras": {"a": {"ref": None}}},
        {"loras": {"a": {"ref": 1}}},
        {"loras": {"a": LORA | {"beta_schedule": "linear"}}},
        {"loras": {"a": LORA | {"name": "b"}}},
        {"loras": {"a": LORA | {"scale": "1"}}},
        {"loras": {"a": LORA | {"scale": True}}},
        {"loras": {"a": LORA | {"scale": float("nan")}}},
        {"loras": {"a": LORA | {"scale": 10**400}}},
        {"loras": {"a": LORA | {"file": None}}},
        {"loras": {"a": LORA | {"file": FILE | {"sha256": "0" * 63 + "g"}}}},
        {"loras": {"a": LORA | {"file": FILE | {"sha256": 5}}}},
        {"loras": {"a": LORA | {"file": {"sha256": None}}}},
        {"loras": {"a": LORA | {"file": FILE | {"more": 1}}}},
        *[{"loras": {"a": LORA | {"file": FILE | {"name": name}}}} for name in ("../x", "a/b", "..", "", "a\\b", "\0")],
        {"loras": {"a": LORA | {"file": FILE | {"name": 5}}}},
        {"controls": {"a": {"ref": ".", "file": FILE}}},
        {"controls": {"a": {"ref": "x", "weight_name": "y"}}},
        {"embeddings": {"a": {"ref": "x", "token": "b"}}},
        {"motion": []},
        {"motion": {"ref": "x\nerror: y", "variant": 1}},
        {"motion": {"ref": "x", "revision": {}}},
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_a_hostile_description_is_one_line(described: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalotypeError) as caught:
        calotype.load_from(described, search=[tmp_path])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_description_that_is_damaged_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"known are model, unet"):
        Description.of({"modle": "x"})
    with pytest.raises(UsageError, match=r"search has 'nowhere', which is no folder"):
        calotype.load_from({}, search=["nowhere"])


def test_a_description_without_files_is_taken_as_it_is(mine: Path) -> None:
    """As pictures of earlier versions have it."""
    engine = engine_of(mine)

    def without(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: without(each) for name, each in value.items() if name not in ("file", "files")}

    old = without(engine.describe())
    assert "sha256" not in json.dumps(old)
    assert pixels(calotype.load_from(old)) == pixels(engine)
