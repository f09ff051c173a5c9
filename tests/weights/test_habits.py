"""Few-step models and adapters bring their habits: by their Hub ids, their published names and their headers."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import calotype
from calotype import Request, cli
from calotype.errors import UsageError
from calotype.parts import Habit
from calotype.samplers import SAMPLERS
from calotype.schedule import PREDICTIONS, SPACINGS, spaced_grid
from calotype.weights import habits
from calotype.weights.convert import convert
from calotype.weights.habits import Sort, habit_of
from calotype.weights.inspect import inspect_model

Copy = Callable[[Path], Path]

ROWS = json.loads(habits.TABLE.read_text("utf-8"))

TRAILING = {"spacing": "trailing"}

# What the makers say of files under the names that they published them with: sampler, steps, guidance, and the rest.
PUBLISHED: list[tuple[Sort, str, tuple[str, int, float], dict[str, Any]]] = [
    ("lora", "lcm-lora-sdv1-5.safetensors", ("lcm", 4, 1.0), {}),
    ("lora", "lcm_lora_sdxl.safetensors", ("lcm", 4, 1.0), {}),
    ("lora", "LCM_LoRA_Weights_SD15.safetensors", ("lcm", 4, 1.0), {}),
    ("lora", "lcm-lora-ssd-1b.safetensors", ("lcm", 4, 1.0), {}),
    ("lora", "TCD-SDXL-LoRA.safetensors", ("tcd", 4, 1.0), {"gamma": 0.3}),
    ("lora", "Hyper-SDXL-1step-lora.safetensors", ("tcd", 1, 1.0), {"gamma": 1.0}),
    ("lora", "Hyper-SD15-1step-lora.safetensors", ("tcd", 1, 1.0), {"gamma": 1.0}),
    ("lora", "Hyper-SDXL-2steps-lora.safetensors", ("ddim", 2, 1.0), TRAILING),
    ("lora", "Hyper-SD15-8steps-lora.safetensors", ("ddim", 8, 1.0), TRAILING),
    ("lora", "Hyper-SDXL-12steps-CFG-lora.safetensors", ("ddim", 12, 5.0), TRAILING),
    ("model", "Hyper-SDXL-1step-Unet.safetensors", ("lcm", 1, 1.0), {"timesteps": (800,)}),
    ("model", "Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors", ("lcm", 1, 1.0), {"timesteps": (800,)}),
    ("lora", "sdxl_lightning_4step_lora.safetensors", ("euler", 4, 1.0), TRAILING),
    ("model", "sdxl_lightning_8step_unet.safetensors", ("euler", 8, 1.0), TRAILING),
    ("model", "sdxl_lightning_2step.safetensors", ("euler", 2, 1.0), TRAILING),
    ("model", "sdxl_lightning_1step_unet_x0.safetensors", ("euler", 1, 1.0), TRAILING | {"prediction": "sample"}),
    ("model", "sd_xl_turbo_1.0_fp16.safetensors", ("euler", 1, 1.0), TRAILING | {"size": 512}),
    ("model", "sd_turbo.safetensors", ("euler", 1, 1.0), TRAILING | {"size": 512}),
    ("model", "dmd2_sdxl_4step_unet_fp16.safetensors", ("lcm", 4, 1.0), {"timesteps": (999, 749, 499, 249)}),
    ("lora", "dmd2_sdxl_4step_lora_fp16.safetensors", ("lcm", 4, 1.0), {"timesteps": (999, 749, 499, 249)}),
    ("model", "dmd2_sdxl_1step_unet_fp16.safetensors", ("lcm", 1, 1.0), {"timesteps": (399,)}),
    ("lora", "pcm_sd15_smallcfg_2step_converted.safetensors", ("ddim", 2, 1.0), TRAILING),
    ("lora", "pcm_sdxl_normalcfg_16step_converted.safetensors", ("ddim", 16, 7.5), TRAILING),
    ("lora", "pcm_sdxl_lcmlike_lora_converted.safetensors", ("lcm", 4, 1.0), {}),
    ("lora", "AnimateLCM_sd15_t2v_lora.safetensors", ("lcm", 6, 2.0), {}),
    ("motion", "AnimateLCM_sd15_t2v.safetensors", ("lcm", 6, 2.0), {}),
    ("motion", "animatediff_lightning_4step_diffusers.safetensors", ("euler", 4, 1.0), TRAILING),
]  # fmt: skip


def empty(path: Path, said: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({}, path, said)
    return path


def test_the_table_says_what_requests_understand() -> None:
    names = {field.name for field in dataclasses.fields(Habit)}
    for row in ROWS:
        assert set(row) - names <= {"of", "hub", "file", "source"}, row
        assert row["source"]
        assert row["sampler"] in SAMPLERS
        assert row.get("spacing") in (*SPACINGS, None)
        assert row.get("prediction") in (*PREDICTIONS, None)
        assert ("steps" in row) != ("(?P<steps>" in row.get("file", "")), row
        Request("a fox", timesteps=row.get("timesteps"), steps=row.get("steps"), guidance=row.get("guidance"))


def in_the_docs(row: dict[str, Any]) -> str:
    """A row of the table as docs/files.md has it."""
    known = [f"`{repo}`" for repo in row.get("hub", ())]
    file = row.get("file", "").replace("|", "\\|").replace("(?P<steps>", "(")
    said = [", ".join(known)] * bool(known) + [f"`{file}`"] * bool(file)
    more = [f"timesteps {','.join(map(str, row['timesteps']))}"] if "timesteps" in row else []
    more += [f"{name} {row[name]}" for name in ("spacing", "gamma", "prediction", "size") if name in row]
    guidance = f"{row['guidance']:g}" if "guidance" in row else "the model's"
    cells = (row["title"], "; ".join(said), row["sampler"], row.get("steps", "as named"), guidance, ", ".join(more))
    return f"| {' | '.join(map(str, cells))} |"


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "files.md").read_text("utf-8")
    assert "\n".join(in_the_docs(row) for row in ROWS) in page


@pytest.mark.parametrize(("sort", "name", "main", "rest"), PUBLISHED, ids=[each[1] for each in PUBLISHED])
def test_a_published_name(
    sort: Sort, name: str, main: tuple[str, int, float], rest: dict[str, Any], tmp_path: Path
) -> None:
    habit = habit_of(sort, tmp_path / name, empty(tmp_path / name))
    assert habit is not None
    assert (habit.sampler, habit.steps, habit.guidance) == main
    said = {field: value for field, value in vars(habit).items() if value is not None}
    assert {field: said[field] for field in said.keys() - {"sampler", "steps", "guidance", "title"}} == rest


def test_every_row_of_files_has_a_published_name() -> None:
    plain = [(sort, habits._plain(name.removesuffix(".safetensors"))) for sort, name, *_ in PUBLISHED]
    for row in ROWS:
        for sort in row["of"] if "file" in row else ():
            assert any(re.fullmatch(row["file"], name) for known, name in plain if known == sort), (sort, row)


@pytest.mark.parametrize("name", [
    "my-lcm-style", "sd15_lora", "hyperrealism-sdxl-4steps-lora", "lightning_bolt", "turbo", "pytorch_lora_weights",
    "lcm-lora-sdv1-5-and-my-cat", "model", "tcd", "sdxl_lightning_3step_lora",
])  # fmt: skip
@pytest.mark.parametrize("sort", ["lora", "model", "motion"])
def test_other_names_say_nothing(sort: Sort, name: str, tmp_path: Path) -> None:
    assert habit_of(sort, name, empty(tmp_path / "loras" / f"{name}.safetensors")) is None


def test_a_repository_is_known_by_its_id_its_cache_and_its_clone(tmp_path: Path) -> None:
    repo, file = "latent-consistency/lcm-lora-sdxl", "pytorch_lora_weights.safetensors"
    for ref, place in (
        (repo, "anything/snapshot"),
        (f"{repo}@main", "anything/other"),
        ("cache", f"models--{repo.replace('/', '--')}/snapshots/0123abc"),
        ("clone", "clones/lcm-lora-sdxl"),
        ("clone", "clones/LCM-LoRA-SDXL"),
    ):
        habit = habit_of("lora", ref, empty(tmp_path / place / file))
        assert habit is not None, (ref, place)
        assert habit.title == "an LCM-LoRA"
    assert habit_of("model", repo, tmp_path) is None  # a LoRA's id is no model's
    assert habit_of("lora", "else/lcm-lora-sdxl", empty(tmp_path / "else" / file)) is None


def test_a_renamed_file_may_still_say_what_it_was_called(tmp_path: Path) -> None:
    path = empty(tmp_path / "fast.safetensors", {"modelspec.title": "Hyper-SD15-4steps-lora"})
    habit = habit_of("lora", path, path)
    assert habit is not None
    assert habit.steps == 4


def test_inspect_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = empty(tmp_path / "Hyper-SD15-4steps-lora.safetensors")
    report = inspect_model(path)
    assert report["few_step"] == {
        "title": "a Hyper-SD LoRA", "sampler": "ddim", "steps": 4, "guidance": 1.0, "spacing": "trailing"
    }  # fmt: skip
    assert "few_step" not in inspect_model(empty(tmp_path / "x.safetensors"))
    assert cli.main(["inspect", str(path)]) == 0
    line = "few step:         a Hyper-SD LoRA: sampler ddim, steps 4, guidance 1.0, spacing trailing"
    assert line in capsys.readouterr().out.splitlines()


# ---- in use ----


def lora(engine: calotype.Engine, path: Path) -> Path:
    """An adapter that changes a little, under this name."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    rows, columns = engine.parts.unet.get_parameter(f"{name}.weight").shape
    tensors = {f"unet.{name}.lora_A.weight": torch.ones(1, columns), f"unet.{name}.lora_B.weight": torch.ones(rows, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def test_an_lcm_lora_on_a_base_model_draws_in_four_steps_and_says_so(tiny_sd15: Path, tmp_path: Path) -> None:
    engine = calotype.load(tiny_sd15, device="cpu")
    engine.add_lora(lora(engine, tmp_path / "lcm-lora-sdv1-5.safetensors"), name="fast")
    result = engine("a fox", seed=0)
    assert (result.request.sampler, result.request.steps, result.request.guidance) == ("lcm", 4, 1.0)
    assert result.timings["evaluations"] == 4
    said = "the LoRA 'fast' is an LCM-LoRA: sampler lcm, steps 4, guidance 1, as nothing else was asked for"
    assert result.notes == (said,)
    given = engine.resolve(Request("a fox", steps=2, sampler="ddim", guidance=3.0))
    assert (given.sampler, given.steps, given.guidance) == ("ddim", 2, 3.0)
    assert engine.notes(Request("a fox", steps=2)) == [said.replace("steps 4, ", "")]
    assert engine.notes(given) == []
    engine.set_loras({})
    plain = engine.resolve(Request("a fox"))
    assert (plain.sampler, plain.steps, plain.guidance) == ("ddim", 25, 7.5)
    assert engine.notes(Request("a fox")) == []


def test_a_renamed_few_step_lora_is_asked_about(tiny_sd15: Path, tmp_path: Path) -> None:
    """Its shape says that it may be one, and not which: LCM, TCD and others change the same layers."""
    engine = calotype.load(tiny_sd15, device="cpu")
    tensors = {}
    for name, module in engine.parts.unet.named_modules():
        if "block" in name and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            rows, columns, *kernel = module.weight.shape
            tensors[f"unet.{name}.lora_A.weight"] = torch.zeros(2, columns, *kernel)
            tensors[f"unet.{name}.lora_B.weight"] = torch.zeros(rows, 2, *[1] * len(kernel))
    few, style = tmp_path / "my-own.safetensors", tmp_path / "style.safetensors"
    save_file(tensors, few)
    save_file(tensors, style, {"ss_network_module": "networks.lora"})  # a LoCon by kohya's scripts
    fewer = {key: tensor for key, tensor in tensors.items() if "time_emb_proj" not in key}
    save_file(fewer, tmp_path / "fewer.safetensors")
    for name in ("style", "fewer"):
        engine.add_lora(tmp_path / f"{name}.safetensors")
        assert engine.notes(Request("a fox")) == []
    engine.add_lora(few)
    (line,) = engine.notes(Request("a fox"))
    assert line.startswith("the LoRA 'my-own' changes every layer, as few-step LoRAs do, and does not say how")
    assert engine.notes(Request("a fox", steps=4)) == []
    engine.set_loras({"my-own": 0.0})
    assert engine.notes(Request("a fox")) == []


def test_a_repository_in_the_cache_brings_its_habit(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    engine = calotype.load(tiny_sd15, device="cpu", offline=True)
    folder = tmp_path / "models--latent-consistency--lcm-lora-sdv1-5"
    lora(engine, folder / "snapshots" / "c0ffee" / "pytorch_lora_weights.safetensors")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c0ffee")
    engine.add_lora("latent-consistency/lcm-lora-sdv1-5")
    assert engine.resolve(Request("a fox")).sampler == "lcm"


def test_trailing_timesteps_are_the_schedulers_own(tiny_sd15: Path, copy_of: Copy, tmp_path: Path) -> None:
    """A Hyper-SD LoRA is drawn as by a model whose scheduler says DDIM with trailing spacing; so is --spacing."""
    engine = calotype.load(tiny_sd15, device="cpu")
    file = lora(engine, tmp_path / "Hyper-SD15-4steps-lora.safetensors")
    trailing = copy_of(tiny_sd15)
    config = trailing / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"timestep_spacing": "trailing"}))
    other = calotype.load(trailing, device="cpu")
    for each in (engine, other):
        each.add_lora(file, name="fast")
    request = Request("a fox", seed=1)
    assert engine.resolve(request).spacing == "trailing"
    *_, ours = engine.stream(request)
    *_, theirs = other.stream(request)
    assert [*spaced_grid(4, spacing="trailing")] == [999, 749, 499, 249]
    assert ours.t[0].item() == 249
    assert torch.equal(ours.x, theirs.x)
    *_, leading = engine.stream(Request("a fox", seed=1, spacing="leading"))
    assert leading.t[0].item() == 1
    assert not torch.equal(leading.x, theirs.x)


def test_timesteps_of_their_own_are_for_pure_noise_and_as_many_steps(tiny_sd15: Path, tmp_path: Path) -> None:
    engine = calotype.load(tiny_sd15, device="cpu")
    engine.add_lora(lora(engine, tmp_path / "dmd2_sdxl_4step_lora_fp16.safetensors"))
    photo = engine("a fox", seed=0).image
    assert engine.resolve(Request("a fox")).timesteps == (999, 749, 499, 249)
    assert engine.resolve(Request("a fox", steps=2)).timesteps is None
    changed = engine.resolve(Request("a fox", image=photo))
    assert (changed.timesteps, changed.steps, changed.strength) == (None, 4, 0.5)
    assert engine.resolve(Request("a fox", image=photo, strength=1)).timesteps == (999, 749, 499, 249)


def test_two_that_contradict_each_other_are_refused_where_it_is_left_open(tiny_sd15: Path, tmp_path: Path) -> None:
    engine = calotype.load(tiny_sd15, device="cpu")
    engine.add_lora(lora(engine, tmp_path / "lcm-lora-sdv1-5.safetensors"), name="lcm")
    engine.add_lora(lora(engine, tmp_path / "TCD-SD15-LoRA.safetensors"), name="tcd")
    message = "the LoRA 'lcm' wants sampler lcm, the LoRA 'tcd' wants tcd: they contradict each other"
    with pytest.raises(UsageError, match=message) as caught:
        engine.resolve(Request("a fox"))
    assert caught.value.hint == "say sampler, or take one of them out"
    found = engine.resolve(Request("a fox", sampler="tcd"))  # in all else they agree
    assert (found.steps, found.guidance, found.gamma) == (4, 1.0, 0.3)
    engine.set_loras({"lcm": 0.7, "tcd": 0.0})
    assert engine.resolve(Request("a fox")).sampler == "lcm"


def test_a_few_step_model_by_its_folders_name(tiny_sd15: Path, copy_of: Copy, tmp_path: Path) -> None:
    folder = copy_of(tiny_sd15).rename(tmp_path / "sd-turbo")
    engine = calotype.load(folder, device="cpu")
    found = engine.resolve(Request("a fox"))
    assert (found.sampler, found.steps, found.guidance, found.spacing) == ("euler", 1, 1.0, "trailing")
    assert (found.width, found.height) == (512, 512)
    assert engine.notes(Request("a fox")) == [
        "the model is SD Turbo: sampler euler, steps 1, guidance 1, spacing trailing, as nothing else was asked for"
    ]
    engine.add_lora(lora(engine, tmp_path / "lcm-lora-sdv1-5.safetensors"))
    assert engine.resolve(Request("a fox")).sampler == "lcm"  # an adapter is put on to change how the model is used
    (folder / "calotype.json").write_text('{"steps": 3}')
    own = calotype.load(folder, device="cpu").resolve(Request("a fox"))
    assert (own.steps, own.sampler) == (3, "ddim")  # what the folder says of itself counts alone


def test_a_few_step_network_beside_a_base_model(tiny_sd15: Path, tmp_path: Path) -> None:
    """SDXL-Lightning's one step predicts the picture, whatever the base model's scheduler says of its own."""
    file = convert(tiny_sd15, tmp_path / "sdxl_lightning_1step_unet_x0.safetensors")
    for engine in (calotype.load(tiny_sd15, unet=file, device="cpu"), calotype.load(file, device="cpu")):
        assert engine.parts.schedule.prediction == "sample"
        assert engine.resolve(Request("a fox")).steps == 1
    told = calotype.load(file, prediction="epsilon", device="cpu")
    assert told.parts.schedule.prediction == "epsilon"


def test_a_motion_adapter_has_a_say_in_clips_alone(tiny_sd15: Path, tmp_path: Path) -> None:
    from diffusers import MotionAdapter

    folder = tmp_path / "AnimateLCM"
    MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=4, motion_norm_num_groups=8
    ).save_pretrained(folder)
    engine = calotype.load(tiny_sd15, device="cpu")
    engine.set_motion(folder)
    clip, picture = engine.resolve(Request("a fox", frames=2)), engine.resolve(Request("a fox"))
    assert (clip.sampler, clip.steps, clip.guidance) == ("lcm", 6, 2.0)
    assert (picture.sampler, picture.steps) == ("ddim", 25)
    assert engine.notes(Request("a fox", frames=2))[0].startswith("the motion adapter is AnimateLCM: sampler lcm")
    assert load_file(folder / "diffusion_pytorch_model.safetensors")


# ---- sizes ----


@pytest.mark.parametrize(("size", "far"), [
    ((64, 64), False), ((96, 96), False), ((96, 64), False), ((48, 64), False), ((40, 80), False),
    ((128, 128), True), ((32, 32), True), ((128, 32), True), ((512, 512), True),
])  # fmt: skip
def test_a_size_far_from_what_the_model_was_trained_for_is_told(
    size: tuple[int, int], far: bool, tiny_sd15: Path
) -> None:
    engine = calotype.load(tiny_sd15, device="cpu")
    request = Request("a fox", width=size[0], height=size[1])
    told = f"{size[0]}x{size[1]} is far from the 64x64 that this model was trained for: its pictures may fall apart"
    assert engine.notes(request) == ([told] if far else [])


def test_a_picture_to_start_from_may_have_any_size(tiny_sd15: Path) -> None:
    engine = calotype.load(tiny_sd15, device="cpu")
    photo = engine("a fox", steps=1, seed=0).image.resize((128, 128))
    assert engine.resolve(Request("a fox", image=photo)).width == 128
