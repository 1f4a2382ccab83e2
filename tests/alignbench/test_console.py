from alignbench.console import verdict, with_interval
from alignbench.record import Estimate, MetricRecord


def test_a_mean_without_an_interval_says_so() -> None:
    assert with_interval(Estimate(value=0.12, lower=0.08, upper=0.16, n=9)) == "+0.12 (+0.08 to +0.16)"
    assert with_interval(Estimate(value=0.5, lower=None, upper=None, n=1), sign="") == "0.5 (no interval)"


def test_an_equal_change_of_all_prompts_is_judged_by_the_sign_test() -> None:
    change = Estimate(value=-0.5, lower=None, upper=None, n=9)
    metric = MetricRecord(base=change, final=change, difference=change, higher_is_better=True, role="reward", p_rise=1 - 0.5**9)
    assert verdict(metric) == "worse"
    assert verdict(metric.model_copy(update={"p_rise": 0.5**9})) == "better"
    assert verdict(metric.model_copy(update={"p_rise": 0.125})) == "no clear change"  # three prompts
    assert verdict(metric.model_copy(update={"p_rise": None})) == "no clear change"
