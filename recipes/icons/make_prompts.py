"""Writes the 1,000 prompts of `calotype eval`: captions that the first teacher was trained on, shuffled once for all.

python recipes/icons/make_prompts.py ICONS [-o recipes/icons/prompts.txt]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

COUNT = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("icons", type=Path, help="the folder with manifest.jsonl")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("prompts.txt"))
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.icons / "manifest.jsonl").read_text().splitlines()]
    captions = sorted({row["caption"] for row in rows if row["set"] == "fluent-emoji-flat"})
    random.Random(0).shuffle(captions)
    args.output.write_text("".join(f"{caption}\n" for caption in captions[:COUNT]))
    print(f"{args.output}: {min(COUNT, len(captions))} of {len(captions)} captions")


if __name__ == "__main__":
    main()
