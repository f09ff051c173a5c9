"""Draws every icon of the list at 128 px: what every training here starts from. About three minutes on one core.

    pip install resvg-py==0.5.0
    python recipes/icons/draw.py PACKAGES OUT [--compare FOLDER]

PACKAGES is what fetch.py leaves. OUT gets

    pictures-128.tar   <id, five digits>.webp: RGBA, without loss, trimmed, its longer side 120 px, in the middle
    manifest.jsonl     a line for each: id, set, icon (its name there), style, caption, kw (keywords), group, sub, hex
    names.json         the names of each emoji, by code points, in other languages

The list (list.jsonl.xz, the same lines) says which icons: no brands, flags, letters, nor pictures that are not free,
each caption read or made by hand where the set's names are none. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import re
import shutil
import subprocess
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from fetch import Package, read_packages
from PIL import Image
from scenes import LIST, NAMES, SIZE, TAR

from calotype.atomic import replacing

INNER = 120  # pixels of the longer side
FAINT = 8  # opacity, of 255, that is not seen as part of an icon: the rims of shadows
RASTER, PAGE = 144, 256  # pixels at which icons, and clip art on its page, are drawn before they are trimmed
SMALL, ENLARGED = 154, 200  # clip art whose longer side is less on its page is drawn anew, with this one,
LARGEST = 2048  # on a page of so many pixels at most
LANGUAGES = ("ar", "es", "fr", "zh")
SIGNS = {0xFE0F, *range(0x1F3FB, 0x1F400)}  # "as a picture" and the skin tones: not part of a concept

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, help="that many icons evenly out of all, for a quick try")
    parser.add_argument("--compare", type=Path, metavar="FOLDER", help="say how far the pictures are from those there")
    options = parser.parse_args()
    started = time.monotonic()
    rows = read_list()
    if options.limit is not None:
        rows = rows[:: max(1, len(rows) // options.limit)][: options.limit]
    drawn = options.out / "drawn"
    drawn.mkdir(parents=True, exist_ok=True)
    sets = Sets(options.packages)
    for number, row in enumerate(rows, start=1):
        path = drawn / file_name(row)
        if not path.is_file():
            try:
                picture = fitted(sets.picture(row))
            except (KeyError, ValueError) as error:
                what = f"{row['set']} {row['icon']} cannot be drawn ({error})"
                raise SystemExit(f"{what}: its package is not the listed one; fetch it anew") from error
            with replacing(path) as temporary:
                picture.save(temporary, "WEBP", lossless=True)
        if number % 2000 == 0:
            print(f"{number} of {len(rows)}; {time.monotonic() - started:.0f} s", flush=True)
    pack([drawn / file_name(row) for row in rows], options.out / TAR)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (options.out / LIST).write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = translations(options.packages, {row["hex"] for row in rows if row["hex"]})
    (options.out / NAMES).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    shutil.rmtree(drawn)
    print(
        f"{len(rows)} pictures and the names of {len(names)} emoji in {options.out}; {time.monotonic() - started:.0f} s"
    )
    if options.compare is not None:
        compare(rows, options.out / TAR, options.compare / TAR)


def read_list() -> list[Row]:
    text = lzma.decompress((Path(__file__).parent / "list.jsonl.xz").read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


def file_name(row: Row) -> str:
    return f"{row['id']:05d}.webp"


# ---- the sets ----


class Sets:
    """The icons of all packages as pictures, each package opened when its first icon is wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages = {package.name.rpartition("/")[2]: package for package in read_packages()}
        self.read: dict[str, Callable[[str], Image.Image]] = {}

    def picture(self, row: Row) -> Image.Image:
        """An icon, untrimmed. Raises KeyError or ValueError where the package lacks it."""
        name = row["set"]
        if name not in self.read:
            self.read[name] = self.reader(name)
        return self.read[name](row["icon"])

    def reader(self, name: str) -> Callable[[str], Image.Image]:
        if name == "fluent-3d":
            content = unpacked(self.folder, self.packages["fluent-emoji-3d"], "package/assets/")
            return lambda icon: Image.open(io.BytesIO(content[f"package/assets/{icon}"])).convert("RGBA")
        if name == "openclipart":
            root = clip_art(self.folder, self.packages["openclipart-svg"])
            return lambda icon: on_page(with_view_box((root / icon).read_text(encoding="utf-8", errors="replace")))
        data = json.loads(unpacked(self.folder, self.packages[name], "package/icons.json")["package/icons.json"])
        return lambda icon: raster(svg(data, icon))


def unpacked(folder: Path, package: Package, prefix: str) -> dict[str, bytes]:
    """The files of an npm package under a prefix."""
    path = present(folder, package)
    with tarfile.open(path) as tar:
        return {
            member.name: file.read()
            for member in tar
            if member.name.startswith(prefix) and (file := tar.extractfile(member)) is not None
        }


def clip_art(folder: Path, package: Package) -> Path:
    """The folder of Open Clip Art's pictures, unpacked beside the package."""
    path = present(folder, package)
    root = folder / package.name
    if not root.is_dir():
        if shutil.which("dpkg-deb") is None:
            raise SystemExit(f"{path} needs dpkg-deb to be opened: install dpkg, or unpack it into {root} yourself")
        partial = root.with_suffix(".part")
        subprocess.run(["dpkg-deb", "-x", path, partial], check=True)
        partial.rename(root)
    return root / "usr" / "share" / "openclipart" / "svg"


def present(folder: Path, package: Package) -> Path:
    path = folder / package.file
    if not path.is_file():
        raise SystemExit(f"{path} is missing: get it with recipes/icons/fetch.py")
    return path


def svg(data: dict[str, Any], name: str) -> str:
    """An icon of an Iconify set as a file of its own."""
    icon = data["icons"].get(name) or data["icons"][data["aliases"][name]["parent"]]
    box = [icon.get(field, data.get(field, default)) for field, default in BOX]
    left, top, width, height = box
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))


def with_view_box(text: str) -> str:
    """Old drawings have sizes in mm or pt, which resvg takes for no size at all: a view box says it in pixels."""
    head = re.search(r"<svg\b[^>]*>", text)
    if head is None:
        return text
    sizes = [re.search(rf'\s{side}="([\d.]+)([a-z]*)"', head[0]) for side in ("width", "height")]
    bare = re.sub(r'\s(width|height)="[^"]*"', "", head[0])
    if "viewBox" not in bare:
        width, height = (float(size[1]) * UNITS.get(size[2], 1) for size in sizes if size is not None)
        bare = bare.replace("<svg", f'<svg viewBox="0 0 {width:g} {height:g}"', 1)
    return text.replace(head[0], bare, 1)


UNITS = {"pt": 96 / 72, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96}  # in pixels


def raster(text: str, side: int = RASTER) -> Image.Image:
    """A drawing that fits a square of so many pixels."""
    return Image.open(io.BytesIO(bytes(resvg().svg_to_bytes(svg_string=text, width=side, height=side)))).convert("RGBA")


def on_page(text: str) -> Image.Image:
    """A drawing that may be small on its page. Raises ValueError where the page is empty."""
    page = raster(text, PAGE)
    box = page.getchannel("A").getbbox()
    if box is None:
        raise ValueError("it is empty")
    longest = max(box[2] - box[0], box[3] - box[1])
    return page if longest >= SMALL else raster(text, min(LARGEST, PAGE * ENLARGED // longest))


@cache
def resvg() -> Any:
    try:
        import resvg_py
    except ImportError:
        raise SystemExit("resvg-py is not installed: pip install resvg-py==0.5.0") from None
    return resvg_py


def seen(picture: Image.Image) -> Image.Image:
    """What is visible of a picture. Raises ValueError where nothing is."""
    box = picture.getchannel("A").point([255 * (opacity > FAINT) for opacity in range(256)]).getbbox()
    if box is None:
        raise ValueError("it is empty")
    return picture.crop(box)


def fitted(picture: Image.Image) -> Image.Image:
    """What is visible of it, its longer side INNER pixels, in the middle."""
    icon = seen(picture)
    scale = INNER / max(icon.size)
    width, height = (max(1, round(side * scale)) for side in icon.size)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(icon.resize((width, height), Image.Resampling.LANCZOS), ((SIZE - width) // 2, (SIZE - height) // 2))
    return canvas


# ---- what is written ----


def pack(files: list[Path], path: Path) -> None:
    """A tar of files that depends on their content alone."""
    with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
        for file in files:
            entry = tarfile.TarInfo(file.name)
            entry.size = file.stat().st_size
            with file.open("rb") as content:
                tar.addfile(entry, content)


def translations(folder: Path, wanted: set[str]) -> dict[str, dict[str, list[str]]]:
    """For each emoji and language its name, then its keywords (Unicode CLDR)."""
    packages = {package.name: package for package in read_packages()}
    names: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for package, kind in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        paths = {f"package/{kind}/{language}/annotations.json": language for language in LANGUAGES}
        for path, content in unpacked(folder, packages[package], f"package/{kind}/").items():
            if path in paths:
                for emoji, entry in json.loads(content)[kind]["annotations"].items():
                    code = "-".join(f"{ord(sign):x}" for sign in emoji if ord(sign) not in SIGNS)
                    # A skin tone comes to the same code as the bare emoji, and later: the bare one's names stay.
                    if code in wanted and "tts" in entry and paths[path] not in names[code]:
                        names[code][paths[path]] = [*entry["tts"], *entry.get("default", [])]
    return {code: names[code] for code in sorted(names) if names[code]}


def compare(rows: list[Row], ours: Path, given: Path) -> None:
    """How many pictures differ by less than 1 in 255 on average (colours as they appear, and opacity)."""
    with tarfile.open(ours) as left, tarfile.open(given) as right:
        differences: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            first, second = (visible(tar, file_name(row)) for tar in (left, right))
            differences[row["set"]].append(float(np.abs(first - second).mean()))
    for name, values in differences.items():
        alike, exact = (sum(value <= limit for value in values) for limit in (1, 0))
        print(f"{name}: {alike} of {len(values)} alike, {exact} exactly; worst {max(values):.2f}")


def visible(tar: tarfile.TarFile, name: str) -> np.ndarray:
    file = tar.extractfile(name)
    assert file is not None
    pixels = np.asarray(Image.open(file).convert("RGBA"), dtype=np.float32)
    return np.concatenate([pixels[..., :3] * pixels[..., 3:] / 255, pixels[..., 3:]], axis=-1)


if __name__ == "__main__":
    main()
