"""The fronts of a comparison: made once, found again for its runs, and told where they cannot be made."""

from pathlib import Path

from alignbench.comparison.fronts import make_fronts, read_fronts
from alignbench.comparison.grid import Grid
from alignbench.comparison.planning import plan_grid, read_request


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
