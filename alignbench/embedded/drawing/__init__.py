"""Procedurally drawn images with prompts, on which the embedded backbone `tiny` is trained.

`scenes` draws coloured shapes with counts and relations; `lettering` draws short words. Everything that a prompt leaves open
(colour, place, size, font, background) varies between images. This is the diversity that alignment may lose.
"""

from alignbench.embedded.drawing.lettering import Lettering, sample_lettering
from alignbench.embedded.drawing.palette import BACKGROUNDS, COLORS, IMAGE_SIZE
from alignbench.embedded.drawing.scenes import Scene, Shape, sample_scene

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "IMAGE_SIZE",
    "Lettering",
    "Scene",
    "Shape",
    "sample_lettering",
    "sample_scene",
]
