"""The name of a test states its fact in one line of a report."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
LONGEST = 80


@pytest.mark.parametrize("file", sorted(ROOT.rglob("test_*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_names_are_short_and_each_is_there_once(file: Path) -> None:
    module = ast.parse(file.read_text(encoding="utf-8"))
    names = [node.name for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert [name for name in names if len(name) > LONGEST] == []
    assert [name for name, times in Counter(names).items() if times > 1] == []
