"""What a backbone's name stands for."""

import json
from pathlib import Path

import pytest

from alignbench import UserError
from alignbench.backbones import families


def test_a_name_of_a_plugin_means_the_plugin_whatever_lies_in_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after `compare --out tiny`, which must not keep the next call from opening the embedded model.
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert families.opener("tiny") == "tiny"
    with pytest.raises(UserError, match="tiny is not a diffusers folder"):
        families.opener("./tiny")


def test_any_other_folder_of_this_folder_needs_no_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    monkeypatch.chdir(tmp_path)
    assert families.opener("mine") == "flux"
    assert families.opener("yours") == "yours"
