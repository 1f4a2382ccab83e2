"""Runs whose weights are spread over several processes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from alignbench import load_objective
from alignbench.config.run_config import RunConfig, load_config
from alignbench.load import load_configured_backbone
from alignbench.rollouts.executor import rollout
from alignbench.runtime.processes import SINGLE_PROCESS, Processes, full_tensor, join
from alignbench.training import engine
from tests.support.pipelines import SIDE, save_pipeline, with_short_texts
from tests.support.plugins import write_task
from tests.support.same_runs import CALM, ROUNDING, assert_same_but_for_rounding, weights
from tests.support.together import ended, runs, started
from tests.support.toys import tree

TRAININGS = [("sd3", "lora"), ("flux", "full")]  # both families, and both kinds of training


@pytest.mark.parametrize(("family", "train"), TRAININGS)
def test_sharded_weights_give_the_same_run_and_resume(tmp_path: Path, family: str, train: str) -> None:
    folder = with_short_texts(save_pipeline(family, tmp_path / family))
    configs = {name: small_config(folder, train, sharded=name == "sharded") for name in ("whole", "sharded")}
    jobs = [(config, tmp_path / name) for name, config in configs.items()]
    assert ended(started(2, runs, jobs, said=tmp_path / "said")) == [0, 0]
    assert_same_but_for_rounding(tmp_path / "whole", tmp_path / "sharded")
    for name in ("ema", "optimizer", "reference"):
        kept, spread = (weights(tmp_path / out, name) for out in ("whole", "sharded"))
        assert kept.keys() == spread.keys() != set()
        for key, tensor in kept.items():
            torch.testing.assert_close(spread[key], tensor, rtol=0, atol=ROUNDING)
    interrupted = tmp_path / "interrupted"
    shutil.copytree(tmp_path / "sharded", interrupted)
    (interrupted / "result.json").unlink()
    shutil.rmtree(interrupted / "checkpoints" / "iteration-2")
    assert ended(started(2, runs, [(configs["sharded"], interrupted)], said=tmp_path / "said")) == [0, 0]
    for key, tensor in weights(tmp_path / "sharded").items():
        assert torch.equal(weights(interrupted)[key], tensor)


@pytest.mark.parametrize(("family", "train"), TRAININGS)
def test_sharded_each_process_holds_half_of_the_weights_and_finds_the_gradient(tmp_path: Path, family: str, train: str) -> None:
    config = small_config(with_short_texts(save_pipeline(family, tmp_path / family)), train, sharded=True)
    assert ended(started(2, sharding, config, tmp_path, said=tmp_path / "said")) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    part = "frozen" if train == "lora" else "trained"  # what is trained beside frozen weights stays whole
    assert first[part] + second[part] == first[f"{part}_before"]
    assert second[part] > 0.4 * first[f"{part}_before"]  # an odd row is the first one's
    for found in (first, second):
        assert train == "full" or found["trained"] == found["trained_before"] > 0
        assert found["gradient"] > 0
        assert found["off"] < 1e-5 * found["gradient"]


def small_config(folder: Path, train: str, sharded: bool) -> RunConfig:
    options = {
        "backbone": {"name": str(folder), "train": train, "lora_rank": 2, "resolution": SIDE},
        "objective": {"name": "grpo", "kl_beta": 0.1},
        "sampler": {"name": "fixed_tree", "steps": 4, "levels": 2, "children": 2, "splits": [1, 2]},
        "task": str(write_task(folder.parent)),
        "iterations": 2,
        "prompts_per_iteration": 2,
        "optimizer": {**CALM, "max_grad_norm": 0.01},
        "ema": {"decay": 0.9, "every": 1},
        "reference_refresh": 1,
        "checkpoint_every": 1,
        "evaluation": {"prompts": 3, "images_per_prompt": 2, "steps": 3},
        "threads": 1,
        "save_images": False,
        "sharded": sharded,
    }
    return load_config(preset="smoke", options=options)


def sharding(config: RunConfig, folder: Path) -> None:
    """Writes how many numbers of the transformer this process holds, and how far the gradient is from that of one process."""
    processes = join(torch.device("cpu"), sharded=True)
    policy = load_configured_backbone(config)
    objective = load_objective("grpo", kl_beta=1.0)
    forest = rollout(policy, ["a"], tree(4, [1, 2], children=2), 0)
    forest.rewards = torch.tensor([0.0, 1.0, 0.5, 0.2])

    def held(trained: bool) -> int:
        parameters = [p for p in policy.trainable().parameters() if p.requires_grad == trained]
        return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)

    def gradient(among: Processes) -> Tensor:
        for parameter in policy.parameters():
            parameter.grad = None
        # Three rows, one in a call: the first process has one of them, and a call without any.
        engine.backward(policy, objective, forest, micro_batch=1, processes=among)
        return torch.cat([full_tensor(p.grad).flatten() for p in policy.parameters() if p.grad is not None])

    found: dict[str, Any] = {"frozen_before": held(False), "trained_before": held(True)}
    alone = gradient(SINGLE_PROCESS)
    policy.shard()
    off = (gradient(processes) - alone).abs().max()
    found |= {"frozen": held(False), "trained": held(True), "gradient": float(alone.abs().max()), "off": float(off)}
    (folder / f"{processes.rank}.json").write_text(json.dumps(found))
