"""No test asks the real hub: it is a port that nobody listens on, or a server of the test's own."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from alignbench import UserError, load_scorer
from alignbench.config.run_config import load_config
from alignbench.runtime import hub
from alignbench.scoring import score as scoring
from evals.embedders.clip import FOLDERS, TINY


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache, and nothing known about the hub yet; what is found out is forgotten afterwards."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # transformers 4 has read it by now.
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
    hub.answers.cache_clear()
    yield
    hub.answers.cache_clear()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def cache(folder: Path, name: str) -> Path:
    """The hub's cache of OWNER/NAME in its layout, empty."""
    repository = folder / "cache" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    return snapshot


def test_all_that_is_missing_is_told_in_one_sentence(tmp_path: Path, silent: None) -> None:
    (cache(tmp_path, "some/model") / "model.safetensors").write_bytes(b"")
    wanted = {"some/model": "geneval", "no/model": "geneval", "no/processor": "geneval", "some/model/other.pt": "hpsv2"}
    with pytest.raises(UserError) as caught:
        hub.require(wanted)
    said = str(caught.value)
    assert "http://127.0.0.1:9 does not answer" in said
    assert ": no/model and no/processor for geneval; some/model/other.pt for hpsv2;" in said


def test_what_is_here_needs_no_hub(tmp_path: Path, silent: None) -> None:
    snapshot = cache(tmp_path, "some/model")
    (snapshot / "weights.pt").write_bytes(b"")
    hub.require({"some/model": "a", "some/model/weights.pt": "b"})
    # Libraries are then told not to ask either: each of their requests is tried six times.
    assert constants.HF_HUB_OFFLINE


def test_local_weights_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requests.head", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "model").mkdir()
    hub.require({str(tmp_path / "model"): "a", "./nowhere": "b"})
    hub.require({})


def test_a_hub_that_answers_is_asked_by_the_libraries() -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        patch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        hub.require({"no/model": "geneval"})
        server.shutdown()
    assert not constants.HF_HUB_OFFLINE


def test_a_task_whose_weights_are_missing_says_so_before_anything_is_loaded(
    silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "load_configured_backbone", lambda config: pytest.fail("a model was loaded"))
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        scoring.score_model(load_config(options={"task": "geneval_coco"}), None)
    assert time.perf_counter() - began < 60  # the hub's own client takes minutes
    for name in (
        "facebook/mask2former-swin-small-coco-instance and timm/vit_large_patch14_clip_224.openai for geneval",
        "yuvalkirstain/PickScore_v1 and laion/CLIP-ViT-H-14-laion2B-s32B-b79K for pickscore",
        "openai/clip-vit-large-patch14 for diversity",
    ):
        assert name in str(caught.value)


def test_a_model_in_the_cache_scores_without_a_network(tmp_path: Path, silent: None) -> None:
    snapshot = cache(tmp_path, "some/clip")
    for file in FOLDERS[TINY].iterdir():
        (snapshot / file.name).symlink_to(file)
    pictures, prompts = np.zeros((2, 64, 64, 3), np.uint8), ["a red circle"] * 2
    found = load_scorer("pickscore", model="some/clip").score(pictures, prompts)
    assert found.tolist() == load_scorer("pickscore").score(pictures, prompts).tolist()


def test_off_is_off_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requests.head", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.answers()
