import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from alignbench import UserError
from alignbench.config.run_config import load_config
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.tasks import RewardChoice, Task, load_task, trained_task


def user_task(folder: Path, **changes: object) -> Task:
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"prompt": f"Straße {i}"}) for i in range(3)))
    (folder / "eval.csv").write_text('prompt\n"one, two"\nthree\n')
    content = {
        "description": "mine",
        "train_prompts": "train.jsonl",
        "eval_prompts": "eval.csv",
        "reward": [{"eval": "quality"}],
        **changes,
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return load_task(str(folder / "mine.yaml"))


def test_a_user_adds_a_task_with_a_yaml_file_and_tables_of_prompts(tmp_path: Path) -> None:
    task = user_task(tmp_path)
    assert (task.name, task.train_prompts, task.eval_prompts) == (
        "mine",
        ["Straße 0", "Straße 1", "Straße 2"],
        ["one, two", "three"],
    )


def test_a_task_that_would_be_judged_on_its_training_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evaluated on prompts it trains on"):
        user_task(tmp_path, eval_prompts=["eval.csv", "train.jsonl"])


def test_case_and_blanks_make_no_other_prompt(tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("STRASSE  1\n")
    with pytest.raises(UserError, match=r"evaluated on prompts it trains on .*'STRASSE  1'"):
        user_task(tmp_path, eval_prompts=["eval.csv", "same.txt"])
    (tmp_path / "again.txt").write_text("Three\nfour\nFour \n")
    assert user_task(tmp_path, eval_prompts=["eval.csv", "again.txt"]).eval_prompts == ["one, two", "Three", "four"]


def test_preference_alternates_words_and_scenes_and_has_metrics_it_does_not_train_on() -> None:
    task = load_task("preference")
    assert Counter('"' in prompt for prompt in task.eval_prompts[:48]) == {True: 24, False: 24}
    judges = MetricSuite(task)
    assert list(judges.rewards) == ["pickscore"]
    assert set(judges.evals) - set(judges.rewards) == {
        "geneval",
        "ocr_judge",
        "quality",
        "diversity",
        "mode_coverage",
        "attribute_difference",
        "named_color",
    }
    # Cosine diversity there would be in features of the model that is trained on.
    assert judges.evals["diversity"].settings.features == ""


def test_mixed_weighs_two_rewards() -> None:
    assert MetricSuite(load_task("mixed")).weights == {"ocr": 1.0, "pickscore": 1.0}


def test_another_reward_makes_the_former_ones_judges() -> None:
    task = load_task("ocr").rewarded_by(RewardChoice(eval="quality", label="mine"))
    assert [c.label for c in task.config.reward] == ["mine"]
    judges = [c.label or c.eval for c in task.config.judges]
    assert judges == [
        "ocr",
        "ocr_judge",
        "quality",
        "clip_agreement",
        "diversity",
        "mode_coverage",
        "attribute_difference",
        "named_color",
    ]


def test_chosen_evals_keep_the_tasks_settings_under_those_that_are_given() -> None:
    task = load_task("ocr")
    ocr, judge, plain = task.choices(["ocr", "ocr_judge", "pickscore"], {"ocr": {"batch": 3}})
    assert ocr.settings == {"reader": "easyocr", "characters": "letters", "batch": 3}
    assert (judge.eval, judge.label, judge.settings) == ("ocr", "ocr_judge", {"reader": "rapidocr"})
    assert (plain.eval, plain.label, plain.settings) == ("pickscore", None, {})
    # An eval that the task does not have gives NaN for prompts that it does not apply to.
    (geneval,) = task.choices(["geneval"], {"geneval": {"reward": "graded"}})
    assert geneval.settings == {"others": "skip", "reward": "graded"}
    with pytest.raises(UserError, match="'ocrr', which is not asked for; did you mean 'ocr'"):
        task.choices(["ocr"], {"ocrr": {}})


@pytest.mark.parametrize("name", ["ocr", "geneval", "geneval_coco", "mixed", "preference"])
def test_train_validation_and_test_prompts_of_a_shipped_task_are_disjoint(name: str) -> None:
    task = load_task(name)
    sets = [set(task.train_prompts), set(task.validation_prompts), set(task.eval_prompts)]
    assert min(map(len, sets)) >= 35
    assert len(sets[0] | sets[1] | sets[2]) == sum(map(len, sets))


def test_validation_prompts_must_be_neither_training_nor_test_prompts(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("four\n")
    assert user_task(tmp_path, validation_prompts="own.txt").validation_prompts == ["four"]
    with pytest.raises(UserError, match="'mine' would be validated on its test prompts"):
        user_task(tmp_path, validation_prompts="eval.csv")
    with pytest.raises(UserError, match="validated on prompts it trains on"):
        user_task(tmp_path, validation_prompts="train.jsonl")


def test_a_task_without_validation_prompts_has_none(tmp_path: Path) -> None:
    assert user_task(tmp_path).validation_prompts == []


def test_the_fingerprint_tells_which_set_of_prompts_changed(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("four\n")
    (tmp_path / "other.txt").write_text("five\n")
    before, after = (user_task(tmp_path, validation_prompts=f"{name}.txt").fingerprint() for name in ("own", "other"))
    assert {part for part in after if after[part] != before[part]} == {"validation prompts"}
    assert "validation prompts" not in user_task(tmp_path).fingerprint()


def test_a_run_trains_on_its_weights_of_rewards_or_on_its_scorer() -> None:
    assert trained_task(load_config(options={"task": "mixed", "reward": {"ocr": 0.5}})).weights == {
        "ocr": 0.5,
        "pickscore": 1.0,
    }
    by_service = trained_task(load_config(options={"task": "mixed", "scorer_url": "http://127.0.0.1:9"}))
    assert by_service.weights == {"remote": 1.0}
    assert [judge.title for judge in by_service.config.judges][:2] == ["ocr", "pickscore"]
