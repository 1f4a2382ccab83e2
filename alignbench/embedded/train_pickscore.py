"""Trains the small CLIP that scores the pictures of `tiny`: `python -m alignbench train-pickscore`.

PickScore (arXiv 2305.01569) is a CLIP fine-tuned on human choices between two pictures of one prompt. This is the same
class of model and the same Bradley-Terry loss, from nothing, on pairs whose answer is known because they are drawn: the
right content against a wrong one, and a clean picture against a broken one. The other pictures and prompts of a batch are
wrong ones too, ranked by the same model (Plackett-Luce), as in CLIP's own training. A picture of wrong content brings the
prompt that it would be right for: a near miss of the prompt costs a tenth of one of the picture, and teaches as much.

What the pictures show is known as well. Linear readings of it are trained beside the loss and thrown away afterwards: of
letters, counts and colours from both embeddings, which lines the two encoders up, and of what each patch shows, without which
the picture encoder does not find the letters in the minutes that it has.
"""

import json
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from alignbench.embedded.drawing import lettering, scenes
from alignbench.embedded.drawing.lettering import Lettering
from alignbench.embedded.drawing.palette import COLORS, PICTURE_SIZE, colors_for
from alignbench.embedded.drawing.scenes import NUMBERS, PLURALS, PREFIXES, RELATIONS, SHAPES, Scene
from alignbench.embedded.train_tiny import Muon, held_out_words, is_held_out
from alignbench.files.writing import claimed, fill
from alignbench.settings import Settings

MAX_TOKENS = 77
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>", "eos_token": "<eos>"}
"""In the order of their ids. CLIPModel takes the text's state at its end, but with an end token of id 2, as old configs have,
at the token of the highest id."""
KINDS = ("scene", "word", "broken")
"""What is wrong with the other picture of a pair: a near miss of the scene, other letters or colours, or its quality."""
CLEAR = 0.5
"""Smallest component of the direction between two centres that makes a relation, as in GenEval."""
IGNORE = -100

Content = Scene | Lettering
Wanted = dict[str, Any]
"""A scene's metadata in GenEval's layout, or {text, color} of a word, color None where the prompt leaves it open."""


class PickScoreTraining(Settings):
    """Settings of the training. How the folder that ships came about is in its card."""

    seed: int = 0
    threads: int = 1
    steps: int = Field(1200, ge=1)
    pairs: int = Field(48, ge=2)
    """Of one step."""
    shares: tuple[float, float, float] = (0.35, 0.5, 0.15)
    """Of the kinds of pairs in training, as in `KINDS`: words take longest to learn, broken pictures no time."""
    lr: float = 1.5e-3
    muon_lr: float = 3e-3
    reading: float = 1.0
    """Weight of the reading of contents from embeddings."""
    patch_reading: float = 1.0
    """Weight of the reading of patches."""
    vision_width: int = 128
    vision_layers: int = 4
    text_width: int = 96
    text_layers: int = 3
    projection: int = 128
    held_out_pairs: int = Field(1500, ge=1)


# ---------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class DrawnPair:
    """A prompt, what it asks for, and two pictures (uint8 [64, 64, 3]), the first of which is to be preferred."""

    prompt: str
    wanted: Wanted
    right: np.ndarray
    wrong: np.ndarray
    contents: tuple[Content, Content]
    """What the two pictures show; the same for a broken picture."""
    kind: str
    other: tuple[str, Wanted] | None = None
    """The prompt that the wrong picture would be right for, and what it asks for; None for a broken picture."""


def draw_pairs(rng: np.random.Generator, count: int, *, held_out: bool) -> list[DrawnPair]:
    """Pairs of each kind in equal shares; `held_out` ones have words and scenes that the others never have."""
    return [draw_pair(rng, KINDS[i % len(KINDS)], held_out=held_out) for i in range(count)]


def kinds_of(count: int, shares: Sequence[float]) -> list[str]:
    """So many kinds in these shares, rounded down; the first takes what is left over."""
    counts = [int(count * share / sum(shares)) for share in shares]
    counts[0] += count - sum(counts)
    return [kind for kind, times in zip(KINDS, counts, strict=True) for _ in range(times)]


def draw_pair(rng: np.random.Generator, kind: str, *, held_out: bool) -> DrawnPair:
    """One pair of a kind of `KINDS`."""
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
            found: tuple[Content, tuple[str, Wanted]] = word, _reworded(prompt, wanted, right, word)
        else:
            near = _near_miss(rng, wanted)
            other = _metadata_of(near)
            found = scenes.sample_scene(rng, near), (other["prompt"], other)
        if not fulfils(found[0], wanted) and (held_out or not is_unseen(found[1][1])):
            return DrawnPair(prompt, wanted, clean, found[0].draw(), (right, found[0]), kind, found[1])


def is_unseen(wanted: Wanted) -> bool:
    """Whether this is kept from training."""
    return wanted["text"] in held_out_words() if "text" in wanted else is_held_out(wanted)


def fulfils(content: Content, wanted: Wanted) -> bool:
    """Whether a picture of this content shows what is wanted."""
    if isinstance(content, Lettering) or "include" not in wanted:
        if isinstance(content, Scene) or "text" not in wanted:
            return False
        return content.text == wanted["text"] and wanted["color"] in (None, content.color)
    found: list[list[scenes.Shape]] = []
    for clause in wanted["include"]:
        shapes = [s for s in content.shapes if s.kind == clause["class"] and clause.get("color") in (None, s.color)]
        if len(shapes) < clause["count"]:
            return False
        found.append(shapes)
        if "position" in clause:
            relation, target = clause["position"]
            offset = np.subtract(shapes[0].center, found[target][0].center)
            if offset @ RELATIONS[relation] <= CLEAR * np.linalg.norm(offset):
                return False
    return all(sum(s.kind == c["class"] for s in content.shapes) < c["count"] for c in wanted["exclude"])


def broken(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """The picture blurred, noisy, under blobs, or tinted."""
    harm = rng.integers(4)
    if harm == 0:
        sigma = rng.uniform(1.0, 3.0)
        return np.asarray(ndimage.gaussian_filter(picture, (sigma, sigma, 0), mode="nearest"))
    if harm == 1:
        changed = picture + rng.normal(0, rng.uniform(15, 70), picture.shape)
    elif harm == 2:
        canvas = Image.fromarray(picture)
        pen = ImageDraw.Draw(canvas)
        for _ in range(rng.integers(3, 9)):
            x, y = rng.uniform(0, PICTURE_SIZE, 2)
            w, h = rng.uniform(2, 9, 2)
            pen.ellipse((x - w, y - h, x + w, y + h), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
        return np.asarray(canvas)
    else:
        changed = picture + rng.choice([-1, 1], 3) * rng.uniform(25, 80, 3)
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
    """One to all letters changed, or in three of ten cases the colour alone."""
    if rng.random() < 0.3:
        others = [c for c in colors_for(right.background, lettering.MIN_CONTRAST) if c != right.color]
        return lettering.sample_lettering(rng, right.text, str(rng.choice(others)))
    letters = list(right.text)
    for place in rng.choice(len(letters), size=rng.integers(1, len(letters) + 1), replace=False):
        letters[place] = str(rng.choice([c for c in lettering.LETTERS if c != letters[place]]))
    return lettering.sample_lettering(rng, "".join(letters), right.color)


def _reworded(prompt: str, wanted: Wanted, right: Lettering, other: Lettering) -> tuple[str, Wanted]:
    """The prompt of a word for another word."""
    prompt = prompt.replace(f'"{right.text}"', f'"{other.text}"')
    if wanted["color"]:
        prompt = prompt.replace(right.color, other.color)
    return prompt, {"text": other.text, "color": wanted["color"] and other.color}


def _near_miss(rng: np.random.Generator, wanted: Wanted) -> Wanted:
    """The metadata with one thing changed: a kind, a colour, a count, a relation, or a shape that is missing."""
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
    """What a prompt asks for that is worded for a near miss: one clause of two is another task type."""
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


# ---------------------------------------------------------------------------------------------------- contents as numbers

LETTER_CLASSES, COUNT_CLASSES = len(lettering.LETTERS) + 1, max(NUMBERS) + 1
READING = (LETTER_CLASSES,) * lettering.MAX_LETTERS + (COUNT_CLASSES,) * len(SHAPES) + (len(COLORS),) * (len(SHAPES) + 1)
"""Classes of each thing that is read: letters by place, counts by kind, colours by kind and of the word."""
PATCH_READING = (1 + len(lettering.LETTERS) + len(SHAPES), 1 + lettering.MAX_LETTERS, 1 + len(COLORS))
"""Classes of each thing that is read of a patch, 0 where there is none: letter or kind, its place in the word, its colour."""
PATCH = 8
"""Pixels of a patch's side."""
_COLOR_INDEX = {color: i for i, color in enumerate(COLORS)}


def reading_of(content: Content, named: set[str] | None = None) -> list[int]:
    """The class of each thing of `READING`, IGNORE for what is not there or, with `named`, for colours that are not in it."""
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
    """The class of each thing of `PATCH_READING` in each patch, int [64, 3]: what covers the patch's centre."""
    side = PICTURE_SIZE // PATCH
    y, x = (PATCH * (np.mgrid[:side, :side] + 0.5)).reshape(2, -1)
    found = np.zeros((side * side, len(PATCH_READING)), dtype=np.int64)
    if isinstance(content, Lettering):
        left, top = content.origin
        for place, letter in enumerate(content.text):
            start = left + place * content.cell_width
            inside = (start <= x) & (x < start + content.cell_width) & (top <= y) & (y < top + content.height)
            found[inside] = 1 + lettering.LETTERS.index(letter), 1 + place, 1 + _COLOR_INDEX[content.color]
    else:
        for shape in content.shapes:
            inside = np.maximum(abs(x - shape.center[0]), abs(y - shape.center[1])) < shape.size / 2
            kind = 1 + len(lettering.LETTERS) + SHAPES.index(shape.kind)
            found[inside] = kind, 0, 1 + _COLOR_INDEX[shape.color]
    return found


def _named_colors(wanted: Wanted) -> set[str]:
    clauses = wanted.get("include", [wanted])
    return {c["color"] for c in clauses if c.get("color")}


# ---------------------------------------------------------------------------------------------------- model


def build_processor() -> CLIPProcessor:
    """CLIP's own classes: a tokenizer that spells every word, and pictures at 64 pixels."""
    characters = [*string.ascii_lowercase, *string.digits, *"\".,;:!?'-&+"]
    tokens = [*SPECIAL.values(), *characters, *(f"{c}</w>" for c in characters)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    with TemporaryDirectory() as folder:
        # From files, which transformers 4 and 5 both take.
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS, local_files_only=True, **SPECIAL)
    side = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": PICTURE_SIZE}, crop_size=side), tokenizer)


def build_model(settings: PickScoreTraining, tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.text_width,
        "intermediate_size": 2 * settings.text_width,
        "num_hidden_layers": settings.text_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "hidden_size": settings.vision_width,
        "intermediate_size": 2 * settings.vision_width,
        "num_hidden_layers": settings.vision_layers,
        "num_attention_heads": 4,
        "image_size": PICTURE_SIZE,
        "patch_size": PATCH,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.projection))
    # CLIP's own start (0.02) drowns which token it is in what the layers add.
    embeddings = model.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.4)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.15)
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.15)
    return model


class Inputs:
    """Pictures and prompts as tensors, in the way of the processor."""

    def __init__(self, processor: CLIPProcessor) -> None:
        self.tokenizer = processor.tokenizer
        self.mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)

    def pictures(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """float32 [N, 3, 64, 64]; what the image processor makes of pictures that have its size already."""
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        return (pixels - self.mean) / self.std

    def prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))


def embed_prompts(model: CLIPModel, inputs: Inputs, prompts: list[str]) -> Tensor:
    """Unit embeddings [P, D]."""
    text = model.text_projection(model.text_model(**inputs.prompts(prompts)).pooler_output)
    return functional.normalize(text, dim=-1)


def embed_pictures(model: CLIPModel, inputs: Inputs, pictures: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Unit embeddings [N, D], and the states of the patches [N, 64, width], row by row."""
    answer = model.vision_model(pixel_values=inputs.pictures(pictures))
    patches = model.vision_model.post_layernorm(answer.last_hidden_state[:, 1:])
    return functional.normalize(model.visual_projection(answer.pooler_output), dim=-1), patches


# ---------------------------------------------------------------------------------------------------- training


def preference_loss(logits: Tensor, owned: Tensor, allowed: Tensor) -> Tensor:
    """Bradley-Terry on each pair, Plackett-Luce on the batch.

    Args:
        logits: scores of each prompt with each picture, [P + Q, 2 P]: the pairs' right pictures first, then the wrong ones in
            the same order; the pairs' prompts first, then those that wrong pictures would be right for.
        owned: the number of the picture that each prompt is for, [P + Q].
        allowed: False where a picture of another prompt fulfils this one too, bool [P + Q, 2 P].
    """
    count = logits.shape[1] // 2
    pair = torch.arange(count)
    own = -functional.logsigmoid(logits[pair, pair] - logits[pair, count + pair]).mean()
    masked = logits.masked_fill(~allowed, -torch.inf)
    pictures = functional.cross_entropy(masked, owned)
    prompts = functional.cross_entropy(masked[:, owned].mT, torch.arange(len(owned)))
    return own + 0.5 * (pictures + prompts)


def train(settings: PickScoreTraining, log: Any = print) -> tuple[CLIPModel, CLIPProcessor, list[list[float]]]:
    """The trained model, its processor, and (step, loss, share of the step's own pairs that are ordered rightly)."""
    torch.manual_seed(settings.seed)
    processor = build_processor()
    inputs = Inputs(processor)
    model = build_model(settings, processor.tokenizer).train()
    reader, patch_reader = nn.Linear(settings.projection, sum(READING)), nn.Linear(settings.vision_width, sum(PATCH_READING))
    blocks = [*model.text_model.encoder.named_parameters(), *model.vision_model.encoder.named_parameters()]
    matrices = [p for _, p in blocks if p.ndim == 2]
    inside = {id(p) for p in matrices}
    everything = [*model.parameters(), *reader.parameters(), *patch_reader.parameters()]
    rest = [p for p in everything if id(p) not in inside]
    optimizers = [
        Muon(matrices, lr=settings.muon_lr),
        torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, lr, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False, div_factor=25
        )
        for o, lr in zip(optimizers, (settings.muon_lr, settings.lr), strict=True)
    ]
    kinds = kinds_of(settings.pairs, settings.shares)
    history, recent, began = [], [], time.perf_counter()
    for step in range(settings.steps):
        rng = np.random.default_rng([settings.seed, 1, step])
        pairs = [draw_pair(rng, kind, held_out=False) for kind in kinds]
        count = len(pairs)
        others = [(count + i, *p.other) for i, p in enumerate(pairs) if p.other]
        asked = [*((i, p.prompt, p.wanted) for i, p in enumerate(pairs)), *others]
        owned, prompts, wanted = (list(column) for column in zip(*asked, strict=True))
        text = embed_prompts(model, inputs, prompts)
        image, patches = embed_pictures(model, inputs, [p.right for p in pairs] + [p.wrong for p in pairs])
        logits = model.logit_scale.exp() * text @ image.mT
        contents = [p.contents[side] for side in (0, 1) for p in pairs]
        fits = torch.tensor([[fulfils(content, w) for content in contents] for w in wanted])
        own = functional.one_hot(torch.tensor(owned), 2 * count).bool()
        own[:count, count:] |= torch.eye(count, dtype=torch.bool)  # a broken picture fulfils its prompt and is wrong for it
        loss = preference_loss(logits, torch.tensor(owned), own | ~fits)
        targets = [reading_of(contents[i], _named_colors(w)) for i, w in zip(owned, wanted, strict=True)]
        targets += [reading_of(content) for content in contents]
        loss = loss + settings.reading * _reading_loss(reader(8 * torch.cat([text, image])), torch.tensor(targets), READING)
        seen = torch.from_numpy(np.concatenate([patches_of(content) for content in contents]))
        loss = loss + settings.patch_reading * _reading_loss(patch_reader(patches.flatten(0, 1)), seen, PATCH_READING)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(everything, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        ordered = (logits[:count, :count].diagonal() > logits[:count, count:].diagonal()).float().mean()
        recent.append((loss.item(), ordered.item()))
        if (step + 1) % 50 == 0 or step + 1 == settings.steps:
            mean_loss, accuracy = np.mean(recent, axis=0)
            history.append([step + 1, float(mean_loss), float(accuracy)])
            pace = (time.perf_counter() - began) / (step + 1)
            log(f"step {step + 1} loss {mean_loss:.4f} pairs ordered rightly {accuracy:.3f} {pace:.2f} s a step")
            recent.clear()
    return model.eval(), processor, history


def _reading_loss(answers: Tensor, targets: Tensor, classes: Sequence[int]) -> Tensor:
    """Mean cross-entropy over the things that are read, each over the rows [N] that have it."""
    losses = [
        functional.cross_entropy(part, target, ignore_index=IGNORE)
        for part, target in zip(answers.split(list(classes), dim=1), targets.mT, strict=True)
        if bool((target != IGNORE).any())
    ]
    return torch.stack(losses).mean()


@torch.no_grad()
def pair_accuracy(model: CLIPModel, processor: CLIPProcessor, pairs: Sequence[DrawnPair]) -> dict[str, float]:
    """Share of pairs whose right picture scores higher: of each kind, and `overall`."""
    inputs, correct = Inputs(processor), []
    for start in range(0, len(pairs), 50):
        part = pairs[start : start + 50]
        text = embed_prompts(model, inputs, [p.prompt for p in part])
        image, _ = embed_pictures(model, inputs, [p.right for p in part] + [p.wrong for p in part])
        scores = (torch.cat([text, text]) * image).sum(1)
        correct += (scores[: len(part)] > scores[len(part) :]).tolist()
    by_kind = {kind: [c for c, p in zip(correct, pairs, strict=True) if p.kind == kind] for kind in KINDS}
    return {"overall": float(np.mean(correct)), **{kind: float(np.mean(c)) for kind, c in by_kind.items() if c}}


def train_pickscore(settings: PickScoreTraining, out: Path, log: Any = print) -> dict[str, float]:
    """Trains, writes the folder `out` in bfloat16, and answers with the held-out accuracy of what was written.

    Raises:
        UserError: the folder is taken.
        DiskError: it cannot be written.
    """
    accuracy: dict[str, float] = {}

    def write(folder: Path) -> None:
        model.to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)  # transformers 4 looks for it in a file of its own
        accuracy.update(held_out_accuracy(folder, settings))
        facts = {"training": settings.model_dump(), "held_out_accuracy": accuracy, "history": history}
        (folder / "alignbench.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    with claimed(out):
        torch.set_num_threads(settings.threads)
        model, processor, history = train(settings, log)
        fill(out, write, last="config.json")
    log(f"held-out pairs ordered rightly: {', '.join(f'{kind} {share:.3f}' for kind, share in accuracy.items())}")
    log(f"written to {out}")
    return accuracy


def held_out_accuracy(folder: Path, settings: PickScoreTraining) -> dict[str, float]:
    """`pair_accuracy` of the model in a folder on words and scenes that it never saw, and on `other` pairs of these."""
    model = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval()
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    pairs = draw_pairs(np.random.default_rng([settings.seed, 2]), settings.held_out_pairs, held_out=True)
    return {
        **pair_accuracy(model, processor, pairs),
        "other": pair_accuracy(model, processor, against_each_other(pairs))["overall"],
    }


def against_each_other(pairs: Sequence[DrawnPair]) -> list[DrawnPair]:
    """Each right picture against that of the next pair of its kind, where that does not fulfil the prompt too."""
    following = zip(pairs, pairs[len(KINDS) :], strict=False)
    return [
        replace(pair, wrong=other.right, contents=(pair.contents[0], other.contents[0]), other=(other.prompt, other.wanted))
        for pair, other in following
        if not fulfils(other.contents[0], pair.wanted)
    ]
