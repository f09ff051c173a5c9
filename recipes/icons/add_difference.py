"""A distilled model of a base model that has learnt more since: the old one, plus what its base's weights moved by.

    python recipes/icons/add_difference.py runs/lcm recipes/icons/base runs/base runs/moved

That is MODEL, the BASE it was distilled from, the NEW one that went on from BASE, and OUT, a model folder. What is
distilled and what is learnt of pictures lie far enough apart to be added, as when an LCM-LoRA is put on a fine-tuned
base model (Luo et al. 2023, arXiv 2311.05556, section 3.2, "task arithmetic"). All but the U-Net is the NEW one's.
It can be used as it is, or gone on from: `calotype distill runs/base DATA --student runs/moved`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from folders import read_part, write_part
from torch import Tensor

from calotype.weights.write import replacing_folder

TAKEN = ("tokenizer", "text_encoder", "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "base", "new", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    for folder in (options.model, options.base, options.new):
        if not (folder / "model_index.json").is_file():
            raise SystemExit(f"{folder} is no finished model: it lacks model_index.json")
    unet, old, new = (read_part(folder / "unet") for folder in (options.model, options.base, options.new))
    tensors = moved(unet, old, new)
    with replacing_folder(options.out) as folder:
        shutil.copytree(options.model, folder, ignore=shutil.ignore_patterns("unet", *TAKEN), dirs_exist_ok=True)
        for name in TAKEN:
            shutil.copytree(options.new / name, folder / name)
        config = json.loads((options.model / "unet" / "config.json").read_text(encoding="utf-8"))
        write_part(folder / "unet", "diffusion_pytorch_model", tensors, config)
    squares = sum((new[name].float() - old[name].float()).square().sum().item() for name in old)
    length = sum(tensor.float().square().sum().item() for tensor in old.values())
    print(f"{options.out}: the base moved by {(squares / length) ** 0.5:.1%} of its length")


def moved(model: Mapping[str, Tensor], old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights plus the difference of two others; what only the model has stays."""
    for name in sorted(old.keys() | new.keys()):
        if len({each[name].shape if name in each else None for each in (model, old, new)}) > 1:
            raise SystemExit(f"{name} is not of one shape in all three: these are not models of one kind")
    return {
        name: tensor.float() + (new[name].float() - old[name].float()) if name in old else tensor
        for name, tensor in model.items()
    }


if __name__ == "__main__":
    main()
