"""Gets the packages that the icons, their names and their translations come from: 80 MB, seconds on a fast line.

    python recipes/icons/fetch.py PACKAGES

npm and apt-get get them, from wherever they are set up to. A file that is already there and whole is left alone; one
whose content is not the one that the list of icons was made for is refused.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package of exactly this content."""

    name: str
    version: str
    sha512: str  # in base64, as npm says it
    debian: bool = False

    @property
    def file(self) -> str:
        if self.debian:
            return f"{self.name}_{self.version.partition(':')[2]}.deb"
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def read_packages() -> list[Package]:
    lines = (Path(__file__).parent / "packages.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    return [Package(name, version, sha512, kind == "deb") for kind, name, version, sha512 in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("--limit", type=int, help="only the first so many, for a quick try")
    options = parser.parse_args()
    started = time.monotonic()
    options.packages.mkdir(parents=True, exist_ok=True)
    wanted = read_packages()[: options.limit]
    for package in wanted:
        path = options.packages / package.file
        if not path.is_file():
            get(package, path)
        check(package, path)
    print(f"{len(wanted)} packages in {options.packages}; {time.monotonic() - started:.0f} s")


def get(package: Package, path: Path) -> None:
    """Downloads beside, then moves: what has the name is whole."""
    if package.debian:
        command = ["apt-get", "download", f"{package.name}={package.version}"]
        remedy = "apt-get update, or on another system put Debian's file there yourself"
    else:
        command = ["npm", "pack", "--loglevel=error", f"{package.name}@{package.version}"]
        remedy = "see that `npm ping` answers, or put the file there yourself"
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{package.file} is missing and there is no {command[0]} to get it: {remedy}")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        files = list(Path(folder).iterdir())
        if done.returncode != 0 or len(files) != 1:
            said = (done.stderr.strip() or done.stdout.strip() or "no file came").splitlines()[0]
            raise SystemExit(f"{package.name} {package.version} cannot be fetched ({said}): {remedy}")
        files[0].rename(path)
    print(path.name, flush=True)


def check(package: Package, path: Path) -> None:
    """Refuses a file that is not the very one."""
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise SystemExit(f"{path} is not {package.name} {package.version} as it was listed: remove it and fetch again")


if __name__ == "__main__":
    main()
