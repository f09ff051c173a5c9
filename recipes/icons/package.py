"""Puts a model that was trained or distilled where it is kept: weights in float16, nothing of the run itself.

    python recipes/icons/package.py runs/base recipes/icons/base --share src/calotype/models/icons
    python recipes/icons/package.py runs/lcm src/calotype/models/icons --card recipes/icons/card.md --base runs/base

The folder is replaced whole. --share FOLDER, as often as you like: parts that are the same there become links to it.
--card FILE: becomes the README.md, with {base.steps} and the like filled in from the records of the trainings, which
--base FOLDER has.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from folders import SHARD, STEMS, must_be_finished, read_part, write_part

from calotype.atomic import replacing_folder

FILES = ("calotype.json", "training.json", "distillation.json", "model_index.json")
RECORDS = {"base": "training.json", "autoencoder": "vae/training.json"}  # so that a card can say {base.steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=Path, action="append", default=[])
    parser.add_argument("--card", type=Path)
    parser.add_argument("--base", type=Path, help="the base model that it was distilled from, as it was trained")
    parser.add_argument("--whole", action="store_true", help="a file a part, however large; else at most 15 MiB each")
    options = parser.parse_args()
    must_be_finished(options.model)
    out: Path = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(out) as folder:
        for name in ("tokenizer", "scheduler"):
            shutil.copytree(options.model / name, folder / name)
        for name, stem in STEMS.items():
            repack(options.model / name, folder / name, stem, SHARD if not options.whole else 1 << 40)
        for name in FILES:
            if (options.model / name).is_file():
                shutil.copyfile(options.model / name, folder / name)
        if options.card is not None:
            (folder / "README.md").write_text(filled(options.card, options.base or options.model), encoding="utf-8")
        for name in ("tokenizer", *STEMS):
            shared = next((each / name for each in options.share if same(folder / name, each / name)), None)
            if shared is not None:
                shutil.rmtree(folder / name)
                (folder / name).symlink_to(os.path.relpath(shared, out))
    sizes = {path: path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file() and not path.is_symlink()}
    total, largest = (size / 2**20 for size in (sum(sizes.values()), max(sizes.values())))
    print(f"{out}: {len(sizes)} files, {total:.1f} MiB, the largest {largest:.1f}")


def repack(source: Path, folder: Path, stem: str, shard: int) -> None:
    """A part's folder again, whatever files its weights were in."""
    tensors = read_part(source)
    if not tensors:
        raise SystemExit(f"{source} has no weights")
    write_part(folder, stem, tensors, json.loads((source / "config.json").read_text(encoding="utf-8")), shard)


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same: the same tensors, in whatever files, and the same beside them."""
    if not other.is_dir():
        return False
    beside = [sorted(path.name for path in each.iterdir() if ".safetensors" not in path.name) for each in (one, other)]
    if beside[0] != beside[1] or filecmp.cmpfiles(one, other, beside[0], shallow=False)[0] != beside[0]:
        return False
    tensors, others = read_part(one), read_part(other)
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def filled(card: Path, base: Path) -> str:
    """The card with the trainings' figures in place of {autoencoder.psnr} and the like."""
    text = card.read_text(encoding="utf-8")
    for name, record in RECORDS.items():
        if (base / record).is_file():
            figures: dict[str, Any] = json.loads((base / record).read_text(encoding="utf-8"))
            for key, value in figures.items():
                text = text.replace(f"{{{name}.{key}}}", str(value))
    left = [part.split("}")[0] for part in text.split("{")[1:] if "." in part.split("}")[0]]
    if left:
        raise SystemExit(f"{card} names {{{left[0]}}}, which {base} has no record of: give --base, or write it there")
    return text


if __name__ == "__main__":
    main()
