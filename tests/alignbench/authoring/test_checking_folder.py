"""What `check --backbone DIR` says about a model's folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignbench import load_backbone
from alignbench.authoring.checking import CheckResult, Subject
from alignbench.authoring.checking_folder import run_checks
from alignbench.backbones.diffusers_folder import DiffusersFolder
from tests.support.command_line import in_this_process
from tests.support.pipelines import MAKERS, SIDE, TEXT_TOKENS, save_pipeline

PROMPTS = ("a red circle", "a very much longer prompt than the other")


def opened(family: str, folder: Path, **settings: Any) -> DiffusersFolder:
    # SD3 and FLUX have no sizes of their own in their folders.
    size = {} if family in TEXT_TOKENS else {"resolution": SIDE}
    policy = load_backbone(str(save_pipeline(family, folder)), device="cpu", lora_rank=2, guidance=2.0, **size, **settings)
    assert isinstance(policy, DiffusersFolder)
    return policy


def checked(policy: DiffusersFolder) -> dict[str, CheckResult]:
    subject: Any = Subject(objective=None, sampler=None, policy=policy, prompts=PROMPTS)  # type: ignore[arg-type]
    return {result.name: result for result in run_checks(subject)}


@pytest.mark.parametrize("family", MAKERS)
def test_everything_holds_for_every_family(tmp_path: Path, family: str) -> None:
    found = checked(opened(family, tmp_path / family))
    assert {name: result.holds for name, result in found.items()} == dict.fromkeys(found, True), found
    assert len(found) == 5


def test_a_velocity_that_is_not_the_pipelines_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = opened("z_image", tmp_path / "z")
    original = policy.answer  # type: ignore[attr-defined]
    monkeypatch.setattr(policy, "answer", lambda *a: -original(*a))
    found = checked(policy)["same as the pipeline"]
    assert found.failed
    assert "mean difference" in found.detail


def test_rows_that_depend_on_each_other_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = opened("sana", tmp_path / "sana")
    original = policy.velocity

    def mixed(x: Tensor, *others: Any) -> Tensor:
        velocity = original(x, *others)
        return velocity + velocity.mean(0)

    monkeypatch.setattr(policy, "velocity", mixed)
    assert checked(policy)["rows are independent"].failed


def test_a_reference_that_follows_the_policy_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = opened("flux2_klein", tmp_path / "klein")

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    monkeypatch.setattr(policy, "reference", nothing)
    assert checked(policy)["reference"].failed


def test_blocks_that_get_no_gradient_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = opened("z_image", tmp_path / "z")
    monkeypatch.setattr(policy.pipeline.transformer.layers[1], "forward", lambda x, *others: x)
    found = checked(policy)["gradients reach all blocks"]
    assert found.failed
    assert found.detail.endswith("blocks, not layers.1")


def test_checking_leaves_the_policy_as_it_was(tmp_path: Path) -> None:
    policy = opened("sana", tmp_path / "sana")
    before = [p.detach().clone() for p in policy.parameters()]
    checked(policy)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_the_command_checks_a_folder_beside_the_pair(tmp_path: Path) -> None:
    folder = save_pipeline("sana", tmp_path / "sana")
    pair = ["--objective", "grpo", "--sampler", "independent", "--iterations", "0", "--set", "sampler.steps=3"]
    done = in_this_process("check", "--backbone", str(folder), *pair, "--set", "guidance=2", "--json")
    names = {result["name"]: result["holds"] for result in json.loads(done.stdout)}
    assert names["same as the pipeline"] is True
    assert names["first ratio is 1"] is True
    assert done.returncode == 0, done.stdout
