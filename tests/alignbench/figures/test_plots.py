from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.offsetbox import AnnotationBbox
from scipy.special import softmax
from scipy.stats import zscore

from alignbench import Plan, Step, UserError
from alignbench.evaluation.curve import KINDS
from alignbench.evaluation.evaluate import Evaluation
from alignbench.figures import plots, sheets
from alignbench.figures.rollout_tree import TREE, RolloutTree, predictions
from alignbench.figures.rollout_tree import tree as tree_figure
from alignbench.figures.style import write_figure
from alignbench.files.images import MAX_PIXELS, open_image
from alignbench.records.record import Estimate, OnsetRecord, read_result
from alignbench.rollouts.executor import rollout
from tests.alignbench.record_folders import write_run
from tests.support.toys import PROMPTS, ToyBackbone, tree

pytestmark = pytest.mark.usefixtures("laid_out")
REWARDS = [[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 4.0, 5.0]]


def drawn() -> RolloutTree:
    """The second of two groups of 2 x 2 leaves over four steps."""
    forest = rollout(ToyBackbone(), PROMPTS, tree(4, (1, 2), children=2), seed=0)
    forest.rewards = torch.tensor(REWARDS).flatten()
    images = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((8, 2, 2, 3), dtype=np.uint8)
    return RolloutTree.of(forest, images, "ocr", beta=2.0, group=1)


def test_a_drawn_tree_is_one_group() -> None:
    found = drawn()
    assert (found.prompt, found.reward, found.beta) == (PROMPTS[1], "ocr", 2.0)
    assert found.stochastic.tolist() == [False, True, True, False]
    assert found.children.tolist() == [1, 2, 2, 1]
    assert found.images[:, 0, 0, 0].tolist() == [4, 5, 6, 7]
    assert found.rewards.tolist() == REWARDS[1]
    assert found.p.sum() == pytest.approx(1)
    assert found.q == pytest.approx(softmax(2 * zscore(REWARDS[1])), rel=1e-3)  # the deviation has an epsilon


def test_the_branches_of_a_tree_by_hand() -> None:
    axis = tree_figure(drawn()).axes[0]
    lines = [np.asarray(line.get_xydata()).tolist() for line in axis.get_lines() if np.size(line.get_xydata())]
    # Leaves stand at 0, 1, 2, 3; their parents at 0.5 and 2.5; the root at 1.5.
    expected: list[list[list[float]]] = [[[3, y], [4, y]] for y in (0, 1, 2, 3)]
    expected += [[[2, parent], [3, child]] for parent, child in ((0.5, 0), (0.5, 1), (2.5, 2), (2.5, 3))]
    expected += [[[1, 1.5], [2, 0.5]], [[1, 1.5], [2, 2.5]], [[0, 1.5], [1, 1.5]]]
    assert sorted(lines) == sorted(expected)


def test_a_tree_has_the_images_that_are_predicted_where_branches_split(tmp_path: Path) -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, tree(4, (1, 2), children=2), seed=0)
    forest.rewards = torch.tensor(REWARDS).flatten()
    # The state before step 1, and both before step 2; each is x - sigma v.
    sigma, rows = toy.sigmas(4), [r for r, group in enumerate(forest.row_group.tolist()) if group == 1]
    wanted = torch.stack(
        [forest.states[forest.rows[r]] - sigma[s] * forest.row_velocity[r] for r, s in zip(rows, (1, 2, 2), strict=True)]
    )
    assert torch.equal(predictions(forest, group=1), wanted)
    images = np.zeros((8, 2, 2, 3), dtype=np.uint8)
    predicted = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((3, 2, 2, 3), dtype=np.uint8)
    found = RolloutTree.of(forest, images, "ocr", beta=2.0, group=1, predicted=predicted)
    assert found.split_states == [(1, 0), (2, 0), (2, 1)]
    assert shown_at(found) == [(1, 1.5), (2, 0.5), (2, 2.5), (4, 0), (4, 1), (4, 2), (4, 3)]
    # A growing tree: before step 0, 1 and 2, then the lines of step 2, and the leaves at the end.
    counts = [len(shown_at(found, until)) for until in range(5)]
    assert counts == [0, 1, 3, 3, 7]
    found.write(tmp_path / TREE)
    np.testing.assert_array_equal(RolloutTree.read(tmp_path / TREE).predicted, predicted)
    found._replace(predicted=predicted[:2]).write(tmp_path / TREE)
    with pytest.raises(UserError, match="the shapes or types of its parts do not match"):
        RolloutTree.read(tmp_path / TREE)


def shown_at(drawn: RolloutTree, until: int | None = None) -> list[tuple[float, float]]:
    """The points of a tree's axis at which images are."""
    axis = tree_figure(drawn, until).axes[0]
    return [(float(box.xy[0]), float(box.xy[1])) for box in axis.artists if isinstance(box, AnnotationBbox)]


def test_a_tree_of_an_earlier_version_has_no_predicted_images(tmp_path: Path) -> None:
    parts = drawn()._asdict()
    del parts["predicted"]
    (tmp_path / TREE).parent.mkdir()
    np.savez_compressed(tmp_path / TREE, **parts)
    read = RolloutTree.read(tmp_path / TREE)
    assert len(read.predicted) == 0
    assert len(shown_at(read)) == 4


def test_states_that_are_not_trained_on_have_no_predicted_images() -> None:
    steps = (Step("cps", 0.7, 2, scored=False), Step("cps", 0.7, 2), Step())
    assert len(predictions(rollout(ToyBackbone(), PROMPTS, Plan(steps), seed=0))) == 0
    assert len(predictions(rollout(ToyBackbone(), PROMPTS, Plan((Step("cps", 0.7), Step()), roots=3), seed=0))) == 0


def test_a_leaf_takes_at_least_64_pixels_of_a_plot(tmp_path: Path) -> None:
    red = np.zeros((4, 64, 64, 3), dtype=np.uint8)
    red[..., 0] = 255
    write_figure(tmp_path / "tree.png", tree_figure(drawn()._replace(images=red)))
    pixels = np.asarray(open_image(tmp_path / "tree.png"))[..., :3]
    is_red = (pixels == (255, 0, 0)).all(-1)
    assert is_red.any(0).sum() == pytest.approx(128, abs=1)  # the width; 128 / 150 inches at 150 pixels per inch
    assert is_red.any(1).sum() == pytest.approx(4 * 128, abs=4)


def test_a_tree_shows_the_target_q_of_an_objective_that_has_one_alone() -> None:
    def legend(beta: float) -> list[str]:
        forest = rollout(ToyBackbone(), PROMPTS, tree(4, (1, 2), children=2), seed=0)
        forest.rewards = torch.tensor(REWARDS).flatten()
        images = np.zeros((8, 2, 2, 3), dtype=np.uint8)
        (found,) = tree_figure(RolloutTree.of(forest, images, "ocr", beta)).legends
        return [text.get_text() for text in found.get_texts()]

    assert legend(2.0) == ["p (policy)", "q (target, beta = 2)"]
    assert legend(float("nan")) == ["p (policy)"]


def test_a_tree_is_drawn_again_from_the_record(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    of_run = drawn()
    of_run.write(run / TREE)
    read = RolloutTree.read(run / TREE)
    for name, value in of_run._asdict().items():
        np.testing.assert_array_equal(getattr(read, name), value)
    assert run / "plots" / "tree.png" in plots.plot_run(run)
    (run / TREE).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"tree\.npz is not a drawing of a rollout tree"):
        RolloutTree.read(run / TREE)
    told: list[str] = []
    written = plots.plot_run(run, told.append)
    assert [file.name for file in written] == ["curves.png", "diagnostics.png", "changes.png"]
    assert len(told) == 1
    assert told[0].startswith("left out: plots/tree.png: ")


def test_changes_have_the_spread_of_the_base_model_as_their_unit_where_it_has_one(tmp_path: Path) -> None:
    result = read_result(write_run(tmp_path / "run"))
    zero = Estimate(value=0.0, lower=0.0, upper=0.0, n=2)
    moved = Estimate(value=5.0, lower=4.0, upper=6.0, n=2)
    distance = result.metrics["lgmd"].model_copy(update={"base": zero, "difference": moved})
    result.metrics["path_kl"] = distance
    figure = plots.changes(result)
    assert figure is not None
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["OCR score (trained on) →", "LGMD →"]
    ocr = result.metrics["ocr"]
    assert ocr.base.upper is not None
    assert ocr.base.lower is not None
    assert ocr.difference.value is not None
    points = [float(np.asarray(line.get_xdata())[0]) for line in axis.get_lines() if line.get_marker() == "o"]
    assert points[0] == pytest.approx(ocr.difference.value / ((ocr.base.upper - ocr.base.lower) / 2))


def test_a_sheet_is_no_larger_than_what_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 images of 40 x 40 pixels are 76,800: a third of their sides fits into 10,000 (14 x 14 each)."""
    assert sheets.SHEET_PIXELS < MAX_PIXELS
    monkeypatch.setattr(sheets, "SHEET_PIXELS", 10_000)
    pictures = np.zeros((48, 40, 40, 3), np.uint8)
    pictures[:] = np.arange(48, dtype=np.uint8)[:, None, None, None]
    sheets.grid(pictures, 4).save(tmp_path / "sheet.png")
    sheet = np.asarray(open_image(tmp_path / "sheet.png"))
    assert sheet.shape == (3 * 14, 16 * 14, 3)
    assert sheet[::14, ::14, 0].ravel().tolist() == list(range(48))


def test_large_pictures_before_and_after_are_shrunk(tmp_path: Path) -> None:
    """Of 1,024 pixels a side, ten prompts of four images would make a drawing of 330 million pixels."""
    rows = [(p, f"prompt {p}", i, "reward", 0.5) for p in range(2) for i in range(2)]
    table = pd.DataFrame(rows, columns=["prompt_index", "prompt", "image", "metric", "value"])
    found = Evaluation(table, np.full((4, 1024, 1024, 3), 7, np.uint8), ["prompt 0", "prompt 1"], {}, {})
    file = write_figure(tmp_path / "before_after.png", sheets.before_after(found, found, "reward", 2))
    assert open_image(file).width < 4 * 256 * 2 + 600  # each pixel of an image is 150 / 90 wide


def test_reward_and_diversity_stand_against_path_kl_in_units_of_their_largest_change(tmp_path: Path) -> None:
    values = {"ocr": [0.5, 0.6, 0.9], "lgmd": [0.4, 0.5, 0.2], "path_kl": [0.0, 2.0, 7.0]}
    rows = [
        (10 * i, 100 * i, 1.0, prompt, f"prompt {prompt}", metric, of_metric[i] + shift)
        for metric, of_metric in values.items()
        for i in range(3)
        for prompt, shift in enumerate((-0.1, 0.1))
    ]
    fall = Estimate(value=0.3, lower=0.2, upper=0.4, n=2)
    turn = OnsetRecord(reward="ocr", metric="lgmd", iteration=10, lower=10, upper=20, fall=fall, over_optimised=True)
    result = read_result(write_run(tmp_path / "run")).model_copy(update={"onsets": [turn]})
    result.metrics["lgmd"].role = "judge"
    axes = plots.along_training(pd.DataFrame(rows, columns=list(KINDS)), result).axes
    (panel,) = [axis for axis in axes if axis.get_xlabel().startswith("path KL")]
    reward, diversity, ring, _ = (np.asarray(line.get_xydata()) for line in panel.get_lines())
    assert reward.tolist() == [pytest.approx([0, 0]), pytest.approx([2, 0.25]), pytest.approx([7, 1])]
    assert diversity.tolist() == [pytest.approx([0, 0]), pytest.approx([2, 0.5]), pytest.approx([7, -1])]
    assert ring.tolist() == [pytest.approx([2, 0.5])]
    legend = panel.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["OCR score (trained on): +0.4", "LGMD: -0.2"]


def test_without_path_kl_there_are_the_panels_over_the_iteration_alone(tmp_path: Path) -> None:
    rows = [(i, i, 1.0, 0, "a", "ocr", 0.1 * i) for i in range(3)]
    axes = plots.along_training(pd.DataFrame(rows, columns=list(KINDS)), read_result(write_run(tmp_path / "run"))).axes
    assert [axis.get_xlabel() for axis in axes] == ["iteration"]


def test_panels_show_the_reward_what_turned_an_independent_metric_and_diversity(tmp_path: Path) -> None:
    result = read_result(write_run(tmp_path / "run"))
    like = next(iter(result.metrics.values()))
    names = ["ocr", "ocr_exact", "sharpness", "entropy", "pixel_diversity", "cosine_diversity", "vendi"]
    roles = ["reward", "reward", *["judge"] * 5]
    result.metrics = {
        name: like.model_copy(update={"role": role, "higher_is_better": True}) for name, role in zip(names, roles, strict=True)
    }
    fall = Estimate(value=0.3, lower=0.2, upper=0.4, n=2)
    turn = OnsetRecord(reward="ocr", metric="entropy", iteration=10, lower=10, upper=20, fall=fall, over_optimised=True)
    chosen = plots._by_interest(result.model_copy(update={"onsets": [turn]}), names)
    assert chosen[:5] == ["ocr", "entropy", "sharpness", "vendi", "cosine_diversity"]
    assert sorted(chosen) == sorted(names)


def test_the_frames_of_a_clip_are_tiles_of_a_square() -> None:
    clips = np.zeros((1, 3, 1, 2, 3), np.uint8)
    clips[0] += np.array([1, 2, 3], np.uint8)[:, None, None, None]
    # Three frames of 1 x 2 pixels: sqrt(1.5) is above 1, so two columns of two rows, and white below.
    white = [255] * 4
    assert sheets.squares(clips)[0, ..., 0].tolist() == [[1, 1, 2, 2], [3, 3, 255, 255], white, white]
    square = np.zeros((2, 3, 3, 3), np.uint8)
    assert sheets.squares(square) is square


def test_a_sheet_shows_clips() -> None:
    clips = np.full((4, 4, 8, 8, 3), 7, np.uint8)
    sheet = sheets.grid(clips, 2)
    # Four clips of 2 x 2 frames beside each other and twelve empty places, enlarged twice.
    assert sheet.size == (16 * 16 * 2, 16 * 2)
