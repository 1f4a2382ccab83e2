"""Trains the embedded backbone `tiny` from scratch: `python -m alignbench train-tiny`.

There are three stages, on drawn images and with fixed seeds; the first two can be resumed:

1. `autoencoder`: an `AutoencoderKL` that halves the resolution twice (64x64x3 to 16x16x12), regularised towards a linear
   projection of patches.
2. `transformer`: an `SD3Transformer2DModel` with two CLIP text encoders, trained jointly by flow matching with logit-normal
   times (Esser et al. 2024, arXiv 2403.03206), prompt dropout and an exponential moving average, in phases with more and more
   scenes.
3. `export`: the folder that `StableDiffusion3Pipeline.from_pretrained` opens, in bfloat16.

One text encoder reads the words of the prompt, in which a quoted text is one mark. The other reads the letters of the first
quoted text. SD3's encoders divide meaning and spelling in the same way.
"""

import json
import math
import shutil
import time
from bisect import bisect_right
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from alignbench.embedded.drawing import scenes
from alignbench.embedded.examples import Example, draw_examples, to_pixels
from alignbench.embedded.muon import muon_and_adamw
from alignbench.embedded.networks import (
    LATENT_CHANNELS,
    PATCH,
    TextAndTransformer,
    build_autoencoder,
    letter_tokenizer,
    silent_third_encoder,
    tokenize,
    word_tokenizer,
)
from alignbench.errors import UserError
from alignbench.files.writing import claimed, exclusive, fill, is_free, write_atomically, write_folder
from alignbench.runtime.hardware import has_fast_bfloat16
from alignbench.runtime.import_path import begin_child, safe_children
from alignbench.settings import Settings

FREE_TO_CHANGE = {"threads", "compile", "save_every", "call_steps", "call_guidance"}
"""Settings that may differ when a training is resumed."""
HELD_OUT = 512
"""Number of images that the autoencoder is scaled and tested with; a shard's if that is smaller."""


class Phase(Settings):
    """A part of the transformer's training with its own images, at whose end the learning rate is zero."""

    steps: int = Field(gt=0)
    """Number of optimizer steps."""
    rate: float = 1.0
    """Factor on the learning rates."""
    fall: float = Field(default=1.0, gt=0, le=1)
    """Share of the steps, at the end, in which the learning rate falls linearly to zero."""
    shards: int = Field(default=8, gt=0)
    """Number of images of this phase, in units of `shard_size`."""
    words_share: float = Field(default=0.1, ge=0, le=1)
    """Share of images of words; the others are scenes."""
    single_sizes: tuple[int, ...] = scenes.SIZES[1]
    """Possible diameters of a single shape, in pixels."""
    types: dict[str, float] = Field(default_factory=dict)
    """Relative frequency of each task type; 1 for types that are not listed."""

    def draw(self, seed: int, shard: int, count: int) -> list[Example]:
        """Draws examples of this phase, as a pure function of the arguments."""
        return draw_examples(seed, shard, count, self.words_share, self.single_sizes, self.types)


class TinyTraining(Settings):
    """Settings of the training. The model card of the folder that ships has the settings with which it was made."""

    seed: int = 0
    """Seed of the initial weights, of the drawn images, and of times and noise."""
    threads: int = Field(2, ge=1)
    """CPU threads, and number of processes that draw images."""
    autoencoder_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the autoencoder's training. `auto` uses bfloat16 if the processor has hardware for it, which halves the
    time. The transformer always uses float32, because its small products would not become faster."""
    autoencoder_steps: int = Field(1500, ge=1)
    """Number of optimizer steps of the autoencoder."""
    autoencoder_batch: int = Field(24, ge=1)
    """Number of images per step of the autoencoder."""
    autoencoder_lr: float = 2e-3
    """Learning rate of AdamW for the autoencoder; `warmup` and a linear fall in the last 40 % of the steps scale it."""
    pull: float = 0.3
    """Weight of the squared distance between latents and the principal components of patches."""
    latent_noise: float = 0.1
    """Standard deviation of noise in the decoder's training, so that it smooths small errors of the transformer."""
    compile: bool = True
    """Whether the transformer is compiled if there is a C++ compiler. This takes about 90 s and makes a step 20 % faster."""
    batch: int = Field(64, ge=1)
    """Number of images per step of the transformer."""
    lr: float = 1e-3
    """Learning rate of AdamW, which trains everything but the matrices of the blocks; `warmup` and the phases scale it."""
    muon_lr: float = 2e-3
    """Learning rate of Muon, which trains these matrices, scaled in the same way."""
    warmup: int = Field(100, ge=1)
    """Number of steps in which the learning rates rise linearly from zero."""
    ema: float = 0.995
    """Decay of the exponential moving average of the weights, which is what is exported; early steps use a smaller decay."""
    phases: tuple[Phase, ...] = (
        Phase(steps=10000, fall=0.4, shards=16, words_share=0.4, single_sizes=(32, 48)),
        Phase(steps=2000, rate=0.5, words_share=0.15),
        Phase(steps=5000, rate=0.7, words_share=0.1, types={"two_object": 2, "counting": 2, "position": 3, "color_attr": 3}),
    )
    """The phases. Scenes take longer to learn than words, most of all those with two shapes that must not be confused."""
    prompt_dropout: float = 0.1
    """Probability that the prompt of an image is dropped, which classifier-free guidance needs."""
    shard_size: int = Field(2048, ge=1)
    """Number of images that are drawn, encoded and kept in one file."""
    time_mean: float = 0.5
    """Location of the logit-normal times. It is above 0 because high noise decides which letters and shapes appear."""
    shift: float = 1.5
    """Shift of the exported scheduler's times towards high noise."""
    call_steps: int = Field(20, ge=1)
    """Number of sampling steps that the exported `alignbench.json` sets."""
    call_guidance: float = 1.0
    """Guidance scale that the exported `alignbench.json` sets; 1 is no guidance."""
    save_every: int = Field(125, ge=1)
    """Number of steps between checkpoints."""

    @model_validator(mode="after")
    def _shards_hold_batches(self) -> Self:
        if self.batch > self.shard_size:
            raise ValueError(f"batch={self.batch} images do not fit into shards of shard_size={self.shard_size}")
        return self

    def autoencoder_autocast(self) -> torch.autocast:
        """Makes the context in which the autoencoder is trained; see `autoencoder_precision`."""
        precision = self.autoencoder_precision
        use = precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(torch.device("cpu")))
        return torch.autocast("cpu", torch.bfloat16, enabled=use)


def patch_projection(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The projection to principal components of 4x4 patches, towards which latents are regularised, as a convolution.

    A component with standard deviation d is scaled to sqrt(d). With equal deviations (whitening) the transformer would spend
    its capacity on fine detail; with d itself, detail would be lost in the noise. The variance over all components is 1.

    Returns:
        The kernel [C, 3, 4, 4] and the offset [C].
    """
    patches = functional.pixel_unshuffle(pixels, PATCH).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = patches.mean(0)
    variance, basis = torch.linalg.eigh(torch.cov(patches.mT))
    variance, basis = variance.flip(0)[:LATENT_CHANNELS], basis.flip(1)[:, :LATENT_CHANNELS]
    basis = basis * variance.pow(-0.25) / variance.sqrt().mean().sqrt()
    kernel = basis.mT.reshape(LATENT_CHANNELS, 3, PATCH, PATCH)
    return kernel.float(), (-mean @ basis).float()


def train_autoencoder(settings: TinyTraining, work: Path, log: Any = print) -> AutoencoderKL:
    """Stage 1: trains the autoencoder on images of the first phase.

    Args:
        settings: settings of the training.
        work: folder for checkpoints; a finished autoencoder in it is returned, and an interrupted training resumed.
        log: called with lines about the progress.

    Returns:
        The autoencoder. Its config scales latents to mean 0 and variance 1.
    """
    torch.manual_seed(settings.seed)
    first_phase, total = settings.phases[0], settings.autoencoder_steps
    model = build_autoencoder()
    done = work / "autoencoder"
    if done.exists():
        return AutoencoderKL.from_pretrained(done, use_safetensors=True)
    kernel, offset = patch_projection(
        to_pixels([e.image for e in draw_examples(settings.seed + 3, 0, settings.shard_size, 0.5, first_phase.single_sizes)])
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
        examples = first_phase.draw(settings.seed + 1, step, settings.autoencoder_batch)
        pixels = to_pixels([e.image for e in examples]).contiguous(memory_format=torch.channels_last)
        target = functional.conv2d(pixels, kernel, offset, stride=PATCH)
        loss, squared, distance = _autoencoder_loss(settings, model, autocast, pixels, target, step)
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
    held_out = first_phase.draw(settings.seed + 2, 0, min(HELD_OUT, settings.shard_size))
    error = _set_latent_scale(model.eval(), to_pixels([e.image for e in held_out]))
    log(f"autoencoder held-out squared error {error:.5f}")
    write_folder(done, model.save_pretrained)
    write_atomically(work / "autoencoder_history.json", lambda p: p.write_text(json.dumps(history), encoding="utf-8"))
    return model


def _autoencoder_loss(
    settings: TinyTraining, model: AutoencoderKL, autocast: torch.autocast, pixels: Tensor, target: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a batch, its squared error, and the squared distance of latents to the projection `target`."""
    noise = settings.latent_noise * torch.randn(target.shape, generator=torch.Generator().manual_seed(step))
    with autocast:
        posterior = model.encode(pixels).latent_dist
        restored = model.decode(posterior.mean + noise).sample.float()
    squared = functional.mse_loss(restored, pixels)
    distance = functional.mse_loss(posterior.mean.float(), target)
    spread = (posterior.logvar.float() - 2 * math.log(settings.latent_noise)).square().mean()
    loss = squared + 0.1 * functional.l1_loss(restored, pixels) + settings.pull * distance + 1e-3 * spread
    return loss, squared, distance


@torch.no_grad()
def _set_latent_scale(model: AutoencoderKL, pixels: Tensor) -> float:
    """Sets scale and shift in the model's config so that latents have mean 0 and variance 1; returns the squared error."""
    latents = torch.cat([model.encode(p).latent_dist.mode() for p in pixels.split(64)])
    restored = torch.cat([model.decode(z).sample for z in latents.split(64)])
    model.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return functional.mse_loss(restored, pixels).item()


class LatentPool:
    """Drawn and encoded examples in shards, by phase. They are made once and kept in the work folder.

    Attributes:
        words, letters: the tokenizers of the two text encoders.
        empty: token ids of the empty prompt for each of the two, int64 [1, SEQUENCE_LENGTH].
        shards: for each phase, its shards.
    """

    def __init__(self, settings: TinyTraining, work: Path, log: Any) -> None:
        self.words, self.letters = word_tokenizer(), letter_tokenizer()
        self.empty = tokenize(self.words, [""]), tokenize(self.letters, [""])
        folder = work / "latents"
        folder.mkdir(exist_ok=True)
        phases = [phase for phase in settings.phases for _ in range(phase.shards)]
        paths = [folder / f"{i:03d}.safetensors" for i in range(len(phases))]
        missing = [(i, path) for i, path in enumerate(paths) if not path.exists()]
        if missing:
            log(f"drawing and encoding {len(missing)} x {settings.shard_size} images")
            context = get_context("spawn")
            with safe_children(), ProcessPoolExecutor(settings.threads, context, initializer=begin_child) as workers:
                jobs = [workers.submit(_make_shard, settings, phases[i], i, work / "autoencoder", path) for i, path in missing]
                for job in jobs:
                    job.result()
        shards = iter([load_file(path) for path in paths])
        self.shards = [list(islice(shards, phase.shards)) for phase in settings.phases]

    def shard(self, phase: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The latents, float16 [N, C, 16, 16], and the word ids and letter ids, int64 [N, SEQUENCE_LENGTH]."""
        shards = self.shards[phase]
        shard = shards[epoch % len(shards)]
        return shard["latents"], shard["words"], shard["letters"]


def _make_shard(settings: TinyTraining, phase: Phase, index: int, autoencoder: Path, path: Path) -> None:
    torch.set_num_threads(1)
    model = AutoencoderKL.from_pretrained(autoencoder).eval().to(memory_format=torch.channels_last)
    examples = phase.draw(settings.seed, index, settings.shard_size)
    with torch.no_grad():
        latents = torch.cat([model.encode(p).latent_dist.mode() for p in to_pixels([e.image for e in examples]).split(32)])
    latents = (latents - model.config.shift_factor) * model.config.scaling_factor
    prompts = [e.prompt for e in examples]
    tensors = {"latents": latents.half().contiguous()}
    tensors |= {"words": tokenize(word_tokenizer(), prompts), "letters": tokenize(letter_tokenizer(), prompts)}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def train_transformer(settings: TinyTraining, work: Path, log: Any = print) -> TextAndTransformer:
    """Stage 2: trains the transformer with its text encoders on latents of the autoencoder in `work`.

    Args:
        settings: settings of the training.
        work: folder with the autoencoder, for latents and checkpoints; an interrupted training is resumed.
        log: called with lines about the progress.

    Returns:
        The model with averaged weights.
    """
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
        log(f"resuming at step {start}")
    began, losses = time.perf_counter(), []
    model.train()
    total = sum(phase.steps for phase in settings.phases)
    for step in range(start, total):
        phase, factor = schedule(settings, step)
        for optimizer, lr in zip(optimizers, (settings.muon_lr, settings.lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        loss = _flow_matching_loss(forward, settings, pool, phase, step)
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
            log(f"transformer step {step + 1} loss {history[-1][1]:.4f} {pace:.2f} s per step")
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


def _flow_matching_loss(forward: Any, settings: TinyTraining, pool: LatentPool, phase: int, step: int) -> Tensor:
    """The flow-matching loss of one step's batch, whose examples, times and noise are a function of the seed and the step."""
    epoch, position = divmod(step, settings.shard_size // settings.batch)
    latents, words, letters = pool.shard(phase, epoch)
    order = np.random.default_rng([settings.seed, epoch]).permutation(settings.shard_size)
    chosen = torch.from_numpy(order[position * settings.batch : (position + 1) * settings.batch])
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    x0, word_ids, letter_ids = latents[chosen].float(), words[chosen], letters[chosen]
    dropped = torch.rand(settings.batch, 1, generator=generator) < settings.prompt_dropout
    word_ids, letter_ids = torch.where(dropped, pool.empty[0], word_ids), torch.where(dropped, pool.empty[1], letter_ids)
    sigma = torch.sigmoid(settings.time_mean + torch.randn(settings.batch, generator=generator))
    noise = torch.randn(x0.shape, generator=generator)
    s = sigma.view(-1, 1, 1, 1)
    velocity = forward((1 - s) * x0 + s * noise, sigma, word_ids, letter_ids)
    return functional.mse_loss(velocity, noise - x0)


def export(
    settings: TinyTraining, autoencoder: AutoencoderKL, model: TextAndTransformer, out: Path
) -> StableDiffusion3Pipeline:
    """Stage 3: writes the diffusers folder in bfloat16, with `alignbench.json`, and returns its pipeline."""
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
    # Large parts are bfloat16. Text encoders are float32, because transformers loads them in the dtype of the file.
    pipeline.transformer.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    pipeline.save_pretrained(out, safe_serialization=True)
    # transformers 5 writes a new name of this class, which transformers 4 does not know. Both know this name.
    for path in (out / "model_index.json", *out.glob("tokenizer*/tokenizer_config.json")):
        path.write_text(path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    # diffusers writes the path from which a component was read; it is removed.
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
    """Runs all stages; resumes an earlier call with the same `work` folder and settings.

    Args:
        settings: settings of the training.
        work: folder for checkpoints.
        out: the diffusers folder to write.
        log: called with lines about the progress.

    Raises:
        UserError: `out` is taken, `work` has other content, or another process uses one of them.
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
    """Raises UserError if `work` has the stages of another training, which would be exported with these settings.

    Phases may be added to those in the folder.
    """
    path, now = work / "settings.json", settings.model_dump(mode="json")
    if not path.exists() and not is_free(work):
        raise UserError(f"{work} is not the folder of a training; choose another --work folder")
    kept = json.loads(path.read_text()) if path.exists() else now
    compared = now | {"phases": now["phases"][: len(kept.get("phases", []))]}
    changed = [k for k, v in compared.items() if kept.get(k) != v and k not in FREE_TO_CHANGE]
    if changed:
        differences = ", ".join(f"{k} {kept.get(k)} (now {now[k]})" for k in changed)
        raise UserError(f"{work} has a training with other settings: {differences}; choose another --work folder")
    text = json.dumps(now, indent=2) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def _optimizers(model: TextAndTransformer, settings: TinyTraining) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the attention and feed-forward matrices of the transformer's blocks, and AdamW for all other parameters."""
    blocks = model.transformer.transformer_blocks.named_parameters()
    matrices = [p for name, p in blocks if p.ndim == 2 and ("attn." in name or "ff" in name)]
    return muon_and_adamw(matrices, model.parameters(), muon_lr=settings.muon_lr, lr=settings.lr)


def _compiled(model: nn.Module, log: Any) -> Any:
    if not (shutil.which("g++") or shutil.which("clang++")):
        log("there is no C++ compiler: the transformer is not compiled and runs 20 % slower")
        return model
    return torch.compile(model, dynamic=False)


def schedule(settings: TinyTraining, step: int) -> tuple[int, float]:
    """The index of the phase of a step of the transformer's training, and the factor on its learning rates."""
    ends = list(accumulate(phase.steps for phase in settings.phases))
    index = bisect_right(ends, step)
    phase = settings.phases[index]
    return index, phase.rate * min(1.0, (step + 1) / settings.warmup, (ends[index] - step) / (phase.fall * phase.steps))


def _save_atomically(state: dict[str, Any], path: Path) -> None:
    write_atomically(path, lambda partial: torch.save(state, partial))
