"""How the keys of adapters' files end: what each tensor is, and of which layer. diffusers, PEFT, kohya's scripts,
LyCORIS, ComfyUI and OneTrainer each have their own names for the same matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from calotype.weights.wrapping import INNER

ADAPTER = r"(?:\.(?!weight$|bias$)[\w-]+)?"  # in PEFT's own state the adapter's name stands behind the tensor's

# How a key ends, and what its tensor is; the first that fits counts.
ENDINGS = tuple(
    (re.compile(f"(.+?){ending}"), part)
    for ending, part in (
        (
            rf"(?:\.lora_A{ADAPTER}\.weight|\.lora_A|(?:\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight)",
            "down",
        ),
        (rf"(?:\.lora_B{ADAPTER}\.weight|\.lora_B|(?:\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight)", "up"),
        (rf"\.lora_B{ADAPTER}\.bias", "up_bias"),
        (rf"\.lora_embedding_(?P<part>[AB]){ADAPTER}", "embedding_"),  # of a table, with rows and columns exchanged
        (r"\.lora_mid\.weight", "mid"),
        (r"\.lora_magnitude_vector(?:\.[\w-]+){0,2}", "row_lengths"),  # DoRA, of the outputs
        (r"\.(?:dora_scale|magnitude)", "lengths"),  # DoRA, of the outputs or of the inputs: its shape says which
        (r"(?:_lora)?\.alpha", "alpha"),
        (r"\.(?P<part>scalar)", ""),  # LyCORIS until 2023: a trained factor of the whole product
        (rf"\.hada_(?P<part>w[12]_[ab]|t[12]){ADAPTER}", "hada_"),
        (rf"\.lokr_(?P<part>w[12](?:_[ab])?|t2){ADAPTER}", "lokr_"),
        (r"\.(?P<part>[ab][12])\.weight", "glora_"),
        (r"\.(?P<part>oft_blocks|oft_diag|rescale)", ""),  # kohya's and LyCORIS' OFT, and LyCORIS' BOFT
        (rf"\.oft_R{ADAPTER}\.weight", "oft_packed"),  # PEFT's from 0.16 on, and OneTrainer's
        (r"\.oft_R\.scaled_oft", "oft_scaled"),
        (rf"\.(?P<part>oft_r|oft_s){ADAPTER}", ""),  # PEFT's until 0.15
        (rf"\.(?P<part>ia3_l){ADAPTER}", ""),
        (
            r"\.(?P<part>diff|diff_b|w_norm|b_norm|set_weight)",
            "",
        ),  # the whole change of a weight or a bias, or the whole
        (r"\.(?P<part>reshape_weight|bias_indices|bias_values|bias_size)", ""),
        (r"\.(?P<part>on_input|weight)", "ia3_"),  # LyCORIS' IA3
    )
)

# Adapters that are known, but not applied, and what their keys have. Most are PEFT's.
UNSUPPORTED = {
    "BOFT as PEFT writes it (boft_R)": r"boft_[Rs]\b",
    "PVeRA": r"pvera_",
    "VeRA": r"vera_(?:lambda|[AB])",
    "VB-LoRA": r"vblora_",
    "HRA": r"hra_u\b",
    "FourierFT": r"fourierft_",
    "WaveFT": r"waveft_",
    "LN-tuning": r"ln_tuning_layers\b",
    "X-LoRA": r"(?:internal_)?xlora_",
    "AdaLoRA": r"lora_E\b",
    "GLoRA as PEFT writes it (glora_A)": r"glora_[A-E]\b",
    "RandLoRA": r"randlora_",
    "GraLoRA": r"gralora_",
    "DeLoRA": r"delora_",
    "HiRA": r"hira_",
    "TinyLoRA": r"tinylora_",
    "Uni-LoRA": r"unilora_",
    "Poly": r"poly_(?:lora|router)",
    "MiSS or Bone": r"(?:miss|bone)_",
    "RoAd": r"road_(?:theta|alpha)\b",
    "C3A": r"c3a_kernel\b",
    "SHiRA": r"shira_",
    "OSF": r"osf_",
    "PSOFT": r"psoft_",
    "Lily": r"lily_",
    "FRoD": r"frod_",
    "DEFT": r"deft_[PR]\b",
    "PEANuT": r"peanut_",
    "AdaMSS": r"adamss_",
    "BEFT": r"beft_bias\b",
    "SuperTuning": r"supertuning_",
    "Shadow": r"shadow_(?:up|down|alpha)",
    "KaSA": r"lora_diag\b",
    "MonteCLoRA": r"lora_monteclora",
    "OFT of an embedding table": r"oft_embedding_R\b",
    "trainable tokens": r"trainable_tokens_delta\b",
    "prompt tuning": r"prompt_(?:embeddings|encoder)\b",
    "ControlNet-LLLite": r"lllite_",
    "Control-LoRA, which is a ControlNet": r"lora_controlnet",
    "DyLoRA as it is trained, not as it is saved": r"(?:up|down)_list\.\d+",
    "GLoRA with a Tucker middle": r"[abg]m\.weight",
    "DoRA of OFT": r"dora_multiplier|initial_norm",
    "cloneofsimo's lists of matrices, which do not say their layers": r"(?:unet|text_encoder):\d+:(?:up|down)",
}
SIGN = re.compile(rf"(?:^|[._])(?:{'|'.join(f'({key})' for key in UNSUPPORTED.values())})")


def layers_of(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{module's name in the file: {part: key}}, and the keys that are no part of an adapter."""
    found: dict[str, dict[str, str]] = {}
    strange = []
    for key in keys:
        plain = INNER.sub("", key)  # which may be in the adapter's part of a key as well
        match, part = next(((m, part) for pattern, part in ENDINGS if (m := pattern.fullmatch(plain))), (None, ""))
        if match is not None:
            part += match.groupdict().get("part", "")
            layer = found.setdefault(match[1], {})
        if match is None or part in layer:  # the latter: a second spelling of what is there already
            strange.append(key)
        else:
            layer[part] = key
    for name, layer in [*found.items()]:
        if "ia3_weight" in layer and "ia3_on_input" not in layer:  # a weight of the model itself
            strange.append(layer.pop("ia3_weight"))
        if not layer:
            del found[name]
    return found, strange


def unsupported(keys: Iterable[str]) -> tuple[str, str] | None:
    """(what it is, a key that shows it) of an adapter that is known and not applied."""
    for key in keys:
        if (sign := SIGN.search(key)) is not None:
            return [*UNSUPPORTED][next(i for i, group in enumerate(sign.groups()) if group is not None)], key
    return None
