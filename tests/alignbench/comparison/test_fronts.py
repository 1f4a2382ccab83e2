"""The fronts of a comparison: made once, found again for its runs, and told where they cannot be made."""

from dataclasses import replace
from pathlib import Path

from alignbench.comparison.fronts import Fronts, make_fronts, read_fronts
from alignbench.comparison.grid import Grid
from alignbench.comparison.planning import plan_grid, read_request
from alignbench.frontier.front import EVALUATION, REWARD
from alignbench.records.record import read_result
from tests.alignbench.record_folders import write_run
from tests.support.fronts import hand_made_front


def grid(folder: Path, extra: str = "") -> Grid:
    """Two seeds, with sets of so many points that a front needs few of them."""
    file = folder / "comparison.yaml"
    file.write_text(
        "objectives: [grpo]\nsamplers: [independent]\nbackbone: gaussian_mixture\npreset: smoke\nseeds: [0, 1]\n"
        "settings: {evaluation: {prompts: 2, images_per_prompt: 200, every: 5, validation_images: 100}" + extra + "}\n"
    )
    return plan_grid(read_request(file), 1)


def test_a_task_has_one_front_for_each_prompt_set_and_a_second_call_makes_none(tmp_path: Path) -> None:
    told: list[str] = []
    made = make_fronts(grid(tmp_path), tmp_path, warn=told.append)
    assert (len(made), told) == (2, [])
    records = [front.record for front in read_fronts(tmp_path).kept]
    kinds = sorted((r.prompt_set, r.set_size, r.exact) for r in records)
    assert kinds == [("evaluation", 200, True), ("validation", 100, True)]
    assert make_fronts(grid(tmp_path), tmp_path, warn=told.append) == []


def test_a_front_that_cannot_be_made_is_told_and_stops_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    made = make_fronts(grid(tmp_path, ", scorer_url: 'http://127.0.0.1:9'"), tmp_path, warn=told.append)
    assert made == []
    (line,) = told
    assert "its reward comes from the scorer at scorer_url" in line


def test_a_damaged_front_is_a_line_of_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "fronts" / "x"
    folder.mkdir(parents=True)
    (folder / "front.json").write_text("{}")
    fronts = read_fronts(tmp_path)
    assert fronts.kept == []
    assert "front.json" in fronts.unreadable[0]


def test_a_run_on_fixed_pairs_has_the_front_of_its_task(tmp_path: Path) -> None:
    result = read_result(write_run(tmp_path / "run")).model_copy(update={"config": {}, "task": {"reward": "1", "pairs": "2"}})
    front = hand_made_front({REWARD: [[0.1]]})
    of_task = {"task": "ocr", "prompt_set": EVALUATION, "config": {}}
    same, other = (
        replace(front, record=front.record.model_copy(update={**of_task, "fingerprint": {"reward": digest}}))
        for digest in ("1", "3")
    )
    assert Fronts([other, same]).of(result) is same
