"""calotype doctor: what this machine has, what is chosen by itself on it, and which models fit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

GB = 1e9
DECODING = 1750  # numbers that decoding takes for each pixel at its peak (docs/notes/fast.md)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine has, what calotype chooses by itself on it, and which models fit.

    Products of matrices are measured, for some seconds.
    """
    found = examined()
    if as_json:
        print(json.dumps(found))
        return
    print("\n".join(f"{name + ':':<12}{text}" for name, text in rows(found)))


def examined() -> dict[str, Any]:
    """All that is told, as JSON."""
    import torch

    from calotype import machine
    from calotype.optimize import chosen, native
    from calotype.precision import SMALL, automatic, device_of

    device = device_of("auto")
    dtype = automatic(device, SMALL)
    dtypes = dict.fromkeys((torch.float32, dtype))
    return {
        "processor": machine.processor(),
        "threads": torch.get_num_threads(),
        "instructions": list(machine.instructions()),
        "memory": machine.memory(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "compiler": native.compiler(),
        "native": native.unusable() or ("built" if native.kernel() is not None else "not built: calotype native build"),
        "ceilings": {_name(each): machine.ceiling(each, device) for each in dtypes},
        "dtype": _name(dtype),
        "small dtype": _name(automatic(device, SMALL - 1)),
        "small": SMALL,
        "steps": [step.name for step in chosen("auto", device, dtype, SMALL)],
        "models": {name: needed(name, dtype) for name in ("sd15", "ssd1b", "sdxl")},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def needed(name: str, dtype: torch.dtype) -> dict[str, float]:
    """The side of a family's pictures in pixels, and the bytes that such a picture takes: weights, and decoding."""
    from calotype.families import FAMILIES
    from calotype.weights.load import text_encoder_of, unet_of, vae_of
    from calotype.weights.texts import family_texts

    texts = family_texts(next(family for family in FAMILIES if family.name == name))
    unet, vae = unet_of(texts["unet/config.json"], name), vae_of(texts["vae/config.json"], name)
    places = [place for place in texts if place.startswith("text_encoder")]
    networks = [unet, vae, *(text_encoder_of(texts[place], name) for place in places)]
    weights = sum(each.numel() for network in networks for each in network.parameters())
    side = unet.config.sample_size * vae.config.downscale
    return {"side": side, "bytes": dtype.itemsize * (weights + DECODING * side**2)}


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, what is found), a line each."""
    ceilings = (f"{name} {flops / 1e9:,.0f} GFLOP/s" for name, flops in found["ceilings"].items())
    million = f"{found['small'] / 1e6:.0f} million"
    sets = ", ".join(found["instructions"]) or "no vector instructions that are known here"
    fits = (
        f"{name} at {model['side']} px, {model['bytes'] / GB:.1f} GB: "
        + ("yes" if model["bytes"] < found["memory"] else "no")
        for name, model in found["models"].items()
    )
    return [
        ("processor", f"{found['processor']}, {found['threads']} threads: {sets}"),
        ("memory", f"{found['memory'] / GB:.1f} GB"),
        ("GPU", found["gpu"] or ("none" if found["device"] == "cpu" else found["device"])),
        ("torch", found["torch"]),
        ("compiler", found["compiler"] or "none"),
        ("kernel", found["native"]),
        ("ceiling", ", ".join(ceilings)),
        ("large", f"from {million} parameters on: {found['dtype']}, {', '.join(found['steps']) or 'no steps'}"),
        ("small", f"smaller models: {found['small dtype']}, no steps"),
        ("fits", "; ".join(fits)),
    ]
