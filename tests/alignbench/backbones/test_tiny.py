"""The embedded model, as `alignbench` and as plain diffusers open it."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from alignbench import load_backbone, load_objective, load_sampler, rollout
from alignbench.backbones.diffusers_folder import DiffusersFolder
from alignbench.backbones.tiny import FOLDER
from alignbench.embedded.networks import letter_tokenizer, word_tokenizer
from alignbench.rollouts.executor import sample
from alignbench.rollouts.noise import group_keys, normal
from alignbench.training.engine import backward

PROMPTS = ['the word "TULIP" in red', "a blue square"]
MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def tiny() -> DiffusersFolder:
    backbone = load_backbone("tiny", device="cpu")
    assert isinstance(backbone, DiffusersFolder)
    return backbone


def test_the_folder_is_small() -> None:
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= MAX_BYTES


def test_no_config_names_a_place_on_the_machine_that_made_it() -> None:
    configs = [json.loads(file.read_text()) for file in FOLDER.rglob("*config.json")]
    assert len(configs) > 5
    assert not [value for config in configs for value in config.values() if isinstance(value, str) and value.startswith("/")]


def test_it_is_written_so_that_transformers_4_opens_it_too() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert {index[name][1] for name in ("tokenizer", "tokenizer_2", "tokenizer_3")} == {"PreTrainedTokenizerFast"}
    assert json.loads((FOLDER / "text_encoder_3" / "config.json").read_text())["num_layers"] == 1


@pytest.mark.parametrize("without", [{}, {"text_encoder_3": None, "tokenizer_3": None}])
def test_plain_diffusers_opens_it_and_draws_what_our_ode_draws(tiny: DiffusersFolder, without: dict[str, Any]) -> None:
    call = json.loads((FOLDER / "alignbench.json").read_text())["call"]
    pipeline = StableDiffusion3Pipeline.from_pretrained(FOLDER, **without)
    pipeline.set_progress_bar_config(disable=True)
    steps, seed = 6, 5
    # The pipeline's own schedule ends at sigma 0.001; ours is equally spaced down to 0.
    t = [1 - i / steps for i in range(steps)]
    noise = normal([("evaluation", seed, *key, 0) for key in group_keys(PROMPTS)], tiny.latent_shape)
    theirs = pipeline(PROMPTS, latents=noise, **{**call, "num_inference_steps": steps}, sigmas=t, output_type="np").images
    ours = tiny.decode(sample(tiny, PROMPTS, 1, steps, seed))
    # One grey level is the rounding of either side.
    assert np.abs(np.round(theirs * 255) - ours).max() <= 1


def test_guidance_leads_from_the_empty_prompts_answer_past_the_prompts_own(tiny: DiffusersFolder) -> None:
    plain, guided = (load_backbone("tiny", device="cpu", guidance=g) for g in (1.0, 3.0))
    x, sigma, group = torch.randn(2, *tiny.latent_shape), torch.tensor([0.9, 0.4]), torch.tensor([0, 1])
    with torch.no_grad():
        with_text = plain.velocity(x, sigma, plain.encode(PROMPTS), group)
        without = plain.velocity(x, sigma, plain.encode(["", ""]), group)
        found = guided.velocity(x, sigma, guided.encode(PROMPTS), group)
    # One batch of four and two of two differ in the order of float32 sums.
    assert torch.allclose(found, 3 * with_text - 2 * without, atol=1e-4)


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("name", ["tmpo", "grpo"])
@pytest.mark.parametrize("micro_batch", [1, 3, None])
def test_the_first_update_starts_at_ratio_one_and_the_reference_stays(train: str, name: str, micro_batch: int | None) -> None:
    policy = load_backbone("tiny", device="cpu", train=train)
    plan = load_sampler("fixed_tree", steps=4, levels=2, splits=(0, 1), children=2, first_split=0).plan(
        0, np.random.default_rng(0)
    )
    forest = rollout(policy, PROMPTS[:1], plan, 0)
    forest.rewards = torch.arange(4.0)
    found = backward(policy, load_objective(name), forest, micro_batch=micro_batch)
    assert (torch.exp(found.terms["log_prob"] - forest.old_log_prob) - 1).abs().max() < 1e-5
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in gradients) > 0
    x, sigma, group = forest.states[:1], torch.tensor([0.5]), torch.tensor([0])
    with torch.no_grad():
        conditioning = policy.encode(PROMPTS[:1])
        before = policy.velocity(x, sigma, conditioning, group)
        for parameter in policy.parameters():
            parameter.add_(0.05)
        moved = policy.velocity(x, sigma, conditioning, group)
        with policy.reference():
            reference = policy.velocity(x, sigma, conditioning, group)
    assert (moved - before).abs().max() > 1e-3
    assert torch.allclose(reference, before, atol=1e-5)


def test_known_words_are_tokens_and_others_are_spelt() -> None:
    words = word_tokenizer()
    assert words.convert_ids_to_tokens(words("a red zebra").input_ids) == [
        "<bos>", "a", "red", "z", "##e", "##b", "##r", "##a", "<eos>",
    ]  # fmt: skip


def test_letters_are_those_of_the_first_quoted_text() -> None:
    letters = letter_tokenizer()
    spelt = letters.convert_ids_to_tokens(letters('say "Dog" and "CAT"').input_ids)
    assert spelt == ["<bos>", "d", "o", "g", "<eos>"]
    assert letters.convert_ids_to_tokens(letters("three stars").input_ids) == ["<bos>", "<eos>"]
