"""What a report says of curves and fronts that are made by hand, in numbers that can be told beforehand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from scipy import stats

from alignbench.comparison.grid import Contrast
from alignbench.comparison.reading import read_results
from alignbench.evaluation.curve import KINDS
from alignbench.frontier.front import (
    BEST_OF,
    COLUMNS,
    KL,
    REWARD,
    TILT,
    VALIDATION,
    Front,
    FrontRecord,
    dependence,
    write_front,
)
from alignbench.records.record import read_result
from alignbench.reports.curve_report import CurveReport
from alignbench.reports.curve_sections import tables
from alignbench.reports.findings import curve_sentences
from alignbench.reports.plots.curve_figure import curve_trade_off
from alignbench.reports.report import curve_reports, write_report
from alignbench.reports.verdict import verdict
from tests.alignbench.record_folders import PROMPTS, write_run

TMPO, GRPO = "tmpo x independent", "grpo x independent"
CURVES = {
    # reward and LGMD at iterations 0, 10, 20; 100 model rows an iteration
    "tmpo": ([0.0, 0.5, 1.0], [1.0, 0.8, 0.4]),
    "grpo": ([0.0, 0.8, 0.8], [1.0, 0.3, 0.1]),
}


def write_curve(folder: Path, rewards: list[float], lgmd: list[float]) -> None:
    """A curve of four prompts that are alike but for 0.01 from one to the next."""
    rows = [
        (10 * e, 1000 * e, 1.0 * e, p, f"prompt {p}", metric, values[e] + 0.01 * p - 0.015)
        for e in range(len(rewards))
        for metric, values in (("ocr", rewards), ("lgmd", lgmd))
        for p in range(4)
    ]
    pd.DataFrame(rows, columns=list(KINDS)).to_parquet(folder / "curve.parquet", index=False)


def make_front(run: Path, out: Path, kind: str = "evaluation", prompts: int = 2) -> None:
    """A front on which the reward goes from 0.45 to 0.95 and the LGMD from 0.45 to 0.25, the same for all prompts."""
    rewards, lgmd, kl = [0.45, 0.7, 0.95], [0.45, 0.4, 0.25], [0.0, 0.1, 0.5]
    rows = [
        (TILT, float(s), p, f"prompt {p}", metric, values[s] + (0.05 if p % 2 else -0.05) * (metric != KL))
        for metric, values in ((REWARD, rewards), ("lgmd", lgmd), (KL, kl))
        for s in range(3)
        for p in range(prompts)
    ]
    rows += [(BEST_OF, 2.0, p, f"prompt {p}", m, v) for m, v in ((REWARD, 0.6), ("lgmd", 0.41)) for p in range(prompts)]
    result = read_result(run)
    record = FrontRecord(
        key=kind, task="ocr", backbone="tiny", prompts=prompts, images=64, set_size=4, steps=8, guidance=1.0, noise_seed=5,
        rewards={"ocr": 1.0}, normalised=False, reward_deviation=0.1, headline=["lgmd"], set_metrics=["lgmd"],
        directions={"ocr": True, "lgmd": True}, prompt_set=kind, config=dependence(result.config), fingerprint=result.task,
    )  # fmt: skip
    write_front(Front(record, pd.DataFrame(rows, columns=COLUMNS)), out / kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("curves")
    for seed in range(3):
        for objective, sign in (("tmpo", 1), ("grpo", -1)):
            rewards, lgmd = CURVES[objective]
            run = write_run(
                made / f"{objective}{seed}", objective=objective, seed=seed, reward=(0.65, 0.75),
                lgmd=(0.3, 0.4) if objective == "tmpo" else (0.05 + 0.01 * seed, 0.1),
            )  # fmt: skip
            write_curve(run, rewards, [value + sign * 0.01 * seed for value in lgmd])
    make_front(made / "tmpo0", made / "fronts")
    make_front(made / "tmpo0", made / "fronts", VALIDATION, prompts=4)
    return made


@pytest.fixture
def report(folder: Path) -> CurveReport:
    (found,) = curve_reports(read_results(folder)).values()
    return found


def table(report: CurveReport, title: str) -> list[list[str]]:
    (found,) = [each for each in tables(report) if each.title.startswith(title)]
    assert all(len(row) == len(found.head) for row in found.rows)
    assert len(found.head) <= 6
    return [[cell.text for cell in row] for row in found.rows]


def test_the_verdict_begins_with_the_difference_at_equal_reward(report: CurveReport) -> None:
    """At 0.8 tmpo has 0.56 + 0.01 seed and grpo 0.3 - 0.01 seed; tmpo needs 1,600 rows to get there, grpo 1,000."""
    apart = np.array([0.26, 0.28, 0.30])
    low, high = stats.t.interval(0.95, 2, apart.mean(), stats.sem(apart))
    p = stats.ttest_1samp(apart, 0).pvalue
    tests = int(report.differences["tests"].max())
    assert report.common_level == pytest.approx(0.8)
    first = curve_sentences(report)[0]
    assert first.startswith(
        f"At OCR score 0.8, which every run reaches: {TMPO} has 0.280 [{low:.3f}, {high:.3f}] more LGMD than {GRPO} "
    )
    corrected = report.differences.query("metric == 'lgmd' and level == @report.common_level")["p_holm"].iloc[0]
    assert p <= corrected <= tests * p * (1 + 1e-9)
    assert f"(n = 3 seeds, p = {corrected:.2g}) and needs 600 more model evaluations, not beyond chance" in first


def test_planned_contrasts_are_answered_first(folder: Path) -> None:
    """Both reach 0.8, where tmpo has 0.56 + 0.01 seed and grpo 0.3 - 0.01 seed."""
    results = read_results(folder)
    results.contrasts = [Contrast(first=TMPO, second=GRPO), Contrast(first=GRPO, second=TMPO, metric="unknown")]
    (report,) = curve_reports(results).values()
    apart = np.array([0.26, 0.28, 0.30])
    low, high = stats.t.interval(0.95, 2, apart.mean(), stats.sem(apart))
    size = f"0.280 [{low:.3f}, {high:.3f}]"
    ((first, second, level, difference, found, answer),) = table(report, "Planned contrasts")
    assert (first, second, level, answer) == (TMPO, GRPO, "0.8, 0.8 above the base model", "more")
    assert difference == f"{size} * in LGMD, p {stats.ttest_1samp(apart, 0).pvalue:.2g}"
    assert found.startswith("0.1; 0.06")  # a tenth of the base model's 1; 3.26 deviations of 0.02
    (sentence,) = [s for s in verdict(results, report.setup, report) if s.startswith("Of the contrasts")]
    assert sentence == (
        f"Of the contrasts that were planned: at equal reward (OCR score 0.8, 0.8 above the base model) {TMPO} has {size} more "
        f"LGMD than {GRPO}."
    )
    assert tables(report)[0].title == "Planned contrasts"
    assert tables(report)[0].note.startswith("Planned before any run: ")
    assert report.frames()["planned_contrasts"]["value"].tolist() == pytest.approx([0.28])
    results.complete_before_contrasts = 6
    assert tables(report)[0].title == "Contrasts of the comparison"
    assert tables(report)[0].note.startswith("Set when 6 runs were complete: ")
    (late,) = [s for s in verdict(results, report.setup, report) if s.startswith("Of the contrasts")]
    assert late.startswith("Of the contrasts that the comparison names, set after its first results: at equal reward")


def test_a_method_that_does_not_reach_a_level_is_named(report: CurveReport) -> None:
    rows = table(report, "Differences at equal reward")
    last = next(row for row in rows if row[0] == "0.9")
    assert last[3] == f"{GRPO} reaches it in 0 of 3 seeds"
    costs = {row[0]: row[1:] for row in table(report, "Model evaluations to reach a reward")}
    assert costs[GRPO][-2:] == ["not reached (0 of 3 runs)", "2,000"]
    assert costs[TMPO][-2:] == ["1,800", "2,000"]
    assert f"Less than half of the runs reach 0.9 within their budget: {GRPO} (0 of 3 runs)." in curve_sentences(report)


def test_the_avoidable_loss_is_the_fronts_value_at_the_models_reward(report: CurveReport) -> None:
    """Both have reward 0.7, where the front has 0.4: tmpo has 0.35; grpo 0.075, 0.08 and 0.085."""
    rows = {row[0]: row[1] for row in table(report, "Avoidable loss")}
    assert rows["base model"].startswith("0 ")
    assert rows[TMPO] == "0.05"  # the same with each seed, so that there is no interval
    assert rows[GRPO].startswith("0.320 [0.308, 0.332]")
    assert any(s.startswith(f"LGMD lost needlessly, against the target's front at equal reward: {GRPO} 0.32") for s in
               curve_sentences(report))  # fmt: skip


def test_a_further_seed_of_one_method_does_not_turn_the_verdict_around(tmp_path: Path) -> None:
    """On seed 0, which both have, tmpo keeps 0.26 more; its mean with seed 1 is below that of grpo."""
    for objective, seed, shift in (("tmpo", 0, 0.0), ("grpo", 0, 0.0), ("tmpo", 1, -2.0)):
        rewards, lgmd = CURVES[objective]
        run = write_run(tmp_path / f"{objective}{seed}", objective=objective, seed=seed)
        write_curve(run, rewards, [value + shift for value in lgmd])
    results = read_results(tmp_path)
    (report,) = curve_reports(results).values()
    second = verdict(results, report.setup, report)[1]
    assert f"{TMPO} has 0.26 more LGMD than {GRPO}, but there are too few seeds for a test" in second


def test_without_a_front_the_verdict_says_what_losses_are_compared_with(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    (found,) = curve_reports(read_results(tmp_path)).values()
    said = curve_sentences(found)
    assert said[0].startswith("No run was evaluated along its training, so methods cannot be compared at equal reward")
    assert said[1].startswith("There is no front of the tilted target here")
    assert found.front is None
    assert curve_trade_off(found, "lgmd") is None


def test_a_curve_with_one_evaluation_is_told(tmp_path: Path) -> None:
    write_curve(write_run(tmp_path / "a"), [0.1], [0.2])
    (found,) = curve_reports(read_results(tmp_path)).values()
    assert curve_sentences(found)[0] == (
        f"Evaluated only once along the training, while a curve needs two evaluations: {TMPO}; lower evaluation.every."
    )


def test_a_front_of_another_base_model_is_not_taken(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "a", settings={"beta": 1.0})
    make_front(tmp_path / "a", tmp_path / "fronts")
    (found,) = curve_reports(read_results(tmp_path)).values()
    assert found.front is not None
    record = tmp_path / "a" / "result.json"
    record.write_text(record.read_text().replace('"config":{', '"config":{"guidance":3.0,', 1))
    (other,) = curve_reports(read_results(tmp_path)).values()
    assert other.front is None


def test_the_figure_has_a_line_for_each_method_and_for_the_front(report: CurveReport) -> None:
    figure = curve_trade_off(report, "lgmd")
    assert figure is not None
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["front of the target", "best of 2", "grpo", "tmpo", "base model"]
    (axis,) = figure.axes
    drawn = {tuple(np.asarray(line.get_xdata()).round(3)): np.asarray(line.get_ydata()) for line in axis.lines}
    assert drawn[0.0, 0.5, 1.0] == pytest.approx([1.01, 0.81, 0.41])  # the mean of three seeds
    plt.close(figure)


def test_both_pages_show_tables_and_figure(folder: Path) -> None:
    written = {file.relative_to(folder).as_posix() for file in write_report(folder)}
    assert {"plots/curve_trade_off_lgmd.png", "tables/avoidable_loss.csv", "tables/equal_reward_differences.csv"} <= written
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        for title in ("Avoidable loss of diversity", "Differences at equal reward", "What 3 seeds can and cannot tell"):
            assert title in text


def test_a_fall_that_the_target_asks_for_raises_no_alarm_and_one_beyond_it_does(tmp_path: Path) -> None:
    """The reward rises by 0.25. The front's LGMD falls by 0.05 on the way; 20 prompts fall by that, or by 0.2 more."""
    for name, fall in (("asked", 0.05), ("beyond", 0.25)):
        run = write_run(tmp_path / name / "run", prompts=PROMPTS)
        noise = np.random.default_rng(0).normal(0, 0.005, (3, 20))
        base = {"ocr": 0.45 + noise[0], "lgmd": 0.45 + noise[1]}
        final = {"ocr": 0.70 + noise[0] + noise[2], "lgmd": 0.45 - fall + noise[1] + noise[2]}
        rewrite(run, base, final)
        make_front(run, tmp_path / name / "fronts", prompts=20)
        (found,) = curve_reports(read_results(tmp_path / name)).values()
        (recorded,) = read_result(run).alarms
        assert "lgmd went from" in recorded  # against the base model both fell
        (alarms,) = found.alarms.values()
        assert alarms == ([] if name == "asked" else [alarms[0]])
        if alarms:
            assert "further than the target's own at this reward" in alarms[0]


def rewrite(run: Path, base: dict[str, np.ndarray], final: dict[str, np.ndarray]) -> None:
    """Gives a run's folder other values: metric -> one for each prompt."""
    from alignbench.evaluation.alarm import alarms
    from alignbench.evaluation.evaluate import Evaluation, metric_changes

    def evaluation(values: dict[str, np.ndarray]) -> Evaluation:
        rows = [(p, f"prompt {p}", -1, metric, float(v)) for metric, each in values.items() for p, v in enumerate(each)]
        data = pd.DataFrame(rows, columns=["prompt_index", "prompt", "image", "metric", "value"])
        roles = {"ocr": "reward", "lgmd": "judge"}
        prompts = [f"prompt {p}" for p in range(len(values["ocr"]))]
        return Evaluation(data, np.zeros((2, 4, 4, 3), np.uint8), prompts, {"ocr": True, "lgmd": True}, roles)

    phases = {"base": evaluation(base), "final": evaluation(final)}
    changes = metric_changes(phases["base"], phases["final"])
    result = read_result(run).model_copy(update={"metrics": changes, "alarms": alarms(changes, ["ocr"])})
    (run / "result.json").write_text(result.model_dump_json(), encoding="utf-8")
    tables_ = [each.table.assign(phase=phase) for phase, each in phases.items()]
    pd.concat(tables_, ignore_index=True).to_parquet(run / "evals.parquet", index=False)


def test_a_front_of_standardised_rewards_is_compared_with_nothing_and_pages_say_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", reward=(0.65, 0.75), lgmd=(0.1, 0.2))
    make_front(run, tmp_path / "fronts")
    (front,) = (tmp_path / "fronts").rglob("front.json")
    record = json.loads(front.read_text())
    front.write_text(json.dumps({**record, "normalised": True}))
    (found,) = curve_reports(read_results(tmp_path)).values()
    assert found.front is not None
    assert found.front.record.normalised
    assert found.comparable_front is None
    assert not [each for each in tables(found) if each.title.startswith("Avoidable loss")]
    write_report(tmp_path)
    assert "Alarms about diversity compare with the base model" in (tmp_path / "report.md").read_text()
