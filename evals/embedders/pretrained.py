"""Models of transformers that evals look through, from a folder here or from the hub.

They come in as a backbone's folder does: by classes of the installed package, as safetensors, and with nothing run that lies
beside them.
"""

import os
from pathlib import Path
from typing import Any

from alignbench import UserError
from alignbench.backbones.trust import check_folder, lacking
from alignbench.errors import first_line
from alignbench.runtime import hub
from evals.embedders.processors import torchvision


def open_pretrained(model: str, processor: str, name: str, what: str, *, processor_from: str | None = None) -> tuple[Any, Any]:
    """A model in float32, frozen, and what prepares its inputs.

    Args:
        model, processor: classes of transformers.
        name: a local folder or a hub id.
        what: the kind of model, for messages.
        processor_from: where the processor comes from if not from `name`.

    Raises:
        UserError: it does not open, lacks weights, or its folder holds what is not trusted.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    hub.require({name: what} | ({processor_from: what} if processor_from else {}))
    try:
        source, options = _source(name)
        opened, loading = getattr(transformers, model).from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **options
        )
        source, options = _source(processor_from or name)
        prepares = getattr(transformers, processor).from_pretrained(source, trust_remote_code=False, **options, **torchvision())
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{name!r} does not open as a {what}, neither as a local folder nor from the hub: {reason}") from error
    if missing := lacking(opened, loading):
        raise UserError(f"{name!r} lacks {len(missing)} of the weights of a {what}, among them {missing[0]}")
    return opened.float().eval().requires_grad_(False), prepares


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """What transformers takes for a folder or hub id, and whether it may ask the hub."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        check_folder(folder)
        return str(folder), {"local_files_only": True}
    if hub.is_local(name):
        raise UserError(f"there is no folder {name!r}")
    return name, {}
