"""Ways of asking for a picture: in English as people write it, and in other languages.

Captions (scenes.py) are how the training pictures are labelled; this is what somebody may type who has seen none.
"""

from __future__ import annotations

from collections.abc import Sequence

from numpy.random import Generator
from scenes import STYLES, Icons, Scene, on_ground, one_of, plain, style_named, translated, with_article

OPENINGS = (
    "a picture of", "a photo of", "an image of", "an illustration of", "a drawing of", "a painting of", "an icon of",
    "an emoji of", "a picture with", "draw", "draw me", "please draw", "can you draw", "show me", "give me", "make",
    "generate", "create", "generate an image of", "i want", "i would like", "i want to see", "here is", "this is",
)  # fmt: skip
STYLED = ("a {} picture of", "a {} image of", "a {} illustration of", "a {} drawing of", "a {} emoji of")
IN_STYLE = (" in {} style", " in a {} style", " in the style of {}", ", in {} style", ", {} style", ", {}", " as {}")
GROUNDS = (" on a {} background", " with a {} background", " in front of a {} background", " on {}", ", {} background")
BESIDE = ("next to", "beside", "with", "and", "near", "together with")
FINE = ("cute", "beautiful", "nice", "lovely", "pretty", "little", "cool", "single", "real", "detailed", "typical")
WHOSE = ("the", "one", "some", "my", "your")
ENDINGS = ("", "", "", ".", "!", ", please")
ABROAD = {
    "ar": ("صورة {}", "رسم {}", "ارسم {}", "ال{}"),
    "es": ("un {}", "una {}", "el {}", "la {}", "una imagen de {}", "un dibujo de {}", "dibuja {}"),
    "fr": ("un {}", "une {}", "le {}", "la {}", "une image de {}", "un dessin de {}", "dessine {}"),
    "zh": ("一个{}", "一只{}", "一张{}的图片", "画{}"),
}
# Never learnt from: retrieve.py asks by these whether the others taught more than themselves.
NEVER = ("i need an icon with {}", "could you paint {}", "my favourite: {}", "an artwork that shows {}", "look, {}!")


def abroad(names: dict[str, list[str]], dice: Generator) -> str:
    """A name in one of the other languages; often with a keyword, or in a phrase."""
    if dice.random() < 0.6:
        return translated(names, dice)
    language = one_of(sorted(names), dice)
    return one_of(ABROAD.get(language, ("{}",)), dice).format(names[language][0].lower())


def in_other_words(icons: Icons, scene: Scene, dice: Generator) -> tuple[str, str]:
    """A phrase for a scene, and the caption that says the same."""
    rows = [icons.rows[i] for i in scene.icons]
    row = rows[0]
    style = one_of(STYLES[row["style"]], dice) if style_named(row, dice) else ""
    if len(rows) == 2:
        left, right = (with_article(row["name"]) for row in rows)
        subject, meant = f"{left} {one_of(BESIDE, dice)} {right}", f"{left} and {right}"
    else:
        meant = f"{scene.color} {row['name']}".strip()
        subject = called(meant, row["kw"], dice)
    ground = on_ground(scene)
    opening = one_of(OPENINGS, dice) if dice.random() < 0.6 else ""
    if style:
        meant = f"{meant}, {style} style"
        if opening and dice.random() < 0.4:
            opening = one_of(STYLED, dice).format(style)
        else:
            subject += one_of(IN_STYLE, dice).format(style)
    if ground:
        subject += one_of((ground, *(each.format(scene.ground) for each in GROUNDS)), dice)
    said = f"{opening} {subject}{one_of(ENDINGS, dice)}".strip()
    return said.lower(), plain(meant + ground)


def called(thing: str, keywords: Sequence[str], dice: Generator) -> str:
    """One thing, as people speak of it."""
    if dice.random() < 0.2:
        return f"{one_of(WHOSE, dice)} {thing}"
    if dice.random() < 0.25:
        return with_article(f"{one_of(FINE, dice)} {thing}")
    if keywords and dice.random() < 0.25:  # "a slice of pizza" is a pizza
        word = one_of(keywords, dice)
        return one_of((f"{word} {thing}", f"{thing} {word}", f"{with_article(word)} of {thing}"), dice)
    return with_article(thing)
