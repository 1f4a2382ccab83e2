"""The animation of a comparison's distributions, from records that stand in for runs."""

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from alignbench import UserError
from alignbench.records import distributions
from alignbench.reports.animations import write_animations
from tests.alignbench.figures.test_animation import table
from tests.alignbench.record_folders import write_run

pytestmark = pytest.mark.usefixtures("laid_out")


def keep(run: Path, found: pd.DataFrame) -> None:
    found.to_parquet(run / distributions.FILE, index=False)


def test_runs_with_distributions_on_the_way_are_animated(tmp_path: Path) -> None:
    keep(write_run(tmp_path / "a", objective="tmpo"), table(0, 3, 9))
    keep(write_run(tmp_path / "b", objective="grpo"), table(0, 9))
    write_run(tmp_path / "c", objective="ddpo")
    (file,) = write_animations(tmp_path)
    assert file == tmp_path / "plots" / "distributions.gif"
    with Image.open(file) as gif:
        assert gif.n_frames == 3  # type: ignore[attr-defined]


def test_without_them_it_is_said_how_to_get_them(tmp_path: Path) -> None:
    keep(write_run(tmp_path / "a"), table(0))
    with pytest.raises(UserError, match=r"no run below .* recorded its distribution during training; .* --set snapshots=20"):
        write_animations(tmp_path)
    assert not (tmp_path / "plots").exists()
