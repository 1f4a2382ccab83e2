"""Complete pipelines with random weights for the families whose text encoder is a language model."""

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from alignbench.embedded.networks import word_tokenizer

WIDTH = 8
"""Width of the language models."""
SPECIAL = ("<|im_start|>", "<|im_end|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat as the Qwen models have it."""
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}


def autoencoder(**changes: Any) -> AutoencoderKL:
    """A decoder of 4 channels that enlarges twice."""
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 1.5,
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**settings | changes)


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


def qwen_image(scheduler: dict[str, Any]) -> QwenImagePipeline:
    config = Qwen2_5_VLConfig(
        text_config={
            **language_model(2),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
    )
    shifting = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**{**shifting, "shift": 1.0, "shift_terminal": 0.02, **scheduler}),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 2.0, 0.5, 1.0],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=byte_tokenizer(),
    )


def z_image(scheduler: dict[str, Any]) -> ZImagePipeline:
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[2, 2, 4],
            axes_lens=[512, 64, 64],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=autoencoder(scaling_factor=0.4, use_quant_conv=True, use_post_quant_conv=True),
        text_encoder=Qwen3Model(Qwen3Config(**language_model(2))),
        tokenizer=byte_tokenizer(),
    )


def sana(scheduler: dict[str, Any]) -> SanaPipeline:
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            scaling_factor=0.41,
        ),
        text_encoder=Gemma2Model(Gemma2Config(**language_model(2), query_pre_attn_scalar=4)),
        tokenizer=letter_tokenizer(),
    )


def wan(scheduler: dict[str, Any]) -> WanPipeline:
    text = UMT5Config(
        vocab_size=len(word_tokenizer()), d_model=WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2, initializer_factor=0.3
    )
    return WanPipeline(
        transformer=WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=16,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 2.0, 0.5, 1.0],
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        ),
        text_encoder=UMT5EncoderModel(text),
        tokenizer=word_tokenizer(),
    )


def language_model(layers: int) -> dict[str, Any]:
    """The size of a language model with a token for each byte."""
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


def letter_tokenizer() -> GemmaTokenizer:
    """A tokenizer of Gemma's class, which has a token for each letter and no merges."""
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    return GemmaTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], add_bos_token=True)
