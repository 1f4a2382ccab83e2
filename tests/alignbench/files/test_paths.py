"""`~` is the home folder; a relative path is relative to the current folder, and in a file to that file's folder."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from alignbench import UserError
from alignbench.cli import options
from alignbench.comparison.planning import Request, plan_grid
from alignbench.config.run_config import load_config, parse_assignments, read_settings
from alignbench.files.paths import current_folder, local_path
from alignbench.tasks import load_task
from alignbench.tasks.prompts import read_image_folder
from alignbench.training.pairs import read_pairs
from tests.support.command_line import in_this_process
from tests.support.plugins import toy_config, write_task


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with odd letters in its name, and a current folder apart from it."""
    home, here = tmp_path / "my [home] #1 ä", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return home


def test_tilde_is_the_home_folder_and_an_absolute_path_stays(home: Path) -> None:
    assert local_path("~/x") == home / "x"
    assert local_path("/a/x", Path("/b")) == Path("/a/x")
    assert local_path("x", Path("/b")) == Path("/b/x")
    assert local_path("x~") == Path("x~")


def test_paths_start_at_the_file_or_for_the_command_line_at_the_current_folder(home: Path) -> None:
    (home / "model").mkdir()
    keys = {
        "task": "mine.yaml",
        "pairs": "p.jsonl",
        "backbone": "model",
        "objective": {"name": "dpo", "pairs": "best_worst", "weights": "./w"},
    }
    (home / "c.yaml").write_text(yaml.safe_dump(keys))
    found = load_config(file=home / "c.yaml", sets=["scorer_token_file=~/token"])
    assert found.task == str(home / "mine.yaml")
    assert found.pairs == home / "p.jsonl"
    assert found.backbone.name == str(home / "model")
    assert found.scorer_token_file == home / "token"
    # What is no path stays, under whichever key.
    assert found.objective.settings == {"pairs": "best_worst", "weights": str(home / "w")}
    typed = load_config(options={"task": "sub/mine.yaml", "backbone": "tiny"}, sets=["pairs=p.jsonl", "task=~/t.yaml"])
    assert (typed.task, typed.pairs, typed.backbone.name) == (str(home / "t.yaml"), Path("p.jsonl"), "tiny")
    anchored = typed.anchored()
    assert anchored.pairs == Path.cwd() / "p.jsonl"
    assert load_config(options=anchored.resolved()) == anchored


def test_a_task_file_is_found_from_anywhere_and_its_prompts_beside_it(home: Path) -> None:
    write_task(home)
    assert load_task("~/toy.yaml").train_prompts == [f"train {i}" for i in range(5)]
    (home / "toy.yaml").write_text((home / "toy.yaml").read_text().replace("train.txt", "~/train.txt"))
    assert load_task(str(home / "toy.yaml")).train_prompts[0] == "train 0"
    (Path.cwd() / "link.yaml").symlink_to(home / "toy.yaml")
    with pytest.raises(UserError, match=r"prompts in eval\.txt: No such file"):
        load_task("link.yaml")


def test_a_comparison_holds_absolute_paths_so_that_it_goes_on_from_anywhere(home: Path) -> None:
    write_task(Path.cwd())
    config = toy_config(Path("toy.yaml")).resolved()
    rest = {k: config[k] for k in ("evaluation", "prompts_per_iteration", "save_images")}
    request = Request(
        objectives=["grpo"],
        samplers=["independent"],
        tasks=["toy.yaml"],
        seeds=[0],
        backbone="tests.support.plugins:ToyPolicy",
        preset="smoke",
        budget={"model_rows": 100},
        settings=rest,
    )
    grid = plan_grid(request)
    assert grid.tasks == [str(Path.cwd() / "toy.yaml")]
    assert grid.cells()[0].id == "grpo-independent-toy-s0"
    (home / "parts.yaml").write_text(yaml.safe_dump({"parts": {"a": {"tasks": ["x.yml", "ocr"]}}, "backbone": "./m"}))
    read = read_settings(home / "parts.yaml", "comparison")
    assert read == {"parts": {"a": {"tasks": [str(home / "x.yml"), "ocr"]}}, "backbone": str(home / "m")}


def test_every_option_of_the_command_line_knows_the_home_folder(home: Path) -> None:
    (home / "p.txt").write_text("a cat\n")
    done = in_this_process("prompts", "--out=~/o.jsonl", "--each", "1", "--exclude=~/p.txt", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert (home / "o.jsonl").is_file()
    assert parse_assignments(["evals.geneval.metadata=~/m.jsonl", "x=[~/a, {b: ~/c}]"]) == {
        "evals": {"geneval": {"metadata": str(home / "m.jsonl")}},
        "x": [str(home / "a"), {"b": str(home / "c")}],
    }
    assert options._expanded([Path("~/a"), Path("b")]) == [home / "a", Path("b")]


def test_a_current_folder_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="the current folder has been removed"):
        current_folder()


def test_images_that_a_table_names_may_be_in_the_home_folder(home: Path) -> None:
    (home / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(home / "images" / f"{name}.png")
    (home / "p.csv").write_text("image,prompt\n~/images/a.png,x\nb.png,y\n")
    assert read_image_folder(home / "images", home / "p.csv").prompts == ["x", "y"]
    (home / "pairs.csv").write_text("prompt,chosen,rejected\nx,~/images/a.png,images/b.png\n")
    pair = read_pairs(home / "pairs.csv")[0]
    assert (pair.chosen, pair.rejected) == (home / "images" / "a.png", home / "images" / "b.png")
