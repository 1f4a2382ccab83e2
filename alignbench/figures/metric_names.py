"""What reports call a metric or a column, and what it means, for a reader who meets it for the first time."""

from collections.abc import Iterable

from alignbench.files.escaping import visible

NAMES = {
    "lgmd": "LGMD",
    "rollout_lgmd": "LGMD of rollouts",
    "vendi": "Vendi score",
    "ocr": "OCR score",
    "ocr_exact": "OCR exact",
    "ocr_judge": "OCR judge",
    "ocr_judge_exact": "OCR judge, exact",
    "clip_agreement": "CLIP agreement",
    "kl_base": "KL to base (nats)",
    "path_kl": "path KL to base (nats)",
    "model_rows": "model evaluations",
    "kl_model_target": "KL(model || target)",
    "kl_target_model": "KL(target || model)",
    "js_target": "JS divergence to the target",
    "js_modes": "JS divergence between modes",
    "js_within_modes": "JS divergence within modes",
    "reward": "training reward",
    "seconds": "seconds of training",
    "training_seconds": "seconds of training",
    "ratio_abs_dev_max": "max |ratio - 1|",
    "grad_norm": "gradient norm",
    "policy_update_norm": "update norm",
    "zero_std_ratio": "groups of equal rewards",
    "ess_target": "ESS of target q",
    "ess_policy": "ESS of policy p",
}
"""What axes and sentences call a metric or a column, where that is not its own name."""
MEANINGS = {
    "lgmd": "mean log distance between the final latents of a prompt's images, a measure of diversity",
    "vendi": "effective number of different images of a prompt",
    "cosine_diversity": "1 minus the mean cosine similarity between the image features of a prompt, a measure of diversity",
    "named_color": "share of images in the colour that the prompt names, where it names one",
    "pixel_diversity": "mean difference between the pixels of a prompt's images, a measure of diversity",
    "mode_coverage": "how evenly a prompt's images vary in what it leaves open, a measure of diversity",
    "attribute_difference": "how often two images of a prompt differ in what it leaves open, such as colour or place",
    "coverage_color": "how evenly the colours vary where the prompt leaves them open, a measure of diversity",
    "coverage_place": "how evenly the places vary where the prompt leaves them open, a measure of diversity",
    "coverage_size": "how evenly the sizes vary where the prompt leaves them open, a measure of diversity",
    "coverage_background": "how evenly the backgrounds vary where the prompt leaves them open, a measure of diversity",
    "modes_covered": "share of the target's modes that the model still draws",
    "ocr": "how well the text in the image matches the prompt, by edit distance",
    "ocr_exact": "share of images whose text is exactly that of the prompt",
    "ocr_judge": "the OCR score by a text reader that was not trained on",
    "ocr_judge_exact": "the share of exact texts by a text reader that was not trained on",
    "geneval": "share of images that meet all requirements of the prompt",
    "pickscore": "score of a model of human preference",
    "clip_agreement": "CLIP's similarity of prompt and image",
    "sharpness": "variance of the image's Laplacian, low for blurred images",
    "path_kl": "KL divergence of the denoising paths from the base model's",
    "kl_base": "KL divergence of the samples from the base model's",
    "kl_model_target": "KL divergence of the model from the tilted target; 0 is exact",
    "kl_target_model": "KL divergence of the tilted target from the model; large where modes are missing",
    "js_target": "Jensen-Shannon divergence between model and tilted target",
    "js_modes": "Jensen-Shannon divergence between the masses of modes of model and target",
    "js_within_modes": "mean Jensen-Shannon divergence inside modes",
    "velocity_error": "root mean square error of the model's velocity against the exact one",
    "exact_reward": "expected reward, computed without sampling",
    "scenario_reward": "the toy problem's reward of a sample",
}
"""What a metric measures, in a few words."""


def axis_name(column: str) -> str:
    """What axes, tables and sentences call a metric or a column."""
    return NAMES.get(column, column.replace("_", " "))


def explained(metric: str) -> str:
    """The metric's name and, where they are known, a few words on what it measures."""
    meaning = MEANINGS.get(metric)
    return axis_name(metric) + (f" ({meaning})" if meaning else "")


def meanings(metrics: Iterable[str]) -> dict[str, str]:
    """Name -> meaning of those metrics whose meaning is known."""
    return {visible(axis_name(metric)): MEANINGS[metric] for metric in metrics if metric in MEANINGS}
