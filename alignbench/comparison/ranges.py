"""The values that a metric can have, so that no interval of a report leaves them."""

from alignbench.statistics import Interval, within

ASPECTS = ("color", "place", "size", "background")
"""What `mode_coverage` and `attribute_difference` measure one by one."""
RANGES: dict[str, tuple[float | None, float | None]] = {
    **dict.fromkeys(("ocr", "ocr_exact", "ocr_judge", "ocr_judge_exact", "geneval", "geneval_graded"), (0.0, 1.0)),
    **dict.fromkeys(("mode_coverage", "modes_covered", "black_or_white", "attribute_difference", "named_color"), (0.0, 1.0)),
    **dict.fromkeys([f"{kind}_{aspect}" for kind in ("coverage", "difference") for aspect in ASPECTS], (0.0, 1.0)),
    **dict.fromkeys(("vendi", *(f"modes_{aspect}" for aspect in ASPECTS)), (1.0, None)),
    **dict.fromkeys(("clip_agreement",), (-100.0, 100.0)),
    **dict.fromkeys(("pixel_diversity", "cosine_diversity", "sharpness", "entropy", "brightness"), (0.0, None)),
    **dict.fromkeys(("kl_base", "path_kl", "kl_model_target", "kl_target_model"), (0.0, None)),
    **dict.fromkeys(("js_target", "js_modes", "js_within_modes", "velocity_error"), (0.0, None)),
}
"""The lowest and the highest value that a metric can have, None for no such end. Metrics that are not here have neither."""


def in_range(metric: str, interval: Interval) -> Interval:
    """The interval of a metric's mean, inside the metric's range; see `statistics.within`."""
    low, high = RANGES.get(metric, (None, None))
    return within(interval, low, high)
