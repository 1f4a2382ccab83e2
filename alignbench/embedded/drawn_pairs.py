"""Pairs of drawn images of which one is better for a prompt, and what they show."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from alignbench.embedded.drawing import lettering, scenes
from alignbench.embedded.drawing.lettering import Lettering
from alignbench.embedded.drawing.palette import COLORS, IMAGE_SIZE, colors_for
from alignbench.embedded.drawing.scenes import NUMBERS, PLURALS, PREFIXES, RELATIONS, SHAPES, Scene
from alignbench.embedded.examples import held_out_words, is_held_out

KINDS = ("scene", "word", "broken")
"""What is wrong with the second image of a pair: a detail of the scene, letters or the colour of a word, or the quality."""
CLEAR = 0.5
"""Smallest component of the direction between two centres for which a relation holds, as in GenEval."""
IGNORE = -100
"""Class of what has no target; `cross_entropy` ignores it."""

Content = Scene | Lettering
Wanted = dict[str, Any]
"""What a prompt asks for: a scene's metadata in GenEval's format, or {text, color} of a word, with color None if it is open."""


@dataclass(frozen=True)
class DrawnPair:
    """A prompt, what it asks for, and two images (uint8 [64, 64, 3]), of which the first is better."""

    prompt: str
    wanted: Wanted
    right: np.ndarray
    wrong: np.ndarray
    contents: tuple[Content, Content]
    """Content of the two images; it is the same for a broken image."""
    kind: str
    other: tuple[str, Wanted] | None = None
    """A prompt for which the wrong image would be correct, and what it asks for; None for a broken image."""


def draw_pairs(rng: np.random.Generator, count: int, *, held_out: bool) -> list[DrawnPair]:
    """Draws pairs, with equal shares of each kind. Held-out pairs have words and scenes that no other pair has."""
    return [draw_pair(rng, KINDS[i % len(KINDS)], held_out=held_out) for i in range(count)]


def kinds_of(count: int, shares: Sequence[float]) -> list[str]:
    """A list of `count` kinds with these shares, rounded down; the first kind gets the remainder."""
    counts = [int(count * share / sum(shares)) for share in shares]
    counts[0] += count - sum(counts)
    return [kind for kind, times in zip(KINDS, counts, strict=True) for _ in range(times)]


def draw_pair(rng: np.random.Generator, kind: str, *, held_out: bool) -> DrawnPair:
    """Draws a pair of one kind of `KINDS`."""
    right: Content
    if kind == "word" or (kind == "broken" and rng.random() < 0.5):
        prompt, wanted, right = _draw_word(rng, held_out)
    else:
        prompt, wanted, right = _draw_scene(rng, held_out)
    clean = right.draw()
    if kind == "broken":
        return DrawnPair(prompt, wanted, clean, broken(rng, clean), (right, right), kind)
    while True:
        if isinstance(right, Lettering):
            word = _other_word(rng, right)
            wrong: tuple[Content, tuple[str, Wanted]] = word, _reworded(prompt, wanted, right, word)
        else:
            near = _near_miss(rng, wanted)
            other = _metadata_of(near)
            wrong = scenes.sample_scene(rng, near), (other["prompt"], other)
        if not fulfils(wrong[0], wanted) and (held_out or not is_unseen(wrong[1][1])):
            return DrawnPair(prompt, wanted, clean, wrong[0].draw(), (right, wrong[0]), kind, wrong[1])


def is_unseen(wanted: Wanted) -> bool:
    """Whether a prompt's content is kept from the training."""
    return wanted["text"] in held_out_words() if "text" in wanted else is_held_out(wanted)


def fulfils(content: Content, wanted: Wanted) -> bool:
    """Whether an image with this content shows what a prompt asks for."""
    if isinstance(content, Lettering) or "include" not in wanted:
        if isinstance(content, Scene) or "text" not in wanted:
            return False
        return content.text == wanted["text"] and wanted["color"] in (None, content.color)
    matching: list[list[scenes.Shape]] = []
    for clause in wanted["include"]:
        shapes = [s for s in content.shapes if s.kind == clause["class"] and clause.get("color") in (None, s.color)]
        if len(shapes) < clause["count"]:
            return False
        matching.append(shapes)
        if "position" in clause:
            relation, target = clause["position"]
            offset = np.subtract(shapes[0].center, matching[target][0].center)
            if offset @ RELATIONS[relation] <= CLEAR * np.linalg.norm(offset):
                return False
    return all(sum(s.kind == c["class"] for s in content.shapes) < c["count"] for c in wanted["exclude"])


def broken(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Blurs the image, or adds noise, blobs or a tint."""
    harm = rng.integers(4)
    if harm == 0:
        sigma = rng.uniform(1.0, 3.0)
        return np.asarray(ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest"))
    if harm == 1:
        changed = image + rng.normal(0, rng.uniform(15, 70), image.shape)
    elif harm == 2:
        canvas = Image.fromarray(image)
        pen = ImageDraw.Draw(canvas)
        for _ in range(rng.integers(3, 9)):
            x, y = rng.uniform(0, IMAGE_SIZE, 2)
            w, h = rng.uniform(2, 9, 2)
            pen.ellipse((x - w, y - h, x + w, y + h), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
        return np.asarray(canvas)
    else:
        changed = image + rng.choice([-1, 1], 3) * rng.uniform(25, 80, 3)
    return np.clip(changed, 0, 255).astype(np.uint8)


def _draw_word(rng: np.random.Generator, held_out: bool) -> tuple[str, Wanted, Lettering]:
    text = str(rng.choice(sorted(held_out_words()))) if held_out else lettering.sample_text(rng, held_out_words())
    prompt, color = lettering.sample_prompt(rng, text)
    return prompt, {"text": text, "color": color}, lettering.sample_lettering(rng, text, color)


def _draw_scene(rng: np.random.Generator, held_out: bool) -> tuple[str, Wanted, Scene]:
    while True:
        metadata = scenes.sample_metadata(rng, str(rng.choice(scenes.TASK_TYPES)))
        if is_held_out(metadata) == held_out:
            return metadata["prompt"], metadata, scenes.sample_scene(rng, metadata)


def _other_word(rng: np.random.Generator, right: Lettering) -> Lettering:
    """Changes one or more letters, or in three of ten cases only the colour."""
    if rng.random() < 0.3:
        others = [c for c in colors_for(right.background, lettering.MIN_CONTRAST) if c != right.color]
        return lettering.sample_lettering(rng, right.text, str(rng.choice(others)))
    letters = list(right.text)
    for place in rng.choice(len(letters), size=rng.integers(1, len(letters) + 1), replace=False):
        letters[place] = str(rng.choice([c for c in lettering.LETTERS if c != letters[place]]))
    return lettering.sample_lettering(rng, "".join(letters), right.color)


def _reworded(prompt: str, wanted: Wanted, right: Lettering, other: Lettering) -> tuple[str, Wanted]:
    """The prompt of a word, rewritten for another word."""
    prompt = prompt.replace(f'"{right.text}"', f'"{other.text}"')
    if wanted["color"]:
        prompt = prompt.replace(right.color, other.color)
    return prompt, {"text": other.text, "color": wanted["color"] and other.color}


def _near_miss(rng: np.random.Generator, wanted: Wanted) -> Wanted:
    """The metadata with one change: a kind, a colour, a count, a relation, or a missing shape."""
    include = [dict(c) for c in wanted["include"]]
    clause = include[rng.integers(len(include))]
    choices = ["kind"]
    choices += ["color"] * ("color" in clause) + ["missing"] * (len(include) > 1)
    choices += ["count"] * (wanted["tag"] == "counting") + ["position"] * (wanted["tag"] == "position")
    change = rng.choice(choices)
    if change == "kind":
        clause["class"] = str(rng.choice([s for s in SHAPES if all(s != c["class"] for c in include)]))
    elif change == "color":
        clause["color"] = str(rng.choice([c for c in COLORS if c != clause["color"]]))
    elif change == "count":
        clause["count"] = int(rng.choice([n for n in (1, *NUMBERS) if n != clause["count"]]))
    elif change == "missing":
        include = [{k: v for k, v in clause.items() if k != "position"}]
    else:
        relation, target = include[1]["position"]
        include[1]["position"] = [str(rng.choice([r for r in RELATIONS if r != relation])), target]
    return {**wanted, "include": include}


def _metadata_of(near: Wanted) -> Wanted:
    """The metadata of a prompt that describes a near miss; with one shape instead of two it has another task type."""
    include, prompt = near["include"], near["prompt"]
    prefix = next(prefix for prefix in sorted(PREFIXES, key=len, reverse=True) if prompt.startswith(prefix))
    first, second = include[0], include[-1]
    if len(include) == 1:
        tag = "counting" if first["count"] > 1 else "colors" if "color" in first else "single_object"
    else:
        tag = "position" if "position" in second else "color_attr" if "color" in first else "two_object"
    if tag == "position":
        first, second = second, first
    kinds, colors = (first["class"], second["class"]), (first.get("color", ""), second.get("color", ""))
    relation = first["position"][0] if tag == "position" else ""
    metadata = scenes.compose(tag, kinds, colors, first["count"], relation, PLURALS.__getitem__)
    return {**metadata, "prompt": prefix + metadata["prompt"]}


LETTER_CLASSES, COUNT_CLASSES = len(lettering.LETTERS) + 1, max(NUMBERS) + 1
READING = (LETTER_CLASSES,) * lettering.MAX_LETTERS + (COUNT_CLASSES,) * len(SHAPES) + (len(COLORS),) * (len(SHAPES) + 1)
"""Number of classes of each classifier: letters by place, counts by kind, colours by kind, and the colour of the word."""
PATCH_READING = (1 + len(lettering.LETTERS) + len(SHAPES), 1 + lettering.MAX_LETTERS, 1 + len(COLORS))
"""Number of classes of each classifier of a patch: letter or kind, place in the word, colour. Class 0 means that there is
none."""
PATCH = 8
"""Side of a patch in pixels."""
_COLOR_INDEX = {color: i for i, color in enumerate(COLORS)}


def reading_of(content: Content, named: set[str] | None = None) -> list[int]:
    """The class for each classifier of `READING`; IGNORE for what is missing, and for colours that are not in `named`."""
    letters, counts, colors = [0] * lettering.MAX_LETTERS, [0] * len(SHAPES), [IGNORE] * (len(SHAPES) + 1)
    if isinstance(content, Lettering):
        letters[: len(content.text)] = [1 + lettering.LETTERS.index(c) for c in content.text]
        colors[-1] = _COLOR_INDEX[content.color]
    else:
        for shape in content.shapes:
            kind = SHAPES.index(shape.kind)
            counts[kind] += 1
            colors[kind] = _COLOR_INDEX[shape.color]
    if named is not None:
        known = {_COLOR_INDEX[c] for c in named}
        colors = [c if c in known else IGNORE for c in colors]
    return [*letters, *counts, *colors]


def patches_of(content: Content) -> np.ndarray:
    """The class for each classifier of `PATCH_READING` and each patch, int [64, 3], by what covers the patch's centre."""
    side = IMAGE_SIZE // PATCH
    y, x = (PATCH * (np.mgrid[:side, :side] + 0.5)).reshape(2, -1)
    classes = np.zeros((side * side, len(PATCH_READING)), dtype=np.int64)
    if isinstance(content, Lettering):
        left, top = content.origin
        for place, letter in enumerate(content.text):
            start = left + place * content.cell_width
            inside = (start <= x) & (x < start + content.cell_width) & (top <= y) & (y < top + content.height)
            classes[inside] = 1 + lettering.LETTERS.index(letter), 1 + place, 1 + _COLOR_INDEX[content.color]
    else:
        for shape in content.shapes:
            inside = np.maximum(abs(x - shape.center[0]), abs(y - shape.center[1])) < shape.size / 2
            kind = 1 + len(lettering.LETTERS) + SHAPES.index(shape.kind)
            classes[inside] = kind, 0, 1 + _COLOR_INDEX[shape.color]
    return classes


def named_colors(wanted: Wanted) -> set[str]:
    """The colours that a prompt names."""
    clauses = wanted.get("include", [wanted])
    return {c["color"] for c in clauses if c.get("color")}


def against_each_other(pairs: Sequence[DrawnPair]) -> list[DrawnPair]:
    """Pairs each correct image with that of the next pair of its kind, if that one does not fulfil the prompt too."""
    following = zip(pairs, pairs[len(KINDS) :], strict=False)
    return [
        replace(pair, wrong=other.right, contents=(pair.contents[0], other.contents[0]), other=(other.prompt, other.wanted))
        for pair, other in following
        if not fulfils(other.contents[0], pair.wanted)
    ]
