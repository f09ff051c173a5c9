"""Adapters that turn or scale a weight, and whole values: each against its authors' formula, written another way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters import normal, save
from calotype.errors import CalotypeWarning, CheckpointError
from calotype.lora import Stack, load_lora
from calotype.lora.names import networks
from calotype.nn.unet import Conditioning
from calotype.parts import Parts
from calotype.weights.load import load_parts

SQUARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # (32, 32) in the tiny Stable Diffusion 1.5
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"  # (32, 128), biased
CONV = "down_blocks.1.resnets.0.conv1"  # (64, 32, 3, 3), biased
SQUARE_CONV = "down_blocks.0.resnets.0.conv1"  # (32, 32, 3, 3)
PROJECTION = "down_blocks.0.attentions.0.proj_in"  # (32, 32, 1, 1)
SHAPES = {
    SQUARE: (32, 32),
    FF: (32, 128),
    CONV: (64, 32, 3, 3),
    SQUARE_CONV: (32, 32, 3, 3),
    PROJECTION: (32, 32, 1, 1),
}

Keys = dict[str, Tensor]
Formula = Callable[[Tensor], Tensor]  # the base's weight -> the trained one


@pytest.fixture
def parts(tiny_sd15: Path) -> Parts:
    return load_parts(tiny_sd15)


def kohya(module: str, prefix: str = "lora_unet_") -> str:
    return prefix + module.replace(".", "_")


def file_of(folder: Path, name: str, keys: Keys, *more: Keys) -> Path:
    tensors = {f"{name}.{part}": tensor for part, tensor in keys.items()}
    return save(folder / "it.safetensors", tensors)


def weight(parts: Parts, module: str, parameter: str = "weight") -> Tensor:
    return parts.unet.get_parameter(f"{module}.{parameter}")


def close(made: Tensor, wanted: Tensor, bound: float = 1e-5) -> bool:
    assert made.shape == wanted.shape
    return ((made - wanted).norm() / wanted.norm()).item() < bound


# ---- formulas ----


def by_rows(weight: Tensor, matrix: Tensor) -> Tensor:
    return (matrix @ weight.flatten(1)).reshape(weight.shape)


def by_columns(weight: Tensor, matrix: Tensor) -> Tensor:
    return (weight.flatten(1) @ matrix).reshape(weight.shape)


def turned(blocks: Tensor, most: float = math.inf) -> Tensor:
    """(I + Q) (I - Q)^-1 of all blocks B along the diagonal, Q = B - B^T of a norm of at most `most`."""
    q = torch.block_diag(*(blocks - blocks.transpose(1, 2))).double()
    q = q * min(1.0, most / float(q.norm()))
    eye = torch.eye(len(q)).double()
    return ((eye + q) @ torch.linalg.inv(eye - q)).float()


def butterfly(weight: Tensor, factors: Tensor, most: float = math.inf) -> Tensor:
    """BOFT: each factor between two shuffles of the outputs, which are matrices here."""
    norm = float((factors - factors.transpose(-1, -2)).norm())
    size = factors.shape[-1]
    for step, blocks in enumerate(factors):
        limited = blocks * min(1.0, most / norm)
        far = 2**step * size // 2
        order = torch.arange(len(weight)).reshape(-1, 2, far).transpose(1, 2).flatten()
        shuffle = torch.eye(len(weight))[order]
        weight = by_rows(weight, shuffle.T @ turned(limited) @ shuffle)
    return weight


def series(packed: Tensor) -> Tensor:
    """I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 of blocks whose upper triangles are given, along the diagonal."""
    size = math.isqrt(2 * packed.shape[1]) + 1
    blocks = []
    for row in packed:
        q = torch.zeros(size, size)
        numbers = iter(row)
        for i in range(size):
            for j in range(i + 1, size):
                q[i, j] = next(numbers)
        q = q - q.T
        powers = [torch.linalg.matrix_power(q, i) for i in range(5)]
        blocks.append(powers[0] + 2 * powers[1] + 2 * powers[2] + 2 * powers[3] + powers[4])
    return torch.block_diag(*blocks)


def small(*shape: int, seed: int = 3) -> Tensor:
    return 0.1 * normal(*shape, seed=seed)


def kinds() -> dict[str, tuple[str, str, Keys, Formula]]:
    """name -> (module, the name in the file, what the file holds of it, the trained weight)."""
    flag = torch.tensor
    out, into = small(64), small(32)
    blocks, wide = small(4, 8, 8), small(4, 16, 16)
    rescale = 1 + small(64, 1, 1, 1)
    boft, boft_wide = small(3, 4, 8, 8), small(4, 8, 8, 8)
    glora = {"a1": small(32, 3), "a2": small(3, 32), "b1": small(32, 3), "b2": small(3, 32)}
    general = {
        "a1": small(32, 3, 1, 1),
        "a2": small(3, 32, 1, 1),
        "b1": small(64, 3, 1, 1),
        "b2": small(3, 32, 3, 3),
    }
    a, b = (general["a1"].flatten(1) @ general["a2"].flatten(1), general["b1"].flatten(1) @ general["b2"].flatten(1))
    packed, packed_conv, shared = small(4, 28), small(36, 28), small(1, 28)
    up, down, values = small(64, 3, 1, 1), small(3, 32, 3, 3), torch.tensor([1.0, -2.0])
    sparse = torch.zeros(64, 288)
    sparse[3, 5], sparse[63, 287] = values
    whole = small(64, 32, 3, 3)
    return {
        "IA3 of outputs": (
            CONV,
            kohya(CONV),
            {"weight": out.reshape(1, 64, 1, 1), "on_input": flag(0)},
            lambda w: w * (1 + out[:, None, None, None]),
        ),
        "IA3 of inputs": (
            CONV,
            kohya(CONV),
            {"weight": into.reshape(1, 32, 1, 1), "on_input": flag(1)},
            lambda w: w * (1 + into[:, None, None]),
        ),
        "IA3 of a square convolution's outputs": (
            SQUARE_CONV,
            kohya(SQUARE_CONV),
            {"weight": into.reshape(1, 32, 1, 1), "on_input": flag(0.0)},
            lambda w: w * (1 + into[:, None, None, None]),
        ),
        "OFT of kohya": (
            SQUARE,
            kohya(SQUARE, "oft_unet_"),
            {"oft_blocks": blocks, "alpha": flag(1e-3)},
            lambda w: by_rows(w, turned(blocks, 32e-3).T),
        ),
        "OFT of LyCORIS": (
            CONV,
            kohya(CONV),
            {"oft_blocks": wide, "alpha": flag(0), "rescale": rescale},
            lambda w: rescale * by_rows(w, turned(wide).T),
        ),
        "OFT of 1x1 convolutions": (
            PROJECTION,
            kohya(PROJECTION, "lycoris_"),
            {"oft_blocks": blocks, "alpha": flag(0.02)},
            lambda w: by_rows(w, turned(blocks, 0.64).T),
        ),
        "OFT of LyCORIS in 2023": (
            FF,
            kohya(FF),
            {"oft_diag": torch.stack([turned(block[None]) for block in blocks])},
            lambda w: by_rows(w, turned(blocks).T),
        ),
        "OFT of ComfyUI": (
            "conv_in",
            "diffusion_model.input_blocks.0.0",
            {"oft_blocks": blocks, "alpha": flag(1.0)},
            lambda w: by_rows(w, turned(blocks, 1.0).T),
        ),
        "BOFT": (
            FF,
            kohya(FF),
            {"oft_blocks": boft, "alpha": flag(0)},
            lambda w: butterfly(w, boft),
        ),
        "BOFT, constrained and rescaled": (
            CONV,
            kohya(CONV),
            {"oft_blocks": boft_wide, "alpha": flag(0.01), "rescale": rescale},
            lambda w: rescale * butterfly(w, boft_wide, 0.64),
        ),
        "OFT of OneTrainer": (
            FF,
            kohya(FF),
            {"oft_R.weight": small(16, 28)},
            lambda w: by_columns(w, series(small(16, 28)).T),
        ),
        "OFT of OneTrainer, shared": (
            FF,
            f"unet.{FF}",
            {"oft_R.weight": shared},
            lambda w: by_columns(w, series(shared.expand(16, 28)).T),
        ),
        "OFT of OneTrainer, scaled": (
            SQUARE,
            f"unet.{SQUARE}",
            {"oft_R.weight": packed, "oft_R.scaled_oft": flag(True)},
            lambda w: by_columns(w, series(packed / (2 * math.sqrt(7))).T),
        ),
        "OFT of OneTrainer, a convolution": (
            CONV,
            kohya(CONV),
            {"oft_R.weight": packed_conv},
            lambda w: by_columns(w, series(packed_conv)),
        ),
        "GLoRA": (
            SQUARE,
            kohya(SQUARE),
            {**{f"{part}.weight": factor for part, factor in glora.items()}, "alpha": flag(6)},
            lambda w: w + 2 * (w @ glora["a1"] @ glora["a2"] + glora["b1"] @ glora["b2"]),
        ),
        "GLoRA before LyCORIS 3": (
            SQUARE,
            kohya(SQUARE),
            {
                "a1.weight": glora["a2"],
                "a2.weight": glora["a1"],
                "b1.weight": glora["b2"],
                "b2.weight": glora["b1"],
                "alpha": flag(3.0),
            },
            lambda w: w + w @ glora["a1"] @ glora["a2"] + glora["b1"] @ glora["b2"],
        ),
        "GLoRA of a convolution": (
            CONV,
            kohya(CONV),
            {f"{part}.weight": factor for part, factor in general.items()},
            lambda w: w + torch.einsum("oikl,ij->ojkl", w, a) + b.reshape(w.shape),
        ),
        "a value": (CONV, f"diffusion_model.{CONV}", {"set_weight": whole}, lambda w: whole),
        "LoCon and single elements": (
            CONV,
            kohya(CONV),
            {
                "lora_up.weight": up,
                "lora_down.weight": down,
                "alpha": flag([3.0]),
                "bias_indices": torch.tensor([[3, 63], [5, 287]], dtype=torch.int16),
                "bias_values": values,
                "bias_size": torch.tensor([64, 288], dtype=torch.int16),
            },
            lambda w: w + (up.flatten(1) @ down.flatten(1) + sparse).reshape(w.shape),
        ),
        "LoRA with a scalar": (
            FF,
            kohya(FF),
            {"lora_up.weight": small(32, 3), "lora_down.weight": small(3, 128), "scalar": flag(0.25)},
            lambda w: w + 0.25 * small(32, 3) @ small(3, 128),
        ),
        "LoRA that keeps a shape": (
            FF,
            kohya(FF),
            {
                "lora_up.weight": small(32, 3),
                "lora_down.weight": small(3, 128),
                "reshape_weight": torch.tensor([32, 128]),
            },
            lambda w: w + small(32, 3) @ small(3, 128),
        ),
    }


KINDS = kinds()


@pytest.mark.parametrize("kind", KINDS)
def test_kind(parts: Parts, tmp_path: Path, kind: str) -> None:
    """At 1 the trained weight; in a straight line elsewhere; nothing at 0, bit for bit; live the same."""
    module, name, keys, formula = KINDS[kind]
    base = weight(parts, module).clone()
    wanted = formula(base) - base
    stack = Stack(parts)
    stack.add("it", load_lora(file_of(tmp_path, name, keys), parts))
    assert close(weight(parts, module) - base, wanted)
    for scale in (0.5, -1.0):
        stack.set({"it": scale})
        assert close(weight(parts, module) - base, scale * wanted)
    stack.set({"it": 0.6})
    merged = run(parts)
    stack.set({})
    assert torch.equal(weight(parts, module), base)
    plain = run(parts)
    with stack.live({"it": 0.6}):
        assert close(run(parts), merged)
    assert torch.equal(run(parts), plain)
    assert not close(merged, plain, 1e-4), "it does little: this proves little"


def run(parts: Parts) -> Tensor:
    context = normal(2, 77, parts.unet.config.context_dim, seed=2)
    with torch.no_grad():
        result: Tensor = parts.unet(normal(2, 4, 8, 8, seed=1), torch.tensor([999, 259]), Conditioning(context))
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_seen(parts: Parts, tmp_path: Path, kind: str) -> None:
    """Each tensor matters: with NaN in any that is trained, nothing is loaded."""
    module, name, keys, _ = KINDS[kind]
    base = weight(parts, module).clone()
    for part, tensor in keys.items():
        if tensor.is_floating_point():
            spoilt = {**keys, part: torch.full_like(tensor, float("nan"))}
            with pytest.raises(CheckpointError) as caught:
                load_lora(file_of(tmp_path, name, spoilt), parts)
            assert "\n" not in str(caught.value)
            assert "it.safetensors" in str(caught.value)
            assert caught.value.hint is not None
    assert torch.equal(weight(parts, module), base)


SMALL = [torch.bool, torch.int8, torch.uint8, torch.int32, torch.float16, torch.bfloat16]
EIGHTH = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [*SMALL, *EIGHTH], ids=str)
def test_flags_and_alphas_of_any_dtype(parts: Parts, tmp_path: Path, dtype: torch.dtype) -> None:
    base = weight(parts, FF).clone()
    for on_input, into in ((0, small(32)), (1, small(128))):
        path = file_of(tmp_path, kohya(FF), {"weight": into, "on_input": torch.tensor(on_input).to(dtype)})
        stack = Stack(parts)
        stack.add("it", load_lora(path, parts))
        assert close(weight(parts, FF) - base, base * (into if on_input else into[:, None]))
        stack.set({})
    low = {"lora_up.weight": small(32, 3), "lora_down.weight": small(3, 128), "alpha": torch.tensor(1).to(dtype)}
    Stack(parts).add("it", load_lora(file_of(tmp_path, kohya(FF), low), parts))
    assert close(weight(parts, FF) - base, small(32, 3) @ small(3, 128) / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *EIGHTH], ids=str)
@pytest.mark.parametrize("kind", ["OFT of kohya", "BOFT", "OFT of OneTrainer", "GLoRA", "IA3 of inputs"])
def test_small_dtypes(parts: Parts, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """What a file of few bits holds is what is applied: no rounding comes on top."""
    module, name, keys, _ = KINDS[kind]
    base, found = weight(parts, module).clone(), []
    for wide in (False, True):
        held = {part: tensor.to(dtype) if tensor.is_floating_point() else tensor for part, tensor in keys.items()}
        held = {part: tensor.float() if wide else tensor for part, tensor in held.items()}
        stack = Stack(parts)
        stack.add("it", load_lora(file_of(tmp_path, name, held), parts))
        found.append(weight(parts, module) - base)
        stack.set({})
    assert close(*found, 1e-6)


# ---- PEFT ----


def peft(folder: Path, keys: Keys, **config: object) -> Path:
    save(folder / "adapter_model.safetensors", {f"base_model.model.{key}": tensor for key, tensor in keys.items()})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("coft", [False, True])
def test_oft_of_peft_0_13(parts: Parts, tmp_path: Path, coft: bool, share: bool) -> None:
    """It turned the outputs: W' = D^T W, D = (I - S) (I + S)^-1, S = (B - B^T) / 2; COFT: at most eps (O / r)^2."""
    blocks = small(1 if share else 4, 16, 16)
    base = weight(parts, CONV).clone()
    folder = peft(tmp_path, {f"{CONV}.oft_r": blocks}, peft_type="OFT", r=4, coft=coft, eps=1e-3, block_share=share)
    Stack(parts).add("it", load_lora(folder, parts))
    if coft:
        blocks = blocks / blocks.flatten(1).norm(dim=1)[:, None, None] * 1e-3 * 16**2 / math.sqrt(len(blocks))
    wanted = by_rows(base, turned(-blocks.expand(4, 16, 16) / 2).T)
    assert close(weight(parts, CONV), wanted)
    assert not close(weight(parts, CONV), base, 1e-3)


def test_oft_of_peft_0_15(parts: Parts, tmp_path: Path) -> None:
    """It turned the inputs, W' = W D^T, and scaled the outputs."""
    blocks, lengths = small(16, 8, 8), 1 + small(32, 1)
    base = weight(parts, FF).clone()
    keys = {f"{FF}.oft_r.default": blocks, f"{FF}.oft_s.default": lengths}
    folder = peft(tmp_path, keys, peft_type="OFT", r=16, oft_block_size=0, coft=False, block_share=False)
    with pytest.warns(CalotypeWarning, match=r"0\.18"):
        lora = load_lora(folder, parts)
    Stack(parts).add("it", lora)
    assert close(weight(parts, FF), lengths * by_columns(base, turned(-blocks / 2).T))


def test_oft_with_its_config_in_the_header(parts: Parts, tmp_path: Path) -> None:
    """As diffusers keeps configs: here Cayley's transform itself, (I - Q) (I + Q)^-1, from the upper triangles."""
    packed, base = small(4, 28), weight(parts, SQUARE).clone()
    config = {"peft_type": "OFT", "r": 0, "oft_block_size": 8, "use_cayley_neumann": False}
    metadata = {f"unet.{key}": value for key, value in config.items()}
    path = save(tmp_path / "it.safetensors", {f"unet.{SQUARE}.oft_R.weight": packed}, metadata)
    Stack(parts).add("it", load_lora(path, parts))
    triangles = torch.zeros(4, 8, 8)
    triangles[:, *torch.triu_indices(8, 8, 1)] = packed
    assert close(weight(parts, SQUARE), by_columns(base, turned(-triangles).T))


def test_ia3_of_peft_multiplies_biases_of_outputs(parts: Parts, tmp_path: Path) -> None:
    base, bias = weight(parts, FF).clone(), weight(parts, FF, "bias").clone()
    factors = 1 + small(32, 1)
    Stack(parts).add("it", load_lora(peft(tmp_path, {f"{FF}.ia3_l.default": factors}, peft_type="IA3"), parts))
    assert close(weight(parts, FF), factors * base)
    assert close(weight(parts, FF, "bias"), factors.flatten() * bias)


def test_ia3_of_a_square_convolution_needs_its_config(parts: Parts, tmp_path: Path) -> None:
    factors, base = 1 + small(1, 32, 1, 1), weight(parts, SQUARE_CONV).clone()
    config = {"peft_type": "IA3", "feedforward_modules": ["resnets.0.conv1"]}
    Stack(parts).add("it", load_lora(peft(tmp_path, {f"{SQUARE_CONV}.ia3_l": factors}, **config), parts))
    assert close(weight(parts, SQUARE_CONV), factors * base)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"only adapter_config\.json says which"):
        load_lora(tmp_path, parts)


def test_an_older_series_of_peft_is_warned_of(parts: Parts, tmp_path: Path) -> None:
    keys = {f"{SQUARE}.oft_R.weight": small(4, 28)}
    old = {"peft_type": "OFT", "r": 0, "oft_block_size": 8, "use_cayley_neumann": True}
    with pytest.warns(CalotypeWarning, match=r"before PEFT 0\.18"):
        load_lora(peft(tmp_path, keys, **old), parts)
    for sound in ({"peft_version": "0.18.0"}, {"use_cayley_neumann": False}):
        load_lora(peft(tmp_path, keys, **{**old, **sound}), parts)


# ---- the tables of tokens and positions, and what ComfyUI extracts ----


def test_what_comfyui_extracts_of_a_text_encoder(parts: Parts, tmp_path: Path) -> None:
    """Every weight of it, embeddings too; and a projection that Stable Diffusion does not have."""
    (encoder,) = parts.text.models
    prefix = "text_encoders.clip_l.transformer."
    tensors, wanted = {}, {}
    for name, parameter in encoder.named_parameters():
        path, _, last = name.rpartition(".")
        if parameter.ndim > 1:
            up, down = small(len(parameter), 2), small(2, parameter.shape[1])
            tensors |= {f"{prefix}{path}.lora_up.weight": up, f"{prefix}{path}.lora_down.weight": down}
            wanted[name] = up @ down
        else:
            tensors[f"{prefix}{path}.{'diff' if last == 'weight' else 'diff_b'}"] = wanted[name] = small(
                *parameter.shape
            )
    tensors |= {f"{prefix}text_projection.{part}": small(32, 32) for part in ("lora_up.weight", "lora_down.weight")}
    before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    plain = parts.text.encode(["a red fox"])[0]
    stack = Stack(parts)
    stack.add("it", load_lora(save(tmp_path / "it.safetensors", tensors), parts))
    for name, parameter in encoder.named_parameters():
        assert close(parameter - before[name], wanted[name], 1e-4)
    merged = parts.text.encode(["a red fox"])[0]
    stack.set({})
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[name])
    assert not close(merged, plain, 0.1)
    with stack.live({"it": 1.0}):
        assert close(parts.text.encode(["a red fox"])[0], merged)


def test_peft_has_tables_the_other_way_round(parts: Parts, tmp_path: Path) -> None:
    table = parts.text.models[0].text_model.embeddings.position_embedding.weight
    base, name = table.clone(), "text_encoder.text_model.embeddings.position_embedding"
    keys = {"lora_embedding_A": small(3, 77), "lora_embedding_B": small(32, 3)}
    Stack(parts).add("it", load_lora(file_of(tmp_path, name, keys), parts))
    assert close(table - base, (small(32, 3) @ small(3, 77)).T)


def test_biases_and_norms_as_comfyui_trains_them(parts: Parts, tmp_path: Path) -> None:
    names = {
        "out.0": ("conv_norm_out", "weight"),
        "input_blocks.1.1.transformer_blocks.0.norm1": (
            "down_blocks.0.attentions.0.transformer_blocks.0.norm1",
            "weight",
        ),
    }
    tensors = {f"diffusion_model.{ldm}.diff": small(32) for ldm in names} | {
        "diffusion_model.out.2.diff_b": small(4),
        "diffusion_model.time_embed.0.lora_up.weight": small(128, 2),
        "diffusion_model.time_embed.0.lora_down.weight": small(2, 32),
        "diffusion_model.time_embed.0.alpha": torch.tensor(1.0),
    }
    lora = load_lora(save(tmp_path / "it.safetensors", tensors), parts)
    made = {f"{module}.{parameter}" for module, parameter in names.values()}
    assert set(lora.deltas["unet"]) == made | {"conv_out.bias", "time_embedding.linear_1.weight"}


# ---- what is refused ----


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("attn1.to_q.boft_R", r"BOFT as PEFT writes it \(boft_R\)"),
        ("attn1.to_q.boft_s.default", r"BOFT as PEFT writes it"),
        ("attn1.to_q.vera_lambda_b", "VeRA"),
        ("vera_A", "VeRA"),
        ("attn1.to_q.pvera_lambda_b", "PVeRA"),
        ("vblora_vector_bank", "VB-LoRA"),
        ("attn1.to_q.vblora_logits_A", "VB-LoRA"),
        ("attn1.to_q.hra_u", "HRA"),
        ("attn1.to_q.fourierft_spectrum", "FourierFT"),
        ("norm1.ln_tuning_layers.weight", "LN-tuning"),
        ("internal_xlora_classifier.layers.0.weight", "X-LoRA"),
        ("attn1.to_q.lora_E", "AdaLoRA"),
        ("attn1.to_q.glora_A.Xd", "GLoRA as PEFT writes it"),
        ("attn1.to_q.randlora_lambda", "RandLoRA"),
        ("attn1.to_q.shira_weight", "SHiRA"),
        ("attn1.to_q.hira_A", "HiRA"),
        ("attn1.to_q.road_theta", "RoAd"),
        ("attn1.to_q.miss_block", "MiSS"),
        ("lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight", "ControlNet-LLLite"),
        ("lora_controlnet", "Control-LoRA"),
        ("unet:0:up", "cloneofsimo"),
    ],
)
def test_other_kinds_are_refused_by_name(parts: Parts, tmp_path: Path, key: str, said: str) -> None:
    """Also where the file has much that is known."""
    prefix = "" if ":" in key or key.startswith(("lllite", "lora_")) else "base_model.model."
    known = {f"{kohya(FF)}.lora_up.weight": small(32, 3), f"{kohya(FF)}.lora_down.weight": small(3, 128)}
    with pytest.raises(CheckpointError, match=rf"is not supported: it is {said}") as caught:
        load_lora(save(tmp_path / "it.safetensors", {**known, prefix + key: small(4, 4)}), parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "keys", "said"),
    [
        (FF, {"weight": small(32)}, "holds no adapter"),
        (FF, {"weight": small(31), "on_input": torch.tensor(0)}, r"another shape \(.*\[31, 1\]"),
        (FF, {"weight": small(32), "on_input": torch.tensor(2)}, "has the on_input 2"),
        (FF, {"on_input": torch.tensor(0)}, "has ia3_on_input without"),
        (FF, {"oft_blocks": small(3, 8, 8)}, r"another shape \(.*\[24\]"),
        (FF, {"oft_blocks": small(4, 8, 7)}, "shapes that do not go together"),
        (FF, {"oft_blocks": small(32)}, "shapes that do not go together"),
        (FF, {"oft_blocks": small(2, 3, 4, 8, 8)}, "shapes that do not go together"),
        (FF, {"oft_blocks": small(6, 4, 8, 8)}, "shapes that do not go together"),  # more factors than pairs
        (FF, {"oft_blocks": small(0, 4, 8, 8)}, "shapes that do not go together"),
        (FF, {"oft_blocks": small(2, 4, 0, 0)}, "shapes that do not go together"),
        (FF, {"oft_blocks": small(4, 8, 8), "rescale": small(31, 1)}, "another shape"),
        (FF, {"oft_blocks": small(4, 8, 8), "dora_scale": small(32, 1)}, "has DoRA's lengths without a change"),
        (FF, {"oft_diag": small(4, 8)}, "has blocks of shape"),
        (FF, {"oft_blocks": small(4, 8, 8), "scalar": torch.tensor(1.0)}, "has scalar without"),
        (FF, {"lora_up.weight": small(32, 3), "scalar": torch.ones(2)}, "has the scalar"),
        (FF, {"oft_R.weight": small(16, 27)}, "shapes that do not go together"),
        (FF, {"oft_R.weight": small(15, 28)}, r"another shape \(.*\[120\]"),
        (FF, {"oft_r": small(4, 8, 8)}, r"only adapter_config\.json"),
        (FF, {"a1.weight": small(128, 3), "a2.weight": small(3, 128), "b1.weight": small(32, 3)}, "has no b2.weight"),
        (SQUARE, {f"{part}.weight": small(32, 32) for part in ("a1", "a2", "b1", "b2")}, "cannot be told apart"),
        (FF, {f"{part}.weight": small(3, 3) for part in ("a1", "a2", "b1", "b2")}, "another shape"),
        (FF, {f"{part}.weight": small(3, i) for i, part in enumerate(("a1", "a2", "b1", "b2"))}, "do not go together"),
        (FF, {f"{part}.weight": small(3) for part in ("a1", "a2", "b1", "b2")}, "do not go together"),
        (FF, {"ia3_l": small(31, 1)}, "another shape"),
        (FF, {"set_weight": small(32, 127)}, "another shape"),
        (
            FF,
            {
                "lora_up.weight": small(32, 3),
                "lora_down.weight": small(3, 128),
                "reshape_weight": torch.tensor([32, 64]),
            },
            r"changes the shape of its weight to \[32, 64\]",
        ),
        (
            FF,
            {"lora_up.weight": small(32, 3), "lora_down.weight": small(3, 128), "bias_values": small(2)},
            "bias_values without",
        ),
        (
            FF,
            {
                "lora_up.weight": small(32, 3),
                "lora_down.weight": small(3, 128),
                "bias_values": small(1),
                "bias_indices": torch.tensor([[32], [0]]),
                "bias_size": torch.tensor([32, 128]),
            },
            "not in a matrix of 32 by 128",
        ),
        (FF, {"lora_up.weight": torch.ones(32, 3).to(torch.int8), "lora_down.weight": small(3, 128)}, "in int8"),
        ("conv_norm_out", {"oft_blocks": small(4, 8, 8)}, "for a norm"),
        ("conv_norm_out", {"lora_up.weight": small(32, 3), "lora_down.weight": small(3, 128)}, "another shape"),
        ("conv_norm_out", {"diff": small(32), "dora_scale": small(1, 32)}, "for a norm"),
    ],
)
def test_faults(parts: Parts, tmp_path: Path, module: str, keys: Keys, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        load_lora(file_of(tmp_path, kohya(module), keys), parts)
    assert "\n" not in str(caught.value)
    assert caught.value.hint is not None


def test_oft_of_peft_without_its_config(parts: Parts, tmp_path: Path) -> None:
    """Nothing else says how a rotation is computed."""
    with pytest.raises(CheckpointError, match=r"only adapter_config\.json, beside an"):
        load_lora(file_of(tmp_path, f"base_model.model.{SQUARE}", {"oft_R.weight": small(4, 28)}), parts)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_cayley_neumann": 1}, "use_cayley_neumann is 1"),
        ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is 0"),
        ({"coft": True, "eps": -1}, "eps is -1"),
        ({"feedforward_modules": [3]}, r"feedforward_modules is \[3\]"),
    ],
)
def test_faults_of_configs(parts: Parts, tmp_path: Path, config: dict[str, object], said: str) -> None:
    given = {"peft_type": "OFT", "r": 0, "oft_block_size": 8, "peft_version": "0.19.0", **config}
    with pytest.raises(CheckpointError, match=said):
        load_lora(peft(tmp_path, {f"{SQUARE}.oft_R.weight": small(4, 28)}, **given), parts)


def test_every_shape_is_what_it_says(parts: Parts) -> None:
    """The table above is of this model."""
    found = {name: tuple(networks(parts)["unet"].get_parameter(f"{name}.weight").shape) for name in SHAPES}
    assert found == SHAPES
