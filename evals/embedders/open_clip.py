"""CLIP models of open_clip, and files of weights, local or on the hub."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from alignbench import UserError
from alignbench.backbones.pipelines.trust import plain_weights
from alignbench.errors import did_you_mean, first_line
from alignbench.runtime import hub


@dataclass(frozen=True)
class OpenClip:
    """A CLIP model of open_clip in float32.

    Attributes:
        model: the model, with `encode_image` and `encode_text`.
        preprocess: turns an image into the model's input, float32 [3, h, w].
        tokenizer: turns prompts into the model's input, [N, tokens].
    """

    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]


def load_open_clip(
    name: str, weights: str, device: torch.device, *, quick_gelu: bool = False, resize: str | None = None
) -> OpenClip:
    """Opens an architecture of open_clip with the weights of a tag or a local file.

    Args:
        name: the architecture.
        weights: a tag of open_clip, or a local file.
        device: the device that the model runs on.
        quick_gelu: whether to use the activation that OpenAI's weights need. open_clip never sets it for a file; the tag
            `openai` implies it.
        resize: how an image that is not square is resized: open_clip's `shortest` (crop), `longest` (pad with black) or
            `squash`; None for what the weights say.

    Raises:
        UserError: there is no such architecture, or its weights cannot be loaded.
    """
    import open_clip

    hub.require(dict.fromkeys(tag_on_hub(name, weights), f"open_clip's {name}"))
    if name not in open_clip.list_models():
        raise UserError(f"open_clip has no architecture {name!r}{did_you_mean(name, open_clip.list_models())}")
    try:
        with plain_weights():
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, pretrained=weights, force_quick_gelu=quick_gelu or weights == "openai", image_resize_mode=resize
            )
    except Exception as error:  # whatever a missing tag or a damaged file makes its reader raise
        raise UserError(f"open_clip's {name} does not load the weights {weights!r}: {first_line(error)}") from error
    model.eval().requires_grad_(False).to(device)
    return OpenClip(model, preprocess, open_clip.get_tokenizer(name))


def tag_on_hub(name: str, weights: str) -> list[str]:
    """Names where the hub has the weights of an architecture's tag; none for a local file or an unknown tag."""
    import open_clip

    hub_id = open_clip.get_pretrained_cfg(name, weights).get("hf_hub", "")
    return [hub_id.rstrip("/")] if hub_id else []


def weights_file(name: str) -> Path:
    """Finds a file of weights, and downloads it from the hub if necessary.

    Args:
        name: a local path, or OWNER/REPOSITORY/FILE on the hub.

    Raises:
        UserError: it is neither, or the hub does not provide it.
    """
    if not weights_on_hub(name):
        return Path(os.path.expanduser(name))
    from huggingface_hub import hf_hub_download

    hub.require({name: "the weights"})
    owner, repository, file = name.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except Exception as error:  # whatever the hub's client makes of a missing network, repository or file
        raise UserError(
            f"the weights {name!r} are not a local file, and the hub does not provide them: {first_line(error)}"
        ) from error


def weights_on_hub(name: str) -> list[str]:
    """Returns a list with the name if it is OWNER/REPOSITORY/FILE on the hub, and an empty one for a local file.

    Raises:
        UserError: it is neither.
    """
    if Path(os.path.expanduser(name)).is_file():
        return []
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file) or owner in (".", "..", "~"):
        raise UserError(f"there is no file of weights {name!r}")
    return [name]
