"""`show` tells every setting of every plug-in, and of a run, with type, default and meaning."""

import json
import sys
from typing import Literal

import pytest
from pydantic import Field

from alignbench import Objective, UserError, registry, settings
from alignbench.authoring.describing import KINDS, _settings, describe
from alignbench.config.run_config import RunConfig, load_config
from tests.support.command_line import in_this_process


def test_types_are_told_as_a_person_writes_them() -> None:
    class Mine(settings.Settings):
        rate: float | None = Field(0.5, gt=0, le=1)
        """How fast."""
        kind: Literal["a", "b"] = "a"
        names: tuple[str, ...] = ()
        count: int = Field(ge=1)

    told = {s.name: (s.type, s.default, s.required, s.meaning) for s in _settings(Mine)}
    assert told == {
        "rate": ("float above 0 and at most 1, or null", 0.5, False, "How fast."),
        "kind": ("one of a, b", "a", False, ""),
        "names": ("list of text", [], False, ""),
        "count": ("whole number at least 1", None, True, ""),
    }


def test_a_text_keeps_the_indent_of_its_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[registry.find("objectives", "grpo", Objective).__module__]
    monkeypatch.setattr(module, "__doc__", "grpo: Mine.\n\n    loss = r\n\nSource: nowhere.\n")
    told = describe("objective", "grpo")
    assert (told.summary, told.text) == ("Mine.", "    loss = r\n\nSource: nowhere.")


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_of_a_plug_in_that_ships_has_a_meaning(kind: str) -> None:
    where, _ = KINDS[kind]
    found = {name: describe(kind, name) for name in registry.names(where)}
    assert {name: line.removeprefix(f"{name}: ") for name, line in registry.describe(where).items()} == {
        name: told.summary for name, told in found.items()
    }
    assert [(name, s.name) for name, told in found.items() for s in told.settings if not s.meaning] == []


def test_every_key_of_a_run_is_told_and_can_be_set() -> None:
    told = {s.name: s for s in describe("run").settings}
    assert {name.partition(".")[0] for name in told} >= set(RunConfig.model_fields)
    assert [name for name, setting in told.items() if not setting.meaning] == []
    assert told["optimizer.lr"].default == RunConfig().optimizer.lr
    assert load_config(sets=["optimizer.lr=0.5", "evaluation.prompts=3"]).evaluation.prompts == 3


def test_the_command_prints_equation_source_and_settings_or_one_document() -> None:
    shown = in_this_process("show", "objective", "tmpo")
    assert shown.returncode == 0
    for part in ("arXiv 2605.10983", "L_TMPO", "clip  float above 0; default 0.2", "reference  one of none, behaviour, frozen"):
        assert part in shown.stdout
    document = json.loads(in_this_process("show", "objectives", "tmpo", "--json").stdout)
    assert (document["kind"], document["name"]) == ("objective", "tmpo")
    assert document["strength"] == {"setting": "beta", "values": [1.0, 2.0, 4.0]}
    assert "strength: beta, from closest to the base model to furthest: 1, 2, 4\n" in shown.stdout
    assert {"beta", "clip"} <= {setting["name"] for setting in document["settings"]}


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("objective", "tmp", "did you mean 'tmpo'"),
        ("objectif", None, "unknown kind 'objectif'; did you mean 'objective'"),
        ("sampler", None, "`show sampler` needs a name: branch, dynamic_tree"),
        ("run", "tmpo", "takes no name"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(kind: str, name: str | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        describe(kind, name)
