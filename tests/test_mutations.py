"""The list of mutations stays true; that a test notices each is tried by `make mutants`."""

import pytest

from tests.support.mutants import ROOT, Mutation, mutations

CENTRAL = (
    *(
        "alignbench/rollouts/plan.py",
        "alignbench/flow.py",
        "alignbench/rollouts/noise.py",
        "alignbench/rollouts/forest.py",
        "alignbench/rollouts/executor.py",
    ),
    *(
        "alignbench/rollouts/terms.py",
        "alignbench/training/engine.py",
        "alignbench/groups.py",
        "alignbench/training/trainer.py",
    ),
    *(
        "alignbench/training/checkpoint.py",
        "alignbench/evaluation/evaluate.py",
        "alignbench/statistics.py",
        "alignbench/records/record.py",
    ),
    *("alignbench/config/run_config.py", "objectives/tmpo.py", "objectives/grpo.py"),
)


@pytest.mark.parametrize("mutation", mutations(), ids=lambda m: f"{m.file}: {m.wrong}"[:80])
def test_every_mutation_breaks_one_place_and_names_tests_that_are_there(mutation: Mutation) -> None:
    whole = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert whole.count(mutation.was) == 1
    assert mutation.broken != mutation.was
    compile(whole.replace(mutation.was, mutation.broken), mutation.file, "exec")
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8")


def test_every_central_module_has_mutations() -> None:
    listed = [mutation.file for mutation in mutations()]
    assert all(listed.count(module) >= 2 for module in CENTRAL)
