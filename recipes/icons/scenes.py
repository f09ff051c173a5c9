"""Training pictures out of icons: which icons, how changed, on what background; drawn, and described in words.

The icons are transparent, so one drawing makes many pictures: in another hue, on a colour, two side by side. They are
not mirrored: it would double what has to be learnt, and no word says which of the two is meant.
"""

from __future__ import annotations

import colorsys
import io
import json
import math
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from PIL import Image
from torch import Tensor

SIZE = 128
TAR, LIST, NAMES = f"pictures-{SIZE}.tar", "manifest.jsonl", "names.json"

# Pictures of each style, as words a user would say; the neutral ones only: the others are names of their makers' sets.
STYLES = {
    "flat": ("flat",),
    "gradient": ("gradient", "glossy"),
    "3d": ("3d",),
    "noto": ("shaded",),
    "blob": ("blob",),
    "twemoji": ("simple",),
    "emojione": ("vivid",),
    "fx": ("muted",),
    "outline": ("outline", "cartoon"),
    "clip art": ("clip art",),
    "line art": ("line art",),
    "weather": ("weather icon",),
    "badge": ("badge",),
    "sticker": ("sticker",),
    "outlined color": ("outlined color",),
    "flat ui": ("ui icon",),
    "glossy ui": ("glossy ui icon",),
}
# What a name alone means: drawings of one shape in three finishes. Were it any of sixteen, a caption without a style
# would be answered with their mean. Of these flat and 3d are drawn twice as often as the others.
USUAL = {"flat", "gradient", "3d"}
WEIGHTS = {
    **dict.fromkeys(STYLES, 0.5),
    **dict.fromkeys(("flat", "3d"), 1.0),
    "gradient": 0.25,  # nearly the same pictures as 3d
    "line art": 0.15,
    **dict.fromkeys(("weather", "sticker"), 0.35),
    **dict.fromkeys(("clip art", "outlined color", "flat ui", "glossy ui"), 0.2),
}
PAIRS = 0.15  # share of pictures with two icons, among those that a name alone means; of the others a third as many
UNSAID = 0.15  # share of the others' captions without a style all the same
UNTOLD = "badge"  # a style that the models never see: train_style.py teaches it to them
CROWDED = {"people-body", "symbols"}  # a quarter of all emoji: each counts half
PAINTED = {"animals-nature", "food-drink", "travel-places", "objects", "activities"}  # of another hue they are still it

# Animals that emoji show as a face and as a whole, and the code points of both. Their name means the face, which a
# network of this size draws so that anyone knows it; from the side a cat is a dog to many.
FACES = {
    "cat": ("1f431", "1f408"),
    "cow": ("1f42e", "1f404"),
    "dog": ("1f436", "1f415"),
    "monkey": ("1f435", "1f412"),
    "mouse": ("1f42d", "1f401"),
    "pig": ("1f437", "1f416"),
    "rabbit": ("1f430", "1f407"),
    "tiger": ("1f42f", "1f405"),
}
CALLED = {face: name for name, (face, _) in FACES.items()} | {
    whole: f"full body {name}" for name, (_, whole) in FACES.items()
}

BACKGROUNDS = {
    "red": (220, 50, 50),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 80),
    "green": (70, 170, 90),
    "blue": (60, 120, 220),
    "light blue": (170, 215, 250),
    "purple": (140, 80, 190),
    "pink": (250, 180, 205),
    "grey": (150, 150, 150),
    "black": (15, 15, 15),
}
HUES = ((15, "red"), (42, "orange"), (68, "yellow"), (165, "green"), (255, "blue"), (300, "purple"), (340, "pink"))


Names = dict[str, dict[str, list[str]]]  # by code points and language: the name, then keywords


@dataclass(frozen=True)
class Icons:
    """The list, and its pictures (n, 4, 128, 128) uint8: red, green, blue, opacity."""

    rows: list[dict[str, Any]]
    pictures: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def read_icons(folder: Path, limit: int | None = None) -> Icons:
    """The icons that draw.py leaves; with a limit, that many evenly out of all."""
    for name in (TAR, LIST):
        if not (folder / name).is_file():
            raise SystemExit(f"{folder / name} is missing: make it with recipes/icons/draw.py")
    rows = [json.loads(line) for line in (folder / LIST).read_text(encoding="utf-8").splitlines()]
    usual = {row["caption"] for row in rows if row["style"] in USUAL}
    for row in rows:
        row["usual"] = row["style"] in USUAL or row["caption"] not in usual  # whether its name alone means it
        row["name"] = name_of(row)
    if limit is not None:
        rows = rows[:: max(1, len(rows) // limit)][:limit]
    index = {f"{row['id']:05d}.webp": i for i, row in enumerate(rows)}
    pictures = torch.empty(len(rows), 4, SIZE, SIZE, dtype=torch.uint8)
    with tarfile.open(folder / TAR) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name in index else None
            if file is not None:
                with Image.open(io.BytesIO(file.read())) as icon:
                    pictures[index.pop(member.name)] = torch.from_numpy(np.array(icon.convert("RGBA"))).permute(2, 0, 1)
    if index:
        raise SystemExit(
            f"{folder / TAR} lacks {len(index)} pictures of its list, such as {next(iter(index))}: draw anew"
        )
    return Icons(rows, pictures)


def name_of(row: dict[str, Any]) -> str:
    """What captions call an icon."""
    return CALLED.get(row["hex"], row["caption"])


def read_names(data: Path) -> Names:
    path = data / NAMES
    if not path.is_file():
        print(f"{path} is missing (draw.py makes it): captions are in English alone", flush=True)
        return {}
    names: Names = json.loads(path.read_text(encoding="utf-8"))
    for face, whole in FACES.values():  # in other languages too a name means the face
        if face in names and whole in names:
            others = names.pop(whole)
            names[face] = {code: [*others.get(code, [])[:1], *words] for code, words in names[face].items()}
    return names


def unseen(row: dict[str, Any]) -> bool:
    """One concept in forty, the same in every style: those the autoencoder is judged by and never trained on."""
    return zlib.crc32(row["caption"].encode()) % 40 == 0


def held_out_pairs(rows: Sequence[dict[str, Any]], count: int = 200, styles: int = 7) -> set[int]:
    """The ids of `count` pictures whose concept the base model sees in other styles, of which there are `styles`."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["hex"]:
            groups[row["hex"]].append(row)
    rich = [code for code, group in groups.items() if len({row["style"] for row in group}) >= styles]
    rich.sort(key=lambda code: zlib.crc32(code.encode()))
    return {
        min(groups[code], key=lambda row: zlib.crc32(f"{code} {row['style']}".encode()))["id"] for code in rich[:count]
    }


def shown_and_held_out(rows: Sequence[dict[str, Any]], count: int = 200) -> tuple[list[int], list[int]]:
    """Which icons the models are shown, and which of the held-out pairs they are not."""
    pairs = held_out_pairs(rows, count)
    shown = [i for i, row in enumerate(rows) if row["id"] not in pairs and row["style"] != UNTOLD]
    return shown, [i for i, row in enumerate(rows) if row["id"] in pairs]


def weight(row: dict[str, Any]) -> float:
    """How often a picture is drawn, beside the others."""
    return WEIGHTS[row["style"]] * (0.5 if row["group"] in CROWDED else 1.0)


class Mix:
    """Chooses icons by their weights."""

    def __init__(self, icons: Icons, shown: Sequence[int]) -> None:
        self.icons, self.shown = icons, np.array(shown)
        weights = np.cumsum([weight(icons.rows[i]) for i in shown])
        self.shares = weights / weights[-1]
        self.mates: dict[str, list[int]] = defaultdict(list)
        for i in shown:
            if short(icons.rows[i]):
                self.mates[icons.rows[i]["style"]].append(i)

    def pairs(self, count: int, rng: Generator) -> list[tuple[int, int]]:
        """Icons, and for each another to go beside it, in scenes of two."""
        chosen = self.shown[np.searchsorted(self.shares, rng.random(count), side="right")]
        return [(i, self.mate(i, rng)) for i in chosen.tolist()]

    def mate(self, i: int, rng: Generator) -> int:
        """One of the same style with a short name."""
        mates = self.mates.get(self.icons.rows[i]["style"]) or [i]
        return one_of(mates, rng)


def short(row: dict[str, Any]) -> bool:
    """Whether its name leaves room for another beside it."""
    return len(row["name"].split()) <= 3


# ---- a scene: every choice made, nothing drawn yet ----


@dataclass(frozen=True)
class Scene:
    icons: tuple[int, ...]  # one, or the left and the right one
    mirrored: bool = False  # the autoencoder's alone
    angle: float = 0.0  # of the hue, in radians
    background: tuple[int, int, int] = (255, 255, 255)
    ground: str = ""  # the background in words; "" where nothing is said of it
    color: str = ""  # the icon's own, after it was turned

    @property
    def plain(self) -> bool:
        """Whether an icon's name says all of it."""
        return len(self.icons) == 1 and not self.ground and not self.color


def render(icons: Icons, scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """The pictures (B, 3, 128, 128) in [-1, 1]."""
    first = _layer(icons, [scene.icons[0] for scene in scenes], scenes, device)
    pairs = [i for i, scene in enumerate(scenes) if len(scene.icons) == 2]
    if pairs:
        second = _layer(icons, [scenes[i].icons[1] for i in pairs], [scenes[i] for i in pairs], device)
        halves = torch.cat([F.avg_pool2d(first[pairs], 2), F.avg_pool2d(second, 2)], dim=3)
        first[pairs] = F.pad(halves, (0, 0, SIZE // 4, SIZE // 4))
    ground = torch.tensor([scene.background for scene in scenes], device=device)[:, :, None, None] / 255
    return (first[:, :3] + (1 - first[:, 3:]) * ground) * 2 - 1


def _layer(icons: Icons, chosen: list[int], scenes: Sequence[Scene], device: torch.device | str) -> Tensor:
    """Icons (B, 4, 128, 128), their colours multiplied by the opacity, so that layers can be scaled and added."""
    x = icons.pictures[torch.tensor(chosen)].to(device).float() / 255
    turns = torch.tensor(np.stack([turn(scene.angle) for scene in scenes]), device=device)
    color = torch.einsum("nij,njhw->nihw", turns, x[:, :3]).clamp(0, 1)
    x = torch.cat([color * x[:, 3:], x[:, 3:]], dim=1)
    mirrored = torch.tensor([scene.mirrored for scene in scenes], device=device)[:, None, None, None]
    return torch.where(mirrored, x.flip(3), x)


def turn(angle: float) -> np.ndarray:
    """The matrix (3, 3) that turns colours around the grey axis (Rodrigues' formula)."""
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=np.float32) / np.float32(math.sqrt(3))
    eye = np.eye(3, dtype=np.float32)
    return (np.cos(angle) * eye + (1 - np.cos(angle)) / 3 + np.sin(angle) * cross).astype(np.float32)


def any_scene(allowed: Sequence[int], rng: Generator) -> Scene:
    """For the autoencoder: anything goes that makes edges and colours, since nothing has to be said of it."""
    count = 2 if rng.random() < 0.15 else 1
    ground = rng.integers(0, 256, 3).tolist() if rng.random() < 0.25 else [255, 255, 255]
    angle = float(rng.uniform(-math.pi, math.pi)) if rng.random() < 0.25 else 0.0
    chosen = tuple(allowed[int(i)] for i in rng.integers(len(allowed), size=count))
    return Scene(chosen, bool(rng.random() < 0.5), angle, (ground[0], ground[1], ground[2]))


def told_scene(icons: Icons, first: int, second: int, rng: Generator, pairs: float = PAIRS) -> Scene:
    """For the base model: what a caption can tell. Mostly the icon as it is, on white."""
    row = icons.rows[first]
    pair = rng.random() < (pairs if row["usual"] else pairs / 3) and short(row)
    chosen = (first, second) if pair else (first,)
    ground = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.1 else ""
    background = BACKGROUNDS.get(ground, (255, 255, 255))
    angle, color = 0.0, ""
    if not pair and row["group"] in PAINTED and rng.random() < 0.1:
        angle = float(rng.uniform(-math.pi, math.pi))
        color = color_name(icons.pictures[first], angle)
        if not color:  # no one colour: nothing could be said of the change
            angle = 0.0
    return Scene(chosen, angle=angle, background=background, ground=ground, color=color)


def color_name(picture: Tensor, angle: float) -> str:
    """The one colour of an icon (4, H, W) uint8 that was turned by an angle, or "" where there is no such thing."""
    pixels = picture.flatten(1)[:, ::7].numpy().astype(np.float32) / 255  # every seventh: a colour is not a detail
    colors = (turn(angle) @ pixels[:3]).clip(0, 1)
    chroma = (colors.max(0) - colors.min(0)) * pixels[3]
    if chroma.sum() < 0.15 * pixels[3].sum() + 1e-6:
        return ""  # grey
    mean = (colors * chroma).sum(1) / chroma.sum()
    agreed = (mean.max() - mean.min()) * chroma.sum() / (chroma * chroma).sum()
    if agreed < 0.75:
        return ""  # several colours
    hue, _, value = colorsys.rgb_to_hsv(*mean.tolist())
    name = next((name for limit, name in HUES if hue * 360 < limit), "red")
    return "brown" if name == "orange" and value < 0.65 else name


def caption(icons: Icons, scene: Scene, rng: Generator) -> str:
    """One of the phrases for a scene; one in ten is empty, for classifier-free guidance."""
    rows = [icons.rows[i] for i in scene.icons]
    if rng.random() < 0.1:
        return ""
    ground = on_ground(scene)
    row = rows[0]
    style = one_of(STYLES[row["style"]], rng)
    named = style_named(row, rng)
    if len(rows) == 2:
        left, right = (with_article(row["name"]) for row in rows)
        manner = f", {style}{' style' if rng.random() < 0.5 else ''}" if named else ""
        return plain(f"{left} {'and' if rng.random() < 0.5 else 'left of'} {right}{manner}{ground}")
    thing = f"{scene.color} {row['name']}".strip()
    keywords = [word for word in row["kw"] if word != row["name"]]
    two = [keywords[int(i)] for i in rng.permutation(len(keywords))[:2]]
    if named:
        phrases = {
            f"{thing}, {style} style": 0.33,
            f"{style} {thing}": 0.25,
            f"a {style} icon of {with_article(thing)}": 0.17,
            f"{thing}, {style}": 0.15,
            ", ".join([thing, *two, style]): 0.1,
        }
    else:
        phrases = {
            thing: 0.4,
            with_article(thing): 0.2,
            ", ".join([thing, *two]): 0.25,
            " ".join([scene.color, *two]).strip() if len(two) == 2 else f"{thing} icon": 0.15,
        }
    share = np.array(list(phrases.values()))
    return plain(list(phrases)[int(rng.choice(len(phrases), p=share / share.sum()))] + ground)


def on_ground(scene: Scene) -> str:
    """What a caption ends with, where the background is to be told."""
    return f", on a {scene.ground} background" if scene.ground else ""


def style_named(row: dict[str, Any], rng: Generator) -> bool:
    """Whether a caption has to say the style: half the time, and nearly always where the name alone means another."""
    return bool(rng.random() < (0.5 if row["usual"] else 1 - UNSAID))


def with_article(thing: str) -> str:
    """ "a cat", "an apple"; names in the plural and of people's kind stay as they are."""
    if thing.endswith("s") and not thing.endswith("ss"):
        return thing
    return f"{'an' if thing[:1].lower() in 'aeiou' else 'a'} {thing}"


def names_alone(icons: Icons, names: Names, scene: Scene) -> dict[str, list[str]]:
    """The names in other languages, by language, of a scene that such a name alone means; else none."""
    row = icons.rows[scene.icons[0]]
    return names.get(row["hex"] or "", {}) if row["usual"] and scene.plain else {}


def translated(names: dict[str, list[str]], rng: Generator) -> str:
    """A caption in one of the other languages: the name, or with keywords; no style, whose words are English."""
    words = names[one_of(sorted(names), rng)]
    if rng.random() < 0.7 or len(words) < 3:
        return words[0].lower()
    return " ".join([words[0], words[1 + int(rng.integers(len(words) - 1))]]).lower()


def one_of(some: Sequence[Any], rng: Generator) -> Any:
    return some[int(rng.integers(len(some)))]


def plain(text: str) -> str:
    """In lower case, with no punctuation but commas, hyphens and apostrophes."""
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s,'’-]", " ", text.lower())).strip()
