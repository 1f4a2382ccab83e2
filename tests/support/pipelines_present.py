"""Complete pipelines of random weights for the families whose texts are read by a language model."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WIDTH = 8
"""Width of the language models."""
SPECIAL = ("<|im_start|>", "<|im_end|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat as the Qwen models have it."""
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}


def flux2(scheduler: dict[str, Any]) -> Flux2Pipeline:
    config = Mistral3Config(
        text_config=MistralConfig(**language_model(30)).to_dict(),
        vision_config=PixtralVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
        ).to_dict(),
    )
    return Flux2Pipeline(
        transformer=_flux2_transformer(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(**{**DYNAMIC, **scheduler}),
        vae=_flux2_autoencoder(),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=PixtralProcessor(image_processor=PixtralImageProcessor(), tokenizer=byte_tokenizer(), chat_template=CHAT),
    )


def flux2_klein(scheduler: dict[str, Any]) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        transformer=_flux2_transformer(guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(**{**DYNAMIC, **scheduler}),
        vae=_flux2_autoencoder(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**language_model(28))),
        tokenizer=byte_tokenizer(),
    )


def _flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )


def _flux2_autoencoder() -> AutoencoderKLFlux2:
    made = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    made.bn.running_mean += torch.randn(16)
    made.bn.running_var += torch.rand(16)
    return made


def language_model(layers: int) -> dict[str, Any]:
    """The size of a language model that reads bytes."""
    return {
        "vocab_size": len(byte_tokenizer()),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "initializer_range": 0.3,  # so that prompts differ in what their last tokens say
        "max_position_embeddings": 2048,
    }


def byte_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of Qwen's class, which has a token for each byte and no merges."""
    made = Qwen2Tokenizer(vocab={character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    made.chat_template = CHAT
    return made
