"""Every command that README and docs show is one that the command line accepts, up to the work itself."""

from pathlib import Path

import pytest

from tests.support.documented import NEEDS, PAGES, Command, commands, commands_outside_code, make_workplace, problem

SHOWN = [command for page in PAGES for command in commands(page)]
DISTINCT = list({command.words: command for command in SHOWN}.values())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    make_workplace(folder)
    return folder


@pytest.mark.parametrize("command", DISTINCT, ids=lambda command: f"{command.place} {command.text}"[:100])
def test_a_documented_command_is_accepted(command: Command, workplace: Path) -> None:
    assert problem(command, workplace) is None


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["fly"], "No such command"),
        (["report", "--fast", "results/mine"], "No such option"),
        (["run", "--objectve", "tmpo"], "No such option"),
        (["run", "--objective", "tmpp"], "'tmpo'"),
        (["run", "--sampler", "fixed_three"], "'fixed_tree'"),
        (["run", "--preset", "fast"], "no preset"),
        (["run", "--task", "ocrs"], "'ocr'"),
        (["run", "--set", "objective.clipp=1"], "'clip'"),
        (["run", "--set", "sampler.group_sise=4", "--sampler", "independent"], "'group_size'"),
        (["run", "--backbone", "gaussian_mixture", "--set", "backbone.hiden=4"], "'hidden'"),
        (["run", "--set", "iterations=many"], "iterations"),
        (["compare", "--objectives", "tmpo", "--samplers", "independent", "--sweep", "tmpo.betta=1,2"], "'beta'"),
        (["tune", "--objectives", "tmpo", "--samplers", "independent", "--task", "ocrs"], "'ocr'"),
        (["eval", "--pipeline", "tiny", "--evals", "ocrr"], "'ocr'"),
        (["eval", "--pipeline", "tiny", "--evals", "ocr", "--set", "evals.ocr.readr=easyocr"], "'reader'"),
        (["show", "objective", "tmpp"], "'tmpo'"),
        (["list", "models"], "unknown kind"),
    ],
)
def test_a_command_with_a_slip_is_found(words: list[str], part: str, workplace: Path) -> None:
    assert part in str(problem(Command("here", tuple(words), None), workplace))


def test_commands_are_read_from_blocks_and_from_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Use `alignbench list` or `run`.\n\n<!-- needs: gpu -->\n\n"
        "    pip install x; python -m alignbench run --seed 1 \\\n        --set 'a=b c'   # first\n"
        '    W="--seed 2 --dry-run"\n    torchrun -m alignbench run $W\n\n```python\nimport alignbench\n```\n'
    )
    assert [(command.words, command.marked) for command in commands(page)] == [
        (("list",), None),
        (("run", "--seed", "1", "--set", "a=b c"), {"gpu"}),
        (("run", "--seed", "2", "--dry-run"), {"gpu"}),
    ]


def test_a_block_says_what_its_commands_need() -> None:
    needed: dict[str, set[str]] = {}
    for command in SHOWN:
        if command.marked is not None:
            needed.setdefault(command.place, set()).update(command.needs)
    assert {command.place: command.marked for command in SHOWN if command.marked is not None} == needed
    assert {need for command in SHOWN for need in command.needs} <= set(NEEDS)


def test_no_command_stands_outside_code() -> None:
    assert [place for page in PAGES for place in commands_outside_code(page)] == []
