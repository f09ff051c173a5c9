"""The command line, with an engine that draws flat pictures: what is parsed, written, printed, refused and returned."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import calotype
from calotype import stills, video
from calotype.cli import COMMANDS, destination, main, parse, report
from calotype.cli.generate import job_like, uncollected
from calotype.errors import CalotypeWarning, CheckpointError, ModelNotFoundError, OutputError, UsageError
from calotype.request import Control, Request
from calotype.stills import METADATA_KEY, read_metadata

DEFAULTS = {"steps": 4, "guidance": 4.0, "seed": 7, "width": 16, "height": 16, "sampler": "lcm"}


@dataclass
class FakeStep:
    index: int
    total: int


@dataclass
class FakeResult:
    images: list[Image.Image]
    seeds: list[int]
    request: Request
    timings: dict[str, float]
    model: dict[str, Any]
    notes: tuple[str, ...] = ()

    def metadata(self, index: int) -> dict[str, Any]:
        request = self.request.to_json(pictures=False)
        return {"calotype": calotype.__version__, "request": request, "index": index, "model": self.model}

    def save_one(self, index: int, path: Path) -> Path:
        if self.request.frames is None:
            return stills.save(self.images[index], path, self.metadata(index))
        path.write_text(json.dumps(self.metadata(index)))  # stands for a clip
        return path


class FakeEngine:
    """Does what calotype.Engine does for the command line; a picture's colour is its seed and the batch's size."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.requests: list[Request] = []
        self.at_step: Callable[[int], None] = lambda index: None
        self.added: dict[str, Any] = {}  # what describe says of adapters
        self.noted: list[str] = []  # what comes up while it draws

    def set_motion(self, **given: Any) -> None:
        self.added["motion"] = given

    def add_lora(self, name: str, **given: Any) -> None:
        self.added.setdefault("loras", {})[name] = {**given, "scale": 1.0}

    def set_loras(self, mix: dict[str, float]) -> None:
        for name, scale in mix.items():
            self.added["loras"][name]["scale"] = scale

    def add_embedding(self, ref: str, token: str | None) -> None:
        self.added.setdefault("embeddings", {})[token or "<what the file says>"] = {"ref": ref}

    def add_control(self, ref: str, name: str) -> None:
        self.added.setdefault("controls", {})[name] = {"ref": ref}

    def resolve(self, request: Request) -> Request:
        defaults = DEFAULTS if request.timesteps is None else {**DEFAULTS, "steps": len(request.timesteps)}
        return replace(request, **{name: value for name, value in defaults.items() if getattr(request, name) is None})

    def notes(self, request: Request) -> list[str]:
        return [f"steps {self.resolve(request).steps}"] if self.arguments.get("model") == "few" else []

    def stream(self, request: Request) -> Generator[FakeStep, None, FakeResult]:
        request = self.resolve(request)
        self.requests.append(request)
        assert request.steps is not None
        assert request.seed is not None
        for index in range(request.steps):
            self.at_step(index)
            yield FakeStep(index, request.steps)
        seeds = [request.seed + i for i in range(request.n)]
        images = [Image.new("RGB", (16, 16), (seed % 256, request.n, request.steps)) for seed in seeds]
        notes = (*self.notes(request), *self.noted)
        return FakeResult(images, seeds, request, {"denoise": 0.5}, self.describe(), notes)

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.arguments.get("model"),
            "unet": None,
            "dtype": "float32",
            "device": "cpu",
            "family": "sd15",
            **self.added,
        }


class Loader:
    """Stands for calotype.load and keeps what it was asked for."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.error: Exception | None = None
        self.at_step: Callable[[int], None] = lambda index: None

    def __call__(self, **arguments: Any) -> FakeEngine:
        if self.error is not None:
            raise self.error
        self.engines.append(FakeEngine(**arguments))
        self.engines[-1].at_step = self.at_step
        return self.engines[-1]

    @property
    def request(self) -> Request:
        return self.engines[-1].requests[-1]


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Loader:
    loader = Loader()
    monkeypatch.setitem(vars(calotype), "load", loader)
    monkeypatch.chdir(tmp_path)
    return loader


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- What is run ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["a fox"],
        ["generate", "a fox"],
        ["-o", "a-fox-7.png", "a fox"],
        ["--steps", "4", "a fox"],
        ["a fox", "--quiet"],
        ["--", "a fox"],
    ],
    ids=" ".join,
)
def test_what_is_no_command_is_a_prompt(
    arguments: list[str], loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr() == ("a-fox-7.png\n", "")
    assert loader.request.prompt == "a fox"
    assert written(tmp_path) == ["a-fox-7.png"]


def test_every_option_reaches_the_request_and_the_engine(loader: Loader) -> None:
    request = "--steps 2 --guidance 1.5 --guidance-steps 1 --seed 3 --size 64x128 -n 2 --sampler ddim --clip-skip 1"
    models = "--model M --unet U --vae V --variant fp16 --revision R --device cpu --dtype bfloat16 --offline"
    assert main(["a fox", "--negative", "", "--emphasis", *request.split(), *models.split()]) == 0
    assert loader.request == Request(
        prompt="a fox", negative_prompt="", steps=2, guidance=1.5, guidance_steps=1, seed=3, width=64, height=128, n=2,
        sampler="ddim", clip_skip=1, emphasis=True,
    )  # fmt: skip
    assert loader.engines[-1].arguments == {
        "model": "M", "unet": "U", "vae": "V", "variant": "fp16", "revision": "R", "device": "cpu", "dtype": "bfloat16",
        "offline": True,
    }  # fmt: skip


def test_an_option_left_out_is_not_passed_and_zero_is(loader: Loader) -> None:
    assert main(["", "--seed", "0", "--timesteps", "999, 499"]) == 0
    assert loader.engines[-1].arguments == {}
    assert (loader.request.prompt, loader.request.seed) == ("", 0)
    assert list(loader.request.timesteps or ()) == [999, 499]


def test_pictures_and_adapters_reach_them_too(loader: Loader, tmp_path: Path) -> None:
    photo, mask = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "white")
    photo.save("photo.png")
    mask.save("mask.png")
    task = "--image photo.png --mask mask.png --strength 0.5 --mask-feather 2 --mask-crop 3 --resize pad"
    rest = "--sampler tcd --gamma 0.1 --spacing trailing --guidance-mode once --steps 2 --guidance 1 --size 16x16"
    extras = "--lora styles/paper:0.8 --lora lcm --lora other/lcm:-1 --motion M --control canny=photo.png:0.5"
    extras += " --embedding e/cat.safetensors --embedding e/x=toy"
    assert (
        main(["a fox", "--seed", "1", *task.split(), *rest.split(), *extras.split(), "--control", "canny=mask.png"])
        == 0
    )
    assert loader.request == Request(
        prompt="a fox", seed=1, image=photo, mask=mask, strength=0.5, mask_feather=2, mask_crop=3, resize="pad",
        sampler="tcd", gamma=0.1, spacing="trailing", guidance_mode="once", steps=2, guidance=1.0, width=16, height=16,
        controls=(Control("canny", photo, 0.5), Control("canny", mask)),
    )  # fmt: skip
    described = {
        "loras": {
            "paper": {"ref": "styles/paper", "scale": 0.8},
            "lcm": {"ref": "lcm", "scale": 1.0},
            "lcm-2": {"ref": "other/lcm", "scale": -1.0},
        },
        "controls": {"canny": {"ref": "canny"}},
        "embeddings": {"<what the file says>": {"ref": "e/cat.safetensors"}, "toy": {"ref": "e/x"}},
        "motion": {"ref": "M"},
    }
    assert loader.engines[-1].added == described

    (made,) = tmp_path.glob("a-fox-1.png")
    assert main(["--like", str(made)]) == 2, "the pictures are not in the file"
    pictures = [
        "--image",
        "photo.png",
        "--mask",
        "mask.png",
        "--control",
        "canny=photo.png:0.5",
        "--control",
        "canny=mask.png",
    ]
    assert main(["--like", str(made), *pictures]) == 0
    assert loader.request.strength == 0.5
    assert loader.engines[-1].added == described


def test_clips(loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a fox", "--motion", "M", "--frames", "4", "--fps", "10", "--seed", "3"]) == 0
    assert (loader.request.frames, loader.request.fps) == (4, 10)
    assert capsys.readouterr().out == "a-fox-3.gif\n"
    assert main(["a fox", "--motion", "M", "--frames", "4", "-o", "fox.webp"]) == 0
    assert (tmp_path / "fox.webp").exists()
    assert main(["a fox", "--frames", "4", "-o", "fox.png"]) == 2
    assert "must end in .gif or .webp or .mp4" in capsys.readouterr().err


def test_a_clip_is_made_of_a_picture_or_of_frames(loader: Loader) -> None:
    photo, frames = Image.new("RGB", (16, 16), "red"), [Image.new("RGB", (16, 16), c) for c in ("red", "lime", "blue")]
    photo.save("photo.png")
    photo.save("still.webp", lossless=True)
    frames[0].save("clip.gif", save_all=True, append_images=frames[1:])
    clip = ["a fox", "--motion", "M", "--frames", "3", "--seed", "1", "-q"]
    for name, count in (("photo.png", 1), ("still.webp", 1), ("clip.gif", 3)):
        assert main([*clip, "--image", name, "--control", f"canny={name}", "-o", f"{name}.gif"]) == 0
        for pictures in (loader.request.image, loader.request.controls[0].image):
            assert (len(pictures) if isinstance(pictures, tuple) else 1) == count


def test_a_clip_says_what_made_it_and_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"calotype": calotype.__version__, "request": {"prompt": "a fox", "frames": 2}, "index": 0, "model": {}}
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for suffix in video.SUFFIXES:
        path = video.save(frames, tmp_path / f"clip{suffix}", 8, metadata)
        assert main(["show", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == metadata
        assert job_like(path, {"seed": 1}, {}, {}).request == Request("a fox", frames=2, seed=1)


def test_like_takes_the_loras_from_the_model_that_it_loads(tmp_path: Path) -> None:
    """A request's own mix is in the model's, too: what --lora gives instead would not be found under its names."""
    request = {"prompt": "a fox", "seed": 1, "loras": {"style": 0.5}}
    model = {"loras": {"style": {"ref": "style.safetensors", "scale": 0.5}}}
    metadata = {"calotype": calotype.__version__, "request": request, "index": 0, "model": model}
    stills.save(Image.new("RGB", (8, 8)), tmp_path / "fox.png", metadata)
    job = job_like(tmp_path / "fox.png", {}, {}, {})
    assert (job.request, job.adapters.loras) == (Request("a fox", seed=1), model["loras"])


def test_show_names_controls_and_their_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {
        "calotype": calotype.__version__,
        "request": {"prompt": "a fox", "controls": [{"name": "canny", "image": "sha256:1", "scale": 0.8}]},
        "index": 0,
        "model": {"model": "M", "controls": {"canny": {"ref": "lllyasviel/sd-controlnet-canny", "variant": None}}},
    }
    stills.save(Image.new("RGB", (8, 8)), tmp_path / "a.png", metadata)
    assert main(["show", str(tmp_path / "a.png")]) == 0
    shown = capsys.readouterr().out
    assert "0.8" in shown
    assert "lllyasviel" in shown


@pytest.mark.parametrize("text", ["canny", "=photo.png", "canny="])
def test_a_control_without_its_picture_is_refused(
    text: str, loader: Loader, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["a fox", "--control", text]) == 2
    assert "--control must be REF=IMAGE" in capsys.readouterr().err
    assert loader.engines == []


def test_a_prompt_from_stdin(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a fox\nin snow\n"))
    assert main(["-"]) == 0
    assert loader.request.prompt == "a fox\nin snow"


def test_an_endless_or_binary_stdin_is_refused(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1_000_000))
    assert main(["-"]) == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe fox"), encoding="utf-8"))
    assert main(["-"]) == 2
    assert "is not text" in capsys.readouterr().err
    assert loader.engines == []


# ---- What is written and printed ----


def test_a_picture_carries_all_that_repeats_it(loader: Loader, tmp_path: Path) -> None:
    assert main(["a fox", "--model", "M", "--seed", "5", "-n", "2", "-o", "fox.png"]) == 0
    metadata = read_metadata(tmp_path / "fox-2.png")
    assert metadata == {
        "calotype": calotype.__version__,
        "request": loader.request.to_json(),
        "index": 1,
        "model": loader.engines[-1].describe(),
    }
    assert metadata["request"]["steps"] == 4  # resolved: the default is written down


@pytest.mark.parametrize("suffix", stills.SUFFIXES)
def test_a_picture_of_each_format_is_shown_and_made_again(
    suffix: str, loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["a fox", "--seed", "5", "-n", "2", "-o", f"fox{suffix}"]) == 0
    assert capsys.readouterr().out == f"fox-1{suffix}\nfox-2{suffix}\n"
    first = loader.request
    with Image.open(tmp_path / f"fox-2{suffix}") as image:
        assert image.format == stills.SUFFIXES[suffix]
    assert main(["show", f"fox-2{suffix}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request"] == first.to_json()
    assert main(["--like", f"fox-2{suffix}", "-o", f"again{suffix}"]) == 0
    assert loader.request == first
    assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / f"fox-2{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", stills.SUFFIXES)
def test_a_picture_that_says_nothing(
    suffix: str, loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / f"plain{suffix}")
    for arguments in (["--like"], ["show"]):
        assert main([*arguments, f"plain{suffix}"]) == 2
        error = capsys.readouterr().err
        assert re.match(rf"error: 'plain{suffix}' holds no calotype metadata\n\nhint: ", error)
    assert loader.engines == []


def test_json_is_one_object(loader: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a fox", "-n", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["paths"] == ["a-fox-7.png", "a-fox-8.png"]
    assert printed["seeds"] == [7, 8]
    assert printed["request"] == loader.request.to_json()
    assert printed["timings"].keys() == {"load", "denoise"}


def test_our_own_names_replace_no_file(loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a-fox-7.png", "a-fox-7-2.png"):
        (tmp_path / name).write_text("mine")
    assert main(["a fox"]) == 0
    assert capsys.readouterr().out == "a-fox-7-3.png\n"
    assert (tmp_path / "a-fox-7.png").read_text() == "mine"


def test_the_users_own_name_replaces_a_file(loader: Loader, tmp_path: Path) -> None:
    (tmp_path / "fox.png").write_text("old")
    assert main(["a fox", "-o", "fox.png"]) == 0
    assert (tmp_path / "fox.png").read_bytes().startswith(b"\x89PNG")
    assert written(tmp_path) == ["fox.png"]


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A Fox, in the SNOW!", "a-fox-in-the-snow"),
        ("", "picture"),
        ("../../etc/passwd", "etc-passwd"),
        ("狐狸 \udcff", "狐狸"),
        ("x" * 500, "x" * 48),
        ("word " * 100, "-".join(["word"] * 9)),
    ],
)
def test_slug(prompt: str, stem: str) -> None:
    assert destination.slug(prompt) == stem


def test_two_pictures_of_one_seed_get_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert destination.unused("a", [1, 1]) == [Path("a-1.png"), Path("a-1-2.png")]


def test_progress_only_for_a_terminal_and_never_on_stdout(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["a fox"]) == 0
    shown = capsys.readouterr()
    assert "decoding" in shown.err
    assert shown.out == "a-fox-7.png\n"
    assert main(["a fox", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


# ---- --like ----


def test_like_repeats_the_whole_batch_and_keeps_the_one_picture(loader: Loader, tmp_path: Path) -> None:
    assert main(["a fox", "--model", "M", "--seed", "5", "-n", "3", "--steps", "2", "-o", "fox.png"]) == 0
    first = loader.request
    assert main(["--like", "fox-2.png", "-o", "again.png"]) == 0
    assert loader.request == first
    assert loader.engines[-1].arguments == {"model": "M", "dtype": "float32", "device": "cpu"}
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "fox-2.png").read_bytes()
    assert not (tmp_path / "again-1.png").exists()


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--steps", "1"], {"steps": 1}),
        (["--guidance", "0"], {"guidance": 0.0}),
        (["a hare"], {"prompt": "a hare"}),
        (["--seed", "0"], {"seed": 0, "n": 1}),
        (["-n", "2"], {"seed": 6, "n": 2}),  # from the picture's own seed on
        (["--timesteps", "999"], {"steps": None, "timesteps": (999,)}),
    ],
    ids=str,
)
def test_like_is_changed_by_what_is_given(options: list[str], changed: dict[str, Any], loader: Loader) -> None:
    assert main(["a fox", "--seed", "5", "-n", "3", "-o", "fox.png"]) == 0
    expected = FakeEngine().resolve(replace(loader.request, **changed))
    assert main(["--like", "fox-2.png", "-o", "again.png", *options]) == 0
    assert loader.request == expected


def test_like_without_metadata_or_with_damaged_is_refused(
    loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(name: str, **metadata: Any) -> None:
        info = PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps(metadata))
        Image.new("RGB", (8, 8)).save(tmp_path / name, pnginfo=info)

    request = Request(prompt="a", seed=1).to_json()
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    save("beyond.png", request=request, index=5, model={})
    save("list.png", request=[1], index=0, model={})
    save("odd.png", request={**request, "stepps": 1}, index=0, model={})
    for name in ("plain.png", "beyond.png", "list.png"):
        for arguments in (["--like", name], ["show", name]):
            assert main(arguments) != 0
            assert re.match(r"error: [^\n]*" + name, capsys.readouterr().err)
    assert main(["--like", "odd.png"]) == 2
    assert "stepps" in capsys.readouterr().err
    assert loader.engines == []


def test_like_from_another_version_warns(loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stills.save(
        Image.new("RGB", (8, 8)),
        tmp_path / "old.png",
        {"calotype": "0.0.1", "request": Request(prompt="a", seed=1).to_json(), "index": 0, "model": {}},
    )
    assert main(["--like", "old.png"]) == 0
    assert capsys.readouterr().err.startswith("warning: old.png was made by calotype 0.0.1")


# ---- show ----


def test_show(loader: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a \x1b[31mfox", "--model", "M", "-n", "2", "-o", "fox.png"]) == 0
    capsys.readouterr()
    assert main(["show", "fox-2.png"]) == 0
    rows = dict(re.split(r":\s+", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["prompt"] == "a \\x1b[31mfox"  # a prompt must not drive the terminal
    assert (rows["steps"], rows["picture"], rows["model"]) == ("4", "2 of 2", "M")
    assert main(["show", "fox-2.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_metadata(Path("fox-2.png"))


def test_show_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path / "none.png")]) in (1, 2)
    assert "none.png" in capsys.readouterr().err


# ---- What is refused ----


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a", "b"], r"extra argument.*\n\nhint: .*quotes"),
        (["--nonsense", "a"], r"--nonsense.*\n\nhint: calotype generate --help"),
        (["--steps", "few", "a"], r"--steps.*'few'"),
        (["--guidance", "much", "a"], r"--guidance.*'much'"),
        (["--guidance", "nan", "a"], r"guidance is nan"),
        (["--size", "12x12", "a"], r"width is 12"),
        (["--size", "512", "a"], r"--size must be WIDTHxHEIGHT.*'512'"),
        (["--timesteps", "9,x", "a"], r"--timesteps.*'9,x'"),
        (["--steps", "2"], r"no prompt"),
        (["--seed", "1" * 5000, "a"], r"--seed"),
        (["-o", "fox.bmp", "a"], r"\.png or \.jpg or \.jpeg or \.webp, not 'fox\.bmp'"),
        (["-o", "fox.gif", "a"], r"\.png or .*'fox\.gif'"),
        (["-o", "fox", "a"], r"\.png.*'fox'"),
        (["show"], r"FILE.*\n\nhint: calotype show --help"),
    ],
    ids=lambda v: " ".join(v)[:30] if isinstance(v, list) else None,
)
def test_bad_usage_is_told_in_one_line_and_a_hint(
    arguments: list[str], says: str, loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"error: [^\n]+\n\nhint: [^\n]+\n", shown.err)
    assert re.search(says, shown.err)
    assert loader.engines == []
    assert written(tmp_path) == []


def test_an_output_that_cannot_be_written_is_told_before_loading(
    loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for output, says in (("folder.png", "is a folder"), ("none/fox.png", "no folder"), ("pipe.png", "not a file")):
        assert main(["a fox", "-o", output]) == 1
        assert re.match(rf"error: [^\n]*{says}[^\n]*\n\nhint: ", capsys.readouterr().err)
    assert loader.engines == []
    assert written(tmp_path) == ["folder.png", "pipe.png"]


def test_a_folder_without_permission(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root, who runs many a CI, may write anywhere
    with pytest.raises(OutputError, match="permission denied"):
        destination.check(tmp_path / "fox.png", 1)


@pytest.mark.parametrize("text", ["", "x", "512x", "512x512x512", "-8x8", "8.5x8", "9" * 50 + "x8"])
def test_a_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
        parse.size(text)


def test_parsers_accept() -> None:
    assert parse.size("512X768") == (512, 768)
    assert parse.timesteps("999, 499,0") == (999, 499, 0)


# ---- Failures and exit codes ----


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (CheckpointError("broken", hint="mend it"), 1, "error: broken\n\nhint: mend it\n"),
        (ModelNotFoundError("no model 'x'"), 3, "error: no model 'x'\n"),
        (UsageError("steps must be 1 or more, not 0"), 2, "error: steps must be 1 or more, not 0\n"),
        (MemoryError(), 1, "error: out of memory: MemoryError\n\nhint: fewer"),
        (RuntimeError("x DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory: x Def"),
        (ZeroDivisionError("one\ntwo"), 1, "error: ZeroDivisionError: one\n\nhint: this is a fault in calotype"),
        (CheckpointError("evil \x1b[2J\nname"), 1, "error: evil \\x1b[2J\\nname\n"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else None,
)
def test_a_failure_is_one_line(
    error: Exception, code: int, says: str, loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loader.error = error
    assert main(["a fox"]) == code
    shown = capsys.readouterr()
    assert shown.err.startswith(says)
    assert "Traceback" not in shown.err
    assert (shown.out, written(tmp_path)) == ("", [])


@pytest.mark.parametrize("arguments", [["a fox", "--debug"], ["--debug", "a fox"]], ids=" ".join)
def test_debug_shows_the_traceback(arguments: list[str], loader: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    loader.error = CheckpointError("broken")
    assert main(arguments) == 1
    assert re.search(r"Traceback .*CheckpointError: broken\nerror: broken\n$", capsys.readouterr().err, re.DOTALL)


def test_notes_are_lines_and_each_is_told_once(loader: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the request before it is drawn, then those of what came up meanwhile."""
    loader.at_step = lambda index: loader.engines[-1].noted.append("the decoder gave numbers")
    assert main(["a fox", "--model", "few", "--steps", "1"]) == 0
    assert capsys.readouterr().err == "note: steps 1\nnote: the decoder gave numbers\n"


def test_warnings_are_lines(loader: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    def warn(index: int) -> None:
        warnings.warn("guidance 90 is beyond 15", CalotypeWarning, stacklevel=2)

    loader.at_step = warn
    assert main(["a fox", "--steps", "1"]) == 0
    assert capsys.readouterr().err == "warning: guidance 90 is beyond 15\n"


def test_what_pillow_thinks_of_a_files_metadata_is_not_told(loader: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    loader.at_step = lambda index: warnings.warn_explicit("Corrupt EXIF", UserWarning, "x.py", 1, "PIL.TiffImagePlugin")
    assert main(["a fox", "--steps", "1"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_leaves_no_file_and_no_traceback(
    number: signal.Signals,
    code: int,
    loader: Loader,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ours))

    def interrupt(index: int) -> None:
        if index == 2:
            os.kill(os.getpid(), number)
            time.sleep(5)  # the signal arrives before this ends

    loader.at_step = interrupt
    before = signal.getsignal(signal.SIGTERM)
    assert main(["a fox"]) == code
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "error: interrupted\n" if code == 130 else "error: terminated\n")
    assert written(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interruption_that_a_library_swallowed_is_told_in_the_end(
    loader: Loader, request: pytest.FixtureRequest
) -> None:
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ours))

    def swallow(index: int) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    loader.at_step = swallow
    assert main(["a fox"]) == 130


def test_exit_codes_have_one_source() -> None:
    assert report.explain(KeyboardInterrupt()) == ("interrupted", None, 130)
    assert report.explain(BrokenPipeError(32, "Broken pipe"))[2] == 1


@pytest.mark.parametrize("prompt", ["a fox", "a fox " * 3000], ids=["at the end", "in the middle"])
def test_a_reader_that_goes_away_gets_no_traceback(prompt: str, loader: Loader, tmp_path: Path) -> None:
    assert main([prompt, "-o", "fox.png"]) == 0
    command = [sys.executable, "-m", "calotype", "show", "fox.png"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_full_disk_under_stdout_is_an_error(loader: Loader, tmp_path: Path) -> None:
    assert main(["a fox", "-o", "fox.png"]) == 0
    command = [sys.executable, "-m", "calotype", "show", "fox.png"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rb"error: [^\n]*No space left[^\n]*\n\nhint: [^\n]+\n", done.stderr)


def test_what_is_imported_is_left_to_itself_by_the_garbage_collector() -> None:
    gc.unfreeze()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000
    gc.unfreeze()


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"], []):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert [name for name in COMMANDS if not re.search(rf"\b{name}\b", shown)] == []


def test_brackets_in_help_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "show", f"{__name__}:bracketed")
    assert main(["show", "--help"]) == 0
    assert "[default: ours]" in capsys.readouterr().out


def bracketed(option: Annotated[str | None, typer.Option(help="What [default: ours].")] = None) -> None:
    """A command."""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{calotype.__version__}\n"
