"""Procedurally drawn pictures with prompts: what the embedded `tiny` backbone is trained on.

`scenes` draws coloured shapes with counts and relations, `lettering` draws short words. Whatever a prompt leaves open
(colour, place, size, font, background) varies in the picture: that is the diversity which alignment may lose.
"""

from alignbench.embedded.drawing.lettering import Lettering, sample_lettering
from alignbench.embedded.drawing.palette import BACKGROUNDS, COLORS, PICTURE_SIZE
from alignbench.embedded.drawing.scenes import Scene, Shape, sample_scene

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "PICTURE_SIZE",
    "Lettering",
    "Scene",
    "Shape",
    "sample_lettering",
    "sample_scene",
]
