"""Pools of a model's own images, whose diversity is reduced by choosing among them.

Colours are chosen by a plain reading of the pixels, not by a detector of a metric on trial. `one noise` chooses by none of an
image's content: its images begin near one initial noise, so that they are variations of one image of the model.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from alignbench import flow
from alignbench.backbone import Backbone
from alignbench.embedded.drawing.palette import BACKGROUNDS, COLORS, nearest
from alignbench.rollouts.executor import decode, predict
from alignbench.trial.pools import COLLAPSED, EQUAL, REFERENCE, TREATMENTS, Builder, Condition, Pool, treated

OWN = "own"
"""The source of images by the model."""
IMAGES, STEPS = 64, 8
"""Images of a prompt, and denoising steps of each."""
NEAR = 0.9
"""Correlation of initial noises that are near each other."""
MICRO_BATCH = 64


def own_pool(policy: Backbone, prompt: str, rng: np.random.Generator) -> Pool:
    """Samples a prompt's images and makes the conditions among them.

    Args:
        policy: the model.
        prompt: the prompt.
        rng: the generator.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    noise = torch.randn(IMAGES + REFERENCE + COLLAPSED, *policy.latent_shape, generator=generator)
    near = slice(IMAGES + REFERENCE, None)
    noise[near] = NEAR * noise[0] + (1 - NEAR**2) ** 0.5 * noise[near]
    own = decode(policy, _sample(policy, prompt, noise.to(policy.device)), MICRO_BATCH)
    builder = Builder()
    free, reference, one_noise = np.split(builder.add(own), [IMAGES, IMAGES + REFERENCE])
    backgrounds, inks = zip(*map(read_colors, own[free]), strict=True)
    conditions = {
        "color": Condition("planted", free[_dominant(inks)], free),
        "background": Condition("planted", free[_dominant(backgrounds)], free),
        "one noise": Condition("planted", one_noise, free[1:]),
        EQUAL: Condition("equal", free[:0], free),
    }
    for treatment in TREATMENTS:
        changed = treated(own[free[-COLLAPSED:]], rng, treatment)
        conditions[treatment] = Condition("harmless", free[:0], builder.add(changed))
    images = builder.images()
    # A changed image has no other latent than the encoder's, so the unchanged ones are encoded as well.
    return Pool(OWN, prompt, images, policy.encode_images(list(images)).cpu(), free, reference, conditions)


def read_colors(image: np.ndarray) -> tuple[str, str]:
    """Reads the names of an image's background and of its ink.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        The background that is nearest to the median of the image's rim, and the colour that is nearest to the median of the
        tenth of the pixels that differ most from it.
    """
    rim = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)
    distance = np.linalg.norm(image.astype(np.float64) - rim, axis=2)
    ink = np.median(image[distance >= np.quantile(distance, 0.9)], axis=0)
    return nearest(rim, BACKGROUNDS), nearest(ink, COLORS)


def _dominant(values: Sequence[str]) -> np.ndarray:
    """Marks the images with the most frequent value: bool [N]."""
    ((most, _),) = Counter(values).most_common(1)
    return np.array([value == most for value in values])


@torch.no_grad()
def _sample(policy: Backbone, prompt: str, x: Tensor) -> Tensor:
    """Final latents from these initial noises, by the deterministic ODE."""
    sigmas = policy.sigmas(STEPS).tolist()
    conditioning, group = policy.encode([prompt]), torch.zeros(len(x), dtype=torch.long, device=x.device)
    for sigma, following in pairwise(sigmas):
        velocity = predict(policy, x, sigma, conditioning, group, MICRO_BATCH)
        x = flow.unchecked_step(x, velocity, sigma, following, 0.0, "ode").x_next
    return x
