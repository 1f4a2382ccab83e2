"""The facts that hold for every family of diffusers folders, tested against the family's own pipeline.

The test of a family is a class that derives from `FamilyFacts` and has a `family`.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import load_backbone, load_objective, load_sampler, rollout, run
from alignbench.backbone import temporarily_set
from alignbench.backbones.diffusers_folder import DiffusersFolder
from alignbench.forecast.expected_rows import ExpectedRows
from alignbench.forecast.memory import estimate_memory
from alignbench.load import load_configured_backbone
from alignbench.rollouts.executor import predict, sample
from alignbench.rollouts.noise import group_keys, normal
from alignbench.training.checkpoint import policy_weights
from alignbench.training.engine import RATIO_TOLERANCE, backward
from alignbench.training.exporting import export
from tests.support.allocation import most_allocated
from tests.support.pipelines import save_pipeline
from tests.support.plugins import toy_config, write_task

PROMPTS = ['the word "TULIP" in red', "a blue square"]
STEPS = 4
KINDS = ("grpo", "dpo", "nft", "tmpo")
"""An objective on path densities, on pairs of final images, with a behaviour policy of its own, and on whole paths."""
Call = dict[str, Any]


def the_same(latents: Tensor) -> Tensor:
    return latents


@dataclass(frozen=True)
class Family:
    """How the call of a family's pipeline differs from those of others.

    Attributes:
        name: its name in `tests.support.pipelines`.
        guided: arguments of a call for our guidance; guidance 1 is none.
        layout: our latents as the call takes them.
        unlayout: the transformer's output as our velocity.
        final: our final latents as the call returns them (`output_type="latent"`).
        own: further arguments of each call.
        embedded: whether guidance is an input of the transformer.
        drawn: the images, or final latents, in what a call returns.
        as_images: settings with which the family draws images, for those that draw clips.
    """

    name: str
    guided: Callable[[float], Call]
    layout: Callable[[Tensor], Tensor] = the_same
    unlayout: Callable[[Any], Tensor] = the_same
    final: Callable[[DiffusersFolder, Tensor], Tensor] = lambda policy, latents: latents
    own: Mapping[str, Any] = field(default_factory=dict)
    embedded: bool = False
    drawn: Callable[[Any], Any] = lambda output: output.images
    as_images: Mapping[str, Any] = field(default_factory=dict)

    def saved(self, folder: Path, **scheduler: Any) -> Path:
        return save_pipeline(self.name, folder, **scheduler)

    def draw(self, pipeline: Any, policy: DiffusersFolder, guidance: float, output: str) -> Any:
        """Calls the pipeline with the noise that `sample` draws with seed 5."""
        call = {
            "latents": self.layout(noise(policy)),
            "num_inference_steps": STEPS,
            "height": policy.call["height"],
            "width": policy.call["width"],
            "max_sequence_length": policy.call["max_sequence_length"],
            "output_type": output,
        }
        return self.drawn(pipeline(prompt=list(PROMPTS), **call, **self.guided(guidance), **self.own))


def noise(policy: DiffusersFolder) -> Tensor:
    return normal([("evaluation", 5, *key, 0) for key in group_keys(PROMPTS)], policy.latent_shape)


def opened(folder: Path, **settings: Any) -> DiffusersFolder:
    backbone = load_backbone(str(folder), device="cpu", **settings)
    assert isinstance(backbone, DiffusersFolder)
    return backbone


def pipeline(folder: Path) -> Any:
    made = diffusers.DiffusionPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def velocities(policy: DiffusersFolder, prompts: list[str] = PROMPTS) -> Tensor:
    x = normal([("x", i) for i in range(3)], policy.latent_shape)
    with torch.no_grad():
        return policy.velocity(x, torch.tensor([0.9, 0.5, 0.1]), policy.encode(prompts), torch.tensor([0, 1, 1]))


def check_draws_alike(family: Family, folder: Path, guidance: float) -> None:
    """Our deterministic sampling equals the pipeline's call, in latents and in grey levels."""
    policy = opened(folder, guidance=guidance)
    own, ours = pipeline(folder), sample(policy, PROMPTS, 1, STEPS, seed=5)
    theirs = family.draw(own, policy, guidance, "latent")
    found = family.final(policy, ours)
    # float32 sums in another order, over four steps; values are of order 1 to 5.
    assert torch.allclose(found, theirs, atol=1e-4)
    assert (theirs[0] - theirs[1]).abs().max() > 1e-2
    images = np.round(family.draw(own, policy, guidance, "np") * 255)
    assert (len(images), *images.shape[-3:]) == (2, policy.call["height"], policy.call["width"], 3)
    decoded = policy.decode(ours)
    assert images.shape == decoded.shape
    # One grey level is the rounding of either side.
    assert np.abs(images - decoded).max() <= 1


def check_guidance_matters(folder: Path) -> None:
    weak, strong = (velocities(opened(folder, guidance=g)) for g in (1.0, 6.0))
    assert (weak - strong).abs().max() > 1e-3


def check_velocity_is_one_call(family: Family, folder: Path) -> None:
    """At each state of the pipeline's own call, our velocity equals the output of its transformer."""
    policy, own = opened(folder, guidance=1.0), pipeline(folder)
    answers: list[Tensor] = []
    hook = own.transformer.register_forward_hook(lambda module, given, out: answers.append(family.unlayout(out[0])))
    family.draw(own, policy, 1.0, "latent")
    hook.remove()
    assert len(answers) == STEPS
    x, sigmas, conditioning = noise(policy), policy.sigmas(STEPS), policy.encode(PROMPTS)
    for i, answer in enumerate(answers):
        with torch.no_grad():
            found = policy.velocity(x, sigmas[i].expand(2), conditioning, torch.arange(2))
        assert torch.allclose(found, answer, atol=1e-4)
        x = x + (sigmas[i + 1] - sigmas[i]) * answer


def check_rows_are_independent(folder: Path) -> None:
    """A row's velocity depends neither on other rows nor on the other prompts."""
    policy = opened(folder, guidance=3.0)
    together = velocities(policy, [PROMPTS[0], "a very much longer prompt than the others"])
    x = normal([("x", i) for i in range(3)], policy.latent_shape)[:1]
    with torch.no_grad():
        alone = policy.velocity(x, torch.tensor([0.9]), policy.encode(PROMPTS[:1]), torch.tensor([0]))
    # float32 sums over another number of padded tokens.
    assert torch.allclose(together[:1], alone, atol=1e-5)


def check_half_precision(folder: Path) -> None:
    full, half = (opened(folder, precision=p, guidance=1.0) for p in ("fp32", "bf16"))
    found = velocities(half)
    assert found.dtype == torch.float32
    assert half.trainable().dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    # bfloat16 has eight bits; the deep language model and the transformer add up roundings to some tenths of the norm.
    assert (found - velocities(full)).norm() / found.norm() < 0.3
    mixed, whole = (opened(folder, train="full", precision=p, guidance=1.0) for p in ("bf16", "fp32"))
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    found = velocities(mixed)
    assert found.dtype == torch.float32
    assert 1e-4 < (found - velocities(whole)).norm() / found.norm() < 0.1  # only the transformer rounds


def check_memory(folder: Path, place: Path, tolerance: float, **settings: Any) -> None:
    """A dry run's estimate is what torch's allocator gives to a training pass."""
    real, on_meta = (load_backbone(str(folder), device=device, guidance=2.0, **settings) for device in ("cpu", "meta"))
    prompt = "a " * 300  # as long as the longest text, which the estimate counts
    told = estimate_memory(toy_config(write_task(place)), on_meta, prompt, ExpectedRows(4, 3, 3, 3, 4, 4)).training
    # Kernels have work space of their own, and some write in place what is told as two tensors.
    assert told == pytest.approx(most_allocated(real, prompt, 3), rel=tolerance)
    assert told > 1_000_000


def check_resume(folder: Path, place: Path) -> None:
    """A run that was interrupted and resumed ends with the bits of one that was not."""
    settings: dict[str, Any] = {
        "backbone": {"name": str(folder), "lora_rank": 2},
        "guidance": 2.0,
        "iterations": 2,
        "evaluation": {"prompts": 2, "steps": 2},
    }
    broken = place / "broken"
    broken.mkdir()
    run(toy_config(write_task(place), **settings), place / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(toy_config(write_task(broken, "Interrupting"), **settings), broken / "run")
    run(toy_config(write_task(broken), **settings), broken / "run", resume=True)
    policy = opened(folder, lora_rank=2)
    ends = (policy_weights(at / "checkpoints").in_order(policy.trainable()) for at in (place / "whole", broken / "run"))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def check_config_files_are_enough(folder: Path, bare: Path, train: str) -> None:
    """On the device meta, a folder without weights has the parameters and shapes of the complete one."""
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer.json"))
    real, on_meta = (
        opened(folder, train=train, guidance=2.0),
        load_backbone(str(bare), device="meta", train=train, guidance=2.0),
    )
    assert isinstance(on_meta, DiffusersFolder)
    shapes = [
        {f"{part}.{name}": p.shape for part, c in policy.components().items() for name, p in c.module.named_parameters()}
        for policy in (real, on_meta)
    ]
    assert shapes[0] == shapes[1]
    states = [policy.encode(PROMPTS).prompts.states.shape for policy in (real, on_meta)]
    assert (states[0][0], states[0][2]) == (states[1][0], states[1][2])
    assert states[0][1] <= states[1][1]  # real texts may be shorter than the longest
    x = torch.zeros(2, *on_meta.latent_shape, device="meta")
    answer = predict(on_meta, x, 0.5, on_meta.encode(PROMPTS), torch.tensor([0, 1], device="meta"))
    assert answer.shape == (2, *real.latent_shape)
    assert on_meta.decode(x).shape == real.decode(torch.zeros(2, *real.latent_shape)).shape


def check_images_encode(family: Family, folder: Path) -> None:
    """Encoded images are decoded to the autoencoder's own reconstruction."""
    policy = opened(folder, **family.as_images)
    images = policy.decode(normal([("z", i) for i in range(3)], policy.latent_shape))
    latents = policy.encode_images(list(images))
    assert latents.shape == (3, *policy.latent_shape)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = policy.pipeline.vae
    video = any(parameter.ndim == 5 for parameter in vae.parameters())
    with torch.no_grad():
        expected = vae(pixels[:, :, None] if video else pixels, return_dict=False)[0].reshape(pixels.shape)
    found = torch.from_numpy(policy.decode(latents)).permute(0, 3, 1, 2).float()
    assert (found - ((expected / 2 + 0.5).clamp(0, 1) * 255)).abs().max() <= 1  # rounding to grey levels


def check_training(folder: Path, place: Path, objective: str) -> None:
    """Two iterations train the LoRA, and the first importance ratio is 1."""
    backbone = {"name": str(folder), "lora_rank": 2, "gradient_checkpointing": True}
    config = toy_config(
        write_task(place),
        backbone=backbone,
        objective=objective,
        guidance=2.0,
        iterations=2,
        evaluation={"prompts": 2, "steps": 2},
    )
    done = run(config, place / "run")
    assert done.protocol.guidance == 2.0
    assert (done.checks.get("first_update_ratio_abs_dev_max") or 0.0) < RATIO_TOLERANCE[torch.float32]
    weights = policy_weights(place / "run" / "checkpoints")
    policy = load_configured_backbone(config)
    fresh = [p.detach().clone() for p in policy.parameters()]
    trained = weights.in_order(policy.trainable())
    assert any(not torch.equal(a, b) for a, b in zip(fresh, trained, strict=True))


def check_gradient(folder: Path, idle: tuple[str, ...]) -> None:
    """Gradients reach every matrix of the LoRA except those with the given prefixes, and do not depend on microbatches."""
    torch.manual_seed(0)
    policy = opened(folder, guidance=2.0, lora_rank=2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plan = load_sampler("independent", steps=3, group_size=2).plan(0, np.random.default_rng(0))
    forest = rollout(policy, PROMPTS, plan, 0)
    forest.rewards = torch.arange(4.0)
    found = []
    for micro_batch in (None, 3):
        policy.trainable().zero_grad()
        backward(policy, load_objective("grpo"), forest, micro_batch=micro_batch)
        for name, parameter in policy.trainable().named_parameters():
            if parameter.requires_grad and not name.startswith(idle):
                assert parameter.grad is not None, name
                assert parameter.grad.norm() > 0, name
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()


def check_export(family: Family, folder: Path, place: Path) -> None:
    """An exported LoRA draws the same in plain diffusers."""
    backbone = {"name": str(folder), "lora_rank": 4, "lora_alpha": 6.0}
    evaluation = {"prompts": 2, "steps": 2}
    config = toy_config(
        write_task(place), backbone=backbone, guidance=2.0, iterations=2, optimizer={"lr": 0.05}, evaluation=evaluation
    )
    run(config, place / "run")
    export(config, place / "run", place / "lora")
    policy = load_configured_backbone(config)
    assert isinstance(policy, DiffusersFolder)
    base = sample(policy, PROMPTS, 1, STEPS, seed=5)
    weights = policy_weights(place / "run" / "checkpoints").in_order(policy.trainable())
    with temporarily_set(list(policy.parameters()), weights):
        ours = sample(policy, PROMPTS, 1, STEPS, seed=5)
    plain = pipeline(folder)
    plain.load_lora_weights(place / "lora")
    theirs = family.draw(plain, policy, 2.0, "latent")
    assert (ours - base).abs().max() > 0.05
    # float32 sums in another order, over four steps, beside a LoRA that moved them far.
    assert torch.allclose(family.final(policy, ours), theirs, atol=1e-3)


def adapted_ends(policy: DiffusersFolder) -> set[str]:
    """Ends of the names of the modules that got a LoRA, without the number and the name of their block."""
    names = [name for name, module in policy.trainable().named_modules() if hasattr(module, "lora_A")]
    return {name.split(".", 2)[-1] for name in names}


class FamilyFacts:
    """The tests of each family. A subclass sets `family`."""

    family: Family
    idle: tuple[str, ...] = ()
    """Beginnings of the names of layers whose output nothing reads."""
    memory_tolerance = 0.05

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return self.family.saved(tmp_path_factory.mktemp(self.family.name))

    @pytest.mark.parametrize("guidance", [1.0, 2.0])
    def test_our_ode_draws_what_the_pipeline_draws(self, folder: Path, guidance: float) -> None:
        check_draws_alike(self.family, folder, guidance)

    def test_our_velocity_is_one_call_of_the_transformer(self, folder: Path) -> None:
        check_velocity_is_one_call(self.family, folder)

    def test_guidance_changes_the_velocity(self, folder: Path) -> None:
        check_guidance_matters(folder)

    def test_a_row_does_not_depend_on_the_others(self, folder: Path) -> None:
        check_rows_are_independent(folder)

    def test_half_precision_is_near_to_the_full_one(self, folder: Path) -> None:
        check_half_precision(folder)

    @pytest.mark.parametrize("train", ["lora", "full"])
    def test_config_files_are_enough_for_a_dry_run(self, folder: Path, tmp_path: Path, train: str) -> None:
        check_config_files_are_enough(folder, tmp_path / "bare", train)

    def test_images_encode_to_what_decodes_to_their_reconstruction(self, folder: Path) -> None:
        check_images_encode(self.family, folder)

    @pytest.mark.parametrize("objective", KINDS)
    def test_every_kind_of_objective_trains_the_lora(self, folder: Path, tmp_path: Path, objective: str) -> None:
        check_training(folder, tmp_path, objective)

    def test_a_resumed_run_has_the_bits_of_a_whole_one(self, folder: Path, tmp_path: Path) -> None:
        check_resume(folder, tmp_path)

    @pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
    def test_the_memory_of_a_dry_run_is_what_the_allocator_gives(
        self, folder: Path, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        check_memory(folder, tmp_path, self.memory_tolerance, **settings)

    def test_gradients_reach_every_matrix_of_the_lora(self, folder: Path) -> None:
        check_gradient(folder, self.idle)

    def test_an_exported_lora_draws_the_same_in_plain_diffusers(self, folder: Path, tmp_path: Path) -> None:
        check_export(self.family, folder, tmp_path)
