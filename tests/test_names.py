"""The name of a test states its fact in one line of a report."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
LONGEST = 80
TO_BE_SHORTENED = {
    "test_a_parameter_inside_the_terms_gets_its_gradient_and_whole_numbers_pass_through",
    "test_a_plan_without_noise_is_refused_for_an_objective_on_steps_and_taken_by_one_on_pictures",
    "test_a_training_prompt_that_the_reward_would_refuse_ends_the_run_before_it_begins",
    "test_a_whole_checkpoint_of_the_iteration_is_not_written_again_and_a_damaged_one_is",
    "test_false_onsets_are_as_rare_as_said_though_the_best_of_many_evaluations_is_taken",
    "test_processes_that_share_a_cell_give_the_same_within_rounding_and_listen_to_this_machine_alone",
    "test_resuming_with_other_prompts_behind_the_same_task_is_refused_and_another_reward_is_told",
    "test_setups_and_metrics_whose_names_differ_in_signs_alone_have_plots_and_tables_of_their_own",
    "test_the_first_update_takes_one_pass_and_its_gradient_is_that_of_all_rows_at_once",
    "test_while_nothing_has_changed_the_policys_own_answer_is_the_old_ones_and_carries_no_gradient",
}


@pytest.mark.parametrize("file", sorted(ROOT.rglob("test_*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_names_are_short_and_each_is_there_once(file: Path) -> None:
    module = ast.parse(file.read_text(encoding="utf-8"))
    names = [node.name for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert [name for name in names if len(name) > LONGEST and name not in TO_BE_SHORTENED] == []
    assert [name for name, times in Counter(names).items() if times > 1] == []
