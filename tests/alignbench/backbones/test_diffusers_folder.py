"""Both families through complete random pipelines: against diffusers' own, trained by everything, and what is refused."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from alignbench import UserError, load_backbone, load_objective, load_sampler, registry, rollout, run
from alignbench.backbone import temporarily_set
from alignbench.backbones.diffusers_folder import DiffusersFolder
from alignbench.backbones.flux import Flux, image_positions
from alignbench.backbones.pipelines.packing import pack, unpack
from alignbench.backbones.sd3 import SD3
from alignbench.config.run_config import load_config
from alignbench.evaluation.evaluate import MetricSuite, evaluate
from alignbench.load import load_configured_backbone
from alignbench.rollouts.executor import predict, sample
from alignbench.rollouts.noise import group_keys, normal
from alignbench.rollouts.terms import Velocities
from alignbench.runtime.live_bytes import LiveBytes
from alignbench.tasks import load_task
from alignbench.training.checkpoint import policy_weights
from alignbench.training.engine import RATIO_TOLERANCE, backward
from alignbench.training.exporting import export
from alignbench.training.trainer import Trainer
from tests.support.pairs import in_turn
from tests.support.pipelines import FAMILIES, SIDE, save_pipeline, with_short_texts
from tests.support.plugins import toy_config, write_task

PROMPTS = ['the word "TULIP" in red', "a blue square"]
STEPS = 4
OBJECTIVES = [name for name in registry.names("objectives") if name != "none"]
SAMPLERS: dict[str, dict[str, Any]] = {
    "independent": {"group_size": 4},
    "fixed_tree": {"levels": 2, "children": 2, "splits": [1, 2]},
    "dynamic_tree": {"levels": 2, "children": 2, "early": [1, 2], "late": [1, 2]},
    "sliding_window": {"group_size": 4, "window": 2},
    "flash": {"group_size": 4, "window": 2},
    "tree_window": {"levels": 2, "children": 2},
    "branch": {"levels": 2, "children": 2, "splits": [0, 2]},
    "trunk_tree": {"children": 2, "last_branch": 1},
    "granular": {"children": 4, "last_branch": 0},
}
SCHEDULE = "scheduler/scheduler_config.json"
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_pipeline(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def brief(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same folders, which encode short texts."""
    into = tmp_path_factory.mktemp("brief")
    return {family: with_short_texts(shutil.copytree(folder, into / family)) for family, folder in folders.items()}


def opened(folder: Path, **settings: Any) -> DiffusersFolder:
    # The guidance and text length of the pipelines' own calls would only make the tests slower.
    backbone = load_backbone(str(folder), **{"device": "cpu", "resolution": SIDE, **settings})
    assert isinstance(backbone, DiffusersFolder)
    backbone.call["max_sequence_length"] = 8
    return backbone


def pipeline(folder: Path, cls: str, dtype: torch.dtype = torch.float32) -> Any:
    made = getattr(diffusers, cls).from_pretrained(folder, torch_dtype=dtype)
    made.set_progress_bar_config(disable=True)
    return made


def velocities(policy: DiffusersFolder) -> Tensor:
    x = normal([("x", i) for i in range(3)], policy.latent_shape)
    with torch.no_grad():
        return policy.velocity(x, torch.tensor([0.9, 0.5, 0.1]), policy.encode(PROMPTS), torch.tensor([0, 1, 1]))


# --- the same as diffusers


@pytest.mark.parametrize(("guidance", "output"), [(None, "latent"), (None, "np"), (3.0, "latent")])
@every_family
def test_our_ode_draws_what_the_pipeline_draws_from_the_same_noise(
    folders: dict[str, Path], family: str, guidance: float | None, output: str
) -> None:
    policy = load_backbone(str(folders[family]), device="cpu", resolution=SIDE, guidance=guidance)
    assert isinstance(policy, DiffusersFolder)
    noise = normal([("evaluation", 5, *key, 0) for key in group_keys(PROMPTS)], policy.latent_shape)
    # Everything else is what a call takes where nothing is given. SD3's own schedule ends at a sigma above 0, since the shift
    # is applied to its end twice; ours is equally spaced before the shift, as FLUX's own is.
    own: dict[str, Any] = {} if family == "flux" else {"sigmas": [1 - i / STEPS for i in range(STEPS)]}
    if guidance is not None:
        own["guidance_scale"] = guidance
    theirs = pipeline(folders[family], policy.PIPELINE)(
        PROMPTS,
        latents=pack(noise) if family == "flux" else noise,
        num_inference_steps=STEPS,
        height=SIDE,
        width=SIDE,
        output_type=output,
        **own,
    ).images
    ours = sample(policy, PROMPTS, 1, STEPS, seed=5)
    if output == "latent":
        # float32 sums in another order, over four steps; values are of order 1 to 5.
        assert torch.allclose(pack(ours) if family == "flux" else ours, theirs, atol=1e-5)
        assert (theirs[0] - theirs[1]).abs().max() > 0.1
    else:
        # One grey level is the rounding of either side.
        assert np.abs(np.round(theirs * 255) - policy.decode(ours)).max() <= 1


SHIFTED = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}


@pytest.mark.parametrize(
    ("family", "options", "left_out"),
    [
        ("sd3", {"shift": 1.7}, ()),
        ("sd3", {}, ("shift",)),
        ("sd3", SHIFTED, ()),
        ("sd3", SHIFTED, ("base_shift", "time_shift_type", "base_image_seq_len")),
        ("flux", {"time_shift_type": "linear", "base_shift": 0.2}, ()),
        ("flux", {"shift_terminal": 0.02}, ()),
        ("sd3", {"shift_terminal": 0.1}, ()),
        ("flux", {"shift": 2.5}, ("use_dynamic_shifting",)),
        ("flux", {}, ("max_shift", "max_image_seq_len", "base_image_seq_len", "shift")),
    ],
)
def test_every_schedule_that_is_followed_draws_what_the_pipeline_draws(
    folders: dict[str, Path], tmp_path: Path, family: str, options: dict[str, Any], left_out: tuple[str, ...]
) -> None:
    """An option that the file leaves out is as diffusers has it."""
    folder = changed(folders[family], tmp_path / family, SCHEDULE, **options)
    kept = {key: value for key, value in json.loads((folder / SCHEDULE).read_text()).items() if key not in left_out}
    (folder / SCHEDULE).write_text(json.dumps(kept))
    policy = load_backbone(str(folder), device="cpu", resolution=SIDE, guidance=1.0)
    assert isinstance(policy, DiffusersFolder)
    noise = normal([("evaluation", 5, *key, 0) for key in group_keys(PROMPTS)], policy.latent_shape)
    layout = pack if family == "flux" else Tensor.clone
    own: dict[str, Any] = {} if family == "flux" else {"sigmas": [1 - i / STEPS for i in range(STEPS)]}
    size = {"num_inference_steps": STEPS, "height": SIDE, "width": SIDE, "guidance_scale": 1.0, "output_type": "latent"}
    theirs = pipeline(folder, policy.PIPELINE)(PROMPTS, latents=layout(noise), **size, **own).images
    # float32 sums in another order, over four steps; values are of order 1 to 5.
    assert torch.allclose(layout(sample(policy, PROMPTS, 1, STEPS, seed=5)), theirs, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_velocity_of_sd3_has_the_bits_of_its_transformers_answer(folders: dict[str, Path], guidance: float) -> None:
    policy = opened(folders["sd3"], guidance=guidance)
    x, sigma, group = normal([("x", i) for i in range(3)], policy.latent_shape), torch.tensor([0.9, 0.5, 0.1]), [0, 1, 1]
    encoded = policy.embed(policy._text_pipeline(), [*PROMPTS, ""] if guidance > 1 else PROMPTS)
    rows = [2] * 3 + group if guidance > 1 else group
    times = 2 if guidance > 1 else 1
    with torch.no_grad():
        found = policy.velocity(x, sigma, policy.encode(PROMPTS), torch.tensor(group))
        answer = policy.trainable()(
            hidden_states=torch.cat([x] * times),
            timestep=torch.cat([sigma] * times) * 1000,
            encoder_hidden_states=encoded.states[rows],
            pooled_projections=encoded.pooled[rows] if encoded.pooled is not None else None,
            return_dict=False,
        )[0]
    expected = answer if guidance == 1 else answer[:3] + guidance * (answer[3:] - answer[:3])
    assert torch.equal(found, expected)


def test_the_velocity_of_flux_has_the_bits_of_its_transformers_answer(folders: dict[str, Path]) -> None:
    policy = opened(folders["flux"], guidance=3.0)
    x, sigma, group = normal([("x", i) for i in range(3)], policy.latent_shape), torch.tensor([0.9, 0.5, 0.1]), [0, 1, 1]
    encoded = policy.embed(policy._text_pipeline(), PROMPTS)
    with torch.no_grad():
        found = policy.velocity(x, sigma, policy.encode(PROMPTS), torch.tensor(group))
        answer = policy.trainable()(
            hidden_states=pack(x),
            timestep=sigma,
            guidance=torch.full((3,), 3.0),
            encoder_hidden_states=encoded.states[group],
            pooled_projections=encoded.pooled[group] if encoded.pooled is not None else None,
            txt_ids=torch.zeros(encoded.states.shape[1], 3),
            img_ids=image_positions(4, 4),
            return_dict=False,
        )[0]
    assert torch.equal(found, unpack(answer, 8, 8))


def test_guidance_changes_what_each_family_answers(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        weak, strong = (velocities(opened(folder, guidance=g)) for g in (1.0, 6.0))
        assert (weak - strong).abs().max() > 1e-3


def since_a_rollout(folder: Path, guidance: float) -> tuple[DiffusersFolder, list[Tensor]]:
    """A policy that is neither the base model nor, in the second, what it was at a rollout; the same for each guidance."""
    torch.manual_seed(0)
    policy = opened(folder, guidance=guidance)
    generator = torch.Generator().manual_seed(1)
    old = [p.detach() + 0.05 * torch.randn(p.shape, generator=generator) for p in policy.parameters()]
    with torch.no_grad():
        for parameter, value in zip(policy.parameters(), old, strict=True):
            parameter.copy_(value + 0.02 * torch.randn(value.shape, generator=generator))
    return policy, old


def asked(policy: DiffusersFolder, old: list[Tensor], objective: Any, forest: Any) -> tuple[Any, Tensor]:
    """The terms from velocities that are asked for one by one, and the gradient of their loss."""
    rows = objective.rows(forest, 0)
    inputs = rows.x, rows.sigma, policy.encode(forest.prompts), rows.group
    with torch.no_grad():
        with policy.reference():
            reference = policy.velocity(*inputs) if objective.needs.reference else None
        with temporarily_set(list(policy.parameters()), old):
            before = policy.velocity(*inputs)
    terms = objective.terms(rows, Velocities(policy.velocity(*inputs), reference, before))
    gradients = torch.autograd.grad(objective.loss(terms, forest), list(policy.parameters()))
    return {name: value.detach() for name, value in terms.items()}, torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("objective", ["dpo", "raft", "nft", "awm", "dgpo", "ram", "crd"])
def test_losses_on_final_images_take_the_prompts_own_velocity_under_guidance(folders: dict[str, Path], objective: str) -> None:
    made = load_objective(objective)
    (guided, old), (plain, _) = (since_a_rollout(folders["sd3"], guidance) for guidance in (4.5, 1.0))
    plan = load_sampler("independent", steps=STEPS, group_size=3).plan(0.5, np.random.default_rng(0))
    forest = rollout(guided, PROMPTS, plan, seed=0)
    forest.rewards = torch.tensor([0.0, 1.0, 0.3, 0.2, 0.9, 0.5])
    found = backward(guided, made, forest, behaviour=old)
    gradient = torch.cat([p.grad.flatten() for p in guided.parameters() if p.grad is not None])
    terms, expected = asked(plain, old, made, forest)
    for name, value in terms.items():
        # float32: a batch of other rows is summed in another order.
        assert torch.allclose(found.terms[name], value, rtol=1e-4, atol=1e-5), name
    assert (gradient - expected).norm() < 1e-3 * expected.norm()
    wrong_terms, wrong = asked(guided, old, made, forest)
    assert max(float((wrong_terms[name] - value).abs().max() / value.abs().max()) for name, value in terms.items()) > 0.05
    assert (wrong - expected).norm() > 0.1 * expected.norm()
    # Without guidance there is nothing to take out: the same bits.
    for parameter in plain.parameters():
        parameter.grad = None
    same = backward(plain, made, forest, behaviour=old)
    assert all(torch.equal(same.terms[name], value) for name, value in terms.items())


def test_steps_of_a_rollout_keep_the_guidance_they_were_drawn_with(folders: dict[str, Path]) -> None:
    guided, _ = since_a_rollout(folders["sd3"], 4.5)
    plan = load_sampler("independent", steps=STEPS, group_size=3).plan(0.5, np.random.default_rng(0))
    forest = rollout(guided, PROMPTS, plan, seed=0)
    forest.rewards = torch.tensor([0.0, 1.0, 0.3, 0.2, 0.9, 0.5])
    found = backward(guided, load_objective("grpo"), forest).terms["log_prob"]
    assert (torch.exp(found - forest.old_log_prob) - 1).abs().max() < RATIO_TOLERANCE[torch.float32]


def test_an_embedded_guidance_is_an_input_of_the_network_and_stays(folders: dict[str, Path]) -> None:
    policy, old = since_a_rollout(folders["flux"], 4.5)
    conditioning = policy.encode(PROMPTS)
    assert policy.without_guidance(conditioning) is conditioning
    forest = rollout(
        policy, PROMPTS, load_sampler("independent", steps=STEPS, group_size=3).plan(0.5, np.random.default_rng(0)), 0
    )
    forest.rewards = torch.tensor([0.0, 1.0, 0.3, 0.2, 0.9, 0.5])
    found = backward(policy, load_objective("dpo"), forest)
    terms, _ = asked(policy, old, load_objective("dpo"), forest)
    assert all(torch.equal(found.terms[name], value) for name, value in terms.items())


@every_family
def test_half_precision_answers_in_float32_near_to_the_full_one(folders: dict[str, Path], family: str) -> None:
    full, half = (opened(folders[family], precision=p, guidance=1.0) for p in ("fp32", "bf16"))
    found = velocities(half)
    assert found.dtype == torch.float32
    assert half.trainable().dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    # bfloat16 has eight bits; errors of a few roundings a layer add up to some hundredths of the norm.
    assert (found - velocities(full)).norm() / found.norm() < 0.1


@every_family
def test_unscored_calls_alone_are_computed_in_bfloat16(folders: dict[str, Path], family: str) -> None:
    full, policy = (alike(folders[family], unscored_precision=p) for p in ("same", "bf16"))
    expected = velocities(full)
    assert torch.equal(velocities(policy), expected)
    with policy.unscored():
        found = velocities(policy)
    assert found.dtype == torch.float32
    # One rounding to eight bits is 2e-3 to 4e-3 of a number, and those of the layers add up.
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.1
    assert torch.equal(velocities(policy), expected)
    with full.unscored():
        assert torch.equal(velocities(full), expected)


@every_family
def test_with_unscored_calls_in_bfloat16_the_first_ratio_is_one(folders: dict[str, Path], family: str) -> None:
    policy = alike(folders[family], unscored_precision="bf16")
    plan = load_sampler("fixed_tree", steps=STEPS, levels=2, children=2, splits=(1, 2)).plan(0, np.random.default_rng(0))
    forest = rollout(policy, PROMPTS, plan, 0)
    exact = rollout(alike(folders[family]), PROMPTS, plan, 0)
    assert not torch.equal(forest.leaf_latents, exact.leaf_latents)
    forest.rewards = torch.arange(8.0)
    found = backward(policy, load_objective("grpo"), forest)
    assert float((torch.exp(found.terms["log_prob"] - forest.old_log_prob) - 1).abs().max()) < RATIO_TOLERANCE[torch.float32]


def test_auto_lowers_the_precision_where_bfloat16_is_fast(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in (True, False):
        monkeypatch.setattr("alignbench.runtime.hardware.has_fast_bfloat16", lambda device, fast=fast: fast)
        policy = alike(folders["sd3"], unscored_precision="auto")
        usual = velocities(policy)
        with policy.unscored():
            assert torch.equal(velocities(policy), usual) is not fast


def test_an_unscored_precision_beside_a_low_one_has_no_effect(folders: dict[str, Path]) -> None:
    policy = opened(folders["sd3"], precision="bf16", unscored_precision="bf16")
    assert policy.ineffective_settings() == {
        "unscored_precision": "precision=bf16 already computes everything in that precision"
    }
    usual = velocities(policy)
    with policy.unscored():
        assert torch.equal(velocities(policy), usual)


@every_family
def test_all_weights_are_trained_in_float32_with_half_arithmetic(folders: dict[str, Path], family: str) -> None:
    mixed = opened(folders[family], train="full", precision="bf16", guidance=1.0)
    found, full = velocities(mixed), velocities(opened(folders[family], train="full", guidance=1.0))
    assert found.dtype == torch.float32
    assert mixed.dtype == torch.bfloat16
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert 1e-4 < (found - full).norm() / full.norm() < 0.1
    found = gradients(mixed)
    assert found.dtype == torch.float32
    assert found.norm() > 0


@pytest.mark.parametrize(("family", "train"), [("sd3", "lora"), ("flux", "full")])
def test_a_compiled_transformer_answers_alike_and_keeps_its_names(
    folders: dict[str, Path], family: str, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inductor takes minutes; which graphs are made, and that they are the policy's, the eager backend shows as well.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, compiled = (alike(folders[family], train=train, compile=on) for on in (False, True))
    names = [name for name, _ in plain.trainable().named_parameters()]
    assert [name for name, _ in compiled.trainable().named_parameters()] == names
    # One call for answer and gradient, because each kind of call takes seconds to compile.
    (ours, gradient), (theirs, expected) = (answer_and_gradient(policy) for policy in (compiled, plain))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert gradient.norm() > 1e-3
    with compiled.reference():
        assert torch.allclose(velocities(compiled), velocities(opened(folders[family], guidance=1.0)), atol=1e-5)


def answer_and_gradient(policy: DiffusersFolder) -> tuple[Tensor, Tensor]:
    x = normal([("x", i) for i in range(3)], policy.latent_shape)
    found = policy.velocity(x, torch.tensor([0.9, 0.5, 0.1]), policy.encode(PROMPTS), torch.tensor([0, 1, 1]))
    of_squares = torch.autograd.grad(found.square().mean(), list(policy.parameters()), allow_unused=True)
    return found.detach(), torch.cat([gradient.flatten() for gradient in of_squares if gradient is not None])


def test_compiling_without_a_compiler_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "compile=true needs a C++ compiler" in refused(folders["sd3"], compile=True)


@every_family
def test_pictures_that_were_decoded_encode_to_latents_of_the_models_shape(folders: dict[str, Path], family: str) -> None:
    policy = opened(folders[family])
    pictures = policy.decode(normal([("z", i) for i in range(3)], policy.latent_shape))
    assert pictures.shape == (3, SIDE, SIDE, 3)
    vae = policy.pipeline.vae
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = (vae.encode(pixels).latent_dist.mean - 0.1) * 1.5
    assert torch.allclose(policy.encode_images(list(pictures)), expected, atol=1e-5)


@every_family
def test_decoding_keeps_no_graph(folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = opened(folders[family])
    decode, recorded = policy.vae_decode, []

    def noted(latents: torch.Tensor) -> torch.Tensor:
        recorded.append(torch.is_grad_enabled())
        return decode(latents)

    monkeypatch.setattr(policy, "vae_decode", noted)
    with torch.enable_grad():
        policy.decode(normal([("z", 0)], policy.latent_shape))
    assert recorded == [False]


@every_family
def test_decoding_in_slices_changes_nothing(folders: dict[str, Path], family: str) -> None:
    whole, sliced = (opened(folders[family], decode_batch=n) for n in (32, 2))
    latents = normal([("z", i) for i in range(5)], whole.latent_shape)
    # Other batch sizes may round a value to the next grey level.
    assert np.abs(whole.decode(latents).astype(int) - sliced.decode(latents)).max() <= 1


# --- FLUX's layout and schedule


def test_packing_goes_there_and_back_and_is_diffusers_own() -> None:
    latents = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    packed = pack(latents)
    assert packed.shape == (2, 6, 12)
    # The first token: the top left 2 x 2 latents of the first channel, then of the second.
    assert packed[0, 0, :8].tolist() == [0, 1, 6, 7, 24, 25, 30, 31]
    assert torch.equal(packed, diffusers.FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(unpack(packed, 4, 6), latents)


def test_tokens_stand_row_by_row() -> None:
    assert image_positions(2, 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    theirs = diffusers.FluxPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", torch.float32)
    assert torch.equal(image_positions(2, 3), theirs)


def test_the_shift_follows_the_pictures_tokens(folders: dict[str, Path]) -> None:
    # 16 tokens between 4 (mu 0.5) and 64 (mu 1.15): mu = 0.5 + 0.65 * 12 / 60 = 0.63; 64 tokens have mu = 1.15.
    assert opened(folders["flux"]).shift_of(STEPS) == pytest.approx(np.exp(0.63))
    assert opened(folders["flux"], resolution=32).shift_of(STEPS) == pytest.approx(np.exp(1.15))
    assert opened(folders["sd3"]).shift_of(STEPS) == 3.0


def test_a_linear_time_shift_is_mu_itself(tmp_path: Path) -> None:
    assert opened(save_pipeline("flux", tmp_path, time_shift_type="linear")).shift_of(STEPS) == pytest.approx(0.63)


def test_a_folder_without_dynamic_shifting_has_the_shift_it_names(tmp_path: Path) -> None:
    assert opened(save_pipeline("flux", tmp_path, use_dynamic_shifting=False, shift=1.0)).shift_of(STEPS) == 1.0


# --- training


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def policies(folders: dict[str, Path]) -> dict[str, DiffusersFolder]:
    return {family: opened(folder, guidance=2.0, lora_rank=2) for family, folder in folders.items()}


def test_all_samplers_are_tried() -> None:
    assert set(SAMPLERS) == set(registry.names("samplers"))


# Every pair on one family, and every objective and every sampler on the other: neither of them knows which it trains.
@pytest.mark.parametrize(
    ("family", "objective", "sampler"),
    [*(("sd3", o, s) for o in OBJECTIVES for s in SAMPLERS), *(("flux", o, s) for o, s in in_turn(OBJECTIVES, list(SAMPLERS)))],
)
def test_every_pair_takes_a_step_and_is_judged(
    policies: dict[str, DiffusersFolder], task: Path, family: str, objective: str, sampler: str
) -> None:
    policy, chosen = policies[family], load_task(str(task))
    config = load_config(
        preset="smoke",
        options={
            "objective": objective,
            "sampler": {"name": sampler, "steps": STEPS, **SAMPLERS[sampler]},
            "prompts_per_iteration": 2,
            "iterations": 1,
            "evaluation": {"prompts": 2, "images_per_prompt": 2, "steps": 2},
        },
    )
    made = load_objective(objective, **config.objective.settings), load_sampler(sampler, **config.sampler.settings)
    judges = MetricSuite(chosen)
    trainer = Trainer(config, chosen.train_prompts, policy, *made, judges)
    row = trainer.iterate()
    assert row["policy_update_norm"] > 0
    assert np.isfinite(row["loss"])
    assert row["ratio_abs_dev_max"] < RATIO_TOLERANCE[torch.float32]
    found = evaluate(policy, chosen, judges, config.evaluation)
    assert found.images.shape == (4, SIDE, SIDE, 3)
    assert np.isfinite(found.table.value).all()


@every_family
@pytest.mark.usefixtures("few_paths")
def test_a_run_on_a_folder_trains_it_and_goes_on_where_it_stopped(
    brief: dict[str, Path], task: Path, tmp_path: Path, family: str
) -> None:
    backbone = {"name": str(brief[family]), "resolution": SIDE, "lora_rank": 2, "gradient_checkpointing": True}
    settings: dict[str, Any] = {
        "backbone": backbone,
        "guidance": 2.0,
        "iterations": 2,
        "evaluation": {"prompts": 2, "steps": 2},
    }
    whole = run(toy_config(task, **settings), tmp_path / "whole")
    assert (whole.run.backbone, whole.protocol.guidance) == (str(brief[family]), 2.0)
    assert whole.checks["first_update_ratio_abs_dev_max"] == pytest.approx(0, abs=RATIO_TOLERANCE[torch.float32])
    with pytest.raises(KeyboardInterrupt):
        run(toy_config(write_task(tmp_path, "Interrupting"), **settings), tmp_path / "broken")
    config = toy_config(write_task(tmp_path), **settings)
    run(config, tmp_path / "broken", resume=True)
    weights = [
        load_file(tmp_path / name / "checkpoints" / "iteration-2" / "weights.safetensors") for name in ("whole", "broken")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all("lora" in name for name in weights[0])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@every_family
@pytest.mark.usefixtures("few_paths")
def test_an_exported_lora_draws_the_same_in_plain_diffusers(brief: dict[str, Path], tmp_path: Path, family: str) -> None:
    backbone = {"name": str(brief[family]), "resolution": SIDE, "lora_rank": 4, "lora_alpha": 6.0}
    evaluation = {"prompts": 2, "steps": 2}
    config = toy_config(
        write_task(tmp_path), backbone=backbone, guidance=2.0, iterations=2, optimizer={"lr": 0.1}, evaluation=evaluation
    )
    run(config, tmp_path / "run")
    export(config, tmp_path / "run", tmp_path / "lora")
    policy = load_configured_backbone(config)
    assert isinstance(policy, DiffusersFolder)
    base = sample(policy, PROMPTS, 1, STEPS, seed=5)
    with temporarily_set(
        list(policy.parameters()), policy_weights(tmp_path / "run" / "checkpoints").in_order(policy.trainable())
    ):
        ours = sample(policy, PROMPTS, 1, STEPS, seed=5)
    plain = pipeline(brief[family], policy.PIPELINE)
    plain.load_lora_weights(tmp_path / "lora")
    noise = normal([("evaluation", 5, *key, 0) for key in group_keys(PROMPTS)], policy.latent_shape)
    layout = pack if family == "flux" else Tensor.clone
    own: dict[str, Any] = {} if family == "flux" else {"sigmas": [1 - i / STEPS for i in range(STEPS)]}
    size = {"num_inference_steps": STEPS, "height": SIDE, "width": SIDE, "guidance_scale": 2.0, "output_type": "latent"}
    own["max_sequence_length"] = 8
    theirs = plain(PROMPTS, latents=layout(noise), **size, **own).images
    # float32 sums in another order, over four steps, beside a LoRA that moved them far.
    assert (ours - base).abs().max() > 0.1
    assert torch.allclose(layout(ours), theirs, atol=1e-4)


def gradients(policy: DiffusersFolder, micro_batch: int | None = None) -> Tensor:
    forest = rollout(policy, PROMPTS, load_sampler("independent", steps=3, group_size=2).plan(0, np.random.default_rng(0)), 0)
    forest.rewards = torch.arange(4.0)
    policy.trainable().zero_grad()
    backward(policy, load_objective("grpo"), forest, micro_batch=micro_batch)
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def moved(policy: DiffusersFolder) -> DiffusersFolder:
    """With a LoRA that does something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def alike(folder: Path, **settings: Any) -> DiffusersFolder:
    torch.manual_seed(0)
    return moved(opened(folder, guidance=1.0, lora_rank=2, **settings))


@pytest.mark.parametrize("micro_batch", [None, 3])
@every_family
def test_gradient_checkpointing_gives_the_same_gradient_and_keeps_less(
    folders: dict[str, Path], family: str, micro_batch: int | None
) -> None:
    plain, checkpointed = (alike(folders[family], gradient_checkpointing=on) for on in (False, True))
    expected = gradients(plain, micro_batch)
    assert expected.norm() > 0
    # The same operations on the same numbers.
    assert torch.allclose(gradients(checkpointed, micro_batch), expected, rtol=1e-5, atol=1e-8)
    kept = []
    for policy in (plain, checkpointed):
        x, conditioning = torch.zeros(2, *policy.latent_shape), policy.encode(PROMPTS)
        with LiveBytes(policy.device) as live:
            answer = predict(policy, x, 0.5, conditioning, torch.tensor([0, 1]))
            kept.append(live.now)
        del answer
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@every_family
def test_the_first_ratio_is_one_at_any_micro_batch(folders: dict[str, Path], family: str, precision: str) -> None:
    policy = alike(folders[family], precision=precision)
    plan = load_sampler("fixed_tree", steps=STEPS, levels=2, children=2, splits=(1, 2)).plan(0, np.random.default_rng(0))
    forest = rollout(policy, PROMPTS, plan, 0)
    assert forest.old_log_prob.dtype == torch.float32
    forest.rewards = torch.arange(8.0)
    for micro_batch in (1, 3, None):
        found = backward(policy, load_objective("grpo"), forest, micro_batch=micro_batch)
        ratio = torch.exp(found.terms["log_prob"] - forest.old_log_prob)
        assert float((ratio - 1).abs().max()) < RATIO_TOLERANCE[policy.dtype]


@every_family
def test_a_lora_starts_at_the_base_model_and_the_reference_stays_there(folders: dict[str, Path], family: str) -> None:
    policy = opened(folders[family])
    base = velocities(opened(folders[family], train="full"))
    assert torch.allclose(velocities(policy), base, atol=1e-5)
    moved(policy)
    assert (velocities(policy) - base).abs().max() > 1e-2
    with policy.reference():
        assert torch.allclose(velocities(policy), base, atol=1e-5)


@every_family
def test_trained_in_full_the_reference_is_a_copy_that_stays(folders: dict[str, Path], family: str) -> None:
    policy = opened(folders[family], train="full")
    base = velocities(policy)
    assert sum(p.numel() for p in policy.parameters()) == sum(p.numel() for p in policy.trainable().parameters())
    moved(policy)
    assert (velocities(policy) - base).abs().max() > 1e-2
    with policy.reference():
        assert torch.equal(velocities(policy), base)


@pytest.mark.parametrize(
    ("family", "ends", "rank", "alpha"),
    [
        ("sd3", {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}, 32, 64),
        (
            "flux",
            {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
            | {"ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"},
            64,
            128,
        ),
    ],
)
def test_a_lora_has_the_published_places_and_size(
    folders: dict[str, Path], family: str, ends: set[str], rank: int, alpha: int
) -> None:
    transformer = opened(folders[family]).trainable()
    adapted = {name: m for name, m in transformer.named_modules() if hasattr(m, "lora_A")}
    assert {end for end in ends for name in adapted if name.endswith("." + end)} == ends
    assert all(any(name.endswith("." + end) for end in ends) for name in adapted)
    # The scale of a LoRA is alpha over rank.
    assert {(m.r["default"], m.scaling["default"]) for m in adapted.values()} == {(rank, alpha / rank)}
    # Of the blocks with a text stream and of those without, none is left out.
    assert {name.split(".")[0] for name in adapted} == {
        name for name, _ in transformer.named_children() if name.endswith("transformer_blocks")
    }


# --- prompts


@every_family
def test_text_encoders_go_once_all_prompts_are_encoded_and_come_back_for_a_new_one(
    folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, released = opened(folders[family], keep_text_encoders=True), opened(folders[family])
    for policy in (kept, released):
        policy.encode(PROMPTS)
        assert policy._text is not None
        policy.prepare(PROMPTS)
    assert kept._text is not None
    assert released._text is None
    opening = []

    def open_(given: dict[str, Any]) -> Any:
        opening.append(given)
        return DiffusersFolder._open(released, given)

    monkeypatch.setattr(released, "_open", open_)
    assert torch.equal(velocities(released), velocities(kept))
    released.prepare(PROMPTS)
    assert opening == []
    assert released.encode(["a new prompt"]).prompts.states.shape[0] == 1
    assert len(opening) == 1


def test_embeddings_that_are_not_asked_for_make_room_for_new_ones(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignbench.backbones.diffusers_folder.CACHED_PROMPTS", 2)
    policy = opened(folders["flux"])
    policy.prepare(["a", "b", "c"])  # more than can be kept: nothing is encoded ahead
    assert not policy._encoded
    policy.encode(["a", "b"])
    policy.encode(["b", "c"])
    assert set(policy._encoded) == {"b", "c"}
    assert len(policy.encode(["a", "b", "c"]).prompts.states) == 3


# --- what is refused


def refused(folder: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(Path(folder), **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(source: Path, to: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(source, to, dirs_exist_ok=True)
    data = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps({**data, **changes}))
    return to


def test_a_folder_opens_as_its_family(folders: dict[str, Path]) -> None:
    assert [type(opened(folders[family])) for family in FAMILIES] == [SD3, Flux]


def test_other_pipelines_and_other_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = changed(folders["sd3"], tmp_path / "other", "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "has a StableDiffusionXLPipeline; alignbench opens folders of StableDiffusion3Pipeline, FluxPipeline" in refused(
        other
    )
    assert "is not a diffusers folder (no model_index.json)" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    assert "cannot read the configuration in" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    assert refused(tmp_path).endswith("model_index.json: it does not hold keys and values")
    (tmp_path / "model_index.json").write_text('{"_class_name": ["pipeline", "Mine"]}')
    assert refused(tmp_path).endswith("model_index.json does not name a pipeline (_class_name)")
    with pytest.raises(UserError, match="has a FluxPipeline; this backbone opens StableDiffusion3Pipeline folders"):
        load_backbone("sd3", path=str(folders["flux"]), device="cpu")


def test_a_folder_without_weights_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["flux"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "transformer lacks weights: there is no diffusion_pytorch_model.safetensors" in refused(folder)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("use_karras_sigmas", True, "sets use_karras_sigmas, but alignbench takes the steps of a plain"),
        ("use_exponential_sigmas", True, "sets use_exponential_sigmas, but"),
        ("use_beta_sigmas", True, "sets use_beta_sigmas, but"),
        ("use_karras_sigmas", "false", "sets use_karras_sigmas, but"),  # a text, which is true to diffusers
        ("stochastic_sampling", True, "sets stochastic_sampling, but"),
        ("invert_sigmas", True, "sets invert_sigmas, but"),
        ("shift_terminal", 1.5, "shift_terminal must be a number between 0 and 1"),
        ("num_train_timesteps", 500, "sets num_train_timesteps, but"),
        ("prediction_type", "epsilon", "sets prediction_type, but"),
        ("use_flow_sigmas", True, "sets use_flow_sigmas, but"),  # of no scheduler of ours, but FluxPipeline looks at it
        ("_class_name", "FlowMatchHeunDiscreteScheduler", "is for a FlowMatchHeunDiscreteScheduler"),
        ("time_shift_type", "cubic", "time_shift_type must be exponential or linear"),
        ("use_dynamic_shifting", "yes", "use_dynamic_shifting must be true or false"),
        ("base_shift", None, "base_shift must be a number, got None"),
        ("max_image_seq_len", 4, "max_image_seq_len must differ from base_image_seq_len"),
    ],
)
def test_schedules_that_are_not_followed_are_refused(
    folders: dict[str, Path], tmp_path: Path, key: str, value: Any, says: str
) -> None:
    assert f"{SCHEDULE}" in (told := refused(changed(folders["flux"], tmp_path, SCHEDULE, **{key: value})))
    assert says in told


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "EulerDiscreteScheduler"])
def test_schedulers_of_another_class_are_refused(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = changed(folders["sd3"], tmp_path, "model_index.json", scheduler=["diffusers", name])
    expected = f"names diffusers.{name} as its scheduler; alignbench opens diffusers's FlowMatchEulerDiscreteScheduler"
    assert expected in refused(folder)


def test_a_shift_that_is_no_positive_number_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for value in (None, 0, -1.0, "3", True, float("inf")):
        assert "shift must be a positive number" in refused(changed(folders["sd3"], tmp_path, SCHEDULE, shift=value))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot read the configuration in"),
        ("{}", "has no key call"),
        ('{"call": {"height": "64"}}', "call.height must be a positive number"),
        ('{"call": {"callback_on_step_end": 1}}', "call.callback_on_step_end must be"),
    ],
)
def test_calls_that_a_folder_cannot_ask_for_are_refused(folders: dict[str, Path], tmp_path: Path, text: str, says: str) -> None:
    folder = shutil.copytree(folders["sd3"], tmp_path / "own")
    (folder / "alignbench.json").write_text(text)
    assert says in refused(folder)


def test_settings_that_cannot_be_had_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "multiple of 4 pixels for" in refused(folders["flux"], resolution=18)
    assert "at most 32 x 32 pixels; choose a smaller resolution" in refused(folders["sd3"], resolution=36)
    assert "no module name in" in refused(folders["sd3"], lora_targets=("to_q", "to_w"))
    assert "train=full needs precision fp32 or bf16" in refused(folders["sd3"], train="full", precision="fp16")
    schnell = tmp_path / "schnell"
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(folders["flux"] / "transformer")
    shutil.copytree(folders["flux"], schnell)
    config = {**transformer.config, "guidance_embeds": False}
    diffusers.FluxTransformer2DModel.from_config(config).save_pretrained(schnell / "transformer")
    assert opened(schnell).guidance == 1.0
    assert "has no guidance" in refused(schnell, guidance=3.5)


# --- without weights


@pytest.mark.parametrize("train", ["lora", "full"])
@every_family
def test_on_the_meta_device_config_files_are_enough(folders: dict[str, Path], tmp_path: Path, family: str, train: str) -> None:
    bare = shutil.copytree(folders[family], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    for file in bare.glob("tokenizer*/tokenizer.json"):
        file.unlink()  # not all tokenizers are JSON files alone
    real, on_meta = opened(folders[family], train=train, guidance=2.0), opened(bare, train=train, device="meta", guidance=2.0)
    shapes = [
        {f"{part}.{name}": p.shape for part, c in policy.components().items() for name, p in c.module.named_parameters()}
        for policy in (real, on_meta)
    ]
    assert shapes[0] == shapes[1]
    assert on_meta.encode(PROMPTS).prompts.states.shape == real.encode(PROMPTS).prompts.states.shape
    x = torch.zeros(2, *on_meta.latent_shape, device="meta")
    answer = predict(on_meta, x, 0.5, on_meta.encode(PROMPTS), torch.tensor([0, 1], device="meta"))
    assert answer.shape == (2, *real.latent_shape)
    assert on_meta.decode(x).shape == (2, SIDE, SIDE, 3)


REAL_SIZE = {
    "flux": {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128}
    | {"num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": [16, 56, 56]},
    "sd3": {"num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536}
    | {"in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
    | {"pos_embed_max_size": 384, "dual_attention_layers": list(range(13))},
}
"""The transformers of FLUX.1-dev and SD3.5-Medium."""


@pytest.mark.parametrize(
    ("family", "frozen", "trained"),
    [
        # Rank 64 on (in + out) features. A block with text: 8 matrices of 3072 + 3072 and 4 of 3072 + 12288, 19 times; one
        # without: 3 of 3072 + 3072, 38 times.
        ("flux", 11_901_408_320, 64 * (19 * (8 * 6144 + 4 * 15360) + 38 * 3 * 6144)),
        # Rank 32 on 8 matrices of 1536 + 1536 in 24 blocks, of which the last has no output for the text.
        ("sd3", 2_243_171_520, 32 * (24 * 8 - 1) * 3072),
    ],
)
def test_at_real_size_a_folder_has_as_many_parameters_as_the_published_model(
    folders: dict[str, Path], tmp_path: Path, family: str, frozen: int, trained: int
) -> None:
    real = changed(folders[family], tmp_path / family, "transformer/config.json", **REAL_SIZE[family])
    policy = opened(real, device="meta", precision="bf16")
    assert sum(p.numel() for p in policy.parameters()) == trained
    assert sum(p.numel() for p in policy.trainable().parameters()) == frozen + trained
