"""calotype bench: the same picture from each, stages that add up, and a peer that is missing or fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from calotype import cli
from calotype.bench import compare, random_model, table
from calotype.bench.compare import OURS, STAGES, Comparison, Contender, Figures, Peer
from calotype.bench.task import Task
from calotype.cli import doctor
from calotype.errors import CalotypeError
from calotype.weights.load import load_parts
from checkpoints import write_model

TASK = Task("model", "", 64, 64, steps=2, guidance=1.0, dtype="float32", threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bench") / "model", lcm=True)


def figures(**seconds: list[float]) -> Figures:
    return Figures({stage: seconds.get(stage, []) for stage in STAGES})


def comparison(**contenders: Figures) -> Comparison:
    return Comparison(TASK, ceiling=1e12, flops=10**9, figures=contenders, processor="a processor")


def test_all_draw_the_same_picture_and_their_stages_add_up(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, plot = tmp_path / "found.json", tmp_path / "plot.png"
    options = ["--against", "diffusers,openvino", "--steps", "2", "--runs", "1", "--size", "64x64", "--quiet"]
    wanted = ["--optimize", "none", "--optimize", "packed", "--json", str(found), "--plot", str(plot)]
    assert cli.main(["bench", str(model), *options, *wanted]) == 0
    told = json.loads(found.read_text())
    assert list(told["contenders"]) == ["calotype", "calotype packed", "diffusers", "openvino"]
    for each in told["contenders"].values():
        taken = each["medians"]
        assert taken["picture"] == pytest.approx(taken["text"] + 2 * taken["unet"] + taken["decode"] + taken["rest"])
        assert all(taken[stage] > 0 for stage in STAGES)
        assert taken["cold"] > taken["import"] + taken["load"] + taken["first"]
        assert each["distance"] < 0.5  # of 255
    assert told["contenders"]["openvino"]["convert"] > 0
    assert told["flops"] > 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["calotype", "diffusers", "openvino"]
    with Image.open(plot) as drawn:
        assert len(set(drawn.convert("RGB").resize((200, 100)).get_flattened_data())) > 10


def test_a_ratio_is_the_median_of_each_rounds() -> None:
    """The second round was slow for both."""
    found = comparison(calotype=figures(picture=[1.0, 10.0, 1.0]), peer=figures(picture=[2.0, 20.0, 4.0]))
    assert found.ratio("peer", "picture") == 2.0
    assert found.ratio("peer", "text") is None


def test_the_share_of_the_ceiling() -> None:
    assert comparison(calotype=figures(unet=[0.004])).share("calotype") == pytest.approx(0.25)


def test_the_table_has_a_row_for_each_and_how_many_times_as_fast() -> None:
    ours, theirs = figures(unet=[0.01], picture=[0.1]), figures(unet=[0.02], picture=[0.15])
    ours.distance, theirs.convert = 1.25, 30.0
    text = table.lines(comparison(calotype=ours, peer=theirs))
    assert "peer: 30 s more, once, to convert the model" in text
    row = next(line for line in text if line.startswith("calotype "))
    assert row.split() == ["calotype", "10.0", "100", "10", "%", "1.25"]
    assert text[-1].split() == ["peer", "2.00", "x", "1.50", "x"]


def test_a_missing_peer_is_named_and_the_others_run(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(compare.PEERS, "diffusers", Peer("diffusers", ("diffusers", "nobody_has_this")))
    assert cli.main(["bench", str(model), "--against", "diffusers", "--runs", "1", "--steps", "1"]) == 0
    out, err = capsys.readouterr()
    assert "diffusers is left out: nobody_has_this is not installed; pip install 'calotype[bench]' brings it" in err
    assert "calotype" in out
    assert "diffusers" not in out


def test_a_peer_that_fails_is_left_out_and_we_are_not(tmp_path: Path, model: Path) -> None:
    ours = Task(str(model), str(tmp_path / "ours"), 64, 64, steps=1, guidance=8.5, dtype="float32", threads=1)
    good = Contender("calotype", OURS, ours)
    bad = Contender("peer", Peer("nobody"), Task.from_json(ours.to_json()))
    warnings: list[str] = []
    options: dict[str, Any] = {"starts": 1, "runs": 1, "show": lambda text: None, "warn": warnings.append}
    reference = Task.from_json(ours.to_json().replace('"count": false', '"count": true'))
    found = compare.compare([good, bad], reference, **options)
    assert list(found.figures) == ["calotype"]
    assert warnings == [
        "peer failed: ModuleNotFoundError: No module named 'calotype.bench.peers.nobody': it is left out"
    ]
    with pytest.raises(CalotypeError, match="peer failed"):
        compare.compare([bad, good], reference, **options)


def test_the_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"] > 2**30
    assert found["ceilings"]["float32"] > 1e9
    assert found["dtype"] in found["ceilings"]
    sides = {name: model["side"] for name, model in found["models"].items()}
    assert sides == {"sd15": 512, "ssd1b": 1024, "sdxl": 1024}
    size = torch.float32.itemsize if found["dtype"] == "float32" else 2
    parameters = 859.5e6 + 83.7e6 + 123.1e6  # U-Net, autoencoder, text encoder
    assert found["models"]["sd15"]["bytes"] == pytest.approx(size * (parameters + 1750 * 512**2), rel=0.001)
    text = doctor.rows(found)
    assert (text[-1][0], text[-1][1][:14]) == ("fits", "sd15 at 512 px")
    assert all("\n" not in line for _, line in text)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--random", "sd16"], "--random is 'sd16': allowed are sd15, sd21, sdxl, ssd1b"),
        (["--against", "comfyui"], "--against has 'comfyui': allowed are diffusers, openvino"),
        (["MODEL", "--random", "sd15"], "MODEL and --random contradict each other"),
        (["--plot", "plot.doc"], "--plot must end in .png or .svg or .pdf, not 'plot.doc'"),
        (["--json", "nowhere/found.json"], "there is no folder 'nowhere'"),
        (["--dtype", "int4"], "--dtype is 'int4': allowed are auto, float32, bfloat16, float16"),
        (["--optimize", "magic"], "optimize has 'magic'"),
        (["--decoder", "large"], "--decoder is 'large': allowed are full, tiny"),
        (["--size", "64"], "--size must be WIDTHxHEIGHT"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    options: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *options]) == 2 - ("nowhere" in error)
    assert error in capsys.readouterr().err


def test_random_weights_are_a_model_whose_numbers_stay_of_a_size(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the configs of a small model in the family's place."""
    texts = {
        str(path.relative_to(model)): json.loads(path.read_text())
        for path in model.rglob("*.json")
        if path.name in ("config.json", "model_index.json", "scheduler_config.json", "tokenizer_config.json")
    }
    texts["text_encoder/config.json"]["vocab_size"] = 49408
    monkeypatch.setattr(random_model, "family_texts", lambda family: texts)
    random_model.write("sd15", tmp_path / "a")
    random_model.write("sd15", tmp_path / "b")
    parts = load_parts(tmp_path / "a")
    assert parts.unet.config.guidance_dim == random_model.GUIDANCE_DIM
    assert parts.tiny_vae is not None
    weight = parts.unet.conv_in.weight
    assert weight.std().item() * (weight[0].numel() ** 0.5) == pytest.approx(1, rel=0.2)
    name = Path("unet/diffusion_pytorch_model.safetensors")
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
