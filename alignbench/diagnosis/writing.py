"""The folder of a diagnosis: its record and its figure."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from matplotlib.figure import Figure
from pydantic import BaseModel

from alignbench.figures.style import write_figure
from alignbench.files.writing import claimed, fill

D = TypeVar("D", bound=BaseModel)


def measured_into(out: Path, name: str, measure: Callable[[], D], draw: Callable[[D], Figure]) -> D:
    """Measures a diagnosis and writes `NAME.json` and `NAME.png` into the folder `out`, which is claimed before.

    Raises:
        UserError: the folder is taken.
    """
    with claimed(out):
        diagnosis = measure()
        text = diagnosis.model_dump_json(indent=2) + "\n"

        def write(folder: Path) -> None:
            write_figure(folder / f"{name}.png", draw(diagnosis))
            (folder / f"{name}.json").write_text(text, encoding="utf-8")

        fill(out, write, last=f"{name}.json")
    return diagnosis
