"""Complete diffusers pipelines of the real classes with a few thousand random weights, saved like folders of the hub."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from alignbench.embedded.networks import EOS_ID, word_tokenizer
from tests.support import pipelines_present as present

FAMILIES = ("sd3", "flux")
"""The families of `test_diffusers_folder.py`; each of the others has a file of its own."""
TEXT_TOKENS = {"flux2": 288, "flux2_klein": 96, "qwen_image": 288, "z_image": 96, "sana": 48, "wan": 64}
"""Tokens of a text, for the families whose folders say so: the chat around a prompt takes most of them."""
SIDE = 16
"""Pixels; 8 x 8 latents, 4 x 4 tokens."""
SIDES = {"sana": 32}
"""Pixels of the families whose pipelines accept no less."""
CALLS = {"wan": {"width": 32, "num_frames": 9}}
"""Further arguments of the families' calls: clips of 9 frames, which are 3 latent frames, and wider than high."""
CLIP, T5 = 16, 32
"""Widths of the text encoders."""


def save_pipeline(family: str, folder: Path, **scheduler: Any) -> Path:
    """Saves a folder of a family's pipeline; `scheduler` changes its schedule."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = MAKERS[family](scheduler)
        # Larger than at the start of a training, so that what a model is told shows in what it answers.
        for parameter in made.transformer.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    made.save_pretrained(folder)
    if family in TEXT_TOKENS:
        side = SIDES.get(family, SIDE)
        call = {"height": side, "width": side, "num_inference_steps": 4, "max_sequence_length": TEXT_TOKENS[family]}
        call |= CALLS.get(family, {})
        (folder / "alignbench.json").write_text(json.dumps({"call": call}))
    return folder


def with_short_texts(folder: Path) -> Path:
    """Makes a folder encode prompts into 8 tokens of T5 instead of 256 or 512, which would take most of the time."""
    (folder / "alignbench.json").write_text(json.dumps({"call": {"max_sequence_length": 8}}))
    return folder


def _sd3(scheduler: dict[str, Any]) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=T5,
        pooled_projection_dim=2 * CLIP,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=present.autoencoder(),
        text_encoder=CLIPTextModelWithProjection(_clip()),
        tokenizer=word_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip()),
        tokenizer_2=word_tokenizer(),
        text_encoder_3=_t5(),
        tokenizer_3=word_tokenizer(),
    )


def _flux(scheduler: dict[str, Any]) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5,
        pooled_projection_dim=CLIP,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    shifting = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{**shifting, **scheduler}),
        vae=present.autoencoder(),
        text_encoder=CLIPTextModel(_clip()),
        tokenizer=word_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=word_tokenizer(),
    )


def _clip() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(word_tokenizer()),
        hidden_size=CLIP,
        intermediate_size=CLIP,
        projection_dim=CLIP,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS_ID,
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=len(word_tokenizer()), d_model=T5, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


MAKERS: dict[str, Any] = {
    "sd3": _sd3,
    "flux": _flux,
    "flux2": present.flux2,
    "flux2_klein": present.flux2_klein,
    "qwen_image": present.qwen_image,
    "z_image": present.z_image,
    "sana": present.sana,
    "wan": present.wan,
}
