"""At the published shapes, a folder has as many parameters as its model is said to have."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignbench import load_backbone
from alignbench.backbones.diffusers_folder import DiffusersFolder
from tests.support.pipelines import save_pipeline

KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}


@pytest.mark.parametrize(
    ("family", "shape", "published"),
    [
        # The defaults of the transformers' classes are the shapes of FLUX.2-dev, Qwen-Image, Z-Image, SANA 1.6B and Wan 14B.
        ("flux2", {}, 32e9),
        ("flux2_klein", KLEIN_4B | {"guidance_embeds": False}, 3.9e9),
        ("flux2_klein", KLEIN_9B | {"guidance_embeds": False}, 9e9),
        ("qwen_image", {}, 20e9),
        ("z_image", {}, 6e9),
        ("sana", {}, 1.6e9),
        ("wan", {}, 14e9),
    ],
)
def test_the_transformer_has_its_published_size(tmp_path: Path, family: str, shape: dict[str, Any], published: float) -> None:
    folder = save_pipeline(family, tmp_path / family)
    (folder / "transformer" / "config.json").write_text(json.dumps(shape))
    policy = load_backbone(str(folder), device="meta", precision="bf16", resolution=64)
    assert isinstance(policy, DiffusersFolder)
    trained = sum(p.numel() for p in policy.parameters())
    frozen = sum(p.numel() for p in policy.trainable().parameters()) - trained
    assert frozen == pytest.approx(published, rel=0.03)  # published sizes are rounded
    # The adapter of a few matrices of each block is small beside them.
    assert 0.001 * frozen < trained < 0.03 * frozen
