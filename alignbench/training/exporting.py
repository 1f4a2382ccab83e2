"""Exports the weights of a run in the form that plain diffusers opens."""

import json
import shutil
from pathlib import Path
from typing import Any

from alignbench import __version__
from alignbench.backbone import temporarily_set
from alignbench.backbones.diffusers_folder import DiffusersFolder
from alignbench.config.run_config import RunConfig
from alignbench.errors import UserError, did_you_mean
from alignbench.files.writing import claimed, fill
from alignbench.load import load_configured_backbone
from alignbench.training.checkpoint import policy_weights
from alignbench.training.tensors import PolicyWeights

CHOICES = ("last", "best")
ABOUT = "alignbench-export.json"
BESIDE = ("model_index.json", "alignbench.json")
"""Files of a diffusers folder that belong to the whole pipeline, without the model card, which is about other weights."""


def export(config: RunConfig, run: Path, out: Path, which: str = "last") -> str:
    """Writes the weights of a run's checkpoint, the averaged ones where the run keeps an average.

    A LoRA becomes `pytorch_lora_weights.safetensors`. Its scale, lora_alpha / lora_rank, is multiplied into the weights, so
    that a program which ignores alpha draws the same images. A run that trained all weights becomes a diffusers folder: the
    transformer in the precision of the training, everything else copied. `alignbench-export.json` says where the weights come
    from.

    Args:
        config: the configuration of the run.
        run: the run's folder.
        out: a new folder.
        which: `last`, or `best` (see `alignbench.training.checkpoint.best_iteration`).

    Returns:
        A sentence that says what was written and how to open it.

    Raises:
        UserError: the folder is taken, there is no such checkpoint, or the run's backbone is not a diffusers model.
        DiskError: the folder cannot be written; nothing is left of it.
    """
    if which not in CHOICES:
        raise UserError(f"--which takes last or best, got {which!r}{did_you_mean(which, CHOICES)}")
    if which == "best" and config.best_window is None:
        raise UserError(f"{run} kept no best checkpoint: its best_window is null")
    with claimed(out):
        return _export(config, run, out, which)


def _export(config: RunConfig, run: Path, out: Path, which: str) -> str:
    weights = policy_weights(run / "checkpoints", config.best_window if which == "best" else None)
    policy = load_configured_backbone(config.model_copy(update={"device": "cpu"}))
    if not isinstance(policy, DiffusersFolder):
        raise UserError(f"backbone {config.backbone.name!r} is not a diffusers model, so there is nothing to export")
    lora = policy.settings.train == "lora"
    about = json.dumps(_about(config, run, which, weights), indent=2) + "\n"

    def write(folder: Path) -> None:
        (_write_lora if lora else _write_pipeline)(policy, folder)
        (folder / ABOUT).write_text(about, encoding="utf-8")

    with temporarily_set(list(policy.parameters()), weights.in_order(policy.trainable())):
        fill(out, write, last=ABOUT)
    variants = {v for name, v in policy.parts.variants.items() if v and name != "transformer"}
    named = "".join(f', variant="{variant}"' for variant in variants)
    opened = f'pipeline.load_lora_weights("{out}")' if lora else f'DiffusionPipeline.from_pretrained("{out}"{named})'
    return f"wrote {out} ({weights.kind} weights of iteration {weights.iteration}); in Python: {opened}"


def _write_lora(policy: DiffusersFolder, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    o = policy.settings
    layers = {
        name: value * (o.lora_alpha / o.lora_rank) if ".lora_B." in name else value
        for name, value in get_peft_model_state_dict(policy.trainable()).items()
    }
    policy.pipeline.save_lora_weights(folder, transformer_lora_layers=layers, safe_serialization=True)


def _write_pipeline(policy: DiffusersFolder, folder: Path) -> None:
    source = policy.folder
    for name, opened in policy.parts.classes.items():
        if name != "transformer" and opened:
            shutil.copytree(source / name, folder / name)
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    policy.pipeline.transformer.save_pretrained(folder / "transformer", safe_serialization=True)


def _about(config: RunConfig, run: Path, which: str, weights: PolicyWeights) -> dict[str, Any]:
    return {
        "run": run.resolve().name,
        "iteration": weights.iteration,
        "which": which,
        "weights": weights.kind,
        "alignbench": __version__,
        "config": config.resolved(),
    }
