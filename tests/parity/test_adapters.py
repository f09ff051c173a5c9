"""Adapters' files, each as one of the programs writes them: the networks with it are those of diffusers and PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from reference import NETWORK, Agreement, Pair, distance
from torch import Tensor, nn

import calotype
from adapters import Factors, chosen, kohya_names, layers, low_rank, normal, peft_names, save
from calotype.errors import CheckpointError
from calotype.lora import Stack, load_lora
from calotype.nn.unet import Conditioning
from calotype.parts import Parts
from calotype.weights.load import load_parts

RANK, ALPHA = 3, 2.0
PATTERNS = {"to_k": 5.0, "conv1": 1.0, "layers.1.mlp.fc1": 4.0}  # of some modules another alpha
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
FOLDER_FILE = "pytorch_lora_weights.safetensors"

Everything = dict[str, Factors]  # network -> its modules' factors, by the names that diffusers' networks have
Pairs = Callable[[str], Pair]

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own


def encoders(pipeline: Any) -> dict[str, nn.Module]:
    names = ("text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def factors_for(pipeline: Any, seed: int = 0) -> Everything:
    """For every linear layer and convolution of the U-Net, and the linear layers of the text encoders.

    diffusers takes a projection of pooled text for no part of a text encoder.
    """
    made = {"unet": low_rank(layers(pipeline.unet), RANK, seed)}
    for name, encoder in encoders(pipeline).items():
        made[name] = low_rank(chosen(layers(encoder), (*CLIP_ATTENTION, "fc1", "fc2")), RANK, seed + 500)
    return made


# ---- the formats ----


def by_diffusers(pipeline: Any, folder: Path, factors: Everything) -> Path:
    """As its training scripts do: PEFT's layers in its networks, saved with PEFT's configs in the header."""
    networks = {"unet": pipeline.unet, **encoders(pipeline)}
    for name, own in factors.items():
        config = LoraConfig(r=RANK, lora_alpha=cast(int, ALPHA), alpha_pattern=PATTERNS, target_modules=list(own))
        networks[name].add_adapter(config, "default")  # type: ignore[operator]
        with torch.no_grad():
            for module, (down, up) in own.items():
                layer: Any = networks[name].get_submodule(module)
                layer.lora_A["default"].weight.copy_(down)
                layer.lora_B["default"].weight.copy_(up)
    states = {f"{name}_lora_layers": get_peft_model_state_dict(network) for name, network in networks.items()}
    metadata = _collate_lora_metadata(networks)
    type(pipeline).save_lora_weights(folder, **states, **metadata)
    pipeline.unload_lora_weights()
    return folder / FOLDER_FILE


def by_diffusers_untold(pipeline: Any, folder: Path, factors: Everything) -> Path:
    """Older ones left the header alone: alpha is the rank."""
    type(pipeline).save_lora_weights(
        folder, **{f"{name}_lora_layers": peft_names(own) for name, own in factors.items()}
    )
    return folder / FOLDER_FILE


def by_old_diffusers(pipeline: Any, folder: Path, factors: Everything) -> Path:
    """Attention processors with `to_q_lora.down`; the text encoder's likewise."""
    tensors = {}
    for network, own in factors.items():
        for name, (down, up) in own.items():
            block, _, last = name.removesuffix(".0").rpartition(".")
            last = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(last, last)
            key = f"{network}.{block}.{'processor.' if network == 'unet' else ''}{last}_lora"
            tensors[f"{key}.down.weight"], tensors[f"{key}.up.weight"] = down, up
    return save(folder / FOLDER_FILE, tensors)


def by_older_peft(pipeline: Any, folder: Path, factors: Everything) -> Path:
    """`to_q.lora.down` in the U-Net and `q_proj.lora_linear_layer.down` in the text encoders."""
    tensors = {}
    for network, own in factors.items():
        named = convert_state_dict_to_diffusers(peft_names(own))
        tensors |= {f"{network}.{key}": value for key, value in named.items()}
    return save(folder / FOLDER_FILE, tensors)


def by_kohya(pipeline: Any, folder: Path, factors: Everything) -> Path:
    return save(folder / "style.safetensors", kohya_tensors(factors))


def by_kohya_with_ldm_names(pipeline: Any, folder: Path, factors: Everything) -> Path:
    """As kohya's SDXL script: the U-Net's blocks are LDM's."""
    return save(folder / "style.safetensors", kohya_tensors(factors, ldm_name))


def by_kohya_export(pipeline: Any, folder: Path, factors: Everything) -> Path:
    """diffusers' own conversion to kohya's names; it writes the rank as alpha."""
    tensors = {}
    for network, own in factors.items():
        tensors |= convert_state_dict_to_kohya(peft_names(own, f"{network}."))
    return save(folder / "style.safetensors", tensors)


def kohya_tensors(factors: Everything, rename: Callable[[str], str] = str) -> dict[str, Tensor]:
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    if len(factors) == 2:
        prefixes["text_encoder"] = "lora_te_"
    tensors = {}
    for network, own in factors.items():
        tensors |= kohya_names(
            own, prefixes[network], lambda name: ALPHA, rename if network == "unet" else with_text_model
        )
    return tensors


def with_text_model(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


# SDXL's U-Net: three levels of two layers, attention below the first.
LDM = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.resnets.0": "input_blocks.7.0",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.resnets.1": "input_blocks.8.0",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.resnets.2": "output_blocks.2.0",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.3.0",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.resnets.1": "output_blocks.4.0",
    "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.1.resnets.2": "output_blocks.5.0",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.0": "output_blocks.6.0",
    "up_blocks.2.resnets.1": "output_blocks.7.0",
    "up_blocks.2.resnets.2": "output_blocks.8.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
LDM_INSIDE = {
    ".conv1": ".in_layers.2",
    ".time_emb_proj": ".emb_layers.1",
    ".conv2": ".out_layers.3",
    ".conv_shortcut": ".skip_connection",
}


def ldm_name(module: str) -> str:
    head = next(ours for ours in LDM if module == ours or module.startswith(f"{ours}."))
    rest = module.removeprefix(head)
    return LDM[head] + LDM_INSIDE.get(rest, rest)


# ---- both sides ----


@contextmanager
def loaded(pipeline: Any, adapters: Mapping[str, tuple[Path, float]]) -> Iterator[None]:
    """diffusers' pipeline with adapters, each a file and a weight, by PEFT."""
    # By this reference.py helps clip_skip along; it would mislead the reader.
    helped = [encoder for encoder in encoders(pipeline).values() if vars(encoder).pop("text_model", None) is not None]
    try:
        for name, (path, _) in adapters.items():
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        pipeline.set_adapters(list(adapters), [weight for _, weight in adapters.values()])
        yield
    finally:
        pipeline.unload_lora_weights()
        for encoder in helped:
            object.__setattr__(encoder, "text_model", encoder)


def outputs(parts: Parts) -> list[Tensor]:
    """The U-Net's output, and the context and pooled text of a prompt."""
    with torch.no_grad():
        made = [parts.unet(*unet_inputs(parts))]
        context, pooled = parts.text.encode(["a red fox in the snow"])
    return [*made, context, *([] if pooled is None else [pooled])]


def unet_inputs(parts: Parts) -> tuple[Tensor, Tensor, Conditioning]:
    config = parts.unet.config
    x, t = normal(2, 4, 12, 12), torch.tensor([999, 259])
    w = None if config.guidance_dim is None else torch.tensor([3.0, 7.5])
    pooled = time_ids = None
    if config.addition_in_dim is not None and config.addition_time_dim is not None:
        pooled = normal(2, config.addition_in_dim - 6 * config.addition_time_dim, seed=2)
        time_ids = torch.tensor([[96.0, 96, 0, 0, 96, 96], [72, 88, 8, 16, 72, 88]])
    return x, t, Conditioning(normal(2, 77, config.context_dim, seed=1), pooled, time_ids, w)


def their_outputs(pipeline: Any, parts: Parts, unet: Any = None) -> list[Tensor]:
    x, t, conditioning = unet_inputs(parts)
    arguments: dict[str, Any] = {}
    if conditioning.pooled is not None:
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
        arguments["added_cond_kwargs"] = added
    if conditioning.w is not None:
        width = parts.unet.config.guidance_dim
        arguments["timestep_cond"] = pipeline.get_guidance_scale_embedding(conditioning.w, width)
    with torch.no_grad():
        made = [(pipeline.unet if unet is None else unet)(x, t, conditioning.context, **arguments).sample]
        text: dict[str, Any] = {"do_classifier_free_guidance": False, "device": "cpu", "num_images_per_prompt": 1}
        found = pipeline.encode_prompt(["a red fox in the snow"], **text)
    return [*made, found[0], *([found[2]] if len(found) == 4 else [])]


def agree_all(model: str, agree: Agreement, ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for made, found in zip(ours, theirs, strict=True):
        agree.tensors(model, "lora", made, found, NETWORK)


# ---- the tests ----

BOTH, XL = ("sd15-lcm", "sdxl"), ("sdxl",)
FORMATS: dict[str, Callable[[Any, Path, Everything], Path]] = {
    "diffusers": by_diffusers,
    "diffusers without alphas": by_diffusers_untold,
    "older diffusers": by_older_peft,
    "old diffusers": by_old_diffusers,
    "kohya": by_kohya,
    "kohya by diffusers": by_kohya_export,
    "kohya, LDM names": by_kohya_with_ldm_names,
}
CELLS = [(name, model) for name in FORMATS for model in (XL if "LDM" in name else BOTH)]

# Names with words in them that diffusers takes for something else, where they are spelt with `_` for dots.
MISREAD = ("time_embedding.cond_proj", "add_embedding.linear_1", "add_embedding.linear_2")


def test_what_distillation_wrote(pairs: Pairs, agree: Agreement, tmp_path: Path) -> None:
    """An LCM-LoRA of our own, loaded by diffusers: the same picture."""
    data = tmp_path / "data"
    data.mkdir()
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (64, 64), colour).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"a {colour} fox")
    pair = pairs("sd21")
    settings: dict[str, Any] = {"lora_rank": RANK, "learning_rate": 3e-2, "lr_warmup_steps": 1, "resolution": 64}
    *_, end = calotype.distill(pair.folder, data, tmp_path / "out", lora=True, max_train_steps=4, **settings)
    assert end.stage == "done"
    parts = load_parts(pair.folder)
    before = outputs(parts)
    with loaded(pair.pipeline, {"it": (tmp_path / "out" / FOLDER_FILE, 1.0)}):
        theirs = their_outputs(pair.pipeline, parts)
    stack = Stack(parts)
    stack.add("it", load_lora(tmp_path / "out" / FOLDER_FILE, parts))
    ours = outputs(parts)
    agree_all("sd21", agree, ours, theirs)
    assert distance(ours[0], before[0]) > 0.05


def sayable(form: str, factors: Everything) -> Everything:
    """What of an adapter a format can say, and diffusers reads. (It also takes one alpha for all of kohya's layers.)"""
    if "old" in form:
        return {
            network: {name: own[name] for name in own if name.endswith((*ATTENTION, *CLIP_ATTENTION))}
            for network, own in factors.items()
        }
    if form.startswith("kohya"):
        return {network: {name: own[name] for name in own if name not in MISREAD} for network, own in factors.items()}
    return factors


@pytest.mark.parametrize(("form", "model"), CELLS, ids=[f"{form}-{model}" for form, model in CELLS])
def test_a_file(pairs: Pairs, agree: Agreement, tmp_path: Path, form: str, model: str) -> None:
    pair = pairs(model)
    path = FORMATS[form](pair.pipeline, tmp_path, sayable(form, factors_for(pair.pipeline)))
    parts = load_parts(pair.folder)
    before = outputs(parts)
    with loaded(pair.pipeline, {"it": (path, -0.7)}):
        theirs = their_outputs(pair.pipeline, parts)
    assert distance(their_outputs(pair.pipeline, parts)[0], before[0]) < NETWORK, "they went back as well"
    stack = Stack(parts)
    stack.add("it", load_lora(path, parts), -0.7)
    ours = outputs(parts)
    agree_all(model, agree, ours, theirs)
    assert distance(ours[0], before[0]) > 0.05, "the adapter does little: this proves little"
    stack.set({})
    for made, was in zip(outputs(parts), before, strict=True):
        assert torch.equal(made, was)


@pytest.mark.parametrize("model", BOTH)
def test_a_mix(pairs: Pairs, agree: Agreement, tmp_path: Path, model: str) -> None:
    """An LCM-LoRA's like (every layer, alpha 8 of rank 64) with a style of some layers, at 1.0 and 0.8."""
    pair = pairs(model)
    pipeline = pair.pipeline
    every = low_rank({name: module for name, module in layers(pipeline.unet).items() if name not in MISREAD}, 64)
    style = {
        "unet": low_rank(chosen(layers(pipeline.unet), ATTENTION), 5, seed=900),
        "text_encoder": low_rank(chosen(layers(pipeline.text_encoder), CLIP_ATTENTION), 5, seed=950),
    }
    lcm = save(tmp_path / "lcm.safetensors", kohya_names(every, "lora_unet_", lambda name: 8.0))
    papercut = save(tmp_path / "papercut.safetensors", kohya_tensors(style))

    parts = load_parts(pair.folder)
    with loaded(pipeline, {"lcm": (lcm, 1.0), "papercut": (papercut, 0.8)}):
        theirs = their_outputs(pipeline, parts)
    stack = Stack(parts)
    stack.add("papercut", load_lora(tmp_path, parts, weight_name="papercut.safetensors"))
    stack.add("lcm", load_lora(lcm, parts))
    stack.set({"lcm": 1.0, "papercut": 0.8})
    agree_all(model, agree, outputs(parts), theirs)

    stack.set({})
    with stack.live({"lcm": 1.0, "papercut": 0.8}):
        agree_all(model, agree, outputs(parts), theirs)


SOME = ["to_k", "ff.net.2", "proj_in", "conv1", "conv", "conv_shortcut", "time_emb_proj"]  # all shapes there are
CONFIGS: dict[str, Any] = {
    "LoRA": LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"to_k": 7, "conv1": 2},
        alpha_pattern={"conv1": 9, "down_blocks.0.resnets.0.time_emb_proj": 1},
        target_modules=SOME,
        init_lora_weights=False,
    ),
    "rsLoRA": LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=SOME, init_lora_weights=False),
    "LoRA with biases": LoraConfig(
        r=4, lora_alpha=6, lora_bias=True, target_modules=["ff.net.2", "conv1"], init_lora_weights=False
    ),
    "DoRA": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=SOME, init_lora_weights=False),
    "LoHa": LoHaConfig(r=4, alpha=20, target_modules=SOME, init_weights=False),
    "LoHa, Tucker": LoHaConfig(r=4, alpha=40, use_effective_conv2d=True, target_modules=SOME, init_weights=False),
    "LoKr": LoKrConfig(r=4, alpha=6, target_modules=SOME, init_weights=False),
    "LoKr, whole": LoKrConfig(r=64, alpha=48, target_modules=SOME, init_weights=False),
    "LoKr, Tucker, all in products": LoKrConfig(
        r=2,
        alpha=3,
        decompose_both=True,
        decompose_factor=8,
        use_effective_conv2d=True,
        rank_pattern={"to_k": 1},
        target_modules=SOME,
        init_weights=False,
    ),
    "IA3": IA3Config(target_modules=SOME, feedforward_modules=["ff.net.2", "conv1"], init_ia3_weights=False),
    "OFT": OFTConfig(oft_block_size=8, target_modules=SOME, init_weights=False),
    "OFT, seven terms": OFTConfig(
        oft_block_size=8, num_cayley_neumann_terms=7, target_modules=SOME, init_weights=False
    ),
    "OFT, two terms": OFTConfig(oft_block_size=8, num_cayley_neumann_terms=2, target_modules=SOME, init_weights=False),
    "OFT, exact": OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=SOME, init_weights=False),
    "OFT, constrained and shared": OFTConfig(
        oft_block_size=8, coft=True, eps=0.3, block_share=True, target_modules=SOME, init_weights=False
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_of_peft(pairs: Pairs, agree: Agreement, tmp_path: Path, kind: str) -> None:
    """Trained and saved by PEFT: what multiplies it is in adapter_config.json."""
    pair = pairs("sd15-lcm")
    unet = copy.deepcopy(pair.pipeline.unet)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(unet, copy.deepcopy(CONFIGS[kind]))
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:  # it begins with the base's lengths
                parameter.data *= 0.7 + 0.6 * torch.rand_like(parameter)
            elif "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path))
    if kind.startswith("OFT"):  # of a convolution, what it trains is not what it merges
        model.merge_adapter()
    parts = load_parts(pair.folder)
    plain = outputs(parts)[0]
    theirs = their_outputs(pair.pipeline, parts, unet)[0]
    stack = Stack(parts)
    stack.add("it", load_lora(tmp_path, parts))
    ours = outputs(parts)[0]
    agree.tensors("sd15-lcm", "lora", ours, theirs, NETWORK)
    assert distance(ours, plain) > 0.01, "the adapter does little: this proves little"


def test_a_state_of_peft(pairs: Pairs, tmp_path: Path) -> None:
    """The adapter's name is in its keys, and nothing says alpha."""
    pair = pairs("sd15-lcm")
    factors = low_rank(chosen(layers(pair.pipeline.unet), ATTENTION))
    parts = load_parts(pair.folder)
    with_name = save(tmp_path / "a.safetensors", peft_names(factors, "base_model.model.", ".default"))
    without = save(tmp_path / "b.safetensors", peft_names(factors, "unet."))
    made = [Stack(parts) for _ in range(2)]
    found = []
    for stack, path in zip(made, (with_name, without), strict=True):
        stack.add("it", load_lora(path, parts))
        found.append(outputs(parts)[0])
        stack.set({})
    assert torch.equal(*found)


def test_sdxl_on_ssd1b(pairs: Pairs, tmp_path: Path) -> None:
    """The same widths, but blocks that SSD-1B lacks."""
    factors = low_rank(chosen(layers(pairs("sdxl").pipeline.unet), ATTENTION))
    path = save(tmp_path / "xl.safetensors", peft_names(factors, "unet."))
    with pytest.raises(CheckpointError, match=r"name nothing in it \(unet\.down_blocks"):
        load_lora(path, load_parts(pairs("ssd1b-lcm").folder))


def test_every_name_of_sdxl_is_found_both_ways(pairs: Pairs) -> None:
    """Our table of LDM names, against the one above, and back."""
    from calotype.lora.names import Names, kohya_name, ldm_names

    parts = load_parts(pairs("sdxl").folder)
    theirs = {name: ldm_name(name) for name in layers(parts.unet)}
    ours: Mapping[str, str] = ldm_names(parts.unet)
    assert {name: ours[name] for name in theirs} == theirs
    names = Names.of(parts)
    for name in ours:
        assert names.find(kohya_name("unet", name, ours)) == ("unet", name)
        assert names.find(kohya_name("unet", name, {})) == ("unet", name)
    for network, encoder in zip(("text_encoder", "text_encoder_2"), parts.text.models, strict=True):
        for name in layers(encoder):
            assert names.find(kohya_name(network, name, ours)) == (network, name)
