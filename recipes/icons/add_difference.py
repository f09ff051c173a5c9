"""A model moved by what another learnt: its weights, plus the difference of two others, or a share of it.

    python recipes/icons/add_difference.py MODEL BASE NEW OUT [--share 0.7]

NEW went on from BASE, and MODEL was distilled from BASE, or is BASE itself; OUT is a model folder. What distilling
changes and what is learnt of pictures lie far enough apart to be added, as when an LCM-LoRA is put on a fine-tuned
model (Luo et al. 2023, arXiv 2311.05556, section 3: "task arithmetic"). A share of what was learnt of a narrower
mixture keeps most of it, and most of what was known before (Wortsman et al. 2022, arXiv 2109.01903).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from folders import STEMS, must_be_finished, read_part, write_json, write_part
from torch import Tensor

from calotype.atomic import replacing_folder

MOVED = ("unet", "text_encoder")
RECORD = "training.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "base", "new", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the difference")
    options = parser.parse_args()
    for folder in (options.model, options.base, options.new):
        must_be_finished(folder)
    with replacing_folder(options.out) as folder:
        shutil.copytree(options.model, folder, ignore=shutil.ignore_patterns(*MOVED), dirs_exist_ok=True)
        for part in MOVED:
            three = [read_part(each / part) for each in (options.model, options.base, options.new)]
            config = json.loads((options.model / part / "config.json").read_text(encoding="utf-8"))
            write_part(folder / part, STEMS[part], moved(*three, options.share), config)
        if (folder / RECORD).is_file() and (options.new / RECORD).is_file():  # a base model says how it was made
            record = json.loads((options.new / RECORD).read_text(encoding="utf-8"))
            write_json(folder / RECORD, {**record, "share": options.share})
    print(f"{options.out}: {options.model}, moved by {options.share:g} of what {options.new} learnt")


def moved(
    model: Mapping[str, Tensor], old: Mapping[str, Tensor], new: Mapping[str, Tensor], share: float = 1.0
) -> dict[str, Tensor]:
    """The model's weights plus a share of the difference of two others; what only the model has stays."""
    for name in sorted(old.keys() | new.keys()):
        if len({each[name].shape if name in each else None for each in (model, old, new)}) > 1:
            raise SystemExit(f"{name} is not of one shape in all three: these are not models of one kind")
    return {
        name: tensor.float() + share * (new[name].float() - old[name].float()) if name in old else tensor
        for name, tensor in model.items()
    }


if __name__ == "__main__":
    main()
