"""Fixed pairs of pictures on disk, for training without rollouts (offline DPO): read, written, and made into forests.

The file is JSON lines, `{"prompt": ..., "chosen": ..., "rejected": ...}`, with the pictures' paths relative to the file.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from alignbench.backbone import Backbone
from alignbench.errors import UserError
from alignbench.evaluation import Judges
from alignbench.executor import sample
from alignbench.files import claimed, disk_error
from alignbench.flow import Reduction
from alignbench.forest import RolloutForest
from alignbench.plan import Plan, Step
from alignbench.settings import first_problem


class Pair(BaseModel):
    """Two pictures of one prompt, the first preferred."""

    model_config = ConfigDict(extra="ignore")

    prompt: str
    chosen: Path
    rejected: Path


def read_pairs(file: Path) -> list[Pair]:
    """The pairs of a file, with paths that can be opened.

    Raises:
        UserError: the file cannot be read or is empty, a line is no pair, or a picture is missing.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # no UTF-8, or a name that no file has
        raise UserError(f"cannot read the pairs in {file}: {getattr(error, 'strerror', None) or error}") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pair = Pair.model_validate_json(line)
        except ValidationError as error:
            raise UserError(f"{file}, line {number}, is no pair: {first_problem(error, 'line')}") from None
        for role in ("chosen", "rejected"):
            picture = file.parent / getattr(pair, role)
            if not os.path.isfile(picture):  # which takes any name, as long as it may be
                raise UserError(f"{file}, line {number}: the {role} picture {picture} is not there")
            setattr(pair, role, picture)
        pairs.append(pair)
    if not pairs:
        raise UserError(f"{file} holds no pair")
    return pairs


def pair_forest(policy: Backbone, pairs: list[Pair], seed: int, iteration: int, reduction: Reduction) -> RolloutForest:
    """Groups of two leaves without a path, rewarded 1 (chosen) and 0.

    Raises:
        UserError: a picture cannot be opened or does not fit the model, or the model cannot encode pictures.
    """
    files = [file for pair in pairs for file in (pair.chosen, pair.rejected)]
    latents = policy.encode_images([_opened(file) for file in files]).float()
    none, numbers = torch.empty(0, dtype=torch.long, device=latents.device), latents.new_empty(0)
    return RolloutForest(
        prompts=[pair.prompt for pair in pairs],
        plan=Plan((Step(),), roots=2),
        iteration=iteration,
        reduction=reduction,
        states=latents,
        rows=none,
        row_group=none,
        row_step=none,
        row_velocity=latents[:0],
        edge_row=none,
        edge_child=none,
        edge_sigma=numbers,
        edge_sigma_next=numbers,
        edge_noise_level=numbers,
        old_log_prob=numbers,
        leaves=torch.arange(len(files), device=latents.device),
        leaf_edges=none.new_empty(len(files), 0),
        seed=seed,
        rewards=latents.new_tensor([1.0, 0.0]).repeat(len(pairs)),
    )


def write_pairs(
    policy: Backbone,
    judges: Judges,
    prompts: list[str],
    images_per_prompt: int,
    seed: int,
    out: Path,
    advance: Callable[[int, int], None] = lambda done, pairs: None,
) -> int:
    """Draws pictures of each prompt and keeps the best and the worst by the task's reward; prompts without a best have none.

    Until all prompts are done, the list is called `pairs.partial.jsonl`; what ends earlier leaves it under that name.

    Returns:
        How many pairs were written to `out/pairs.jsonl`.

    Raises:
        UserError: the folder exists and is not empty.
        DiskError: the disk is full, or the folder cannot be written.
        RunError: a scorer failed.
    """
    with claimed(out):
        try:
            return _write_pairs(policy, judges, prompts, images_per_prompt, seed, out, advance)
        except OSError as error:
            raise disk_error(out, error) from error


def _write_pairs(
    policy: Backbone,
    judges: Judges,
    prompts: list[str],
    images_per_prompt: int,
    seed: int,
    out: Path,
    advance: Callable[[int, int], None],
) -> int:
    (out / "pictures").mkdir()
    count, partial = 0, out / "pairs.partial.jsonl"
    with partial.open("x", encoding="utf-8") as file:
        for p, prompt in enumerate(prompts):
            latents = sample(policy, [prompt], images_per_prompt, policy.default_steps, seed)
            images = policy.decode(latents)
            scores = judges.score(images, [prompt] * len(images), when=f"on prompt {prompt!r}")
            total = np.sum([weight * scores[name] for name, weight in judges.weights.items()], axis=0)
            known = np.flatnonzero(~np.isnan(total))
            if len(known) and total[known].max() > total[known].min():
                best, worst = known[total[known].argmax()], known[total[known].argmin()]
                names = {"chosen": f"pictures/{p:05d}-chosen.png", "rejected": f"pictures/{p:05d}-rejected.png"}
                for role, index in (("chosen", best), ("rejected", worst)):
                    Image.fromarray(images[index]).save(out / names[role])
                rewards = {"chosen_reward": float(total[best]), "rejected_reward": float(total[worst])}
                file.write(json.dumps({"prompt": prompt, **names, **rewards}, ensure_ascii=False) + "\n")
                file.flush()
                count += 1
            advance(p + 1, count)
        os.fsync(file.fileno())
    partial.rename(out / "pairs.jsonl")
    return count


def _opened(file: Path) -> np.ndarray:
    try:
        return np.asarray(Image.open(file).convert("RGB"))
    except OSError as error:
        raise UserError(f"cannot open the picture {file}: {error}") from None
