"""Adapters: what each kind computes, that a stack of them leaves no trace, that live is merged, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import calotype
from adapters import chosen, kohya_names, layers, low_rank, normal, peft_names, save
from calotype.errors import CheckpointError, ModelNotFoundError, UnsafeFileError, UsageError
from calotype.hashes import File
from calotype.lora import LoRA, LowRank, Stack, load_lora
from calotype.lora.formats import made_for
from calotype.lora.names import networks
from calotype.nn import motion
from calotype.nn.unet import Conditioning, UNet
from calotype.parts import Motion, Parts
from calotype.weights.load import load_parts

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # (32, 32) in the tiny Stable Diffusion 1.5
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"  # (32, 128), biased
CONV = "down_blocks.1.resnets.0.conv1"  # (64, 32, 3, 3), biased
STRIDED = "down_blocks.0.downsamplers.0.conv"  # (32, 32, 3, 3), in steps of 2
PROJECTION = "down_blocks.0.attentions.0.proj_in"  # (32, 32, 1, 1)
NORM = "down_blocks.0.resnets.0.norm1"
LAYER_NORM = "down_blocks.0.attentions.0.transformer_blocks.0.norm1"

Keys = dict[str, Tensor]


@pytest.fixture
def parts(tiny_sd15: Path) -> Parts:
    return load_parts(tiny_sd15)


@pytest.fixture
def stack(parts: Parts) -> Stack:
    return Stack(parts)


def kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def digest(parts: Parts) -> str:
    """Of every bit of every weight."""
    found = hashlib.sha256()
    for network in (*networks(parts).values(), parts.vae):
        for name, tensor in network.state_dict().items():
            found.update(name.encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def weight(parts: Parts, module: str, parameter: str = "weight") -> Tensor:
    return parts.unet.get_parameter(f"{module}.{parameter}")


def difference(parts: Parts, path: Path, module: str, parameter: str = "weight") -> Tensor:
    """What a file changes of one parameter at scale 1."""
    before = weight(parts, module, parameter).clone()
    stack = Stack(parts)
    stack.add("it", load_lora(path, parts))
    return weight(parts, module, parameter) - before


def run(parts: Parts, rows: int = 2) -> Tensor:
    context = normal(2, 77, parts.unet.config.context_dim, seed=2)[torch.arange(rows) % 2]
    x = normal(2, 4, 8, 8, seed=1)[torch.arange(rows) % 2]
    t = torch.tensor([999, 259])[torch.arange(rows) % 2]
    result: Tensor = parts.unet(x, t, Conditioning(context))
    return result


def close(made: Tensor, wanted: Tensor, bound: float = 1e-5) -> bool:
    assert made.shape == wanted.shape
    return ((made - wanted).norm() / wanted.norm()).item() < bound


# ---- each kind, against another way to compute it ----


def chain(*weights: Tensor, **moves: Any) -> Tensor:
    """The kernel of convolutions one after another, seen by sending impulses (one for each input) through them."""
    size = max(weight.shape[-1] for weight in weights)
    inputs = weights[0].shape[1]
    x = torch.zeros(inputs, inputs, 2 * size - 1, 2 * size - 1)
    x[torch.arange(inputs), torch.arange(inputs), size - 1, size - 1] = 1
    for weight in weights:
        x = F.conv2d(x, weight)
    return x.transpose(0, 1).flip(-1, -2)  # (I, O, k, k), mirrored, as a response to an impulse is


def as_conv(matrix: Tensor) -> Tensor:
    return matrix[:, :, None, None]


def kron(a: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(np.kron(a.numpy(), b.numpy()))


def kron_kernels(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker product of (a, b) and (c, d, k, k), one pixel of the kernel after the other."""
    return torch.stack([torch.stack([kron(a, b[:, :, i, j]) for j in range(3)], -1) for i in range(3)], -2)


def n(*shape: int) -> Tensor:
    return normal(*shape, seed=sum(side * 31**i for i, side in enumerate(shape)))


def kinds() -> dict[str, tuple[str, Keys, Tensor]]:
    """name -> (module, what the file holds of it, the change)."""
    four, alpha = torch.tensor(4.0), torch.tensor(2)  # alpha may be an integer
    low = (n(3, 128), n(32, 3))
    conv = (n(3, 32, 3, 3), n(64, 3, 1, 1))
    tucker = (n(3, 32, 1, 1), n(5, 3, 3, 3), n(64, 5, 1, 1))
    loha = (n(32, 3), n(3, 128), n(32, 3) + 1, n(3, 128) + 1)
    flat = (n(64, 3), n(3, 288), n(64, 3) + 1, n(3, 288) + 1)
    loha_conv = (n(3, 64), n(3, 32), n(3, 64) + 1, n(3, 32) + 1, n(3, 3, 3, 3), n(3, 3, 3, 3) + 1)
    w1, w2, w2_conv = n(4, 8), n(8, 16), n(16, 4, 3, 3)
    w2_tucker = (n(5, 5, 3, 3), n(5, 16), n(5, 4))
    return {
        "LoRA": (FF, {"lora_down.weight": low[0], "lora_up.weight": low[1], "alpha": four}, 4 / 3 * low[1] @ low[0]),
        "LoRA of a 1x1 convolution": (
            PROJECTION,
            {"lora_down.weight": n(3, 32, 1, 1), "lora_up.weight": n(32, 3, 1, 1), "alpha": alpha},
            2 / 3 * chain(n(3, 32, 1, 1), n(32, 3, 1, 1)),
        ),
        "LoRA of it as a linear layer": (
            PROJECTION,
            {"lora_down.weight": n(3, 32), "lora_up.weight": n(32, 3)},
            as_conv(n(32, 3) @ n(3, 32)),
        ),
        "LoCon": (
            CONV,
            {"lora_down.weight": conv[0], "lora_up.weight": conv[1], "alpha": alpha},
            2 / 3 * chain(*conv),
        ),
        "LoCon, Tucker": (
            CONV,
            {f"lora_{part}.weight": tensor for part, tensor in zip(("down", "mid", "up"), tucker, strict=True)},
            chain(*tucker),
        ),
        "LoHa": (
            FF,
            {**hada(loha), "alpha": alpha},
            2 / 3 * (loha[0] @ loha[1]) * (loha[2] @ loha[3]),
        ),
        "LoHa, flat convolution": (
            CONV,
            hada(flat),
            ((flat[0] @ flat[1]) * (flat[2] @ flat[3])).reshape(64, 32, 3, 3),
        ),
        "LoHa, Tucker": (
            CONV,
            {**hada(loha_conv[:4]), "hada_t1": loha_conv[4], "hada_t2": loha_conv[5], "alpha": alpha},
            2
            / 3
            * chain(as_conv(loha_conv[1]), loha_conv[4], as_conv(loha_conv[0].T))
            * chain(as_conv(loha_conv[3]), loha_conv[5], as_conv(loha_conv[2].T)),
        ),
        "LoKr, both whole": (FF, {"lokr_w1": w1, "lokr_w2": w2, "alpha": four}, kron(w1, w2)),  # alpha means nothing
        "LoKr": (
            FF,
            {"lokr_w1": w1, "lokr_w2_a": n(8, 3), "lokr_w2_b": n(3, 16), "alpha": alpha},
            2 / 3 * kron(w1, n(8, 3) @ n(3, 16)),
        ),
        "LoKr, both products": (
            FF,
            {"lokr_w1_a": n(4, 2), "lokr_w1_b": n(2, 8), "lokr_w2_a": n(8, 2), "lokr_w2_b": n(2, 16), "alpha": four},
            2 * kron(n(4, 2) @ n(2, 8), n(8, 2) @ n(2, 16)),
        ),
        "LoKr of a convolution": (CONV, {"lokr_w1": n(4, 8), "lokr_w2": w2_conv}, kron_kernels(n(4, 8), w2_conv)),
        "LoKr, flat convolution": (
            CONV,
            {"lokr_w1": n(4, 8), "lokr_w2_a": n(16, 3), "lokr_w2_b": n(3, 36), "alpha": alpha},
            2 / 3 * kron_kernels(n(4, 8), (n(16, 3) @ n(3, 36)).reshape(16, 4, 3, 3)),
        ),
        "LoKr, Tucker": (
            CONV,
            {"lokr_w1": n(4, 8), "lokr_t2": w2_tucker[0], "lokr_w2_a": w2_tucker[1], "lokr_w2_b": w2_tucker[2]},
            kron_kernels(n(4, 8), chain(as_conv(w2_tucker[2]), w2_tucker[0], as_conv(w2_tucker[1].T))),
        ),
        "a difference": (CONV, {"diff": n(64, 32, 3, 3)}, n(64, 32, 3, 3)),
        "of a group norm": (NORM, {"w_norm": n(32)}, n(32)),
        "of a layer norm": (LAYER_NORM, {"w_norm": n(32)}, n(32)),
    }


def hada(factors: tuple[Tensor, ...]) -> Keys:
    return {f"hada_{part}": factor for part, factor in zip(("w1_a", "w1_b", "w2_a", "w2_b"), factors, strict=True)}


KINDS = kinds()


def file_of(folder: Path, *names: str) -> Path:
    """A kohya file of some of KINDS."""
    return save(
        folder / "it.safetensors",
        {f"{kohya(KINDS[name][0])}.{part}": value for name in names for part, value in KINDS[name][1].items()},
    )


@pytest.mark.parametrize("name", KINDS)
def test_kind(parts: Parts, tmp_path: Path, name: str) -> None:
    module, _, wanted = KINDS[name]
    assert close(difference(parts, file_of(tmp_path, name), module), wanted, 1e-6)


def test_differences_of_biases(parts: Parts, tmp_path: Path) -> None:
    keys = {f"{kohya(CONV)}.diff_b": n(64), f"{kohya(NORM)}.b_norm": n(32)}
    path = save(tmp_path / "it.safetensors", keys)
    assert close(difference(parts, path, CONV, "bias"), n(64), 1e-6)
    assert torch.equal(difference(load_parts(parts.source), path, CONV), torch.zeros(64, 32, 3, 3))


def test_a_bias_beside_b(parts: Parts, tmp_path: Path) -> None:
    """PEFT's `lora_bias`: B has a bias, which is scaled as the product is."""
    keys = {
        f"unet.{FF}.lora_A.weight": n(3, 128),
        f"unet.{FF}.lora_B.weight": n(32, 3),
        f"unet.{FF}.lora_B.bias": n(32),
    }
    path = save(tmp_path / "it.safetensors", keys, {"unet.r": 3, "unet.lora_alpha": 6})
    assert close(difference(parts, path, FF, "bias"), 2 * n(32), 1e-6)


# ---- DoRA ----


def dora(shape: tuple[int, ...], axis: int) -> Tensor:
    lengths = [1] * len(shape)
    lengths[axis] = shape[axis]
    return n(*lengths).abs() + 0.5


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ["LoRA", "LoCon", "LoHa", "LoKr, Tucker"])
def test_dora(parts: Parts, tmp_path: Path, name: str, axis: int) -> None:
    """W' = m (W + D) / |W + D|, each row (or column) of its own length."""
    module, keys, change = KINDS[name]
    lengths = dora(tuple(change.shape), axis)
    held = {**keys, "dora_scale": lengths}
    path = save(tmp_path / "it.safetensors", {f"{kohya(module)}.{part}": value for part, value in held.items()})
    Stack(parts).add("it", load_lora(path, parts))
    made = weight(parts, module).transpose(0, axis).flatten(1)
    wanted = (weight(load_parts(parts.source), module) + change).transpose(0, axis).flatten(1)
    assert torch.allclose(made.norm(dim=1), lengths.flatten(), rtol=1e-5)
    assert torch.allclose(F.cosine_similarity(made, wanted), torch.ones(len(made)), atol=1e-5)


def test_dora_scales_in_a_straight_line(parts: Parts, tmp_path: Path) -> None:
    module, keys, change = KINDS["LoRA"]
    held = {**keys, "dora_scale": dora(tuple(change.shape), 0)}
    path = save(tmp_path / "it.safetensors", {f"{kohya(module)}.{part}": value for part, value in held.items()})
    base, stack = weight(parts, module).clone(), Stack(parts)
    stack.add("it", load_lora(path, parts), 1.0)
    whole = weight(parts, module) - base
    for scale in (0.5, -1.0, 2.0):
        stack.set({"it": scale})
        assert close(weight(parts, module) - base, scale * whole, 1e-6)
    stack.set({"it": 0.0})
    assert torch.equal(weight(parts, module), base)


@pytest.mark.parametrize(
    ("base", "magnitude"),
    [
        ([[3.0, 4.0]], [[10.0]]),  # one output, whose row has length 5
        ([[3.0], [4.0]], [[10.0]]),  # one input, whose column has
        ([[3.0, 4.0]], [[10.0, 2.0]]),  # one output, and a length for each input
        ([[3.0], [4.0]], [[10.0], [2.0]]),
    ],
)
def test_dora_of_a_single_row_or_column(base: list[list[float]], magnitude: list[list[float]]) -> None:
    """Lengths are of rows where there is one for each, else of columns."""
    from calotype.lora import Decomposed

    weight, lengths = torch.tensor(base), torch.tensor(magnitude)
    rows, columns = weight.shape
    delta = Decomposed(LowRank(torch.zeros(1, columns), torch.ones(rows, 1)), lengths)
    assert delta.fits((rows, columns))
    of_rows = lengths.shape == (rows, 1)
    norm = weight.square().sum(dim=1 if of_rows else 0, keepdim=True).sqrt()
    torch.testing.assert_close(weight + delta(weight, 1.0), lengths * weight / norm)


def test_a_row_of_zeros_stays_one(parts: Parts) -> None:
    from calotype.lora import Decomposed

    delta = Decomposed(LowRank(torch.zeros(1, 4), torch.ones(3, 1)), torch.ones(3, 1))
    assert torch.equal(delta(torch.zeros(3, 4), 1.0), torch.zeros(3, 4))


# ---- what it is multiplied by ----

LOW = {f"unet.{FF}.lora_A.weight": n(4, 128), f"unet.{FF}.lora_B.weight": n(32, 4)}


@pytest.mark.parametrize(
    ("metadata", "more", "ratio"),
    [
        (None, {}, 1.0),
        ({"unet.r": 4, "unet.lora_alpha": 2}, {}, 0.5),
        ({"unet.lora_alpha": 2, "unet.use_rslora": True}, {}, 1.0),
        ({"unet.lora_alpha": 2}, {f"unet.{FF}.alpha": torch.tensor(6.0)}, 1.5),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"ff.net.2": 8}}, {}, 2.0),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {f"^{FF}": 12}}, {}, 3.0),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"^net.2": 8, "et.2": 8}}, {}, 0.5),
        ({"text_encoder.lora_alpha": 2}, {}, 1.0),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 2}, {}, 0.5),
    ],
)
def test_ratio(parts: Parts, tmp_path: Path, metadata: Mapping[str, object] | None, more: Keys, ratio: float) -> None:
    path = save(tmp_path / "it.safetensors", LOW | more, metadata)
    assert close(difference(parts, path, FF), ratio * n(32, 4) @ n(4, 128), 1e-6)


def test_peft_scales_a_whole_kronecker_product(parts: Parts, tmp_path: Path) -> None:
    """Where LyCORIS does not: there the config is the only one to say the rank."""
    prefix = f"base_model.model.{FF}"
    save(tmp_path / "adapter_model.safetensors", {f"{prefix}.lokr_w1": n(4, 8), f"{prefix}.lokr_w2": n(8, 16)})
    config = {"peft_type": "LOKR", "r": 8, "alpha": 4, "rank_pattern": {"ff.net.2": 16}, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert close(difference(parts, tmp_path, FF), 4 / 16 * kron(n(4, 8), n(8, 16)), 1e-6)


def test_alpha_is_kept_for_an_lcm_lora(parts: Parts, tmp_path: Path) -> None:
    """Alpha 8 on rank 64 is an eighth, for convolutions and time projections too."""
    factors = low_rank(layers(parts.unet), 64)
    lora = load_lora(save(tmp_path / "it.safetensors", kohya_names(factors, "lora_unet_", lambda name: 8.0)), parts)
    assert {delta.ratio for delta in lora.deltas["unet"].values() if isinstance(delta, LowRank)} == {0.125}
    names = set(lora.deltas["unet"])
    assert {f"{CONV}.weight", f"{STRIDED}.weight", "down_blocks.0.resnets.0.time_emb_proj.weight"} <= names
    assert len(names) == len(factors)


# ---- the stack ----


def attention_lora(parts: Parts, folder: Path, name: str = "attention", seed: int = 0) -> LoRA:
    """Of the U-Net's attentions and all of the text encoder."""
    tensors = peft_names(low_rank(chosen(layers(parts.unet), ("to_q", "to_k", "to_v")), seed=seed), "unet.")
    for number, encoder in enumerate(parts.text.models):
        prefix = "text_encoder." if number == 0 else "text_encoder_2."
        tensors |= peft_names(low_rank(layers(encoder), seed=seed + 100), prefix)
    return load_lora(save(folder / f"{name}.safetensors", tensors), parts)


def every_lora(parts: Parts, folder: Path, name: str = "every", seed: int = 50) -> LoRA:
    factors = low_rank(layers(parts.unet), seed=seed)
    return load_lora(save(folder / f"{name}.safetensors", peft_names(factors, "unet.")), parts)


def pointers(parts: Parts) -> list[int]:
    return [parameter.data_ptr() for network in networks(parts).values() for parameter in network.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_swaps_leave_no_trace(tiny_sd15: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Every bit of every weight, and where each lies; and of the files, which the weights are views of."""
    parts = load_parts(tiny_sd15, dtype=dtype)
    files = {path: path.read_bytes() for path in tiny_sd15.rglob("*.safetensors")}
    before, places, stack = digest(parts), pointers(parts), Stack(parts)
    stack.add("a", attention_lora(parts, tmp_path))
    stack.add("b", attention_lora(parts, tmp_path, "b", seed=7))
    with_both = digest(parts)
    assert with_both != before
    for i in range(1000):
        stack.set([{"a": i / 500 - 1}, {"b": 1.3, "a": 0.2}, {}, {"b": -0.5}][i % 4])
    stack.set({"b": 1.0, "a": 1.0})  # in another order
    assert digest(parts) == with_both
    stack.set({})
    assert digest(parts) == before
    assert pointers(parts) == places
    assert {path: path.read_bytes() for path in files} == files


def test_whoever_keeps_what_depends_on_weights_is_told(parts: Parts, stack: Stack, tmp_path: Path) -> None:
    """Of each parameter that was written, once it is; of nothing where nothing was. Keys agree where the weights do."""
    told: list[frozenset[tuple[str, str]]] = []
    stack.when_written.append(told.append)
    only_unet = save(tmp_path / "only.safetensors", {f"{kohya(CONV)}.diff_b": n(64)})
    stack.add("text", attention_lora(parts, tmp_path), 0.0)
    stack.add("only", load_lora(only_unet, parts), 0.5)
    assert told == [{("unet", f"{CONV}.bias")}]
    stack.set({"only": 0.5, "text": 0.0})
    assert len(told) == 1
    written = stack.set({"text": 1.0})
    assert told[1:] == [written]
    assert {network for network, _ in written} == {"unet", "text_encoder"}
    mixes: list[dict[str, float]] = [{}, {"only": 1.0}, {"text": 1.0}, {"text": 1, "only": 1.0}, {"text": 0.5}]
    for network, module in networks(parts).items():
        states = []
        for mix in mixes:
            stack.set(mix)
            states.append({name: parameter.detach().clone() for name, parameter in module.named_parameters()})
        for (one, a), (other, b) in itertools.combinations(zip(mixes, states, strict=True), 2):
            equal = all(torch.equal(a[name], b[name]) for name in a)
            assert equal == (stack.key(network, one) == stack.key(network, other)), (network, one, other)


def test_what_is_written(parts: Parts, tmp_path: Path) -> None:
    """Only parameters whose share changed."""
    stack, lora, other = Stack(parts), attention_lora(parts, tmp_path), every_lora(parts, tmp_path)
    of_lora = {(network, name) for network, deltas in lora.deltas.items() for name in deltas}
    of_other = {("unet", name) for name in other.deltas["unet"]}
    assert stack.add("a", lora) == of_lora
    assert stack.add("b", other, 0.5) == of_other
    assert stack.mix == {"a": 1.0, "b": 0.5}
    assert stack.set({"a": 1.0, "b": 0.7}) == of_other
    assert stack.set({"b": 0.7, "a": 1.0}) == frozenset()
    assert stack.set({"b": 0.7, "a": 0.0}) == of_lora
    assert stack.remove("b") == of_other
    assert stack.set({}) == frozenset()
    assert list(stack.loras) == ["a"]


def test_mixes_add_up(parts: Parts, tmp_path: Path) -> None:
    stack, name = Stack(parts), f"{LINEAR}.weight"
    base = weight(parts, LINEAR).clone()
    one, other = attention_lora(parts, tmp_path), every_lora(parts, tmp_path)
    stack.add("a", one, 1.0)
    stack.add("b", other, -0.8)
    wanted = base + one.deltas["unet"][name](base, 1.0) + other.deltas["unet"][name](base, -0.8)
    assert close(weight(parts, LINEAR), wanted, 1e-6)


def test_two_text_encoders(tiny_sdxl: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sdxl)
    before, stack = digest(parts), Stack(parts)
    texts = parts.text.encode(["a fox"])
    stack.add("it", attention_lora(parts, tmp_path))
    assert stack.loras["it"].deltas.keys() == {"unet", "text_encoder", "text_encoder_2"}
    context, pooled = parts.text.encode(["a fox"])
    assert texts[1] is not None
    assert pooled is not None
    assert not close(context[..., :32], texts[0][..., :32], 0.01)
    assert not close(context[..., 32:], texts[0][..., 32:], 0.01)
    assert not close(pooled, texts[1], 0.01)
    stack.set({})
    assert digest(parts) == before


def test_half_precision_is_rounded_once(tiny_sd15: Path, tmp_path: Path) -> None:
    """The sum is made in float32 of what the file holds, and then cast."""
    parts, exact = load_parts(tiny_sd15, dtype=torch.float16), load_parts(tiny_sd15)
    for each in (parts, exact):
        stack = Stack(each)
        stack.add("a", attention_lora(each, tmp_path), 0.9)
        stack.add("b", every_lora(each, tmp_path), 0.3)
    assert torch.equal(weight(parts, LINEAR), weight(exact, LINEAR).half())


def test_networks_without_files(parts: Parts, tmp_path: Path) -> None:
    """Made in memory: what is touched is kept, and comes back."""
    parts = replace(parts, stored={})
    before, stack = digest(parts), Stack(parts)
    stack.add("it", every_lora(parts, tmp_path))
    stack.set({"it": -2.0})
    assert digest(parts) != before
    stack.set({})
    assert digest(parts) == before


def test_describe(parts: Parts, stack: Stack, tmp_path: Path) -> None:
    attention_lora(parts, tmp_path, "style")
    stack.add("it", load_lora(tmp_path, parts, weight_name="style.safetensors"), 0.8)
    stack.add("file", load_lora(tmp_path / "style.safetensors", parts))
    stack.set({"it": 0.5})
    told = {"ref": str(tmp_path), "weight_name": "style.safetensors", "revision": None}
    read = File.of(tmp_path / "style.safetensors")
    assert stack.describe(stack.mix) == {"it": {**told, "scale": 0.5, "file": read}}


def test_a_loaded_adapter_outlives_its_file(parts: Parts, stack: Stack, tmp_path: Path) -> None:
    lora = attention_lora(parts, tmp_path)
    (tmp_path / "attention.safetensors").write_bytes(b"")
    stack.add("it", lora)
    assert torch.isfinite(run(parts)).all()


# ---- what fails leaves all as it was ----


def test_failed_sets(parts: Parts, stack: Stack, tmp_path: Path) -> None:
    stack.add("a", attention_lora(parts, tmp_path), 0.5)
    before = digest(parts)
    for mix, said in (
        ({"a": 1.0, "nobody": 1.0}, "no adapter 'nobody': there are a"),
        ({"a": float("nan")}, "the scale of 'a' is nan"),
        ({"a": float("-inf")}, "the scale of 'a' is -inf"),
        ({"a": 1e39}, "leaves the range of float32"),
    ):
        with pytest.raises(UsageError, match=said):
            stack.set(mix)
        assert stack.mix == {"a": 0.5}
        assert digest(parts) == before
    with pytest.raises(UsageError, match="there is an adapter 'a' already"):
        stack.add("a", every_lora(parts, tmp_path))
    with pytest.raises(UsageError, match="no adapter 'b'"):
        stack.remove("b")
    with pytest.raises(UsageError, match="leaves the range"):
        stack.add("b", every_lora(parts, tmp_path), 1e39)
    assert list(stack.loras) == ["a"]
    assert digest(parts) == before
    stack.set({})
    assert digest(parts) == digest(load_parts(parts.source))


def test_an_interrupted_set(parts: Parts, stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.add("a", attention_lora(parts, tmp_path), 0.5)
    stack.add("b", every_lora(parts, tmp_path), 0.0)
    before, product = digest(parts), LowRank.product
    left = 30

    def failing(self: LowRank, device: torch.device, scale: float) -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return product(self, device, scale)

    monkeypatch.setattr(LowRank, "product", failing)
    with pytest.raises(KeyboardInterrupt):
        stack.set({"a": 1.0, "b": 1.0})
    assert left < 0, "it went back"
    assert stack.mix == {"a": 0.5, "b": 0.0}
    assert digest(parts) == before


def test_a_model_that_was_changed_since(tiny_sd15: Path, copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    """Another file under the old name: its weights are not mixed into those in memory."""
    from checkpoints import write_unet

    folder = copy_of(tiny_sd15)
    parts = load_parts(folder)
    lora, before = attention_lora(parts, tmp_path), digest(parts)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    write_unet(folder / "unet")
    with pytest.raises(CheckpointError, match="is not what the model's files hold"):
        Stack(parts).add("it", lora)
    assert digest(parts) == before


# ---- live ----

SPREAD = ("LoRA", "LoRA of a 1x1 convolution", "LoCon", "of a group norm", "of a layer norm")


@pytest.mark.parametrize(
    "names",
    [SPREAD, *[(name,) for name in KINDS if name not in SPREAD]],
    ids=lambda names: "several" if len(names) > 1 else names[0],
)
@torch.no_grad()
def test_live_is_merged(parts: Parts, stack: Stack, tmp_path: Path, names: tuple[str, ...]) -> None:
    lora = load_lora(file_of(tmp_path, *names), parts)
    without, before = run(parts), digest(parts)
    stack.add("it", lora, 0.3)
    merged = run(parts)
    stack.set({})
    with stack.live({"it": 0.3}):
        live = run(parts)
        assert digest(parts) == before
    assert close(live, merged)
    assert not close(live, without, 1e-3)
    assert torch.equal(run(parts), without)


@torch.no_grad()
def test_live_dora_biases_and_strides(parts: Parts, stack: Stack, tmp_path: Path) -> None:
    tensors = {f"{kohya(CONV)}.diff_b": n(64), f"{kohya(NORM)}.b_norm": n(32), f"{kohya(FF)}.diff_b": n(32)}
    for module in (STRIDED, LINEAR):
        shape = weight(parts, module).shape
        (down, up), *_ = low_rank({module: parts.unet.get_submodule(module)}).values()
        held = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": dora(tuple(shape), 0)}
        tensors |= {f"{kohya(module)}.{part}": value for part, value in held.items()}
    stack.add("it", load_lora(save(tmp_path / "it.safetensors", tensors), parts), 0.6)
    merged = run(parts)
    stack.set({})
    with stack.live({"it": 0.6}):
        assert close(run(parts), merged)


@torch.no_grad()
def test_live_text(parts: Parts, stack: Stack, tmp_path: Path) -> None:
    stack.add("it", attention_lora(parts, tmp_path), 0.7)
    merged, _ = parts.text.encode(["a red fox"])
    stack.set({})
    plain, _ = parts.text.encode(["a red fox"])
    with stack.live({"it": 0.7}):
        live, _ = parts.text.encode(["a red fox"])
    with stack.live({"it": 0.7}, only=("unet",)):
        assert torch.equal(parts.text.encode(["a red fox"])[0], plain)
    assert close(live, merged)
    assert not close(live, plain, 0.01)


@torch.no_grad()
def test_live_rows(parts: Parts, stack: Stack, tmp_path: Path) -> None:
    """Different mixes in one batch are what each is alone."""
    stack.add("a", attention_lora(parts, tmp_path), 0.0)
    stack.add("b", every_lora(parts, tmp_path), 0.0)
    a, b = torch.tensor([1.0, 0.0, -0.5, 0.0]), torch.tensor([0.0, 0.4, 1.0, 0.0])
    with stack.live({"a": a, "b": b}, only=("unet",)):
        rows = run(parts, 4)
    plain = run(parts, 4)
    for row in range(4):
        stack.set({"a": float(a[row]), "b": float(b[row])})
        assert close(rows[row], run(parts, 4)[row])
    assert close(rows[3], plain[3], 1e-6)
    assert not close(rows[0], plain[0], 0.01)


@torch.no_grad()
def test_live_comes_on_top_and_the_innermost_counts(parts: Parts, stack: Stack, tmp_path: Path) -> None:
    stack.add("a", attention_lora(parts, tmp_path), 0.0)
    stack.add("b", every_lora(parts, tmp_path), 0.0)
    stack.set({"a": 0.5, "b": 0.5})
    both = run(parts)
    stack.set({"a": 0.5})
    merged = run(parts)
    with stack.live({"b": 0.5}):
        assert close(run(parts), both)
        with stack.live({}):
            assert torch.equal(run(parts), merged)
        with pytest.raises(RuntimeError), stack.live({"a": 3.0}):
            raise RuntimeError
        assert close(run(parts), both)
    assert torch.equal(run(parts), merged)
    assert not any(module._forward_hooks for module in parts.unet.modules())


@pytest.mark.parametrize("kind", ["low rank", "DoRA"])
def test_training(parts: Parts, stack: Stack, kind: str) -> None:
    """Gradients reach the factors, nothing else; a step is seen by the next forward pass; off, it is the teacher."""
    from calotype.lora import Decomposed, Delta

    def trained(*shape: int) -> nn.Parameter:
        return nn.Parameter(n(*shape) * 0.1)

    factors = [LowRank(trained(4, 32, 3, 3), trained(64, 4, 1, 1), 0.5), LowRank(trained(4, 128), trained(32, 4), 0.5)]
    deltas: list[Delta] = [*factors]
    if kind == "DoRA":
        lengths = [weight(parts, name).flatten(1).norm(dim=1) for name in (CONV, FF)]
        shapes = ((64, 1, 1, 1), (32, 1))
        deltas = [
            Decomposed(factor, nn.Parameter(length.reshape(shape)))
            for factor, length, shape in zip(factors, lengths, shapes, strict=True)
        ]
    lora = LoRA("student", None, {"unet": {f"{CONV}.weight": deltas[0], f"{FF}.weight": deltas[1]}})
    stack.add("student", lora, 0.0)
    with torch.no_grad():
        teacher = run(parts)
    parameters = [tensor for delta in deltas for tensor in delta.tensors()]
    losses = []
    for _ in range(2):
        with stack.live({"student": 1.0}):
            with torch.no_grad(), stack.live({}):
                assert torch.equal(run(parts), teacher)
            loss = (run(parts) - 0.5 * teacher).square().mean()
            gradients = torch.autograd.grad(loss, parameters)
        losses.append(loss.item())
        assert all(gradient.norm() > 0 for gradient in gradients)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * gradient
    assert losses[1] < losses[0]
    assert not any(parameter.requires_grad for parameter in parts.unet.parameters())
    with torch.no_grad(), stack.live({"student": 0.8}):
        live = run(parts)
    stack.set({"student": 0.8})
    assert close(live, run(parts))


def test_live_faults(parts: Parts, stack: Stack, tmp_path: Path) -> None:
    stack.add("it", attention_lora(parts, tmp_path), 0.0)
    with pytest.raises(UsageError, match="no adapter 'x'"), stack.live({"x": 1.0}):
        pass
    with pytest.raises(UsageError, match="which has no such rows"), stack.live({"it": torch.ones(2)}):
        pass
    with (
        pytest.raises(UsageError, match="3 scales for a batch of 2 rows"),
        stack.live({"it": torch.ones(3)}, only=("unet",)),
    ):
        run(parts)
    with stack.live({"it": torch.tensor(0.5)}):  # one for all
        run(parts)


# ---- motion modules ----


def with_motion(unet: UNet) -> motion.MotionAdapter:
    config = motion.MotionConfig(
        channels=(32, 64), layers=(1, 1), depths=(1, 1), mid_depth=None, heads=(4, 4), norm_groups=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = motion.MotionAdapter(config).requires_grad_(False)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.2)
    motion.attach(unet, adapter)
    return adapter


OLD = (".temporal_transformer.transformer_blocks", {"attn1": "attention_blocks.0", "attn2": "attention_blocks.1"})


@pytest.mark.parametrize("naming", ["diffusers", "diffusers, old", "AnimateDiff"])
@torch.no_grad()
def test_motion_loras(parts: Parts, stack: Stack, tmp_path: Path, naming: str) -> None:
    """Beside another LoRA, by weights; live too; and without its motion adapter it is refused."""
    style = attention_lora(parts, tmp_path)
    adapter = with_motion(parts.unet)
    names = {name: module for name, module in layers(parts.unet).items() if "motion_modules" in name}
    own = chosen(names, ("to_q", "to_k", "to_v", "to_out.0"))
    factors = low_rank(own, seed=3)
    assert len(own) == 4 * 2 * (2 + 4)  # of each attention; as many modules as there are layers down and up
    tensors = {}
    for name, (down, up) in factors.items():
        key = f"unet.{name}"
        if naming == "AnimateDiff":
            key = "module." + name.replace(".transformer_blocks", OLD[0])
            for ours, theirs in OLD[1].items():
                key = key.replace(ours, theirs)
        if naming == "diffusers":
            tensors |= peft_names({name: (down, up)}, "unet.")
        else:
            block, _, last = key.removesuffix(".0").rpartition(".")
            tensors[f"{block}.processor.{last}_lora.down.weight"] = down
            tensors[f"{block}.processor.{last}_lora.up.weight"] = up
    zoom = load_lora(save(tmp_path / "zoom.safetensors", tensors), parts)
    assert set(zoom.deltas["unet"]) == {f"{name}.weight" for name in own}

    def frames() -> Tensor:
        x, t = normal(4, 4, 8, 8), torch.full((4,), 499)
        result: Tensor = parts.unet(x, t, Conditioning(normal(4, 77, 32, seed=1)), frames=2)
        return result

    plain, before = frames(), digest(parts)
    stack.add("style", style, 0.55)
    stack.add("zoom", zoom, 1.2)
    merged = frames()
    assert not close(merged, plain, 0.01)
    stack.set({})
    assert torch.equal(frames(), plain)
    assert digest(parts) == before
    with stack.live({"style": 0.55, "zoom": torch.full((4,), 1.2)}, only=("unet",)):
        assert close(frames(), merged)
    with (
        pytest.raises(UsageError, match="changes motion modules, which mix all rows"),
        stack.live({"zoom": torch.arange(4.0)}),
    ):
        pass

    stack.exchange_motion(parts)
    with pytest.raises(UsageError, match=r"'zoom' changes unet's .*motion_modules.*, which is not there"):
        stack.set({"style": 1.0, "zoom": 1.0})
    assert stack.mix == {}
    stack.set({"style": 1.0})
    stack.exchange_motion(replace(parts, motion=Motion(adapter, parts.schedule)))
    stack.set({"style": 0.55, "zoom": 1.2})
    assert torch.equal(frames(), merged)


def test_a_motion_lora_without_its_adapter_is_told_what_it_takes(parts: Parts, tmp_path: Path) -> None:
    with_motion(parts.unet)
    own = chosen({name: module for name, module in layers(parts.unet).items() if "motion_modules" in name}, ("to_q",))
    path = save(tmp_path / "zoom.safetensors", peft_names(low_rank(own), "unet."))
    motion.detach(parts.unet)
    with pytest.raises(CheckpointError, match="name nothing in it") as caught:
        load_lora(path, parts)
    assert caught.value.hint == "a motion LoRA takes a motion adapter: set that first"


@pytest.mark.parametrize("scale", ["1", None, True, float("nan"), torch.ones(2)])
def test_a_scale_is_a_number(stack: Stack, parts: Parts, tmp_path: Path, scale: Any) -> None:
    stack.add("style", attention_lora(parts, tmp_path))
    before = digest(parts)
    with pytest.raises(UsageError, match=r"the scale of 'style' is .*: a finite number is needed"):
        stack.set({"style": scale})
    assert digest(parts) == before


# ---- which file ----


def test_which_file(parts: Parts, tmp_path: Path) -> None:
    lora = attention_lora(parts, tmp_path)
    assert load_lora(tmp_path, parts).deltas.keys() == lora.deltas.keys()  # the only one there
    attention_lora(parts, tmp_path, "other")
    with pytest.raises(ModelNotFoundError, match=r"several files: attention.safetensors, other.safetensors") as caught:
        load_lora(tmp_path, parts)
    assert "weight_name" in str(caught.value.hint)
    every_lora(parts, tmp_path, "pytorch_lora_weights")
    assert load_lora(tmp_path, parts).deltas.keys() == {"unet"}
    assert load_lora(tmp_path, parts, weight_name="other.safetensors").deltas.keys() == {"unet", "text_encoder"}
    with pytest.raises(ModelNotFoundError, match=r"has no file 'none.safetensors'"):
        load_lora(tmp_path, parts, weight_name="none.safetensors")
    with pytest.raises(ModelNotFoundError, match="is a file: 'x' cannot be in it"):
        load_lora(tmp_path / "other.safetensors", parts, weight_name="x")
    with pytest.raises(ModelNotFoundError, match="no model"):
        load_lora("nothing of the kind", parts)
    with pytest.raises(ModelNotFoundError, match=r"has no \.safetensors file"):
        load_lora(Path(parts.source) / "tokenizer", parts)
    (tmp_path / "deep").mkdir()
    attention_lora(parts, tmp_path / "deep")
    assert "unet" in load_lora(tmp_path, parts, weight_name="deep/attention.safetensors").deltas


def test_pickles_are_refused(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"\x80\x02")
    for arguments in ({"ref": tmp_path}, {"ref": tmp_path / "pytorch_lora_weights.bin"}):
        with pytest.raises(UnsafeFileError, match="is a pickle"):
            load_lora(arguments["ref"], parts)
    with pytest.raises(UnsafeFileError, match="is a pickle"):
        load_lora(tmp_path, parts, weight_name="pytorch_lora_weights.bin")
    disguised = tmp_path / "it.safetensors"
    disguised.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UnsafeFileError, match="is a pickle"):
        load_lora(disguised, parts)


# ---- what does not fit ----


def test_another_family(parts: Parts, tiny_sdxl: Path, tmp_path: Path) -> None:
    """The first keys, and the family that the adapter looks made for."""
    other = load_parts(tiny_sdxl)
    factors = low_rank(layers(other.unet))
    path = save(tmp_path / "xl.safetensors", kohya_names(factors, "lora_unet_", lambda name: 1.0))
    with pytest.raises(CheckpointError) as caught:
        load_lora(path, parts)
    message = str(caught.value)
    assert f"of its {len(factors)} layers" in message
    assert "name nothing in it (lora_unet_" in message
    assert "are of another shape (lora_unet_" in message
    assert "looks made for text of width 64" in message
    assert "\n" not in message
    with pytest.raises(CheckpointError, match="text of width 32"):
        load_lora(
            save(tmp_path / "15.safetensors", peft_names(low_rank(layers(parts.unet)), "unet.")), load_parts(tiny_sdxl)
        )


def test_made_for() -> None:
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    ldm = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v.lora_down.weight"
    peft = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    old = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight"
    middle = "lora_unet_middle_block_1_proj_in.lora_down.weight"
    assert made_for({block: (4, 768)}) == "Stable Diffusion 1.x"
    assert made_for({old: (4, 1024)}) == "Stable Diffusion 2.x"
    assert made_for({peft: (4, 2048)}) == "SDXL or SSD-1B"
    assert made_for({ldm: (4, 2048), middle: (4, 1280)}) == "SDXL"
    assert made_for({old: (4, 2048)}) == "SDXL"
    assert made_for({block.replace("lora_down.weight", "hada_w1_b"): (4, 768)}) == "Stable Diffusion 1.x"
    assert made_for({block: (4, 100)}) == "text of width 100"
    assert made_for({middle: (4, 1280)}) is None
    for key in (
        "transformer.single_transformer_blocks.0.x.lora_A.weight",
        "lora_unet_double_blocks_0_x.lora_up.weight",
    ):
        assert "another architecture" in (made_for({key: (4, 4)}) or "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{kohya(FF)}.lora_up.weight": None}, "has no up"),
        ({f"{kohya(FF)}.lora_down.weight": None}, "has no down"),
        ({f"{kohya(FF)}.lora_mid.weight": n(3, 3)}, "has factors of shapes"),
        ({f"{kohya(FF)}.lora_up.weight": n(32, 5)}, "has factors of shapes"),
        ({f"{kohya(FF)}.lora_up.weight": n(32)}, "has a up of shape"),
        (
            {f"{kohya(FF)}.lora_down.weight": n(3, 64)},
            r"are of another shape \(lora_unet_.*: \[32, 64\], the model's is \[",
        ),
        ({f"{kohya(FF)}.lora_down.weight": n(0, 128), f"{kohya(FF)}.lora_up.weight": n(32, 0)}, "is of rank 0"),
        ({f"{kohya(FF)}.lora_up.weight": n(32, 3) * float("nan")}, "has NaN or infinite values"),
        ({f"{kohya(FF)}.alpha": torch.tensor(float("inf"))}, "has the alpha inf"),
        ({f"{kohya(FF)}.alpha": torch.tensor([1.0, 2.0])}, r"has the alpha \[1"),
        ({f"{kohya(FF)}.dora_scale": n(31, 1)}, "has 31 lengths for a weight of shape"),
        ({f"{kohya(FF)}.lokr_w1": n(4, 8)}, "has lokr_w1 without what belongs to it"),
        ({f"{kohya(FF)}.oft_blocks": n(4, 8, 8)}, "has oft_blocks without what belongs to it"),
        ({"text_encoder_2.text_projection.lora_A.weight": n(3, 32)}, "name nothing in it"),
        ({"lora_unet_conv_nowhere.alpha": torch.tensor(1.0)}, r"name nothing in it \(lora_unet_conv_nowhere\)"),
        ({f"{kohya(LINEAR)}.diff_b": n(32)}, r"name nothing in it \(.*to_k \(bias\)\)"),
        ({f"{kohya(CONV)}.hada_w1_a": n(64, 3)}, "has no hada_w1_b"),
        ({f"{kohya(FF)}.lora_A.weight": n(3, 128)}, r"name nothing in it \(lora_unet_.*lora_"),
        ({f"unet.{FF}.lora_A.weight": n(3, 128), f"unet.{FF}.lora_B.weight": n(32, 3)}, r"\(a second time\)"),
        ({f"{kohya(CONV)}.alpha": torch.tensor(1.0)}, "has alpha without what belongs to it"),
    ],
)
def test_faults_of_files(parts: Parts, tmp_path: Path, changes: Mapping[str, Tensor | None], said: str) -> None:
    good: dict[str, Tensor | None] = {f"{kohya(FF)}.{part}": value for part, value in KINDS["LoRA"][1].items()}
    tensors = {key: value for key, value in (good | dict(changes)).items() if value is not None}
    before = digest(parts)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_lora(save(tmp_path / "it.safetensors", tensors), parts)
    assert "it.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint is not None
    assert digest(parts) == before


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"unet.lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"unet.lora_alpha": 8, "unet.r": 0}, "r is 0"),
        ({"unet.use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {".*to_k": 4}}, "alpha_pattern is"),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_k": None, "x": "y"}}, "alpha_pattern"),
        ({"unet.init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
    ],
)
def test_faults_of_metadata(parts: Parts, tmp_path: Path, metadata: Mapping[str, object], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_lora(save(tmp_path / "it.safetensors", LOW, metadata), parts)


def test_files_that_are_no_adapters(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no adapter that can be read: it looks like a U-Net"):
        load_lora(Path(parts.source) / "unet/diffusion_pytorch_model.safetensors", parts)
    with pytest.raises(CheckpointError, match="it looks like nothing known"):
        load_lora(save(tmp_path / "it.safetensors", {"x": n(1)}), parts)


def test_a_distilled_lora_brings_its_sampler_steps_and_guidance(tiny_sd15: Path, tmp_path: Path) -> None:
    """By the file's header; a request may still say otherwise, and out of the mix it has no say."""
    engine = calotype.load(tiny_sd15)
    weight = engine.parts.unet.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{key}.lora_A.weight": torch.ones(1, weight.shape[1]),
        f"{key}.lora_B.weight": torch.ones(len(weight), 1),
    }
    habit = {"sampler": "tcd", "steps": 2, "guidance": 1.0}
    save_file(tensors, tmp_path / "few.safetensors", {"calotype.habit": json.dumps(habit)})
    plain = engine.resolve(calotype.Request("a fox", seed=0))
    engine.add_lora(tmp_path / "few.safetensors", name="few")
    found = engine.resolve(calotype.Request("a fox", seed=0))
    assert (found.sampler, found.steps, found.guidance) == ("tcd", 2, 1.0)
    other = engine.resolve(calotype.Request("a fox", seed=0, steps=7, guidance=3.0))
    assert (other.sampler, other.steps, other.guidance) == ("tcd", 7, 3.0)
    assert engine.resolve(calotype.Request("a fox", seed=0, timesteps=(9,))).steps == 1
    engine.set_loras({"few": 0.0})
    assert engine.resolve(calotype.Request("a fox", seed=0)) == plain
    phased = {"sampler": "ddim", "steps": 2, "guidance": 1.0, "timesteps": [999, 499]}
    save_file(tensors, tmp_path / "phased.safetensors", {"calotype.habit": json.dumps(phased)})
    engine.add_lora(tmp_path / "phased.safetensors", name="phased")
    found = engine.resolve(calotype.Request("a fox", seed=0))
    assert (found.sampler, found.timesteps) == ("ddim", (999, 499))
    assert engine.resolve(calotype.Request("a fox", seed=0, steps=3)).timesteps is None
    for bad in ('{"steps": 0}', '{"sampler": "magic"}', "[]", "{"):
        save_file(tensors, tmp_path / "bad.safetensors", {"calotype.habit": bad})
        with pytest.raises(CheckpointError, match=r"calotype\.habit"):
            engine.add_lora(tmp_path / "bad.safetensors", name="bad")
