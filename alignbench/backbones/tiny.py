"""tiny: the embedded 64x64 model of drawn shapes and short words, with 4 million parameters for CPUs."""

from pathlib import Path
from typing import Literal

from alignbench.backbones.sd3 import SD3

FOLDER = Path(__file__).parent / "weights" / "tiny"


class Tiny(SD3):
    """The folder of the embedded model."""

    class Settings(SD3.Settings):
        path: str = str(FOLDER)
        """Folder of the model; the default is the one that ships."""
        train: Literal["full", "lora"] = "full"
        """What is trained: full, all weights of the transformer; or lora, an adapter."""
        keep_text_encoders: bool = True
        """Whether the text encoders stay in memory after all prompts are encoded."""
