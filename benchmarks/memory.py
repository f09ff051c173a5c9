"""How much anonymous memory (RssAnon) loading a large checkpoint takes, while it loads and after.

    python benchmarks/memory.py [--folder FOLDER]     # keeps the random Stable Diffusion 1.5 that it writes (2.1 GB)

Figures are bytes grown over a process that has imported its library, divided by the bytes of the loaded parameters.
Linux only: the figures come from /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from measure import verdict

if TYPE_CHECKING:
    pass

TARGET = 1.15  # bytes grown for each byte of weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="where the random checkpoint is kept")
    parser.add_argument("--child", nargs=3, metavar=("LIBRARY", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(*args.child)
    elif args.folder is not None:
        compare(args.folder)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            compare(Path(scratch, "sd15"))


def compare(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        from calotype.bench.random_model import write

        write("sd15", folder)
    print(f"{'':10} {'dtype':9} weights GB   grown: peak    ratio    after    ratio")
    for dtype in ("float16", "float32"):  # the files are float16: the second is a conversion
        for library in ("calotype", "diffusers"):
            command = [sys.executable, __file__, "--child", library, str(folder), dtype]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            weights, peak, after = json.loads(output.splitlines()[-1])
            numbers = f"{peak / 1e9:8.3f} {peak / weights:8.3f} {after / 1e9:8.3f} {after / weights:8.3f}"
            print(f"{library:10} {dtype:9} {weights / 1e9:10.3f}       {numbers}")
            if library == "calotype":
                verdict(f"anonymous memory at its peak / weights in {dtype}", peak / weights, TARGET)


# ---- the measurement, in a process of its own ----


def child(library: str, folder: str, dtype: str) -> None:
    """Prints [bytes of the loaded parameters, RssAnon's growth at its peak, and at the end]."""
    load = {"calotype": with_calotype, "diffusers": with_diffusers}[library]()
    before = anonymous()
    with Peak() as peak:
        parameters = list(load(folder, dtype))
        after = anonymous()
    weights = sum(parameter.nbytes for parameter in parameters)
    print(json.dumps([weights, max(peak.bytes, after) - before, after - before]))


def with_calotype() -> Callable[[str, str], Iterable]:
    import calotype.engine

    def load(folder: str, dtype: str) -> Iterable:
        parts = calotype.engine.load(folder, dtype=dtype, device="cpu").parts
        return [p for network in (parts.unet, parts.vae, *parts.text.models) for p in network.parameters()]

    return load


def with_diffusers() -> Callable[[str, str], Iterable]:
    import torch
    from diffusers import StableDiffusionPipeline

    def load(folder: str, dtype: str) -> Iterable:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, torch_dtype=getattr(torch, dtype), local_files_only=True
        )
        return [p for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in network.parameters()]

    return load


def anonymous() -> int:
    """This process's RssAnon in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Peak:
    """The largest RssAnon while it is entered, looked at every 5 ms."""

    def __enter__(self) -> Peak:
        self.bytes, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.is_set():
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.005)

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()


if __name__ == "__main__":
    main()
