"""Texts to be read byte by byte: code and documentation that come with Python, and some of other languages."""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenworks.core.corpus import python_docs

OTHERS = {
    "German": (
        "Am Abend saßen die Nachbarn vor dem Haus und erzählten von früher. Niemand hatte es eilig, und "
        "über den Feldern wurde es langsam kühl. Nur der Hund bellte, als ein später Wagen vorbeifuhr.",
        "Die Bibliothek öffnet um neun Uhr. Wer ein Buch zurückgeben möchte, legt es einfach auf den "
        "Tisch neben der Tür; für größere Mengen gibt es hinter dem Haus einen zweiten Eingang.",
    ),
    "French": (
        "Le marché s'installe chaque samedi sur la place de l'église. On y trouve des fromages, des "
        "légumes et du miel, mais les habitués viennent surtout pour parler du temps et des récoltes.",
        "Après la pluie, le chemin était si boueux que nous avons dû marcher dans l'herbe. À midi, le "
        "ciel s'est enfin éclairci et nous avons mangé près de la rivière.",
    ),
    "Spanish": (
        "El tren llegó con media hora de retraso, así que tomamos un café en la estación. Mi hermana leía"
        " el periódico y yo miraba a la gente que corría por el andén con sus maletas.",
        "Cuando éramos niños, pasábamos los veranos en casa de la abuela. Había una higuera en el jardín "
        "y un pozo del que sacábamos agua fría todas las mañanas.",
    ),
    "Italian": (
        "La bottega del falegname era piena di polvere e di luce. Sul banco c'erano tre sedie da "
        "riparare, ma lui preferiva raccontare com'era la città prima che costruissero il ponte.",
        "Per fare un buon pane serve soprattutto pazienza: l'impasto deve riposare tutta la notte, perché"
        " così la crosta diventa croccante e la mollica resta morbida.",
    ),
}
"""Written for this measurement, so that no model has seen them."""


@dataclass(frozen=True)
class Cut:
    """A text cut in two.

    Attributes:
        prompt: what stands before the cut.
        rest: what follows, at least one character.
    """

    prompt: str
    rest: str


@lru_cache(maxsize=1)
def code_files() -> list[str]:
    """The modules of the standard library that are plain ASCII, in the order of their names."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.isascii() and len(text) > 4000:
            found.append(text)
    return found


def passage(kind: str, length: int, chance: random.Random) -> str:
    """`length` characters of code or English documentation, from the beginning of a line on."""
    texts = code_files() if kind == "code" else [text for text in python_docs("test") if text.isascii()]
    texts = [text for text in texts if len(text) > 3 * length]
    text = chance.choice(texts)
    begin = text.find("\n", chance.randrange(len(text) - 2 * length)) + 1
    return text[begin : begin + length]


def cut_token(kind: str, pieces: Callable[[str], list[int]], inside: bool, chance: random.Random) -> Cut:
    """A passage cut strictly inside one of its tokens, or between two.

    Args:
        pieces: gives the lengths of a text's tokens, in bytes.
    """
    while True:
        text = passage(kind, 200, chance)
        places, at = [], 0
        for length in pieces(text):
            if at >= 80:
                places += list(range(at + 1, at + length)) if inside else [at]
            at += length
        if at == len(text) and places:
            place = chance.choice(places)
            return Cut(text[:place], text[place:])


NAME = re.compile(r"[A-Za-z_]\w{4,}")


def cut_line(limit: int, chance: random.Random) -> Cut:
    """Lines of code, the last cut inside a name so that at most `limit` characters of it remain."""
    while True:
        text = chance.choice(code_files())
        end = text.find("\n", chance.randrange(600, len(text) - 200))
        begin = text.rfind("\n", 0, end) + 1
        line = text[begin:end]
        places = [
            place
            for name in NAME.finditer(line)
            for place in range(name.start() + 2, name.end() - 1)
            if len(line) - place <= limit
        ]
        if places and not line.lstrip().startswith("#"):
            place = begin + chance.choice(places)
            first = text.find("\n", max(0, begin - 300)) + 1
            return Cut(text[first:place], text[place:end])
