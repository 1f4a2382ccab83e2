from math import exp, log, sqrt

import numpy as np
import pytest
import torch

from alignbench import UserError
from evals.diversity import Diversity, clip_features, cosine_diversity, lgmd, pixel_diversity, vendi_score
from evals.embedders.features import load_features


def test_lgmd_by_hand() -> None:
    # Distances 5, 5, 6 over D = 4 dimensions.
    latents = np.array([[0, 0, 0, 0], [3, 4, 0, 0], [6, 0, 0, 0]], dtype=float).reshape(3, 2, 2)
    assert lgmd(latents) == pytest.approx((log(5 / 2) + log(5 / 2) + log(6 / 2)) / 3, abs=1e-12)


def test_lgmd_of_independent_unit_latents_is_log_of_root_two() -> None:
    latents = torch.randn(40, 4096, generator=torch.Generator().manual_seed(0))
    # The squared distance of a pair has a relative deviation of sqrt(2 / 4096); the mean over pairs is tighter.
    assert lgmd(latents) == pytest.approx(log(sqrt(2)), abs=2e-2)


def test_equal_latents_are_floored_and_finite() -> None:
    assert lgmd(np.ones((3, 4))) == pytest.approx(log(1e-8), abs=1e-9)


def test_cosine_diversity_by_hand() -> None:
    features = np.array([[2.0, 0.0], [0.0, 5.0], [1.0, 1.0]])
    # Cosines 0, 1/sqrt 2, 1/sqrt 2.
    assert cosine_diversity(features) == pytest.approx(1 - sqrt(2) / 3, abs=1e-12)


@pytest.mark.parametrize(("features", "score"), [(np.eye(4), 4.0), (np.ones((4, 3)), 1.0)])
def test_vendi_score_counts_different_things(features: np.ndarray, score: float) -> None:
    assert vendi_score(features) == pytest.approx(score, abs=1e-9)


def test_vendi_score_by_hand() -> None:
    # Two of three equal: eigenvalues 2/3 and 1/3.
    features = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert vendi_score(features) == pytest.approx(exp(-(2 / 3) * log(2 / 3) - (1 / 3) * log(1 / 3)), abs=1e-9)


def test_pixel_diversity_by_hand() -> None:
    pictures = np.zeros((2, 2, 2, 3), dtype=np.uint8)
    pictures[1] = 51  # a fifth of the range everywhere
    assert pixel_diversity(pictures) == pytest.approx(0.2, abs=1e-12)


def test_one_picture_has_no_diversity() -> None:
    with pytest.raises(UserError, match="at least two"):
        lgmd(np.ones((1, 4)))


def test_zero_features_are_refused() -> None:
    with pytest.raises(UserError, match="not all zero"):
        cosine_diversity(np.zeros((2, 3)))


def test_the_metric_needs_no_latents() -> None:
    pictures = np.zeros((2, 2, 2, 3), dtype=np.uint8)
    metric = Diversity(Diversity.Settings())
    assert metric.measure(pictures, None, "x") == {"pixel_diversity": 0.0}
    assert set(metric.measure(pictures, torch.randn(2, 4), "x")) == {"pixel_diversity", "lgmd"}


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DINOv2 with random weights."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    side = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=side).save_pretrained(folder)
    return str(folder)


def test_features_give_cosine_diversity_and_vendi_score(dino: str) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    metric = Diversity(Diversity.Settings(features=f"dinov2:{dino}", batch=2))
    found = metric.measure(pictures, None, "x")
    features = load_features(f"dinov2:{dino}", "auto", 2)(list(pictures))
    assert features.shape == (3, 16)
    assert found["cosine_diversity"] == cosine_diversity(features)
    assert found["vendi"] == vendi_score(features)
    same = metric.measure(np.stack([pictures[0]] * 3), None, "x")
    # Equal images in batches of two and one: float32 features.
    assert same["cosine_diversity"] == pytest.approx(0, abs=1e-5)
    assert same["vendi"] == pytest.approx(1, abs=1e-3)


def test_clips_of_the_same_frames_in_another_order_differ(dino: str) -> None:
    first, second = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3)).astype(np.uint8)
    clips = np.stack([np.stack([first, second]), np.stack([second, first])])
    metric = Diversity(Diversity.Settings(features=f"dinov2:{dino}"))
    of_frames = cosine_diversity(load_features(f"dinov2:{dino}", "auto", 4)([first, second]))
    found = metric.measure(clips, None, "x")
    # At both times the two clips show the two frames, so that the mean over frames is theirs; float32 features.
    assert found["cosine_diversity"] == pytest.approx(of_frames, abs=1e-6)
    assert of_frames > 1e-3
    assert found["pixel_diversity"] == pytest.approx(pixel_diversity(np.stack([first, second])))
    read = metric.read_images(clips, None, "x")
    assert metric.measure_read(read, [0, 1], "x") == found
    assert metric.measure_read(read, [0, 0], "x")["cosine_diversity"] == pytest.approx(0, abs=1e-6)


def test_features_of_clips_by_hand() -> None:
    shown = np.zeros((2, 2, 1, 1, 3), np.uint8)
    # Norms 5 and 2 do not count: 1/2 (0.6, 0.8) and 1/2 (1, 0), twice.
    found = clip_features(lambda images: torch.tensor([[3.0, 4.0], [2.0, 0.0], [3.0, 4.0], [0.0, 1.0]]), shown)
    assert found.tolist() == [pytest.approx([0.6, 0.8, 1, 0]), pytest.approx([0.6, 0.8, 0, 1])]
    # The cosine is the mean over frames: (1 + 0) / 2.
    assert cosine_diversity(found) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("tiny", "features must be one of clip:NAME"),
        ("clip:", "features must be one of clip:NAME"),
        ("vgg:16", "features must be one of clip:NAME"),
        ("open_clip:ViT-L-14", "must be open_clip:MODEL/WEIGHTS"),
        ("open_clip:ViT-X/openai", "no architecture 'ViT-X'; did you mean"),
        ("open_clip:ViT-B-32/nowhere.pt", "does not load the weights"),
        ("dinov2:./nowhere", "there is no folder './nowhere'"),
    ],
)
def test_features_that_do_not_open_are_refused(source: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=says):
        load_features(source, "cpu", 1)
