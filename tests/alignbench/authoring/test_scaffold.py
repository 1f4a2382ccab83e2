"""`new`: what it writes works as written, under both layouts, and it never destroys anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from alignbench import UserError, load_objective, registry, run
from alignbench.authoring import scaffold
from alignbench.testing import hand_made_forest
from tests.support.plugins import toy_config, write_task

ROOT = Path(__file__).parents[3]
LONGEST = "a" * 40


def python(*arguments: str, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python *arguments` in a process of its own that finds alignbench in `path`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path), "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code, without weights, which is the current folder."""
    for package in ("alignbench", "objectives", "samplers", "evals"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problem(kind: str, name: str, out: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        scaffold.new(kind, name, out)
    return str(caught.value)


def test_each_kind_passes_the_test_that_comes_with_it_in_a_checkout_and_elsewhere(checkout: Path) -> None:
    inside = [scaffold.new(kind, f"my_{kind}") for kind in scaffold.KINDS]
    elsewhere = [scaffold.new(kind, f"own_{kind}", Path("project")) for kind in scaffold.KINDS]
    tests = [str(checkout / made.test) for made in inside] + [made.test.name for made in elsewhere]
    done = python("-m", "pytest", "-q", *tests, cwd=checkout / "project", path=checkout)
    assert done.returncode == 0, done.stdout


def test_in_a_project_both_files_go_into_the_current_folder(project: Path) -> None:
    for kind in scaffold.KINDS:
        assert scaffold.new(kind, f"my_{kind}").handle == f"my_{kind}:My{kind.capitalize()}"
    assert {f.name for f in project.iterdir()} == {f"{p}my_{kind}.py" for kind in scaffold.KINDS for p in ("", "test_")}


def test_in_a_checkout_files_go_where_they_are_found_and_are_clean(checkout: Path) -> None:
    made = [scaffold.new(kind, name) for kind in scaffold.KINDS for name in (f"my_{kind}", LONGEST)]
    assert [str(m.plugin) for m in made[::2]] == [
        "objectives/my_objective.py", "samplers/my_sampler.py", "evals/my_scorer.py", "alignbench/backbones/my_backbone.py",
    ]  # fmt: skip
    assert [str(m.test.parent) for m in made[::2]] == [
        "tests/objectives", "tests/samplers", "tests/evals", "tests/alignbench/backbones",
    ]  # fmt: skip
    assert [m.handle for m in made[::2]] == [f"my_{kind}" for kind in scaffold.KINDS]
    listed = python("-m", "alignbench", "list", cwd=checkout, path=checkout).stdout
    for kind in scaffold.KINDS:
        assert f"  my_{kind} " in listed
    files = [str(f) for m in made for f in (m.plugin, m.test)]
    for command in (["check"], ["format", "--check"]):
        checked = python("-m", "ruff", *command, "--no-cache", *files, cwd=checkout)
        assert checked.returncode == 0, checked.stdout


def test_the_four_work_together_in_a_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {kind: scaffold.new(kind, f"own_{kind}").handle for kind in scaffold.KINDS}
    monkeypatch.syspath_prepend(project)
    task = write_task(project)
    data = {**yaml.safe_load(task.read_text()), "reward": [{"eval": made["scorer"], "label": "colourfulness"}]}
    task.write_text(yaml.safe_dump(data))
    plugins = {kind: made[kind] for kind in ("objective", "sampler", "backbone")}
    result = run(toy_config(task, **plugins, iterations=20), project / "run")
    assert result.run.status == "complete"
    assert result.checks["first_update_ratio_abs_dev_max"] == pytest.approx(0, abs=1e-5)
    # 8 rollouts of 6 steps for each of 2 prompts, three of the steps stochastic.
    assert result.budget.model_rows_rollout == 20 * 2 * 8 * 6
    assert result.budget.model_rows_train == 20 * 2 * 8 * 3
    assert (result.metrics["colourfulness"].difference.lower or 0) > 0


def test_the_walk_through_in_the_docs_ends_where_it_says(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "adding-an-objective.md").read_text()
    made = scaffold.new("objective", "my_rloo")
    text = made.plugin.read_text()
    start, end = text.index("    def advantage"), text.index("    def loss")
    made.plugin.write_text(text[:start] + page.split("```python\n")[1].split("```")[0] + "\n" + text[end:])
    monkeypatch.syspath_prepend(project)
    objective: Any = load_objective(made.handle)
    # The two groups of the test that comes with the file.
    forest = hand_made_forest([[0.0, 2.0], [1.0, 5.0]], [[0], [1], [2], [3]], [0.0] * 4)
    assert objective.advantage(forest).tolist() == [[-2.0, 2.0], [-4.0, 4.0]]
    log_prob = torch.zeros(4, requires_grad=True)
    torch.autograd.backward(objective.loss({"log_prob": log_prob}, forest))
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [0.5, -0.5, 1.0, -1.0]
    assert "(-2, 2), (-4, 4)" in page
    assert "(0.5, -0.5, 1, -1)" in page


def test_the_command_says_what_it_wrote_and_what_comes_next_without_torch(project: Path) -> None:
    code = "import sys; from alignbench.cli.app import app; app(sys.argv[1:], standalone_mode=False)"
    done = python("-c", f"{code}; assert 'torch' not in sys.modules", "new", "objective", "my_loss", cwd=project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "wrote my_loss.py",
        "wrote test_my_loss.py",
        "",
        "next:",
        "  python -m pytest test_my_loss.py",
        "  python -m alignbench check --objective my_loss:MyLoss",
        "  python -m alignbench run --preset smoke --objective my_loss:MyLoss --out results/my_loss",
    ]


@pytest.mark.usefixtures("checkout")
def test_in_a_checkout_the_name_alone_is_enough() -> None:
    assert scaffold.new("sampler", "burst").next.splitlines() == [
        "next:",
        "  python -m pytest tests/samplers/test_burst.py",
        "  python -m alignbench list samplers",
        "  python -m alignbench check --sampler burst",
        "  python -m alignbench run --preset smoke --sampler burst --out results/burst",
    ]


def test_the_task_that_a_scorer_or_backbone_is_told_about_is_one(project: Path) -> None:
    from alignbench.tasks import load_task

    for kind, reward in (("scorer", "tint:Tint"), ("backbone", "quality")):
        command, task = scaffold.new(kind, {"scorer": "tint", "backbone": "blob"}[kind]).next.split("\n\n")
        file = project / f"{kind}.yaml"
        file.write_text("\n".join(task.splitlines()[1:]))
        assert load_task(str(file)).config.reward[0].eval == reward
        assert ("--backbone blob:Blob" in command) == (kind == "backbone")


def test_out_is_a_folder_for_both_files(checkout: Path) -> None:
    made = scaffold.new("scorer", "tint", Path("plugins/mine"))
    assert (made.plugin, made.test) == (Path("plugins/mine/tint.py"), Path("plugins/mine/test_tint.py"))
    assert (checkout / "plugins" / "mine" / "test_tint.py").is_file()
    assert made.handle == "tint:Tint"
    assert made.next.splitlines()[1:3] == ["  cd plugins/mine", "  python -m pytest test_tint.py"]


@pytest.mark.parametrize(
    ("kind", "name", "handle"),
    [
        ("objective", "my_2nd_loss", "my_2nd_loss:My2ndLoss"),
        ("sampler", "plan", "plan:PlanSampler"),  # Plan is imported by the template
        ("sampler", "none", "none:NoneSampler"),
        ("backbone", "pixel_net", "pixel_net:PixelNetBackbone"),
    ],
)
@pytest.mark.usefixtures("project")
def test_a_class_is_named_after_the_file_unless_that_name_is_taken(kind: str, name: str, handle: str) -> None:
    assert scaffold.new(kind, name).handle == handle


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("objektive", "mine", "there is no template for 'objektive'; did you mean 'objective'?"),
        ("eval", "mine", "there is no template for 'eval'; known: backbone, objective, sampler, scorer"),
        ("objective", "my-loss", "'my-loss' cannot be the name of a plug-in"),
        ("objective", "MyLoss", "'MyLoss' cannot be the name of a plug-in"),
        ("objective", "2nd", "'2nd' cannot be the name of a plug-in"),
        ("objective", "_mine", "'_mine' cannot be the name of a plug-in"),
        ("objective", "lambda", "'lambda' cannot be the name of a plug-in"),
        ("objective", "../mine", "'../mine' cannot be the name of a plug-in"),
        ("objective", "", "'' cannot be the name of a plug-in"),
        ("objective", LONGEST + "a", "up to 40 lower-case letters"),
        ("objective", "tmpo", "there is already a plug-in 'tmpo' among the objectives; choose another name"),
        ("scorer", "ocr", "there is already a plug-in 'ocr' among the evals; choose another name"),
        ("sampler", "random", "random.py would hide the Python module 'random'; choose another name"),
        ("scorer", "torch", "torch.py would hide the Python module 'torch'; choose another name"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(project: Path, kind: str, name: str, says: str) -> None:
    assert says in problem(kind, name)
    assert list(project.iterdir()) == []


@pytest.mark.parametrize("taken", ["mine.py", "test_mine.py"])
def test_a_file_that_exists_is_left_as_it_is(project: Path, taken: str) -> None:
    (project / taken).write_text("precious")
    done = python("-m", "alignbench", "new", "objective", "mine", cwd=project)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"alignbench: error: {taken} exists already; choose another name, or move it away\n"
    assert [f.name for f in project.iterdir()] == [taken]
    assert (project / taken).read_text() == "precious"


def test_in_a_checkout_too_and_what_is_there_cannot_be_made_again(checkout: Path) -> None:
    made = scaffold.new("sampler", "burst")
    text = made.plugin.read_text()
    assert problem("sampler", "burst") == "samplers/burst.py exists already; choose another name, or move it away"
    assert problem("scorer", "_shapes").startswith("'_shapes' cannot be the name")
    assert problem("backbone", "guidance").startswith("alignbench/backbones/guidance.py exists already")
    assert (checkout / "samplers" / "burst.py").read_text() == text


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(project: Path) -> None:
    (project / "file").write_text("")
    assert problem("objective", "mine", Path("file")).startswith("cannot write file/mine.py: ")
    assert [f.name for f in project.iterdir()] == ["file"]


def test_there_is_a_template_and_a_test_for_every_kind_of_plug_in() -> None:
    assert set(scaffold.KINDS.values()) == set(registry.PACKAGES)
    found = {f.name for f in scaffold.TEMPLATES.glob("*.py.jinja")}
    assert found == {f"{prefix}{kind}.py.jinja" for kind in scaffold.KINDS for prefix in ("", "test_")}
