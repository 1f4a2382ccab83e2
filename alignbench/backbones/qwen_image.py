"""qwen_image: a local `QwenImagePipeline` folder (Qwen-Image), with full training or LoRA."""

from typing import Any

from pydantic import Field
from torch import Tensor

from alignbench import UserError
from alignbench.backbones.guidance import GuidedFolder
from alignbench.backbones.pipelines.embeddings import Embeddings
from alignbench.backbones.pipelines.packing import PATCH, pack, unpack


class QwenImage(GuidedFolder):
    """A folder of Qwen-Image."""

    class Settings(GuidedFolder.Settings):
        lora_rank: int = Field(64, ge=1)
        """Rank of the LoRA (train=lora)."""
        lora_alpha: float = Field(128, gt=0)
        """Scale of the LoRA (train=lora): its output is multiplied by alpha / rank."""
        lora_targets: tuple[str, ...] = (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
            "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
        )  # fmt: skip
        """Ends of the names of modules that get a LoRA; the default is that of Flow-GRPO for Qwen-Image-Edit."""

    settings: Settings
    PIPELINE = "QwenImagePipeline"
    MODELS = {  # noqa: RUF012
        "transformer": "diffusers.QwenImageTransformer2DModel",
        "vae": "diffusers.AutoencoderKLQwenImage",
        "text_encoder": "transformers.Qwen2_5_VLForConditionalGeneration",
    }
    TOKENIZERS = frozenset({"Qwen2Tokenizer", "Qwen2TokenizerFast"})
    GUIDANCE = "true_cfg_scale"
    NEGATIVE = " "

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if self.pipeline.transformer.config.guidance_embeds:
            raise UserError(f"{self.folder}/transformer is distilled (guidance_embeds), which alignbench cannot open")

    @property
    def patch(self) -> int:
        return PATCH

    @property
    def latent_channels(self) -> int:
        return int(self.pipeline.vae.config.z_dim)

    @property
    def text_tokens(self) -> int:
        """The largest number of tokens; most prompts have a tenth of it."""
        return int(self.call["max_sequence_length"])

    @property
    def text_widths(self) -> tuple[int, None]:
        return self.pipeline.transformer.config.joint_attention_dim, None

    def embed(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        length = self.call["max_sequence_length"]
        states, mask = pipeline.encode_prompt(prompt=prompts, max_sequence_length=length, device=self.device)
        return Embeddings(states, mask=None if mask is None else mask.bool())

    def pipeline_arguments(self, noise: Tensor) -> dict[str, Any]:
        return super().pipeline_arguments(pack(noise)) | {"negative_prompt": [self.NEGATIVE] * len(noise)}

    def answer(self, x: Tensor, sigma: Tensor, texts: Embeddings) -> Tensor:
        rows, columns = (side // PATCH for side in x.shape[2:])
        answer = self.call_transformer(
            hidden_states=pack(x.to(self.weights_dtype)),
            timestep=sigma,
            encoder_hidden_states=texts.states,
            encoder_hidden_states_mask=texts.mask,
            img_shapes=[[(1, rows, columns)]] * len(x),
        )
        return unpack(answer, *x.shape[2:])

    def mix(self, unguided: Tensor, guided: Tensor) -> Tensor:
        """Mixes the velocities; each token keeps the norm that it has without guidance, as in the pipeline."""
        mixed, plain = pack(super().mix(unguided, guided)), pack(guided)
        kept = mixed * (plain.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
        return unpack(kept, *guided.shape[2:])

    def vae_decode(self, latents: Tensor) -> Tensor:
        """Decodes latents as a video of a single frame, because the autoencoder is that of a video model."""
        vae = self.pipeline.vae
        mean, std = self.channel_statistics(latents)
        decoded: Tensor = vae.decode((latents * std + mean).unsqueeze(2).to(vae.dtype), return_dict=False)[0]
        return decoded[:, :, 0]

    def vae_encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        encoded: Tensor = vae.encode(pixels.unsqueeze(2).to(vae.dtype)).latent_dist.mode().float()[:, :, 0]
        mean, std = self.channel_statistics(encoded)
        return (encoded - mean) / std
