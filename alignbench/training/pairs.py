"""Fixed pairs of pictures on disk, for training without rollouts (offline DPO): read, written, and made into forests.

The file is JSON lines, `{"prompt": ..., "chosen": ..., "rejected": ...}`, with the pictures' paths relative to the file; other
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
from alignbench.errors import UserError
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


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt, the first preferred.

    Attributes:
        where: the file and the line that it stands in.
    """

    prompt: str
    chosen: Path
    rejected: Path
    where: str = "a pair"

    def images(self) -> list[np.ndarray]:
        """The chosen and the rejected one, uint8 [H, W, 3] each; raises UserError where one cannot be opened."""
        found = []
        for role in ("chosen", "rejected"):
            try:
                found.append(_opened(getattr(self, role)))
            except UserError as error:
                raise UserError(f"{self.where}, {role}: {error}") from None
        return found


def read_pairs(file: Path) -> list[Pair]:
    """The pairs of a file, with paths that can be opened.

    Raises:
        UserError: the file cannot be read or is empty, a line is no pair, or a picture is missing.
    """
    table = read_table(file, "pairs", "prompt")
    prompts, *pictures = (table.texts(table.require(name)) for name in ("prompt", "chosen", "rejected"))
    pairs = []
    for row, (prompt, chosen, rejected) in enumerate(zip(prompts, *pictures, strict=True)):
        pair = Pair(prompt, local_path(chosen, file.parent), local_path(rejected, file.parent), table.place(row))
        for role in ("chosen", "rejected"):
            picture = getattr(pair, role)
            if not os.path.isfile(picture):  # which takes any name, as long as it may be
                raise UserError(f"{table.place(row)}: the {role} picture {picture} is not there")
        pairs.append(pair)
    return pairs


def check_pairs(pairs: Sequence[Pair], check: Callable[[np.ndarray], None]) -> None:
    """Opens every picture once, so that what is wrong with the last pair is told before anything is trained.

    Args:
        check: raises UserError where the model cannot take a picture; `Backbone.check_image`.

    Raises:
        UserError: naming the line and the picture.
    """
    for pair in pairs:
        for role, image in zip(("chosen", "rejected"), pair.images(), strict=True):
            try:
                check(image)
            except UserError as error:
                raise UserError(f"{pair.where}, {role}: {getattr(pair, role)}: {error}") from None


def fingerprint(pairs: list[Pair]) -> str:
    """SHA-256 of the prompts and of what is in the pictures' files, wherever they lie."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair.prompt).encode())
        for file in (pair.chosen, pair.rejected):
            try:
                digest.update(bytes.fromhex(sha256_of(file)))
            except OSError as error:
                raise UserError(f"cannot open the picture {file}: {error.strerror}") from None
    return digest.hexdigest()


def pair_forest(policy: Backbone, pairs: list[Pair], seed: int, iteration: int, reduction: Reduction) -> RolloutForest:
    """Groups of two leaves without a path, rewarded 1 (chosen) and 0. Their sigmas are those of the model's own call.

    Raises:
        UserError: a picture cannot be opened or does not fit the model, or the model cannot encode pictures.
    """
    images = [image for pair in pairs for image in pair.images()]
    latents = policy.encode_images(images).float()
    builder = ForestBuilder()
    leaves = builder.add_states(latents)
    forest = builder.build(
        leaves,
        leaves.new_empty(len(leaves), 0),
        prompts=[pair.prompt for pair in pairs],
        plan=Plan((Step(),), roots=2),
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
    judges: MetricSuite,
    prompts: list[str],
    images_per_prompt: int,
    seed: int,
    out: Path,
    advance: Callable[[int, int], None] = lambda done, pairs: None,
    *,
    normalise_rewards: bool = True,
) -> int:
    """Draws pictures of each prompt and keeps the best and the worst by the task's reward; prompts without a best have none.

    Until all prompts are done, the list is called `pairs.partial.jsonl`; what ends earlier leaves it under that name.

    Args:
        normalise_rewards: as of a run; a prompt's pictures are the group. See `groups.total`.

    Returns:
        How many pairs were written to `out/pairs.jsonl`.

    Raises:
        UserError: the folder exists and is not empty.
        DiskError: the disk is full, or the folder cannot be written.
        RunError: a scorer failed.
    """
    with claimed(out):
        try:
            return _write_pairs(policy, judges, prompts, images_per_prompt, seed, out, advance, normalise_rewards)
        except OSError as error:
            raise disk_error(out, error) from error


def _write_pairs(
    policy: Backbone,
    judges: MetricSuite,
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
            scores = judges.score(images, [prompt] * len(images), when=f"on prompt {prompt!r}")
            of_group = {name: torch.from_numpy(answer)[None] for name, answer in scores.items()}
            rewards = groups.total(of_group, judges.weights, normalise=normalise_rewards)
            total, known = rewards[0].numpy(), np.flatnonzero(groups.usable_leaves(rewards)[0])
            if len(known):
                best, worst = known[total[known].argmax()], known[total[known].argmin()]
                names = {"chosen": f"pictures/{p:05d}-chosen.png", "rejected": f"pictures/{p:05d}-rejected.png"}
                for role, index in (("chosen", best), ("rejected", worst)):
                    Image.fromarray(images[index]).save(out / names[role])
                totals = {"chosen_reward": float(total[best]), "rejected_reward": float(total[worst])}
                file.write(json.dumps({"prompt": prompt, **names, **totals}, ensure_ascii=False) + "\n")
                file.flush()
                count += 1
            advance(p + 1, count)
        os.fsync(file.fileno())
    partial.rename(out / "pairs.jsonl")
    return count


def _opened(file: Path) -> np.ndarray:
    return np.asarray(open_image(file))
