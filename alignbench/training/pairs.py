"""Reads and writes fixed pairs of images, for training without rollouts (offline DPO), and makes forests of them.

The file is JSON lines, `{"prompt": ..., "chosen": ..., "rejected": ...}`, with paths of images relative to the file. Other
tables with these columns are read as well (`alignbench.files.text_files`).
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from alignbench import groups
from alignbench.backbone import Backbone
from alignbench.errors import RunError, UserError
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.files.images import open_image
from alignbench.files.opening import sha256_of
from alignbench.files.paths import local_path
from alignbench.files.text_files import read_table
from alignbench.files.writing import claimed, disk_error
from alignbench.flow import Reduction
from alignbench.rollouts.builder import ForestBuilder
from alignbench.rollouts.executor import sample
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.plan import Plan, Step
from alignbench.scorer import CLIPS

PAIR = Plan((Step(),), roots=2)
"""The plan of a pair: a group of two images, whose paths are not known."""


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt.

    Attributes:
        prompt: the prompt of both.
        chosen: the file of the preferred image.
        rejected: the file of the other image.
        where: the file and the line that name the pair.
    """

    prompt: str
    chosen: Path
    rejected: Path
    where: str = "a pair"

    def images(self) -> list[np.ndarray]:
        """The chosen and the rejected image, uint8 [H, W, 3] each; raises UserError where one cannot be opened."""
        images = []
        for role in ("chosen", "rejected"):
            try:
                images.append(np.asarray(open_image(getattr(self, role))))
            except UserError as error:
                raise UserError(f"{self.where}, {role}: {error}") from None
        return images


def read_pairs(file: Path) -> list[Pair]:
    """Reads the pairs of a file; the paths of their images are absolute or relative to the current folder.

    Raises:
        UserError: the file cannot be read or is empty, a line is not a pair, or an image is missing.
    """
    table = read_table(file, "pairs", "prompt")
    prompts, *images = (table.texts(table.require(name)) for name in ("prompt", "chosen", "rejected"))
    pairs = []
    for row, (prompt, chosen, rejected) in enumerate(zip(prompts, *images, strict=True)):
        pair = Pair(prompt, local_path(chosen, file.parent), local_path(rejected, file.parent), table.place(row))
        for role in ("chosen", "rejected"):
            image = getattr(pair, role)
            if not os.path.isfile(image):  # Path.is_file raises an error for a name that is too long
                raise UserError(f"{table.place(row)}: the {role} image {image} does not exist")
        pairs.append(pair)
    return pairs


def check_pairs(pairs: Sequence[Pair], check: Callable[[np.ndarray], None]) -> None:
    """Opens every image once, so that a fault in the last pair is found before anything is trained.

    Args:
        check: raises UserError where the model cannot take an image; `Backbone.check_image`.

    Raises:
        UserError: naming the line and the image.
    """
    for pair in pairs:
        for role, image in zip(("chosen", "rejected"), pair.images(), strict=True):
            try:
                check(image)
            except UserError as error:
                raise UserError(f"{pair.where}, {role}: {getattr(pair, role)}: {error}") from None


def fingerprint(pairs: list[Pair]) -> str:
    """The SHA-256 of the prompts and of the contents of the images, wherever the files are."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair.prompt).encode())
        for file in (pair.chosen, pair.rejected):
            try:
                digest.update(bytes.fromhex(sha256_of(file)))
            except OSError as error:
                raise UserError(f"cannot open the image {file}: {error.strerror}") from None
    return digest.hexdigest()


def pair_forest(policy: Backbone, pairs: list[Pair], seed: int, iteration: int, reduction: Reduction) -> RolloutForest:
    """Makes a forest of pairs: each is a group of two leaves without a path, with rewards 1 (chosen) and 0 (rejected).

    The sigmas are those of the model's own call.

    Raises:
        UserError: an image cannot be opened or does not fit the model, or the model cannot encode images.
    """
    images = [image for pair in pairs for image in pair.images()]
    latents = policy.encode_images(images).float()
    builder = ForestBuilder()
    leaves = builder.add_states(latents)
    forest = builder.build(
        leaves,
        leaves.new_empty(len(leaves), 0),
        prompts=[pair.prompt for pair in pairs],
        plan=PAIR,
        sigmas=policy.sigmas(policy.default_steps),
        reduction=reduction,
        iteration=iteration,
        seed=seed,
        schedule_shift=policy.schedule_shift(),
    )
    forest.rewards = latents.new_tensor([1.0, 0.0]).repeat(len(pairs))
    return forest


def write_pairs(
    policy: Backbone,
    suite: MetricSuite,
    prompts: list[str],
    images_per_prompt: int,
    seed: int,
    out: Path,
    advance: Callable[[int, int], None] = lambda done, pairs: None,
    *,
    normalise_rewards: bool = True,
) -> int:
    """Draws images of each prompt and keeps the best and the worst by the task's reward.

    A prompt whose images have equal rewards gets no pair. Until all prompts are done, the list is called
    `pairs.partial.jsonl`; an interrupted call leaves it under that name.

    Args:
        policy: the model that draws the images.
        suite: the task's metrics, of which the rewards are used.
        prompts: for which pairs are made.
        images_per_prompt: the number of images that are drawn for each prompt.
        seed: of the noise.
        out: the folder that is written.
        advance: called with the number of prompts that are done and of pairs that are written.
        normalise_rewards: standardise several rewards before they are summed, as in a run; the images of a prompt are the
            group. See `groups.total`.

    Returns:
        The number of pairs in `out/pairs.jsonl`.

    Raises:
        UserError: the folder exists and is not empty.
        DiskError: the disk is full, or the folder cannot be written.
        RunError: a scorer failed, or the images of every prompt have equal rewards.
    """
    with claimed(out):
        try:
            return _write_pairs(policy, suite, prompts, images_per_prompt, seed, out, advance, normalise_rewards)
        except OSError as error:
            raise disk_error(out, error) from error


def _write_pairs(
    policy: Backbone,
    suite: MetricSuite,
    prompts: list[str],
    images_per_prompt: int,
    seed: int,
    out: Path,
    advance: Callable[[int, int], None],
    normalise_rewards: bool,
) -> int:
    (out / "pictures").mkdir()
    count, partial = 0, out / "pairs.partial.jsonl"
    with partial.open("x", encoding="utf-8") as file:
        for p, prompt in enumerate(prompts):
            latents = sample(policy, [prompt], images_per_prompt, policy.default_steps, seed)
            images = policy.decode(latents)
            if images.ndim == CLIPS:
                raise UserError("pairs are written as images, but this model draws clips; set backbone.scored_frames=1")
            scores = suite.score(images, [prompt] * len(images), when=f"on prompt {prompt!r}")
            group_scores = {name: torch.from_numpy(values)[None] for name, values in scores.items()}
            rewards = groups.total(group_scores, suite.weights, normalise=normalise_rewards)
            total, usable = rewards[0].numpy(), np.flatnonzero(groups.usable_leaves(rewards)[0])
            if len(usable):
                best, worst = usable[total[usable].argmax()], usable[total[usable].argmin()]
                names = {"chosen": f"pictures/{p:05d}-chosen.png", "rejected": f"pictures/{p:05d}-rejected.png"}
                for role, index in (("chosen", best), ("rejected", worst)):
                    Image.fromarray(images[index]).save(out / names[role])
                totals = {"chosen_reward": float(total[best]), "rejected_reward": float(total[worst])}
                file.write(json.dumps({"prompt": prompt, **names, **totals}, ensure_ascii=False) + "\n")
                file.flush()
                count += 1
            advance(p + 1, count)
        os.fsync(file.fileno())
    if not count:
        partial.unlink()
        (out / "pictures").rmdir()
        raise RunError(
            f"no pair was made: for each of the {len(prompts)} prompts, all {images_per_prompt} images have equal rewards; "
            "draw more images of a prompt, or choose another task or backbone"
        )
    partial.rename(out / "pairs.jsonl")
    return count
