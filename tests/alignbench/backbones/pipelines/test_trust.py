"""What is refused in a model's folder before anything of it is opened."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignbench import UserError
from alignbench.backbones.pipelines.trust import check_folder, plain_weights, read_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "vae").mkdir(parents=True)
    (tmp_path / "model" / "vae" / "config.json").write_text('{"a": 1}')
    check_folder(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "place",
    [
        "pipeline.py",
        "vae/mine.py",
        "vae/a/b/c.PY",
        "m.cpython-311-x86_64-linux-gnu.so",
        "vae/libm.so.6",
        "__pycache__/m.pyc",
        "m.pyd",
    ],
)
def test_code_at_any_depth_is_refused(folder: Path, place: str) -> None:
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).write_text("")
    with pytest.raises(UserError, match=rf"contains code \({place}\), which alignbench does not run from a model's folder"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("target", "leaves"), [("/etc", True), ("../../other", True), ("../vae", False), ("config.json", False)]
)
def test_links_that_leave_the_folder_are_refused(folder: Path, target: str, leaves: bool) -> None:
    (folder / "vae" / "link").symlink_to(target)
    if not leaves:
        return check_folder(folder)
    with pytest.raises(UserError, match=f"has a link to another place \\(vae/link -> {target}\\)"):
        check_folder(folder)
    return None


def test_the_hubs_cache_of_links_is_a_folder_of_files(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    check_folder(snapshot)
    (snapshot / "other.json").symlink_to("../../refs")
    with pytest.raises(UserError, match="has a link to another place"):
        check_folder(snapshot)


def test_a_pipe_is_refused_and_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "vae" / "model.safetensors")
    with pytest.raises(UserError, match=r"something that is not a file \(vae/model.safetensors\)"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}, r"names code of its own \(auto_map\)"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "mine.Mine"}}, r"names code of its own \(auto_map\)"),
        ("config.json", {"text_config": {"auto_map": {"AutoConfig": "m.M"}}}, r"names code of its own \(auto_map\)"),
        ("config.json", {"attn_implementation": "someone/kernel"}, "asks for code from the hub"),
        ("config.json", {"_attn_implementation": {"text_config": "someone/kernel:f"}}, "asks for code from the hub"),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "is for quantised weights"),
        ("adapter_config.json", {"base_model_name_or_path": "/elsewhere"}, "contains an adapter for another model"),
        ("config.json", [1], "does not hold keys and values"),
    ],
)
def test_configurations_that_ask_for_more_than_the_folder_are_refused(folder: Path, name: str, content: Any, says: str) -> None:
    (folder / "vae" / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        check_folder(folder)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda f: f.write_text("{"), "cannot read the configuration in"),
        (lambda f: f.write_text("[" * 100_000), "cannot read the configuration in"),
        (lambda f: f.write_bytes(b"\xff\xfe\xff"), "cannot read the configuration in"),
        (lambda f: f.write_text(" " * 5_000_000), "it is larger than 4 MiB"),
        (lambda f: None, "has no x.json"),
    ],
)
def test_json_that_is_no_configuration_is_one_sentence(tmp_path: Path, write: Callable[[Path], Any], says: str) -> None:
    write(tmp_path / "x.json")
    with pytest.raises(UserError, match=says):
        read_json(tmp_path, "x.json")


def test_plain_weights_hold_where_a_package_asks_for_any_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"weight": torch.ones(2), "code": Path}, tmp_path / "w.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with plain_weights(), pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "w.pt", weights_only=False)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert torch.load(tmp_path / "w.pt", weights_only=False)["code"] is Path
