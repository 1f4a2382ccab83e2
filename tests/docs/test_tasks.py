"""The tasks that the pages show can be loaded."""

from pathlib import Path

import pytest

from alignbench.tasks import load_task
from tests.support.documented import MARKDOWN, PAGES

SHOWN = [
    token.content
    for page in PAGES
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8"))
    if token.type == "fence" and token.content.startswith("# my_task.yaml")
]


@pytest.mark.parametrize("text", SHOWN, ids=range(len(SHOWN)))
def test_a_task_on_a_page_can_be_loaded(text: str, tmp_path: Path) -> None:
    (tmp_path / "signs.csv").write_text('prompt\n"a sign that says ""OPEN"""\n')
    (tmp_path / "prompts.txt").write_text('a sign that says "OPEN"\n')
    (tmp_path / "held_out.txt").write_text('a sign that says "EXIT"\n')
    (tmp_path / "my_task.yaml").write_text(text.replace("eval: my_scorer", "eval: pickscore"))
    task = load_task(str(tmp_path / "my_task.yaml"))
    assert task.train_prompts == ['a sign that says "OPEN"']
    assert "quality" in [choice.eval for choice in task.config.judges]


def test_two_pages_show_a_task() -> None:
    assert len(SHOWN) == 2
