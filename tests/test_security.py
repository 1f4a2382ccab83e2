"""Nothing that is read runs, no name leaves its folder, nothing that is shown is markup, nothing listens to everybody."""

import ast
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import typer.testing
import uvicorn
import yaml
from PIL import Image

import alignbench
from alignbench import UserError, load_scorer, run
from alignbench.backbones.tiny import FOLDER as TINY
from alignbench.cli.app import app
from alignbench.cli.options import results_folder
from alignbench.comparison.grid import Grid
from alignbench.comparison.reading import read_results
from alignbench.config.run_config import BudgetConfig, load_config
from alignbench.figures.style import write_figure
from alignbench.files.escaping import slug
from alignbench.files.yaml_files import read_yaml
from alignbench.load import load_backbone
from alignbench.reports import report
from alignbench.reports.plots.gallery import Gallery, image_grid
from evals.embedders.clip import FOLDERS
from tests.alignbench.record_folders import write_run
from tests.support.plugins import toy_config, write_task

ROOT = Path(alignbench.__file__).parents[1]
SOURCES = sorted(f for package in ("alignbench", "objectives", "samplers", "evals") for f in (ROOT / package).rglob("*.py"))


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def poisoned(file: Path) -> Path:
    """Writes weights that make the folder which is returned."""
    ran = file.with_name("it ran")
    torch.save({"weight": Payload(ran)}, file)
    pickle.loads(pickle.dumps(Payload(ran)))
    ran.rmdir()  # which shows that it does; a payload that does nothing would prove nothing
    return ran


# ---------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_code_reads_what_can_run(file: Path) -> None:
    """pickle in its forms, torch.load of more than weights, unsafe YAML, remote code, code from text, a shell."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"} & {m.split(".")[0] for m in modules}
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "pd.read_pickle")
        assert given.get("trust_remote_code", "False") == "False"
        assert given.get("allow_pickle", "False") == given.get("shell", "False") == "False"
        if called.endswith("torch.load"):
            assert given["weights_only"] == "True"


def test_weights_that_are_pickled_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CLIP, an open_clip, a pipeline, and what aesthetic, hpsv2, image-reward and EasyOCR read, which are no safetensors."""
    from evals.embedders.clip import load_clip
    from evals.embedders.features import load_features

    clip = tmp_path / "clip"
    shutil.copytree(FOLDERS["tiny"], clip, ignore=shutil.ignore_patterns("*.safetensors"))
    ran = [poisoned(clip / "pytorch_model.bin")]
    with pytest.raises(UserError, match="does not open as a CLIP"):
        load_clip(str(clip), "cpu", 1)
    ran.append(poisoned(tmp_path / "weights.pt"))
    with pytest.raises(Exception, match=r"(?i)does not load|weights.only"):
        load_features(f"open_clip:ViT-B-32/{tmp_path / 'weights.pt'}", "cpu", 1)
    pipeline = tmp_path / "pipeline"
    shutil.copytree(TINY, pipeline)
    for file in (pipeline / "transformer").glob("*.safetensors"):
        file.unlink()
    ran.append(poisoned(pipeline / "transformer" / "diffusion_pytorch_model.bin"))
    with pytest.raises((UserError, OSError), match="safetensors"):
        load_backbone(str(pipeline), device="cpu")
    from evals.aesthetic import read_layers
    from evals.readers.easyocr import EasyOCRReader

    ran.append(poisoned(tmp_path / "predictor.pth"))
    with pytest.raises(UserError, match="Weights only load failed"):
        read_layers(str(tmp_path / "predictor.pth"))
    ran.append(poisoned(tmp_path / "preference.pt"))
    with pytest.raises(UserError, match="Weights only load failed"):
        load_scorer("hpsv2", weights=str(tmp_path / "preference.pt"), architecture="ViT-B-32", device="cpu").prepare()
    ran.append(poisoned(tmp_path / "reward.pt"))
    package = ModuleType("ImageReward")
    # As its own reader would, told by nobody to be careful.
    package.load = lambda name, **options: torch.load(name, weights_only=False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    with pytest.raises(UserError, match=r"image-reward does not load .*Weights only load failed"):
        load_scorer("imagereward", model=str(tmp_path / "reward.pt"), device="cpu").prepare()
    ran.append(poisoned(tmp_path / "easy.pth"))
    monkeypatch.setattr("easyocr.Reader", lambda *args, **options: torch.load(tmp_path / "easy.pth", weights_only=False))
    with pytest.raises(Exception, match="Weights only load failed"):
        EasyOCRReader("cpu", 1, "all")
    assert not any(folder.exists() for folder in ran)


@pytest.mark.parametrize("entry", [["planted", "Mine"], ["transformer.planted", "Mine"], ["diffusers", "planted"]])
def test_a_models_index_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: list[str]) -> None:
    """Older diffusers imports whatever module the index names, from wherever Python looks."""
    folder = tmp_path / "pipeline"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "transformer": entry}))
    for device in ("cpu", "meta"):
        with pytest.raises(UserError, match="as its transformer; alignbench opens diffusers's SD3Transformer2DModel"):
            load_backbone(str(folder), device=device)
    assert not (tmp_path / "ran").exists()
    assert "planted" not in sys.modules


def test_what_an_eval_looks_through_comes_in_by_the_same_door(tmp_path: Path) -> None:
    """Folders of a CLIP, a DINOv2 and a Mask2Former with code, or with a configuration that asks for some."""
    from evals.detectors.mask2former import Mask2FormerDetector
    from evals.embedders.clip import load_clip
    from evals.embedders.features import load_features

    opens: list[Callable[[str], Any]] = [
        lambda name: load_clip(name, "cpu", 1),
        lambda name: load_features(f"dinov2:{name}", "cpu", 1),
        lambda name: Mask2FormerDetector(name, "openai", "cpu"),
    ]
    for i, opening in enumerate(opens):
        folder = tmp_path / str(i)
        shutil.copytree(FOLDERS["tiny"], folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "mine.pyc").write_bytes(b"")
        with pytest.raises(UserError, match=r"contains code \(sub/mine.pyc\)"):
            opening(str(folder))
        (folder / "sub" / "mine.pyc").unlink()
        config = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps({**config, "auto_map": {"AutoImageProcessor": "m.M"}}))
        with pytest.raises(UserError, match=r"names code of its own \(auto_map\)"):
            opening(str(folder))


@pytest.mark.parametrize("place", ["pipeline.py", "transformer/mine.py"])
def test_code_in_a_models_folder_is_refused(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / place).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "transformer": ["mine", "Mine"]}))
    with pytest.raises(UserError, match=rf"contains code \({place}\), which alignbench does not run from a model's folder"):
        load_backbone(str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_yaml_file_that_asks_for_an_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("seed: !!python/object/apply:os.mkdir [made]")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(tmp_path / "evil.yaml")


def test_a_checkpoint_holds_nothing_but_tensors_and_json(tmp_path: Path) -> None:
    run(toy_config(write_task(tmp_path), objective="ppo", ema={"decay": 0.9, "every": 1}), tmp_path / "run")
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert {f.suffix for f in folder.iterdir()} == {".safetensors", ".json", ""}
    assert {f.name for f in folder.iterdir() if not f.suffix} == {"SHA256SUMS"}


# ---------------------------------------------------------------------------------------------------- what is named

EVIL = ("../../escaped", "..", "/etc/cron.d/x", "a/b", 'q"<script>alert(1)</script>', "x\ny", "a|b")


@pytest.mark.parametrize("name", EVIL)
def test_names_stay_inside_the_results_folder(name: str) -> None:
    inside = results_folder(name, name)
    assert inside.parent == Path("results")
    assert inside.name not in ("", ".", "..")
    assert "/" not in slug(name)
    assert slug(name) not in (".", "..")
    budget = BudgetConfig(model_rows=1)
    grid = Grid(
        objectives=["tmpo"], samplers=["fixed_tree"], tasks=[name], seeds=[0], backbone="tiny", preset="smoke", budget=budget,
        threads=1,
    )  # fmt: skip
    (cell,) = grid.cells()
    assert Path("runs", cell.id).parent == Path("runs")
    assert cell.id not in ("", ".", "..")


def test_prompts_name_no_file_and_break_no_picture(tmp_path: Path) -> None:
    """Prompts with paths, formulas, markup and line ends, on toy images, up to the plots of the run."""
    prompts = [*(f"{name} {i}" for i, name in enumerate(EVIL) if "\n" not in name), "costs $5_{ and $6^", "{}%s\\x00 [/bold]"]
    task = write_task(tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(f"train {p}" for p in prompts))
    (tmp_path / "eval.txt").write_text("\n".join(prompts))
    before = {f for f in tmp_path.parent.rglob("*") if tmp_path / "run" not in f.parents}
    run(toy_config(task, save_images=True), tmp_path / "run")
    assert {f for f in tmp_path.parent.rglob("*") if tmp_path / "run" not in f.parents} - before == {tmp_path / "run"}
    names = {f.name for f in (tmp_path / "run").rglob("*") if f.is_file()}
    assert all(all(c.isalnum() or c in "._-" for c in name) for name in names)
    picture = Image.new("RGB", (4, 4))
    shown = Gallery({"tmpo x $y_{": [[picture]]}, {"tmpo x $y_{": [[0.5]]}, ["costs $5_{ and $6^"], "$m_{")
    write_figure(tmp_path / "grid.png", image_grid(shown))


# ---------------------------------------------------------------------------------------------------- what is shown


def test_no_name_of_a_record_is_markup_in_a_report(tmp_path: Path) -> None:
    """Objective, sampler, task, metrics, alarms, prompts, versions and commands that would be tags, columns or links."""
    evil = "<img src=x onerror=alert(1)>|`](javascript:alert(2))"
    folder = write_run(tmp_path / "results" / "r", objective=evil, prompts=(evil, "plain"))
    text = (folder / "result.json").read_text()
    data = json.loads(text)
    data["run"] |= {"sampler": evil, "task": evil, "backbone": evil, "id": evil}
    data["alarms"] = [evil]
    data["environment"] = {"python": evil, "command": evil}
    data["protocol"]["evals"] = {evil: {"settings": evil}}
    data["metrics"][evil] = data["metrics"]["ocr"]
    (folder / "result.json").write_text(json.dumps(data))
    assert read_results(tmp_path / "results").runs[0].result.alarms == [evil]
    report.write_report(tmp_path / "results")
    page = (tmp_path / "results" / "report.html").read_text()
    assert "<img src=x" not in page
    assert "onerror=alert(1)&gt;" in page  # it is there, as text
    lines = (tmp_path / "results" / "report.md").read_text().splitlines()
    prose = [line for line in lines if not line.startswith("    ")]  # indented lines are code, where nothing is markup
    prose = [re.sub(r"^!\[[\w ,:]+\]\(plots/[\w/]+\.png\)$", "", line) for line in prose]  # our own images
    assert not any("<img" in line.replace("\\<", "") or "](" in line.replace("\\]", "") for line in prose)
    tables = [[line for line in prose if line.startswith(start)] for start in ("| method", "| \\<img")]
    assert len(tables[1]) == 3  # values, differences to the base model, and settings
    for head, row in zip(*tables, strict=False):  # published tables follow
        assert head.replace("\\|", "").count("|") == row.replace("\\|", "").count("|")


def test_the_terminal_shows_names_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are no styles: a folder called `[/red]` ends no run with an error."""
    from alignbench.cli.views.run import Terminal

    out = tmp_path / "[/red] [bold]"
    run(toy_config(write_task(tmp_path)), out, console=Terminal())
    assert "[/red]" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- what listens


def test_the_scorer_service_listens_to_this_machine_alone_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: seen.append(options))
    for arguments in ([], ["--host", "0.0.0.0"]):
        done = typer.testing.CliRunner().invoke(app, ["serve-scorer", "tests.support.plugins:Brightness", *arguments])
        assert done.exit_code == 0, done.output
    assert [options["host"] for options in seen] == ["127.0.0.1", "0.0.0.0"]


def test_the_scorer_service_limits_a_request_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignbench.scoring import serving

    seen: list[int] = []
    monkeypatch.setattr(serving, "application", lambda scorer, *, max_bytes, **_: seen.append(max_bytes))
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: None)
    for arguments in ([], ["--max-mb", "1"]):
        typer.testing.CliRunner().invoke(app, ["serve-scorer", "tests.support.plugins:Brightness", *arguments])
    assert seen == [64 * 2**20, 2**20]


def test_the_scorer_service_asks_for_the_token_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignbench.scoring import serving

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(serving, "application", lambda scorer, **options: seen.append(options))
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: None)
    monkeypatch.delenv("ALIGNBENCH_SCORER_TOKEN", raising=False)
    (tmp_path / "token").write_text("s3cret\n")
    told = []
    for arguments in (
        [],
        ["--token-file", str(tmp_path / "token"), "--allow-host", "Scorer.Lab", "--queue", "3"],
        ["--host", "0.0.0.0"],
        ["--host", "0.0.0.0", "--token-file", str(tmp_path / "token")],
        ["--token-file", str(tmp_path / "none")],
    ):
        done = typer.testing.CliRunner().invoke(app, ["serve-scorer", "tests.support.plugins:Brightness", *arguments])
        told.append(done.stderr)
    assert [options["authorization"] for options in seen] == [None, "Bearer s3cret", None, "Bearer s3cret"]
    assert [options["queue"] for options in seen] == [32, 3, 32, 32]
    assert "scorer.lab" in seen[1]["hosts"]
    assert ["can use this scorer" in line for line in told] == [False, False, True, False, False]
    assert "s3cret" not in "".join(told)
    monkeypatch.setenv("ALIGNBENCH_SCORER_TOKEN", "of the environment")
    typer.testing.CliRunner().invoke(app, ["serve-scorer", "tests.support.plugins:Brightness"])
    assert seen[-1]["authorization"] == "of the environment"


def test_a_config_that_names_a_tasks_path_reads_it_and_writes_nothing_there(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    task = write_task(folder)
    before = sorted(folder.iterdir())
    config = load_config(options=yaml.safe_load(yaml.safe_dump(toy_config(task).resolved())))
    run(config, tmp_path / "run")
    assert sorted(folder.iterdir()) == before
    assert np.isfinite(read_results(tmp_path / "run").runs[0].result.budget.seconds)


def test_the_page_on_security_names_tests_that_are_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    files, names = set(re.findall(r"`(tests/[\w/]+\.py)`", page)), set(re.findall(r"`(test_\w+)`", page))
    assert len(files) >= 5
    assert len(names) >= 5
    assert [file for file in files if not (ROOT / file).is_file()] == []
    tests = (file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    defined = {name for text in tests for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    assert names <= defined
