"""The animations of a comparison, from records that stand in for runs."""

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from alignbench import UserError
from alignbench.figures.rollout_tree import TREE
from alignbench.records import distributions
from alignbench.reports.animations import write_animations
from tests.alignbench.figures.test_animation import table
from tests.alignbench.figures.test_plots import drawn
from tests.alignbench.record_folders import write_run

pytestmark = pytest.mark.usefixtures("laid_out")


def keep(run: Path, found: pd.DataFrame) -> None:
    found.to_parquet(run / distributions.FILE, index=False)


def test_runs_with_distributions_on_the_way_are_animated(tmp_path: Path) -> None:
    keep(write_run(tmp_path / "a", objective="tmpo"), table(0, 3, 9))
    keep(write_run(tmp_path / "b", objective="grpo"), table(0, 9))
    write_run(tmp_path / "c", objective="ddpo")
    (file,), failed = write_animations(tmp_path)
    assert failed == []
    assert file == tmp_path / "plots" / "distributions.gif"
    with Image.open(file) as gif:
        assert gif.n_frames == 3  # type: ignore[attr-defined]


def test_without_them_it_is_said_how_to_get_them(tmp_path: Path) -> None:
    keep(write_run(tmp_path / "a"), table(0))
    with pytest.raises(UserError, match=r"no run below .* kept a rollout tree or recorded its .* --set snapshots=20"):
        write_animations(tmp_path)
    assert not (tmp_path / "plots").exists()


def test_the_trees_of_a_comparison_grow_one_for_each_method_and_that_of_a_run_alone(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, objective=name) for name in ("tmpo", "grpo")]
    second = write_run(tmp_path / "again", objective="tmpo", seed=2)
    for run in (*runs, second):
        drawn().write(run / TREE)
    files, failed = write_animations(tmp_path)
    assert [file.name for file in files] == ["tree_tmpo_x_independent.gif", "tree_grpo_x_independent.gif"]
    assert failed == []
    with Image.open(files[0]) as gif:
        assert gif.n_frames == 4 + 2  # type: ignore[attr-defined]  # before each of four steps, the images, and their rewards
    assert write_animations(runs[0])[0] == [runs[0] / "plots" / "tree.gif"]
    (runs[1] / TREE).write_bytes(b"something else")
    files, failed = write_animations(tmp_path)
    assert [file.name for file in files] == ["tree_tmpo_x_independent.gif"]
    assert failed[0].startswith("left out: animation tree_grpo_x_independent.gif of ocr on tiny: ")
    with pytest.raises(UserError, match=r"tree\.npz is not a drawing of a rollout tree"):
        write_animations(runs[1])
