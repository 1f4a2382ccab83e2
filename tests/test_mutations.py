"""The list of mutations stays true; that a test notices each is tried by `make mutants`."""

from pathlib import Path

import pytest

from tests.support.mutants import Mutation, mutations
from tests.support.places import ROOT, Place, PlaceError

CENTRAL = (
    "alignbench.flow",
    "alignbench.groups",
    "alignbench.statistics",
    "alignbench.config.run_config",
    "alignbench.evaluation.evaluate",
    "alignbench.records.record",
    "alignbench.rollouts.executor",
    "alignbench.rollouts.forest",
    "alignbench.rollouts.noise",
    "alignbench.rollouts.plan",
    "alignbench.rollouts.terms",
    "alignbench.training.checkpoint",
    "alignbench.training.collector",
    "alignbench.training.engine",
    "alignbench.training.trainer",
    "alignbench.training.updater",
    "objectives.grpo",
    "objectives.tmpo",
)


@pytest.mark.parametrize("mutation", mutations(), ids=lambda m: f"{m.where}: {m.wrong}"[:80])
def test_every_mutation_breaks_one_place_and_names_tests_that_are_there(mutation: Mutation) -> None:
    broken = mutation.place.replaced(mutation.by, ROOT)
    assert broken != mutation.place.replaced(mutation.replace, ROOT)
    compile(broken, mutation.file, "exec")
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("module", CENTRAL)
def test_every_central_module_has_mutations(module: str) -> None:
    assert sum(mutation.where.startswith(f"{module}.") for mutation in mutations()) >= 2


SOURCE = """
class Tree:
    def depth(self, rows):  # the places below are named in another layout
        total = max(
            rows["a"], self.first(rows)
        )
        return total + rows["b"] + rows["b"]

def depth(rows):
    total = 1
    del rows
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "alignbench").mkdir()
    (tmp_path / "alignbench" / "trees.py").write_text(SOURCE, encoding="utf-8")
    return tmp_path


def test_an_expression_is_found_whatever_its_quotes_and_line_breaks(tree: Path) -> None:
    broken = Place("alignbench.trees.Tree.depth", "max(rows['a'], self.first(rows))").replaced("min(rows)", tree)
    assert "        total = min(rows)\n" in broken


def test_a_statement_is_replaced_in_the_named_function_alone(tree: Path) -> None:
    broken = Place("alignbench.trees.depth", "total = 1").replaced("total = 2; print(total)", tree)
    assert "    total = 2\n    print(total)\n    del rows" in broken


def test_what_replaces_an_expression_stays_one_operand(tree: Path) -> None:
    broken = Place("alignbench.trees.Tree.depth", "total + rows['b']").replaced("0 if rows else 1", tree)
    assert "return (0 if rows else 1) + rows['b']" in broken


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("alignbench.trees.Tree.depth", "rows['b']", "has this code 2 times, not once: rows['b']\nname a longer piece"),
        ("alignbench.trees.Tree.depth", "del rows", "0 times, not once: del rows\nit is now in alignbench.trees.depth$"),
        ("alignbench.trees.Tree.depth", "rows['c']", "has this code 0 times, not once: rows['c']$"),
        ("alignbench.trees.Tree.width", "rows", "Tree.width: 0 definitions of width, not one"),
        ("alignbench.forests.Tree.depth", "rows", "alignbench.forests.Tree.depth: 0 definitions of forests, not one"),
        ("trees.depth", "rows", "trees.depth: no module of this name"),
        ("alignbench.trees.depth", "total = 1; del rows", "one expression or one statement is named at a time, not 2"),
    ],
)
def test_a_place_that_is_not_there_once_is_an_error_that_says_so(tree: Path, name: str, code: str, message: str) -> None:
    (tree / "alignbench" / "__init__.py").touch()
    with pytest.raises(PlaceError) as error:
        Place(name, code).replaced("0", tree)
    text = str(error.value)
    assert text.endswith(message[:-1]) if message.endswith("$") else message in text
