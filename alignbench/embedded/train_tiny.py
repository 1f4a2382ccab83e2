"""Trains the embedded `tiny` backbone from nothing: `python -m alignbench train-tiny`.

Three stages, each resumable, all on drawn pictures and fixed seeds:

1. `autoencoder`: an `AutoencoderKL` that halves twice (64x64x3 -> 16x16x12), pulled towards a linear projection of patches;
2. `transformer`: an `SD3Transformer2DModel` with two CLIP text encoders, trained jointly by flow matching with
   logit-normal times (Esser et al. 2024, arXiv 2403.03206), prompt dropout and an exponential moving average, in phases
   that see more and more scenes;
3. `export`: the folder that `StableDiffusion3Pipeline.from_pretrained` opens, in bfloat16.

One text encoder reads the words of the prompt (what is quoted becomes one mark), the other the letters of the first
quoted text: the same split of meaning and spelling as in SD3's encoders, at the smallest size.
"""

import hashlib
import json
import math
import shutil
import time
from bisect import bisect_right
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from pydantic import Field
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from alignbench.embedded.drawing import lettering, scenes
from alignbench.embedded.drawing.palette import COLORS
from alignbench.errors import UserError
from alignbench.files.writing import claimed, exclusive, fill, is_free, write_atomically, write_folder
from alignbench.runtime.import_path import begin_child, safe_children
from alignbench.settings import Settings

SEQUENCE_LENGTH = 16
WORD_WIDTH, LETTER_WIDTH = 96, 64
TEXT_WIDTH = WORD_WIDTH + LETTER_WIDTH
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>", "eos_token": "<eos>"}
EOS_ID = 3
LATENT_CHANNELS = 12
PATCH = 4
"""Pixels that one latent stands for, in each direction."""


FREE_TO_CHANGE = {"threads", "compile", "save_every", "call_steps", "call_guidance"}
"""Settings that a stopped training may go on with otherwise."""


class Phase(Settings):
    """A part of the transformer's training with its own pictures, whose rate ends at zero."""

    steps: int = Field(gt=0)
    rate: float = 1.0
    """The share of the learning rates at which it starts."""
    fall: float = Field(default=1.0, gt=0, le=1)
    """The share of the steps, at the end, over which the rate falls linearly to zero."""
    shards: int = Field(default=8, gt=0)
    """Pictures drawn for it, in units of `shard_size`."""
    words_share: float = Field(default=0.1, ge=0, le=1)
    single_sizes: tuple[int, ...] = scenes.SIZES[1]
    """Diameters of a scene's only shape, in pixels."""
    types: dict[str, float] = Field(default_factory=dict)
    """How often a task type is drawn, in proportion to the others; 1 where it is not given."""

    def draw(self, seed: int, shard: int, count: int) -> "list[Example]":
        return draw_examples(seed, shard, count, self.words_share, self.single_sizes, self.types)


class TinyTraining(Settings):
    """Settings of the training. How the folder that ships came about is in its card."""

    seed: int = 0
    threads: int = 2
    autoencoder_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` takes bfloat16 where the processor multiplies it in hardware: half the time for the autoencoder, while
    the transformer, all small products, gains nothing and stays in float32."""
    autoencoder_steps: int = 1500
    autoencoder_batch: int = 24
    autoencoder_lr: float = 2e-3
    pull: float = 0.3
    """Weight of the squared distance between latents and the patches' principal components."""
    latent_noise: float = 0.1
    """Deviation of the noise under which the decoder learns; what it then smooths out of the transformer's errors."""
    compile: bool = True
    """Compile the transformer where there is a C++ compiler: a fifth less time a step, after some 90 s of compiling."""
    batch: int = 64
    lr: float = 1e-3
    muon_lr: float = 2e-3
    warmup: int = 100
    ema: float = 0.995
    phases: tuple[Phase, ...] = (
        Phase(steps=10000, fall=0.4, shards=16, words_share=0.4, single_sizes=(32, 48)),
        Phase(steps=2000, rate=0.5, words_share=0.15),
        Phase(steps=5000, rate=0.7, words_share=0.1, types={"two_object": 2, "counting": 2, "position": 3, "color_attr": 3}),
    )
    """Scenes take longer than words, and of scenes those with two shapes that must not be confused."""
    prompt_dropout: float = 0.1
    shard_size: int = 2048
    time_mean: float = 0.5
    """Location of the logit-normal times: above 0, since what letters and shapes appear is settled at high noise."""
    shift: float = 1.5
    call_steps: int = 20
    call_guidance: float = 1.0
    save_every: int = 125

    def autoencoder_autocast(self) -> torch.autocast:
        processor = Path("/proc/cpuinfo")
        has_bfloat16 = processor.exists() and "avx512_bf16" in processor.read_text()
        use = self.autoencoder_precision == "bfloat16" or (self.autoencoder_precision == "auto" and has_bfloat16)
        return torch.autocast("cpu", torch.bfloat16, enabled=use)


# ---------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Example:
    prompt: str
    picture: np.ndarray


@cache
def held_out_words() -> frozenset[str]:
    """Words of the OCR task's prompts (training, validation, evaluation): the base model never sees one of them."""
    folder = Path(__file__).parent.parent / "tasks" / "ocr"
    lines = [line for name in ("train.txt", "validation.txt", "eval.txt") for line in (folder / name).read_text().splitlines()]
    return frozenset(line.split('"')[1] for line in lines if '"' in line)


def is_held_out(metadata: dict[str, Any]) -> bool:
    """One prompt in ten, by content: scenes that the base model never sees."""
    key = json.dumps([metadata["tag"], metadata["include"], metadata["prompt"]], sort_keys=True)
    return hashlib.sha256(key.encode()).digest()[0] % 10 == 0


def draw_examples(
    seed: int,
    shard: int,
    count: int,
    words_share: float,
    single_sizes: tuple[int, ...] = scenes.SIZES[1],
    types: Mapping[str, float] | None = None,
) -> list[Example]:
    """`count` prompts with their pictures; a pure function of its arguments, which `Phase` explains."""
    rng = np.random.default_rng([seed, shard])
    exclude = held_out_words()
    frequencies = np.array([(types or {}).get(name, 1.0) for name in scenes.TASK_TYPES])
    chances = frequencies / frequencies.sum() if types else None
    examples: list[Example] = []
    while len(examples) < count:
        if rng.random() < words_share:
            text = lettering.sample_text(rng, exclude)
            prompt, color = lettering.sample_prompt(rng, text)
            examples.append(Example(prompt, lettering.sample_lettering(rng, text, color).draw()))
        else:
            metadata = scenes.sample_metadata(rng, str(rng.choice(scenes.TASK_TYPES, p=chances)))
            if not is_held_out(metadata):
                examples.append(Example(metadata["prompt"], scenes.sample_scene(rng, metadata, single_sizes).draw()))
    return examples


def to_pixels(pictures: list[np.ndarray]) -> Tensor:
    """float32 [N, 3, H, W] in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


# ---------------------------------------------------------------------------------------------------- models


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words of our prompts as tokens, any other word spelt letter by letter; a quoted text becomes one quote mark."""
    wordings = [*lettering.PLAIN_WORDINGS, *lettering.COLORED_WORDINGS, *scenes.PREFIXES]
    known = {w for text in wordings for w in text.replace('"{text}"', "").replace("{color}", "").split()}
    known |= {*COLORS, *scenes.SHAPES, *scenes.PLURALS.values(), *scenes.NUMBERS.values(), "a", "an", "and"}
    known |= {w for relation in scenes.RELATIONS for w in relation.split()}
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)]
    pieces = [*letters, *(f"##{c}" for c in letters), *'".,;:!?-&+', *sorted(w for w in known if len(w) > 1)]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex('"[^"]*"?'), ' " ')])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _fast(tokenizer, vocabulary)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """The letters of the first quoted text, one token each; nothing where nothing is quoted."""
    characters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)] + list(" '.,;:!?-&+")
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    before, after = normalizers.Replace(Regex('^[^"]*("|$)'), ""), normalizers.Replace(Regex('"[^"]*'), "")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), before, after])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return _fast(tokenizer, vocabulary)


def silent_third_encoder() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A third text encoder that answers one zero vector whatever the prompt: what SD3's pipeline puts in its place.

    The pipeline can do without its third encoder, but `from_pretrained` then wants to be told so; with this one in the
    folder it opens as it is. With `max_sequence_length=1` both ways give the same embeddings. Its one layer is there because
    transformers 4 opens no T5 without.
    """
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(".+"), "")
    encoder = T5EncoderModel(T5Config(vocab_size=2, d_model=TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    for parameter in encoder.parameters():
        nn.init.zeros_(parameter)
    return encoder, PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=1, pad_token="<pad>", unk_token="<unk>"
    )


def _fast(tokenizer: Tokenizer, vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    ends = [(SPECIAL[t], vocabulary[SPECIAL[t]]) for t in ("bos_token", "eos_token")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=SEQUENCE_LENGTH, **SPECIAL)


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        # One group: with several, each has its own scale over the whole picture, and plain backgrounds lose their level.
        norm_num_groups=1,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def build_text_encoder(vocabulary: int, width: int, layers: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=SEQUENCE_LENGTH,
        hidden_act="gelu",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        initializer_factor=1.0,
    )
    model = CLIPTextModelWithProjection(config)
    # CLIP's own start (0.02) drowns which token it is in what the layers add; colours and letters then take long to learn.
    embeddings = model.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.4)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.15)
    return model


def build_transformer(text_width: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=text_width,
        caption_projection_dim=128,
        pooled_projection_dim=text_width,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


class TextAndTransformer(nn.Module):
    """Everything that stage 2 trains: prompt ids in, velocity out, as `StableDiffusion3Pipeline` wires them."""

    def __init__(self, words: int, letters: int) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(words, WORD_WIDTH, layers=3)
        self.text_encoder_2 = build_text_encoder(letters, LETTER_WIDTH, layers=2)
        self.transformer = build_transformer(TEXT_WIDTH)

    def forward(self, x: Tensor, sigma: Tensor, word_ids: Tensor, letter_ids: Tensor) -> Tensor:
        first = self.text_encoder(word_ids, output_hidden_states=True)
        second = self.text_encoder_2(letter_ids, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        # One zero vector stands for the third encoder: the call's `max_sequence_length` is 1.
        states = torch.cat([states, states.new_zeros(len(states), 1, states.shape[-1])], dim=1)
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return self.transformer(
            x, encoder_hidden_states=states, pooled_projections=pooled, timestep=sigma * 1000, return_dict=False
        )[0]


# ---------------------------------------------------------------------------------------------------- stages


def patch_projection(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The latents that the encoder is pulled towards: principal components of 4x4 patches, as a convolution.

    Returns the kernel [C, 3, 4, 4] and the offset [C]. A component of deviation d gets the deviation sqrt(d): with equal
    deviations (whitening) the transformer spends itself on fine detail, with d itself detail drowns in the noise. Over
    all components the variance is 1.
    """
    patches = functional.pixel_unshuffle(pixels, PATCH).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = patches.mean(0)
    variance, basis = torch.linalg.eigh(torch.cov(patches.mT))
    variance, basis = variance.flip(0)[:LATENT_CHANNELS], basis.flip(1)[:, :LATENT_CHANNELS]
    basis = basis * variance.pow(-0.25) / variance.sqrt().mean().sqrt()
    kernel = basis.mT.reshape(LATENT_CHANNELS, 3, PATCH, PATCH)
    return kernel.float(), (-mean @ basis).float()


def train_autoencoder(settings: TinyTraining, work: Path, log: Any = print) -> AutoencoderKL:
    """Stage 1, on the first phase's pictures; sets the model's `scaling_factor` so that latents have unit variance overall."""
    torch.manual_seed(settings.seed)
    pictures, total = settings.phases[0], settings.autoencoder_steps
    model = build_autoencoder()
    done = work / "autoencoder"
    if done.exists():
        return AutoencoderKL.from_pretrained(done, use_safetensors=True)
    kernel, offset = patch_projection(
        to_pixels([e.picture for e in draw_examples(settings.seed + 3, 0, settings.shard_size, 0.5, pictures.single_sizes)])
    )
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.autoencoder_lr, betas=(0.9, 0.95), weight_decay=1e-3)
    autocast = settings.autoencoder_autocast()
    start, history = 0, []
    checkpoint = work / "autoencoder.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, history = state["step"], state["history"]
    for step in range(start, total):
        for group in optimizer.param_groups:
            group["lr"] = settings.autoencoder_lr * min(1.0, (step + 1) / settings.warmup, (total - step) / (0.4 * total))
        examples = pictures.draw(settings.seed + 1, step, settings.autoencoder_batch)
        pixels = to_pixels([e.picture for e in examples]).contiguous(memory_format=torch.channels_last)
        target = functional.conv2d(pixels, kernel, offset, stride=PATCH)
        noise = settings.latent_noise * torch.randn(target.shape, generator=torch.Generator().manual_seed(step))
        with autocast:
            posterior = model.encode(pixels).latent_dist
            restored = model.decode(posterior.mean + noise).sample.float()
        squared = functional.mse_loss(restored, pixels)
        distance = functional.mse_loss(posterior.mean.float(), target)
        spread = (posterior.logvar.float() - 2 * math.log(settings.latent_noise)).square().mean()
        loss = squared + 0.1 * functional.l1_loss(restored, pixels) + settings.pull * distance + 1e-3 * spread
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == total:
            history.append([step, squared.item()])
            log(f"autoencoder step {step} squared error {squared.item():.5f} distance to projection {distance.item():.4f}")
        if (step + 1) % settings.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "history": history}
            _save_atomically(state, checkpoint)
    model.eval()
    held_out = pictures.draw(settings.seed + 2, 0, 512)
    pixels = to_pixels([e.picture for e in held_out])
    with torch.no_grad():
        latents = torch.cat([model.encode(p).latent_dist.mode() for p in pixels.split(64)])
        restored = torch.cat([model.decode(z).sample for z in latents.split(64)])
    model.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    log(f"autoencoder held-out squared error {functional.mse_loss(restored, pixels).item():.5f}")
    write_folder(done, model.save_pretrained)
    write_atomically(work / "autoencoder_history.json", lambda p: p.write_text(json.dumps(history), encoding="utf-8"))
    return model


class LatentPool:
    """Drawn and encoded examples in shards, made once and kept in the work folder, phase after phase."""

    def __init__(self, settings: TinyTraining, work: Path, log: Any) -> None:
        self.words, self.letters = word_tokenizer(), letter_tokenizer()
        folder = work / "latents"
        folder.mkdir(exist_ok=True)
        phases = [phase for phase in settings.phases for _ in range(phase.shards)]
        paths = [folder / f"{i:03d}.safetensors" for i in range(len(phases))]
        missing = [(i, path) for i, path in enumerate(paths) if not path.exists()]
        if missing:
            log(f"drawing and encoding {len(missing)} x {settings.shard_size} pictures")
            context = get_context("spawn")
            with safe_children(), ProcessPoolExecutor(settings.threads, context, initializer=begin_child) as workers:
                jobs = [workers.submit(_make_shard, settings, phases[i], i, work / "autoencoder", path) for i, path in missing]
                for job in jobs:
                    job.result()
        shards = iter([load_file(path) for path in paths])
        self.shards = [list(islice(shards, phase.shards)) for phase in settings.phases]

    def shard(self, phase: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents float16 [N, C, 16, 16], word ids and letter ids int64 [N, SEQUENCE_LENGTH]."""
        shards = self.shards[phase]
        shard = shards[epoch % len(shards)]
        return shard["latents"], shard["words"], shard["letters"]


def _make_shard(settings: TinyTraining, phase: Phase, index: int, autoencoder: Path, path: Path) -> None:
    torch.set_num_threads(1)
    model = AutoencoderKL.from_pretrained(autoencoder).eval().to(memory_format=torch.channels_last)
    examples = phase.draw(settings.seed, index, settings.shard_size)
    with torch.no_grad():
        latents = torch.cat([model.encode(p).latent_dist.mode() for p in to_pixels([e.picture for e in examples]).split(32)])
    latents = (latents - model.config.shift_factor) * model.config.scaling_factor
    prompts = [e.prompt for e in examples]
    tensors = {"latents": latents.half().contiguous()}
    tensors |= {"words": tokenize(word_tokenizer(), prompts), "letters": tokenize(letter_tokenizer(), prompts)}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Tensor:
    """int64 [N, SEQUENCE_LENGTH], padded and truncated."""
    return tokenizer(prompts, padding="max_length", max_length=SEQUENCE_LENGTH, truncation=True, return_tensors="pt").input_ids


def train_transformer(settings: TinyTraining, work: Path, log: Any = print) -> TextAndTransformer:
    """Stage 2, on latents of stage 1's model in `work`; returns the model with its averaged weights."""
    torch.manual_seed(settings.seed)
    pool = LatentPool(settings, work, log)
    model = TextAndTransformer(len(pool.words), len(pool.letters))
    forward = _compiled(model, log) if settings.compile else model
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = _optimizers(model, settings)
    start, history = 0, []
    checkpoint = work / "transformer.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average, start, history = state["average"], state["step"], state["history"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        log(f"goes on at step {start}")
    empty = tokenize(pool.words, [""]), tokenize(pool.letters, [""])
    per_shard = settings.shard_size // settings.batch
    began, losses = time.perf_counter(), []
    model.train()
    total = sum(phase.steps for phase in settings.phases)
    for step in range(start, total):
        phase, factor = schedule(settings, step)
        for optimizer, lr in zip(optimizers, (settings.muon_lr, settings.lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        epoch, position = divmod(step, per_shard)
        latents, words, letters = pool.shard(phase, epoch)
        order = np.random.default_rng([settings.seed, epoch]).permutation(settings.shard_size)
        chosen = torch.from_numpy(order[position * settings.batch : (position + 1) * settings.batch])
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        x0, word_ids, letter_ids = latents[chosen].float(), words[chosen], letters[chosen]
        dropped = torch.rand(settings.batch, 1, generator=generator) < settings.prompt_dropout
        word_ids, letter_ids = torch.where(dropped, empty[0], word_ids), torch.where(dropped, empty[1], letter_ids)
        sigma = torch.sigmoid(settings.time_mean + torch.randn(settings.batch, generator=generator))
        noise = torch.randn(x0.shape, generator=generator)
        s = sigma.view(-1, 1, 1, 1)
        velocity = forward((1 - s) * x0 + s * noise, sigma, word_ids, letter_ids)
        loss = functional.mse_loss(velocity, noise - x0)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(settings.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            history.append([step + 1, sum(losses) / len(losses)])
            pace = (time.perf_counter() - began) / (step + 1 - start)
            log(f"transformer step {step + 1} loss {history[-1][1]:.4f} {pace:.2f} s a step")
            losses.clear()
        if (step + 1) % settings.save_every == 0 or step + 1 == total:
            state = {
                "model": model.state_dict(),
                "average": average,
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step + 1,
                "history": history,
            }
            _save_atomically(state, checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(average[name])
    write_atomically(work / "transformer_history.json", lambda p: p.write_text(json.dumps(history), encoding="utf-8"))
    return model.eval()


def export(
    settings: TinyTraining, autoencoder: AutoencoderKL, model: TextAndTransformer, out: Path
) -> StableDiffusion3Pipeline:
    """Stage 3: writes the diffusers folder (bfloat16) with `alignbench.json`; returns the pipeline."""
    third, third_tokenizer = silent_third_encoder()
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=settings.shift),
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=word_tokenizer(),
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=letter_tokenizer(),
        text_encoder_3=third,
        tokenizer_3=third_tokenizer,
    )
    # The large parts in bfloat16; text encoders in float32, since transformers loads them in the type they were saved in.
    pipeline.transformer.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    pipeline.save_pretrained(out, safe_serialization=True)
    # transformers 5 writes its own name of this class, which transformers 4 does not know; both know this one.
    for path in (out / "model_index.json", *out.glob("tokenizer*/tokenizer_config.json")):
        path.write_text(path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    # diffusers writes where a part was read from: a path of the machine that trained it.
    config = out / "vae" / "config.json"
    kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    call = {
        "height": 64,
        "width": 64,
        "max_sequence_length": 1,
        "num_inference_steps": settings.call_steps,
        "guidance_scale": settings.call_guidance,
    }
    (out / "alignbench.json").write_text(json.dumps({"call": call, "training": settings.model_dump()}, indent=2) + "\n")
    return pipeline


def train_tiny(settings: TinyTraining, work: Path, out: Path, log: Any = print) -> None:
    """All stages; goes on where an earlier call with the same `work` folder and settings stopped.

    Raises:
        UserError: `out` is taken, `work` holds something else, or another process is at work in one of them.
        DiskError: a file cannot be written.
    """
    torch.set_num_threads(settings.threads)
    with claimed(out), exclusive(work):
        _keep_settings(settings, work)
        autoencoder = train_autoencoder(settings, work, log).eval()
        model = train_transformer(settings, work, log)
        fill(out, lambda folder: export(settings, autoencoder, model, folder), last="model_index.json")
    log(f"written to {out}")


def _keep_settings(settings: TinyTraining, work: Path) -> None:
    """Raises UserError where `work` holds the stages of another training: they would end up under these settings' name.

    Phases may be added to those that it holds.
    """
    path, now = work / "settings.json", settings.model_dump(mode="json")
    if not path.exists() and not is_free(work):
        raise UserError(f"{work} holds something else than a training; choose another --work folder")
    kept = json.loads(path.read_text()) if path.exists() else now
    compared = now | {"phases": now["phases"][: len(kept.get("phases", []))]}
    changed = [k for k, v in compared.items() if kept.get(k) != v and k not in FREE_TO_CHANGE]
    if changed:
        differences = ", ".join(f"{k} {kept.get(k)} (now {now[k]})" for k in changed)
        raise UserError(f"{work} holds a training with other settings: {differences}; choose another --work folder")
    text = json.dumps(now, indent=2) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), in float32, matrices of one shape at a time.

    `torch.optim.Muon` computes the same in bfloat16, which is several times slower on CPUs without bfloat16 arithmetic.
    Updates are scaled to AdamW's usual size, 0.2 sqrt(max(m, n)), so that AdamW's learning rates and decay apply.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    assert parameter.grad is not None
                    state = self.state[parameter]
                    buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(buffer, group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, _orthogonal(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def _orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, by five quintic Newton-Schulz iterations; [N, m, n]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def _optimizers(model: TextAndTransformer, settings: TinyTraining) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the attention and feed-forward matrices of the transformer's blocks, AdamW for everything else."""
    blocks = model.transformer.transformer_blocks.named_parameters()
    matrices = [p for name, p in blocks if p.ndim == 2 and ("attn." in name or "ff" in name)]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    muon = Muon(matrices, lr=settings.muon_lr)
    return muon, torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)


def _compiled(model: nn.Module, log: Any) -> Any:
    if not (shutil.which("g++") or shutil.which("clang++")):
        log("no C++ compiler here: the transformer runs uncompiled, a fifth slower")
        return model
    return torch.compile(model, dynamic=False)


def schedule(settings: TinyTraining, step: int) -> tuple[int, float]:
    """Index of the phase that a step of the transformer's training falls into, and the factor on its learning rates."""
    ends = list(accumulate(phase.steps for phase in settings.phases))
    index = bisect_right(ends, step)
    phase = settings.phases[index]
    return index, phase.rate * min(1.0, (step + 1) / settings.warmup, (ends[index] - step) / (phase.fall * phase.steps))


def _save_atomically(state: dict[str, Any], path: Path) -> None:
    write_atomically(path, lambda partial: torch.save(state, partial))
