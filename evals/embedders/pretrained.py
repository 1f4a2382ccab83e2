"""Opens the models of transformers that evals use, from a local folder or from the hub.

The same rules apply as for the folder of a backbone: only classes of the installed package are used, weights are safetensors,
and no code from the folder is run.
"""

import os
from pathlib import Path
from typing import Any

from alignbench import UserError
from alignbench.backbones.pipelines.trust import check_folder, lacking
from alignbench.errors import first_line
from alignbench.runtime import hub
from evals.embedders.processors import torchvision


def open_pretrained(model: str, processor: str, name: str, what: str, *, processor_from: str | None = None) -> tuple[Any, Any]:
    """Opens a model in float32, frozen, and the processor of its inputs.

    Args:
        model: the model's class in transformers.
        processor: the processor's class in transformers.
        name: a local folder or a hub id.
        what: the kind of model, for messages.
        processor_from: the folder or hub id of the processor; None for `name`.

    Raises:
        UserError: the model cannot be opened, weights are missing, or its folder contains something that is not trusted.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    hub.require({name: what} | ({processor_from: what} if processor_from else {}))
    try:
        source, options = _source(name)
        network, loading = getattr(transformers, model).from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **options
        )
        source, options = _source(processor_from or name)
        preparation = getattr(transformers, processor).from_pretrained(
            source, trust_remote_code=False, **options, **torchvision()
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{name!r} does not open as a {what}, neither as a local folder nor from the hub: {reason}") from error
    if missing := lacking(network, loading):
        raise UserError(f"{name!r} lacks {len(missing)} of the weights of a {what}, among them {missing[0]}")
    return network.float().eval().requires_grad_(False), preparation


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """What transformers is given for a folder or hub id, and whether it may use the hub."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        check_folder(folder)
        return str(folder), {"local_files_only": True}
    if hub.is_local(name):
        raise UserError(f"there is no folder {name!r}")
    return name, {}
