"""tiny: the embedded 64x64 model of drawn shapes and short words; 4 million parameters, made for CPUs."""

from pathlib import Path
from typing import Literal

from alignbench.backbones.sd3 import SD3

FOLDER = Path(__file__).parent / "weights" / "tiny"


class Tiny(SD3):
    class Settings(SD3.Settings):
        path: str = str(FOLDER)
        """The model that ships."""
        train: Literal["full", "lora"] = "full"
        """full: all weights of the transformer. lora: an adapter beside them."""
        keep_text_encoders: bool = True
        """Keep the text encoders in memory once all prompts are encoded."""
