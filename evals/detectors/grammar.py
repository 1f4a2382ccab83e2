"""Parses prompts in GenEval's wording into metadata: objects, counts, colours, positions."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignbench.embedded.drawing.palette import COLORS
from alignbench.embedded.drawing.scenes import NUMBERS, PLURALS, PREFIXES, RELATIONS
from alignbench.files.text import prompt_identity
from alignbench.tasks import coco

_COUNTS = {"one": 1, **{word: number for number, word in NUMBERS.items()}}


def _any(words: Iterable[str]) -> str:
    return "|".join(re.escape(w) for w in words)


_PREFIX = re.compile(f"(?:{_any([p for p in PREFIXES if p])})?")


class Grammar:
    """Parses prompts in GenEval's wording about some kinds of objects.

    Args:
        plurals: kind of object -> its plurals.
    """

    def __init__(self, plurals: Mapping[str, Sequence[str]]) -> None:
        self._kinds = {kind: kind for kind in plurals}
        self._plurals = {plural: kind for kind, several in plurals.items() for plural in several}
        number, kinds = _any(_COUNTS), _any(self._kinds)
        item = rf"(?:an? )?(?:(?P<color_{{0}}>{_any(COLORS)}) )?(?P<kind_{{0}}>{kinds})"
        self._counting = re.compile(f"(?P<count>{number}) (?P<kind>{_any(self._plurals)}|{kinds})")
        self._items = re.compile(f"{item.format('a')}(?: (?P<link>and|{_any(RELATIONS)}) {item.format('b')})?")

    def parse(self, prompt: str) -> dict[str, Any] | None:
        """Parses a prompt into metadata in GenEval's layout; returns None if it is worded in another way.

        The prefix and the article may be missing, and case and white space do not matter. A number, including `one`, asks for
        exactly that many.
        """
        phrase = prompt_identity(prompt).rstrip(".")
        phrase = phrase[_PREFIX.match(phrase).end() :]  # type: ignore[union-attr]  # an optional pattern always matches
        exclude: list[dict[str, Any]] = []
        if match := self._counting.fullmatch(phrase):
            count = _COUNTS[match["count"]]
            kind = (self._kinds if count == 1 else self._plurals).get(match["kind"])
            if kind is None:
                return None
            tag, include = "counting", [{"class": kind, "count": count}]
            exclude = [{"class": kind, "count": count + 1}]
        elif match := self._items.fullmatch(phrase):
            link, kinds, colors = match["link"], match.group("kind_a", "kind_b"), match.group("color_a", "color_b")
            if kinds[0] == kinds[1]:
                # A clause considers only the best object of its class, so two clauses cannot tell two objects of one class
                # apart.
                return None
            clauses = [
                {"class": kind, "count": 1, **({"color": color} if color else {})}
                for kind, color in zip(kinds, colors, strict=True)
                if kind
            ]
            if link in RELATIONS:
                tag, include = "position", [clauses[1], {**clauses[0], "position": [link, 0]}]
            elif link == "and":
                tag, include = "color_attr" if any(colors) else "two_object", clauses
            else:
                tag, include = "colors" if any(colors) else "single_object", clauses
        else:
            return None
        return {"tag": tag, "include": include, "exclude": exclude, "prompt": prompt}


SCENES = Grammar({kind: [plural] for kind, plural in PLURALS.items()})
"""The grammar of drawn scenes, whose prompts `alignbench.embedded.drawing.scenes.sample_metadata` makes."""
COCO = Grammar({name: coco.plurals(name) for name in coco.CLASSES})
"""The grammar of photographs, which covers GenEval's own list of prompts."""
