"""Trains the small PickScore model for images of `tiny`: `python -m alignbench train-pickscore`.

PickScore (arXiv 2305.01569) is a CLIP that is fine-tuned on human choices between two images of one prompt. This is the same
class of model with the same Bradley-Terry loss, trained from scratch on drawn pairs with a known answer: correct against wrong
content, and a clean against a broken image. Other images and prompts of the batch are negatives as well (Plackett-Luce), as in
CLIP's own training. An image with wrong content comes with the prompt that it would be correct for, because a negative prompt
costs a tenth of a negative image and is as useful.

The content of the images is known. Linear classifiers of it are trained beside the loss and discarded afterwards: of letters,
counts and colours from both embeddings, which aligns the two encoders, and of the content of each patch, without which the
image encoder would not find the letters within minutes.
"""

import json
import string
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from alignbench.embedded.drawing.palette import IMAGE_SIZE
from alignbench.embedded.drawn_pairs import (
    IGNORE,
    KINDS,
    PATCH,
    PATCH_READING,
    READING,
    DrawnPair,
    against_each_other,
    draw_pair,
    draw_pairs,
    fulfils,
    kinds_of,
    named_colors,
    patches_of,
    reading_of,
)
from alignbench.embedded.muon import muon_and_adamw
from alignbench.embedded.networks import SPECIAL
from alignbench.files.writing import claimed, fill
from alignbench.settings import Settings

MAX_TOKENS = 77


class PickScoreTraining(Settings):
    """Settings of the training. The model card of the folder that ships has the settings with which it was made."""

    seed: int = 0
    """Seed of the initial weights and of the drawn pairs."""
    threads: int = 1
    """CPU threads."""
    steps: int = Field(1200, ge=1)
    """Number of optimizer steps."""
    pairs: int = Field(48, ge=2)
    """Number of pairs per step."""
    shares: tuple[float, float, float] = (0.35, 0.5, 0.15)
    """Shares of the kinds of pairs, in the order of `KINDS`. Words take longest to learn; broken images are learnt at once."""
    lr: float = 1.5e-3
    """Highest learning rate of AdamW, which trains everything but the matrices of the blocks."""
    muon_lr: float = 3e-3
    """Highest learning rate of Muon, which trains these matrices."""
    reading: float = 1.0
    """Weight of the loss of classifying the content from embeddings."""
    patch_reading: float = 1.0
    """Weight of the loss of classifying patches."""
    vision_width: int = 128
    """Width of the image encoder."""
    vision_layers: int = 4
    """Number of layers of the image encoder."""
    text_width: int = 96
    """Width of the text encoder."""
    text_layers: int = 3
    """Number of layers of the text encoder."""
    projection: int = 128
    """Dimension of the embeddings of images and prompts."""
    held_out_pairs: int = Field(1500, ge=1)
    """Number of held-out pairs on which the trained model is measured."""


def build_processor() -> CLIPProcessor:
    """A processor of CLIP's own classes, with a tokenizer that spells every word and images of 64 pixels."""
    characters = [*string.ascii_lowercase, *string.digits, *"\".,;:!?'-&+"]
    tokens = [*SPECIAL.values(), *characters, *(f"{c}</w>" for c in characters)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    with TemporaryDirectory() as folder:
        # transformers 4 and 5 both read these files.
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS, local_files_only=True, **SPECIAL)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side), tokenizer)


def build_model(settings: PickScoreTraining, tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained CLIP model."""
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
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.projection))
    # With CLIP's own initialisation (0.02), the layers drown the identity of a token.
    embeddings = model.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.4)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.15)
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.15)
    return model


class Inputs:
    """Converts images and prompts to tensors, as the processor does."""

    def __init__(self, processor: CLIPProcessor) -> None:
        self.tokenizer = processor.tokenizer
        self.mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)

    def images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Pixel values, float32 [N, 3, 64, 64], as the image processor computes them for images of its own size."""
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        return (pixels - self.mean) / self.std

    def prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Token ids and attention mask, int64 [P, tokens], padded to the longest prompt."""
        return dict(self.tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))


def embed_prompts(model: CLIPModel, inputs: Inputs, prompts: list[str]) -> Tensor:
    """Normalised embeddings of prompts, [P, D]."""
    text = model.text_projection(model.text_model(**inputs.prompts(prompts)).pooler_output)
    return functional.normalize(text, dim=-1)


def embed_images(model: CLIPModel, inputs: Inputs, images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Normalised embeddings of images, [N, D], and the states of their patches, [N, 64, width], row by row."""
    answer = model.vision_model(pixel_values=inputs.images(images))
    patches = model.vision_model.post_layernorm(answer.last_hidden_state[:, 1:])
    return functional.normalize(model.visual_projection(answer.pooler_output), dim=-1), patches


def preference_loss(logits: Tensor, owned: Tensor, allowed: Tensor) -> Tensor:
    """The Bradley-Terry loss of each pair plus the Plackett-Luce loss of the batch.

    Args:
        logits: scores of each prompt with each image, [P + Q, 2 P]. Columns are the pairs' correct images and then the wrong
            ones in the same order. Rows are the pairs' prompts and then those for which wrong images would be correct.
        owned: index of the image that each prompt is for, [P + Q].
        allowed: False if an image of another prompt fulfils this prompt too, bool [P + Q, 2 P].
    """
    count = logits.shape[1] // 2
    pair = torch.arange(count)
    own = -functional.logsigmoid(logits[pair, pair] - logits[pair, count + pair]).mean()
    masked = logits.masked_fill(~allowed, -torch.inf)
    over_images = functional.cross_entropy(masked, owned)
    over_prompts = functional.cross_entropy(masked[:, owned].mT, torch.arange(len(owned)))
    return own + 0.5 * (over_images + over_prompts)


def train(settings: PickScoreTraining, log: Any = print) -> tuple[CLIPModel, CLIPProcessor, list[list[float]]]:
    """Trains a model.

    Args:
        settings: settings of the training.
        log: called with lines about the progress.

    Returns:
        The model, its processor, and the history of [step, loss, share of correctly ordered pairs].
    """
    torch.manual_seed(settings.seed)
    processor = build_processor()
    inputs = Inputs(processor)
    model = build_model(settings, processor.tokenizer).train()
    reader, patch_reader = nn.Linear(settings.projection, sum(READING)), nn.Linear(settings.vision_width, sum(PATCH_READING))
    parameters = [*model.parameters(), *reader.parameters(), *patch_reader.parameters()]
    optimizers, schedules = _optimizers(settings, model, parameters)
    kinds = kinds_of(settings.pairs, settings.shares)
    history, recent, began = [], [], time.perf_counter()
    for step in range(settings.steps):
        rng = np.random.default_rng([settings.seed, 1, step])
        pairs = [draw_pair(rng, kind, held_out=False) for kind in kinds]
        loss, ordered = _batch_loss(settings, model, inputs, reader, patch_reader, pairs)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        recent.append((loss.item(), ordered))
        if (step + 1) % 50 == 0 or step + 1 == settings.steps:
            mean_loss, accuracy = np.mean(recent, axis=0)
            history.append([step + 1, float(mean_loss), float(accuracy)])
            pace = (time.perf_counter() - began) / (step + 1)
            log(f"step {step + 1} loss {mean_loss:.4f} pairs in correct order {accuracy:.3f} {pace:.2f} s per step")
            recent.clear()
    return model.eval(), processor, history


def _optimizers(
    settings: PickScoreTraining, model: CLIPModel, parameters: Sequence[nn.Parameter]
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.OneCycleLR]]:
    """Muon for the matrices of the encoders' blocks, AdamW for all other parameters, and a schedule for each of the two."""
    blocks = [*model.text_model.encoder.named_parameters(), *model.vision_model.encoder.named_parameters()]
    matrices = [p for _, p in blocks if p.ndim == 2]
    optimizers: list[torch.optim.Optimizer] = list(
        muon_and_adamw(matrices, parameters, muon_lr=settings.muon_lr, lr=settings.lr)
    )
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, lr, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False, div_factor=25
        )
        for o, lr in zip(optimizers, (settings.muon_lr, settings.lr), strict=True)
    ]
    return optimizers, schedules


def _batch_loss(
    settings: PickScoreTraining,
    model: CLIPModel,
    inputs: Inputs,
    reader: nn.Module,
    patch_reader: nn.Module,
    pairs: Sequence[DrawnPair],
) -> tuple[Tensor, float]:
    """The loss of a batch of pairs, with those of the auxiliary classifiers, and the share of correctly ordered pairs."""
    count = len(pairs)
    others = [(count + i, *p.other) for i, p in enumerate(pairs) if p.other]
    asked = [*((i, p.prompt, p.wanted) for i, p in enumerate(pairs)), *others]
    owned, prompts, wanted = (list(column) for column in zip(*asked, strict=True))
    text = embed_prompts(model, inputs, prompts)
    image, patches = embed_images(model, inputs, [p.right for p in pairs] + [p.wrong for p in pairs])
    logits = model.logit_scale.exp() * text @ image.mT
    contents = [p.contents[side] for side in (0, 1) for p in pairs]
    fits = torch.tensor([[fulfils(content, w) for content in contents] for w in wanted])
    own = functional.one_hot(torch.tensor(owned), 2 * count).bool()
    own[:count, count:] |= torch.eye(count, dtype=torch.bool)  # a broken image fulfils its prompt and is still wrong
    loss = preference_loss(logits, torch.tensor(owned), own | ~fits)
    targets = [reading_of(contents[i], named_colors(w)) for i, w in zip(owned, wanted, strict=True)]
    targets += [reading_of(content) for content in contents]
    loss = loss + settings.reading * _reading_loss(reader(8 * torch.cat([text, image])), torch.tensor(targets), READING)
    seen = torch.from_numpy(np.concatenate([patches_of(content) for content in contents]))
    loss = loss + settings.patch_reading * _reading_loss(patch_reader(patches.flatten(0, 1)), seen, PATCH_READING)
    ordered = (logits[:count, :count].diagonal() > logits[:count, count:].diagonal()).float().mean()
    return loss, ordered.item()


def _reading_loss(answers: Tensor, targets: Tensor, classes: Sequence[int]) -> Tensor:
    """The mean cross-entropy of all classifiers, each over the rows [N] for which it has a target."""
    losses = [
        functional.cross_entropy(part, target, ignore_index=IGNORE)
        for part, target in zip(answers.split(list(classes), dim=1), targets.mT, strict=True)
        if bool((target != IGNORE).any())
    ]
    return torch.stack(losses).mean()


@torch.no_grad()
def pair_accuracy(model: CLIPModel, processor: CLIPProcessor, pairs: Sequence[DrawnPair]) -> dict[str, float]:
    """Share of pairs whose correct image has the higher score, for each kind and `overall`."""
    inputs, correct = Inputs(processor), []
    for start in range(0, len(pairs), 50):
        part = pairs[start : start + 50]
        text = embed_prompts(model, inputs, [p.prompt for p in part])
        image, _ = embed_images(model, inputs, [p.right for p in part] + [p.wrong for p in part])
        scores = (torch.cat([text, text]) * image).sum(1)
        correct += (scores[: len(part)] > scores[len(part) :]).tolist()
    by_kind = {kind: [c for c, p in zip(correct, pairs, strict=True) if p.kind == kind] for kind in KINDS}
    return {"overall": float(np.mean(correct)), **{kind: float(np.mean(c)) for kind, c in by_kind.items() if c}}


def train_pickscore(settings: PickScoreTraining, out: Path, log: Any = print) -> dict[str, float]:
    """Trains a model, writes it into the folder `out` in bfloat16, and returns the held-out accuracy of the written model.

    Raises:
        UserError: the folder is taken.
        DiskError: the folder cannot be written.
    """
    accuracy: dict[str, float] = {}

    def write(folder: Path) -> None:
        model.to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)  # transformers 4 reads it from a separate file
        accuracy.update(held_out_accuracy(folder, settings))
        facts = {"training": settings.model_dump(), "held_out_accuracy": accuracy, "history": history}
        (folder / "alignbench.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    with claimed(out):
        torch.set_num_threads(settings.threads)
        model, processor, history = train(settings, log)
        fill(out, write, last="config.json")
    log(f"held-out pairs in correct order: {', '.join(f'{kind} {share:.3f}' for kind, share in accuracy.items())}")
    log(f"written to {out}")
    return accuracy


def held_out_accuracy(folder: Path, settings: PickScoreTraining) -> dict[str, float]:
    """Computes `pair_accuracy` of the model in a folder, on words and scenes that it was not trained on.

    The key `other` is the accuracy on pairs whose wrong image is the correct image of another prompt.
    """
    model = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval()
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    pairs = draw_pairs(np.random.default_rng([settings.seed, 2]), settings.held_out_pairs, held_out=True)
    return {
        **pair_accuracy(model, processor, pairs),
        "other": pair_accuracy(model, processor, against_each_other(pairs))["overall"],
    }
