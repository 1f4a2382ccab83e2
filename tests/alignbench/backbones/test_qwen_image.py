"""Qwen-Image against diffusers: true guidance that keeps norms, packed latents, masked texts, a schedule that ends above 0."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignbench import UserError
from alignbench.backbones.pipelines.packing import pack, unpack
from alignbench.backbones.qwen_image import QwenImage
from tests.support import family_checks as checks
from tests.support.family_checks import Family, FamilyFacts

QWEN = Family(
    "qwen_image",
    lambda g: {"true_cfg_scale": g, "negative_prompt": [" ", " "]},
    layout=pack,
    unlayout=lambda tokens: unpack(tokens, 8, 8),
    final=lambda policy, latents: pack(latents),
)


class TestQwenImage(FamilyFacts):
    family = QWEN
    # The text stream ends with the last block.
    idle = tuple(f"transformer_blocks.1.{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp"))

    def test_a_folder_opens_as_its_family(self, folder: Path) -> None:
        policy = checks.opened(folder)
        assert isinstance(policy, QwenImage)
        assert policy.latent_shape == (4, 8, 8)
        assert policy.guidance == 4.0  # the true_cfg_scale of the pipeline's call
        assert checks.opened(folder, resolution=32).latent_shape == (4, 16, 16)

    def test_a_guided_token_keeps_the_norm_of_the_prompts_own_velocity(self, folder: Path) -> None:
        guided, plain = (pack(checks.velocities(checks.opened(folder, guidance=g))) for g in (6.0, 1.0))
        # float32 roundings of a root of a sum of squares.
        assert torch.allclose(guided.norm(dim=-1), plain.norm(dim=-1), rtol=1e-4)
        assert not torch.allclose(guided, plain, rtol=1e-2)

    def test_a_lora_has_the_places_of_the_published_training(self, folder: Path) -> None:
        added = {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"}
        image = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2"}
        assert checks.adapted_ends(checks.opened(folder)) == added | image | {"txt_mlp.net.0.proj", "txt_mlp.net.2"}

    def test_the_last_step_starts_at_the_terminal_sigma_and_losses_take_the_plain_shift(self, folder: Path) -> None:
        policy = checks.opened(folder)
        assert policy.sigmas(8)[-2:].tolist() == pytest.approx([0.02, 0])
        # 16 tokens, below 256 with mu 0.5 and 8192 with mu 0.9: mu = 0.5 + 0.4 * (16 - 256) / 7936.
        assert policy.schedule_shift() == pytest.approx(torch.exp(torch.tensor(0.5 - 96 / 7936)).item(), rel=1e-5)

    def test_a_distilled_transformer_is_refused(self, folder: Path, tmp_path: Path) -> None:
        other = shutil.copytree(folder, tmp_path / "distilled")
        config = json.loads((other / "transformer" / "config.json").read_text())
        (other / "transformer" / "config.json").write_text(json.dumps({**config, "guidance_embeds": True}))
        with pytest.raises(UserError, match="is distilled \\(guidance_embeds\\), which alignbench cannot open"):
            checks.opened(other)

    def test_the_statistics_of_the_autoencoder_are_undone(self, folder: Path) -> None:
        policy = checks.opened(folder)
        latents: Tensor = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        raw = latents * torch.tensor([1.5, 2.0, 0.5, 1.0]).view(4, 1, 1) + torch.tensor([0.1, -0.2, 0.3, 0.0]).view(4, 1, 1)
        with torch.no_grad():
            expected = policy.pipeline.vae.decode(raw[:, :, None], return_dict=False)[0][:, :, 0]
            assert torch.allclose(policy.vae_decode(latents), expected, atol=1e-6)
