"""The whole command, from nothing to a PNG, against the same picture by a diffusers script.

python benchmarks/cold_start.py [FOLDER] [--runs N]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from calotype.training.card import PEERS
from measure import CALOTYPE, ROOT, SHIPPED, interleaved, ratio, report, verdict

TARGET = 0.5  # of diffusers' time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=SHIPPED)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    defaults = json.loads((args.folder / "calotype.json").read_text())
    same = ["astronaut", "--steps", "4", "--seed", "0", "--guidance", str(defaults["guidance"])]
    _, _, beside = PEERS[defaults["sampler"]]  # what our default is, and not theirs
    theirs_only = [part for name, value in beside.items() for part in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs = Path(scratch, "calotype.png"), Path(scratch, "diffusers.png")
        peer = str(ROOT / "benchmarks/peer_diffusers.py")
        model = [] if args.folder == SHIPPED else ["--model", str(args.folder)]
        commands = {
            "calotype": [CALOTYPE, *same, "-o", str(ours), *model],
            "diffusers": [sys.executable, peer, str(args.folder), *same, *theirs_only, "-o", str(theirs)],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        }
        results = interleaved(commands, args.runs)
        difference = np.abs(pixels(ours) - pixels(theirs))
    report(results, "diffusers")
    print(f"the pictures differ by at most {difference.max()}/255, by more than 1 on {np.mean(difference > 1):.3%}")
    walls = {name: [run.wall for run in runs] for name, runs in results.items()}
    verdict("cold start, calotype / diffusers", ratio(walls["calotype"], walls["diffusers"]), TARGET)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


if __name__ == "__main__":
    main()
