"""tiny: the embedded 64x64 model of drawn shapes and short words; 4 million parameters, made for CPUs."""

from pathlib import Path
from typing import Literal

from alignbench.backbones.diffusers_folder import DiffusersFolder

FOLDER = Path(__file__).parent / "weights" / "tiny"


class Tiny(DiffusersFolder):
    class Settings(DiffusersFolder.Settings):
        path: str = str(FOLDER)
        train: Literal["full", "lora"] = "full"
