"""The recipe of the shipped model (recipes/icons), run from end to end on a few drawn shapes: each stage reads what the
one before left, goes on where it was stopped, and what comes out is a model that calotype loads.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import calotype
from calotype.nn.tiny_vae import AutoencoderTiny
from calotype.weights.control import load_control
from calotype.weights.load import load_parts, load_text_encoder, load_vae

RECIPE = Path(__file__).parents[1] / "recipes" / "icons"
CONCEPTS = {  # by the hash of its name the last one is held out of the autoencoder's training
    "1f534": ("red circle", "#d03030"),
    "1f7e9": ("green square", "#30a040"),
    "1f7e6": ("blue square", "#3060d0"),
    "1f7e3": ("purple disc", "#8040c0"),
}
STYLES = ("flat", "3d", "blob", "fx")


@pytest.fixture(scope="module", autouse=True)
def _modules() -> Iterator[None]:
    sys.path.insert(0, str(RECIPE))
    yield
    sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What draw.py leaves: four shapes, each in four styles (which are sizes here)."""
    folder = tmp_path_factory.mktemp("icons")
    icons, names = [], {}
    for code, (caption, color) in CONCEPTS.items():
        names[code] = {"fr": [f"le {caption}", "forme"], "zh": ["形"]}
        for style in STYLES:
            icon = Image.new("RGBA", (128, 128))
            box = (20 + 4 * STYLES.index(style), 20, 108, 108)
            draw = ImageDraw.Draw(icon)
            (draw.rectangle if "square" in caption else draw.ellipse)(box, fill=color)
            icons.append(({"caption": caption, "style": style, "hex": code}, icon))
    write_icons(folder, icons, names)
    return folder


def write_icons(folder: Path, icons: list[tuple[dict[str, Any], Image.Image]], names: dict[str, Any]) -> None:
    rows = []
    with tarfile.open(folder / "pictures-128.tar", "w") as tar:
        for row, icon in icons:
            file = io.BytesIO()
            icon.save(file, "WEBP", lossless=True)
            entry = tarfile.TarInfo(f"{len(rows):05d}.webp")
            entry.size = len(file.getvalue())
            tar.addfile(entry, io.BytesIO(file.getvalue()))
            rows.append({"id": len(rows), "kw": ["shape"], "group": "symbols", "sub": "geometric"} | row)
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (folder / "names.json").write_text(json.dumps(names, ensure_ascii=False))


COMMON = {"seed": 0, "limit": None, "device": "cpu", "float32": True, "compile": False, "save_every": 2}


def text_options(data: Path, out: Path, steps: int) -> Namespace:
    return Namespace(**COMMON, data=data, out=out, held_out=0, vocabulary=700, width=64, layers=1, steps=steps, batch=6,
                     rate=1e-3)  # fmt: skip


@pytest.fixture(scope="module")
def text(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import train_text

    out = tmp_path_factory.mktemp("text")
    train_text.train(text_options(data, out, steps=2))
    return out


@pytest.fixture(scope="module")
def autoencoder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import train_autoencoder

    out = tmp_path_factory.mktemp("vae")
    train_autoencoder.train(autoencoder_options(data, out))
    return out


def autoencoder_options(data: Path, out: Path) -> Namespace:
    own = {"channels": [16] * 4, "steps": 2, "batch": 4, "crop": 64, "whole": 0.5, "rate": 1e-3}
    return Namespace(**COMMON, **own, data=data, out=out, start=None, decoder=False)


def base_options(data: Path, autoencoder: Path, text: Path, out: Path, steps: int) -> Namespace:
    config = json.loads((RECIPE / "base" / "unet" / "config.json").read_text())
    config |= {"block_out_channels": [32, 32, 64], "cross_attention_dim": 64}
    unet = out.parent / "unet.json"
    unet.write_text(json.dumps(config))
    return Namespace(**COMMON, data=data, autoencoder=autoencoder, text=text, out=out, start=None, unet=unet,
                     prediction="v_prediction", steps=steps, batch=4, rate=1e-3, decay=0.9, fall=0.3, warm=100,
                     pairs=0.3, workers=0)  # fmt: skip


@pytest.fixture(scope="module")
def base(data: Path, autoencoder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import train_base

    out = tmp_path_factory.mktemp("base") / "base"
    train_base.train(base_options(data, autoencoder, text, out, steps=4))
    return out


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """The trained average of a run."""
    state: dict[str, torch.Tensor] = torch.load(folder / "state.pt", weights_only=True)[part]
    return state


def test_the_text_encoder_is_loaded_with_its_tokenizer(text: Path) -> None:
    import train_text

    towers, tokenizer = train_text.read_towers(text)
    encoder = load_text_encoder(text / "text_encoder")
    ids = torch.tensor([[tokenizer.bos, *tokenizer.ids("red circle"), tokenizer.eos]])
    torch.testing.assert_close(encoder(ids).pooled, towers.text(ids).pooled)
    assert towers.read(ids).norm().item() == pytest.approx(1)
    assert tokenizer.ids("形") != tokenizer.ids("猫")  # bytes at least: no writing is unknown


def test_the_latents_are_centred_and_of_unit_scale(data: Path, autoencoder: Path) -> None:
    from scenes import Scene, read_icons, render

    icons = read_icons(data)
    z = load_vae(autoencoder).encode(render(icons, [Scene((i,)) for i in range(len(icons))]))[0]
    assert z.mean((0, 2, 3)).abs().max() < 0.02  # half precision's rounding, and no more
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.02


def test_a_decoder_by_itself_learns_and_leaves_the_latents(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    import train_autoencoder

    options = autoencoder_options(data, tmp_path)
    options.start, options.decoder = autoencoder, True
    options.steps, options.save_every, options.rate = 12, 4, 1e-2
    train_autoencoder.train(options)
    log = [json.loads(line)["psnr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1] > log[0] + 0.2
    before, after = load_vae(autoencoder).state_dict(), load_vae(tmp_path).state_dict()
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert same == {name for name in before if name.startswith(("encoder.", "quant_conv."))}


def test_the_preview_decoder_learns_the_latents(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    import train_preview

    own = {"channels": 8, "steps": 16, "batch": 2, "rate": 1e-2, "autoencoder": autoencoder, "save_every": 4}
    train_preview.train(Namespace(**COMMON | own, data=data, out=tmp_path))
    log = [json.loads(line)["psnr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1] > log[0] + 1
    tiny = load_vae(tmp_path)
    assert isinstance(tiny, AutoencoderTiny)
    assert tiny.decode(torch.zeros(1, 4, 16, 16)).shape == (1, 3, 128, 128)


def test_the_base_model_draws(base: Path) -> None:
    engine = calotype.load(base)
    picture = engine("le red circle", steps=2, guidance=2.0).image
    assert picture.size == (128, 128)
    other = engine("blue square", steps=2, guidance=2.0).image
    assert np.asarray(picture).tobytes() != np.asarray(other).tobytes()  # the text is read


def test_other_phrases_come_to_mean_the_names(data: Path, base: Path, tmp_path: Path) -> None:
    import train_phrases

    own = {"steps": 60, "batch": 20, "rate": 1e-2, "save_every": 20}
    train_phrases.train(Namespace(**COMMON | own, data=data, base=base, out=tmp_path))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for kind in ("foreign", "english"):
        assert log[-1][kind] < 0.8 * log[0][kind]
    assert log[-1]["kept"] < log[-1]["foreign"]  # what was known stays
    before, after = load_text_encoder(base / "text_encoder"), load_text_encoder(tmp_path / "text_encoder")
    assert before.config == after.config


def test_phrases_say_the_whole_scene_and_mean_a_caption(data: Path) -> None:
    from phrases import in_other_words
    from scenes import STYLES, Scene, read_icons

    icons = read_icons(data)
    dice = np.random.default_rng(0)
    for _ in range(200):
        said, meant = in_other_words(icons, Scene((0,), ground="pink", color="blue"), dice)
        assert "blue red circle" in said
        assert "pink" in said
        assert meant in ("blue red circle, on a pink background", "blue red circle, flat style, on a pink background")
        assert (STYLES["flat"][0] in said) == ("flat" in meant)
    said, meant = in_other_words(icons, Scene((0, 4)), dice)
    assert said.index("a red circle") < said.index("a green square")
    assert meant.startswith("a red circle and a green square")


def test_the_name_of_an_animal_means_its_face_in_all_languages(tmp_path: Path) -> None:
    from phrases import in_other_words
    from scenes import Scene, caption, names_alone, read_icons, read_names

    rows = [
        ("cat", "1f408", "flat"),
        ("cat face", "1f431", "flat"),
        ("cat", None, "clip art"),
        ("fox", "1f98a", "flat"),
    ]
    icon = Image.new("RGBA", (128, 128), "orange")
    pictures = [({"caption": name, "hex": code, "style": style, "kw": ["pet"]}, icon) for name, code, style in rows]
    animals = {
        "1f408": {"es": ["gato", "minino"]},
        "1f431": {"es": ["cara de gato", "mascota"]},
        "1f98a": {"es": ["zorro"]},
    }
    write_icons(tmp_path, pictures, animals)
    icons, names = read_icons(tmp_path), read_names(tmp_path)
    assert [row["name"] for row in icons.rows] == ["full body cat", "cat", "cat", "fox"]
    assert [row["caption"] for row in icons.rows] == [name for name, _, _ in rows]  # what sets are held out by
    found = [names_alone(icons, names, Scene((i,))) for i in range(4)]
    assert found == [{}, {"es": ["gato", "cara de gato", "mascota"]}, {}, {"es": ["zorro"]}]
    dice = np.random.default_rng(0)
    for _ in range(50):
        text = caption(icons, Scene((1, 0)), dice)
        assert not text or text.startswith(("a cat and a full body cat", "a cat left of a full body cat"))
        assert "face" not in caption(icons, Scene((1,)), dice)
        assert in_other_words(icons, Scene((1,)), dice)[1] in ("cat", "cat, flat style")


def test_nobody_is_taught_phrases_where_the_data_lack_names(data: Path, base: Path, tmp_path: Path) -> None:
    import train_phrases

    for file in data.iterdir():
        if file.name != "names.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    own = {"steps": 2, "batch": 2, "rate": 1e-3}
    with pytest.raises(SystemExit, match=r"no icon has a name in another language: .*names\.json"):
        train_phrases.train(Namespace(**COMMON, **own, data=tmp_path, base=base, out=tmp_path / "out"))


def test_packing_links_what_others_have(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import package

    def pack(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["package.py", *map(str, arguments)])
        package.main()

    student, trained, out = tmp_path / "student", tmp_path / "trained", tmp_path / "kept" / "base"
    pack(base, student)
    pack(base, trained)
    (student / "unet" / "config.json").write_text("{}")  # another U-Net
    pack(base, out, "--share", student, "--share", trained)
    links = {path.name: path.resolve().parent for path in out.iterdir() if path.is_symlink()}
    assert links == {"tokenizer": student, "text_encoder": student, "vae": student, "unet": trained}
    assert not (out / "state.pt").exists()
    request: dict[str, Any] = {"steps": 1, "guidance": 1.0, "seed": 0}
    drawn = [np.asarray(calotype.load(folder)("red circle", **request).image) for folder in (trained, out)]
    assert np.array_equal(*drawn)
    card = tmp_path / "card.md"
    card.write_text("{base.steps} steps, and {base.nothing}")
    with pytest.raises(SystemExit, match=r"names \{base\.nothing\}, which .* has no record of"):
        pack(base, student, "--card", card)
    assert (student / "unet" / "config.json").read_text() == "{}"  # as it was


def test_a_distilled_model_moves_as_its_base_does(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import add_difference
    import package
    from folders import read_part, write_part

    def run(script: Any, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        script.main()

    new, distilled, out = tmp_path / "new", tmp_path / "distilled", tmp_path / "out"
    for folder in (new, distilled):
        run(package, base, folder)
    config = json.loads((base / "unet" / "config.json").read_text())
    old = {name: tensor.float() for name, tensor in read_part(base / "unet").items()}
    write_part(new / "unet", "diffusion_pytorch_model", {k: v + 0.5 for k, v in old.items()}, config)
    text = read_part(base / "text_encoder")
    read = json.loads((base / "text_encoder" / "config.json").read_text())
    write_part(new / "text_encoder", "model", {k: v + 1 for k, v in text.items()}, read)
    own = {"time_embedding.cond_proj.weight": torch.ones(4, 8)}  # as an LCM's has
    write_part(distilled / "unet", "diffusion_pytorch_model", {k: v * 2 for k, v in old.items()} | own, config)
    run(add_difference, distilled, base, new, out, "--share", 0.5)
    found = read_part(out / "unet")
    assert found.keys() == old.keys() | own.keys()
    for name, tensor in old.items():
        torch.testing.assert_close(found[name].float(), tensor * 2 + 0.25, atol=2e-3, rtol=2e-3)
    assert torch.equal(found["time_embedding.cond_proj.weight"].float(), torch.ones(4, 8))
    moved = read_part(out / "text_encoder")
    assert all(torch.allclose(moved[name].float(), text[name].float() + 0.5, atol=2e-3) for name in text)
    run(add_difference, base, base, new, out, "--share", 0)  # in the same place
    assert calotype.load(out)("red circle", steps=1, guidance=1.0).image.size == (128, 128)
    assert json.loads((out / "training.json").read_text())["share"] == 0
    with pytest.raises(SystemExit, match="is not of one shape in all three"):
        add_difference.moved(old, old, {**old, "conv_in.weight": torch.zeros(1)})


def test_a_stopped_stage_goes_on_as_if_it_had_not_been(
    data: Path, autoencoder: Path, text: Path, base: Path, tmp_path: Path
) -> None:
    import train_base
    import train_text

    train_text.train(text_options(data, tmp_path / "text", steps=2))
    again = weights(tmp_path / "text", "model")
    for name, tensor in weights(text, "model").items():
        assert torch.equal(tensor, again[name]), name

    for steps in (2, 4):  # the rate of a shorter run falls sooner: the second must not notice
        options = base_options(data, autoencoder, text, tmp_path / "base", steps)
        options.fall = 1e-9
        train_base.train(options)
    options = base_options(data, autoencoder, text, tmp_path / "whole", 4)
    options.fall = 1e-9
    train_base.train(options)
    stopped = weights(tmp_path / "base", "average")
    for name, tensor in weights(tmp_path / "whole", "average").items():
        assert torch.equal(tensor, stopped[name]), name


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_is_used_where_the_processor_has_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import resumable

    monkeypatch.setattr(resumable, "multiplies_bfloat16", lambda device: native)
    cpu, x = torch.device("cpu"), torch.ones(2, 2)
    with resumable.autocast(cpu):
        assert (x @ x).dtype == (torch.bfloat16 if native else torch.float32)
        assert torch.backends.cuda.flash_sdp_enabled() is not native  # plain attention beside it
    with resumable.autocast(cpu, float32=True):
        assert (x @ x).dtype == torch.float32
        assert torch.backends.cuda.flash_sdp_enabled()


def test_a_run_with_other_settings_is_not_gone_on_with(data: Path, text: Path) -> None:
    import train_text

    options = text_options(data, text, steps=4)
    options.batch = 8
    with pytest.raises(SystemExit, match="other settings \\(batch\\)"):
        train_text.train(options)


def test_a_control_begins_as_nothing_and_is_loaded(data: Path, base: Path, tmp_path: Path) -> None:
    import train_control

    from calotype.nn.unet import Conditioning

    unet = load_parts(str(base)).unet
    control = train_control.new_control(unet)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 32, 64)
    with torch.inference_mode():
        steered = train_control.Steered(unet, control)(x, t, context, torch.rand(2, 3, 128, 128))
        assert torch.equal(steered, unet(x, t, Conditioning(context)))

    trained = {}
    for adapter in (False, True):
        out = tmp_path / f"control-{adapter}"
        own = {"adapter": adapter, "steps": 2, "batch": 2, "rate": 1e-3}
        train_control.train(Namespace(**COMMON, **own, data=data, base=base, out=out))
        trained[adapter] = weights(out, "average")
        for name, parameter in load_control(out, unet=unet.config).state_dict().items():
            torch.testing.assert_close(parameter, trained[adapter][f"network.{name}"], rtol=1e-3, atol=1e-4)
    assert trained[False]["network.controlnet_mid_block.weight"].abs().max() > 0


def test_controls_learn_where_there_is_much_noise() -> None:
    from train_base import early

    t = early(torch.arange(1000), 1000)
    assert t.min() >= 0
    assert t.max() == 999
    assert abs(t.double().mean() - 750) < 1  # of 1 - u^3
    assert (t >= 875).double().mean() > 0.49


def test_a_motion_begins_as_none_and_moves_clips(data: Path, base: Path, tmp_path: Path) -> None:
    import train_motion

    from calotype.nn.motion import attach
    from calotype.nn.unet import Conditioning

    unet = load_parts(str(base)).unet
    x, t, context = torch.randn(4, 4, 16, 16), torch.tensor([500] * 4), torch.randn(4, 32, 64)
    with torch.inference_mode():
        still = unet(x, t, Conditioning(context))
        attach(unet, train_motion.new_motion(unet.config, 4))
        assert torch.equal(unet(x, t, Conditioning(context), frames=4), still)

    own = {"motion": "bounce", "frames": 4, "steps": 2, "batch": 1, "rate": 1e-3}
    train_motion.train(Namespace(**COMMON, **own, data=data, base=base, out=tmp_path / "motion"))
    engine = calotype.load(base)
    engine.set_motion(tmp_path / "motion")
    assert engine.parts.motion is not None
    assert torch.equal(engine.parts.motion.schedule.alpha, engine.parts.schedule.alpha)
    assert engine.describe()["motion"]["beta_schedule"] == "scaled_linear"
    frames = engine("red circle", frames=4, steps=2, guidance=2.0).images
    assert len(frames) == 4


@pytest.mark.parametrize(
    ("motion", "place"),
    [("bounce", [(0, 0.25), (0, -0.104), (0, -0.25), (0, -0.104)]), ("sway", [(0, 0), (0.22, 0), (0, 0), (-0.22, 0)])],
)
def test_clips_move_as_the_motion_says(motion: str, place: list[tuple[float, float]]) -> None:
    from train_motion import clips

    dot = torch.ones(1, 3, 128, 128)
    dot[:, :, 60:68, 60:68] = -1
    moved = 1 - clips(dot, motion, 4)[:, 0]  # where it is not white
    at = (torch.arange(128) - 63.5) / 64
    for frame, (right, down) in zip(moved, place, strict=True):
        assert (frame.sum(0) @ at / frame.sum()).item() == pytest.approx(right, abs=0.01)
        assert (frame.sum(1) @ at / frame.sum()).item() == pytest.approx(down, abs=0.01)


def test_captions_are_true_of_what_they_say_and_no_more(data: Path) -> None:
    import train_text
    from scenes import Scene, read_icons

    icons = read_icons(data)
    Told = train_text.Told
    flat, round3d = icons.rows[0]["style"], icons.rows[1]["style"]
    plain = Told(Scene((0,)), "red circle", ("1f534",), "")
    styled = Told(Scene((0,)), "red circle, flat style", ("1f534",), flat)
    on_blue = Told(Scene((0,), ground="blue"), "red circle, on a blue background", ("1f534",), "")
    square = Told(Scene((4,)), "green square", ("1f7e9",), "")
    assert plain.true_of(styled, flat)
    assert plain.true_of(on_blue, round3d)
    assert styled.true_of(plain, flat)
    assert not styled.true_of(plain, round3d)
    assert not on_blue.true_of(plain, flat)
    assert not plain.true_of(square, flat)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_two_icons_are_in_as_many_pictures_as_asked_for(share: float, data: Path) -> None:
    from scenes import read_icons, told_scene

    icons, dice = read_icons(data), np.random.default_rng(0)
    shares = {}
    for first in (0, 2):  # a flat one, which needs no word for its style, and a blob, which does
        scenes = [told_scene(icons, first, 4, dice, share) for _ in range(400)]
        shares[icons.rows[first]["style"]] = sum(len(scene.icons) == 2 for scene in scenes) / 400
    assert shares["flat"] == pytest.approx(share, abs=0.08 * (0 < share < 1))
    assert shares["blob"] == pytest.approx(share / 3, abs=0.08 * (share > 0))


def test_held_out_pairs_are_never_shown() -> None:
    from scenes import UNTOLD, held_out_pairs, shown_and_held_out

    rows: list[dict[str, Any]] = [
        {"id": 10 * concept + i, "hex": f"{concept:x}", "caption": str(concept), "style": style}
        for concept in range(30)
        for i, style in enumerate(["flat", "3d", "blob", "fx", "noto", "gradient", "twemoji", UNTOLD])
    ]
    shown, held_out = shown_and_held_out(rows, 20)
    assert len(held_out) == 20
    assert not {rows[i]["id"] for i in shown} & held_out_pairs(rows, 20)
    assert all(rows[i]["style"] != UNTOLD for i in shown)
    assert {rows[i]["hex"] for i in held_out} <= {rows[i]["hex"] for i in shown}  # each concept is seen elsewhere


def test_muon_makes_singular_values_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    import muon

    torch.manual_seed(0)
    matrix = torch.randn(24, 60) * torch.logspace(0, -2, 24)[:, None]
    found = []
    for bfloat16 in (True, False):  # emulated, it would take a minute a step
        monkeypatch.setattr(muon, "multiplies_bfloat16", lambda _, answer=bfloat16: answer)
        found.append(muon.orthogonal(matrix))
        values = torch.linalg.svdvals(found[-1])
        assert values.min() > 0.5
        assert values.max() < 1.3
    apart = (found[0] - found[1]).abs().max()
    assert 1e-3 < apart < 0.1
    assert (found[1] - muon.orthogonal(matrix.double())).abs().max() < 1e-5


def test_muon_leaves_rows_of_a_table_that_had_no_gradient() -> None:
    from muon import Muon

    table = torch.nn.Parameter(torch.randn(8, 8))
    table.grad = torch.zeros(8, 8)
    table.grad[3] = 1.0
    before = table.detach().clone()
    Muon([{"params": [table], "matrix": False}], lr=0.1).step()
    assert torch.equal(before[:3], table[:3])
    assert (before[3] - table[3]).abs().min() > 0.05


@pytest.mark.parametrize("missing", ["pictures-128.tar", "manifest.jsonl"])
def test_missing_pictures_are_one_line_with_the_remedy(missing: str, data: Path, tmp_path: Path) -> None:
    from scenes import read_icons

    for file in data.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SystemExit, match=f"{missing} is missing: make it with"):
        read_icons(tmp_path)


def test_a_list_that_is_longer_than_the_pictures_is_told(data: Path, tmp_path: Path) -> None:
    from scenes import read_icons

    (tmp_path / "pictures-128.tar").write_bytes((data / "pictures-128.tar").read_bytes())
    lines = (data / "manifest.jsonl").read_text().splitlines()
    more = json.dumps(json.loads(lines[0]) | {"id": 99})
    (tmp_path / "manifest.jsonl").write_text("\n".join([*lines, more]))
    with pytest.raises(SystemExit, match=r"lacks 1 pictures of its list, such as 00099\.webp"):
        read_icons(tmp_path)
