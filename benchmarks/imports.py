"""What importing costs, in fresh processes.

python benchmarks/imports.py [--runs N]
"""

from __future__ import annotations

import argparse
import sys

from measure import CALOTYPE, interleaved, ratio, report, verdict

TARGET = 1.3  # of torch's import


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs
    # `import calotype` alone imports nothing else; `calotype.load` brings the engine, and torch.
    engine = "import calotype; calotype.load"
    programs = {"import torch": "import torch", "import calotype": "import calotype", engine: engine}
    commands = {name: [sys.executable, "-c", program] for name, program in programs.items()}
    results = interleaved({**commands, "calotype --help": [CALOTYPE, "--help"]}, runs)
    report(results, "import torch")
    walls = {name: [run.wall for run in runs] for name, runs in results.items()}
    verdict("the engine's import / torch's", ratio(walls[engine], walls["import torch"]), TARGET)


if __name__ == "__main__":
    main()
