"""Whatever is given for a configuration, it is one, or one sentence says why not."""

import re
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from alignbench import Objective, Sampler, UserError, load_objective, load_sampler, registry
from alignbench.backbones import families
from alignbench.config.run_config import (
    RunConfig,
    assignments,
    load_config,
    merged_layers,
    parse_assignments,
)
from alignbench.files.yaml_files import parse, read_yaml, to_yaml
from alignbench.settings import validate
from alignbench.tasks import load_task
from tests.support.properties import nested, one_sentence_at_most

HUGE = st.sampled_from([2**63, 2**64, -(2**63) - 1, 10**30, 10**400, -(10**400)])
NUMBERS = st.integers(-3, 30) | HUGE | st.floats() | st.floats(0, 2)
WORDS = st.text(max_size=12) | st.sampled_from(
    ["tmpo", "grpo", "independent", "tiny", "sum", "cosine", "a" * 5000, "a\0b", "x:y"]
)
PLAIN = st.none() | st.booleans() | NUMBERS.filter(lambda v: v == v) | WORDS
"""What YAML and JSON have in common: all that a configuration is made of."""
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS | st.dates() | st.binary(max_size=3)


def paths(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a configuration, parts inside parts."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, BaseModel) and name not in ("objective", "sampler", "backbone"):
                yield from paths(inner, (*above, name))


KEYS = list(paths(RunConfig))
RUBBISH = nested(SCALARS, st.sampled_from([key[-1] for key in KEYS]) | st.text(max_size=8) | st.integers(0, 3))


@st.composite
def rubbish(draw: st.DrawFn) -> dict[Any, Any]:
    """Some real keys at their places, some of anything, with values of any kind."""
    data: dict[Any, Any] = draw(st.dictionaries(st.text(max_size=8) | st.integers(), RUBBISH, max_size=1))
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=4, unique=True)):
        inner = data
        for part in key[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                break
        else:
            inner[key[-1]] = draw(RUBBISH)
    return data


@st.composite
def valid(draw: st.DrawFn) -> RunConfig:
    """Any valid configuration, as far as the model itself looks."""
    positive, share = st.floats(1e-8, 1e6), st.floats(0, 0.999)
    count, seed, name = st.integers(1, 2**62), st.integers(0, 2**63 - 1), st.text(min_size=1, max_size=8)
    settings = st.dictionaries(
        name.filter(lambda k: k not in ("name", "label", "settings")), nested(WORDS | share, name), max_size=3
    )
    plugin = st.fixed_dictionaries(
        {"name": name, "settings": settings}, optional={"label": st.from_regex(r"[A-Za-z0-9_.+-]+", fullmatch=True)}
    )
    parts: dict[str, Any] = {
        "optimizer": st.fixed_dictionaries(
            {}, optional={"lr": positive, "betas": st.tuples(share, share), "schedule": st.just("cosine")}
        ),
        "ema": st.none() | st.fixed_dictionaries({"decay": st.floats(0.01, 0.99), "every": count}),
        "evaluation": st.fixed_dictionaries({}, optional={"prompts": count, "seed": st.integers(-(2**63), 2**63 - 1)}),
        "budget": st.fixed_dictionaries({"model_rows": count}, optional={"seconds": positive}),
    }
    options = {
        **dict.fromkeys(("objective", "sampler", "backbone"), plugin),
        "task": st.text(max_size=8),
        "seed": seed,
        "iterations": st.none() | st.integers(0, 9),
        "pairs": st.none() | name.map(Path),
        "guidance": st.none() | st.floats(1, 30),
        "trackers": st.just("wandb") | st.lists(st.sampled_from(["wandb", "tensorboard"]), max_size=2),
        "log_prob_reduction": st.sampled_from(["mean", "sum"]),
        "save_images": st.booleans(),
    }
    return validate(RunConfig, draw(st.fixed_dictionaries(parts, optional=options)), where="drawn")


@given(rubbish())
@example({"seed": 2**64, "optimizer": {"betas": [2, 3]}})
@example({"objective": {"name": "tmpo", "settings": {"settings": {"settings": 1}}}})
@example({"backbone": "a" * 5000})
@example({"backbone": {"name": "a\0b/c"}})
@example({"sampler": {"name": "dynamic_tree", "steps": 10**400}})
@example({"preset": 0})
@example({"objective": {"\x1c": 2**64}})
def test_any_data_is_a_configuration_that_serves_or_one_sentence(data: dict[Any, Any]) -> None:
    with one_sentence_at_most():
        _serves(load_config(preset="smoke", options=data))


def _serves(config: RunConfig) -> None:
    again = load_config(options=yaml.safe_load(yaml.safe_dump(config.resolved())))
    assert again.resolved() == config.resolved()
    o = config.optimizer
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], o.lr, o.betas, o.eps, o.weight_decay)
    torch.manual_seed(config.seed)
    with pytest.raises(UserError) if "\0" in config.task or len(config.task) > 999 else one_sentence_at_most():
        load_task(config.task)
    for load, chosen in ((load_objective, config.objective), (load_sampler, config.sampler)):
        with one_sentence_at_most():
            load(chosen.name, **chosen.settings)
    with one_sentence_at_most():
        families.opener(config.backbone.name)


@given(valid())
def test_a_resolved_configuration_comes_back_from_yaml_as_itself(config: RunConfig) -> None:
    text = to_yaml(config.resolved())
    assert validate(RunConfig, parse(text), where="again") == config
    # So it does for readers of YAML 1.1.
    assert validate(RunConfig, yaml.safe_load(text), where="again") == config


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs") / "mine.yaml"


TEXTS = st.text(alphabet="-:[]{}!&*#|>'\", \n\tabseed=0129.e~?%@<", max_size=30)


@given(st.binary(max_size=20) | TEXTS.map(str.encode))
@example(b"seed: 2026-99-99")
@example(b"seed: " + b"9" * 5000)
@example(b"x: !!bool maybe")
@example(b"x: !!timestamp x")
@example(b"x: !!int x")
@example(b"x: &a [*a]")
@example(b"x: &a {y: *a}")
@example(b"[" * 1500)
@example(b"\xef\xbb\xbfseed: 3")
def test_any_file_holds_keys_and_values_or_is_refused_in_one_sentence(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with one_sentence_at_most():
        read_yaml(file)
    with one_sentence_at_most():
        load_config(file=file)


@given(TEXTS | st.builds("{}={}".format, st.sampled_from([".".join(key) for key in KEYS]), TEXTS))
@example("seed=2026-99-99")
@example("0\n={0")
@example("task=" + "9" * 5000)
@example("x=" + "[" * 1500)
def test_any_assignment_is_one_or_is_refused_in_one_sentence(text: str) -> None:
    with one_sentence_at_most():
        load_config(sets=[text])


@given(st.dictionaries(st.text(max_size=5), nested(PLAIN, st.text(max_size=5)), max_size=3))
@example({"a": "012", "b": "1e-4", "c": "no", "d": "1:30", "e": "/x #1", "f": "y: z", "g": "2024-01-01", "h": "~", "i": "[x"})
@example({"0": "\x85", "1": {"a": "\u2028b", "\x85": "\ufeff"}})
def test_assignments_give_the_data_back(data: dict[str, Any]) -> None:
    assume(all(re.fullmatch(r"[^.=\s]+", key) for key in data))
    assert parse_assignments(assignments(data)) == merged_layers(data)


def misspelt(draw: st.DrawFn, word: str) -> str:
    """A letter left out, doubled, or changed places with the next."""
    at = draw(st.integers(0, len(word) - 1))
    return draw(
        st.sampled_from(
            [
                word[:at] + word[at + 1 :],
                word[:at] + word[at] * 2 + word[at + 1 :],
                word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
            ]
        )
    )


@given(st.sampled_from(KEYS), st.data())
def test_a_misspelt_key_is_named_with_the_one_that_was_meant(key: tuple[str, ...], data: st.DataObject) -> None:
    *above, right = key
    wrong = data.draw(st.composite(misspelt)(right))
    assume(wrong and (*above, wrong) not in KEYS)
    inner: dict[str, Any] = {wrong: 1}
    for part in reversed(above):
        inner = {part: inner}
    with pytest.raises(UserError) as caught:
        validate(RunConfig, inner, where="given")
    said = str(caught.value)
    assert f"there is no key {'.'.join([*above, wrong])!r}" in said
    assert repr(right) in said


def test_a_misspelt_key_that_is_right_elsewhere_has_both_hints() -> None:
    with pytest.raises(UserError, match=r"there is no key 'shared'; did you mean 'elbo\.shared' or 'sharded'"):
        validate(RunConfig, {"shared": True}, where="given")


PLUGINS = [(kind, name) for kind in ("objectives", "samplers") for name in registry.names(kind)]


@given(st.sampled_from(PLUGINS), st.data())
def test_a_plugins_settings_of_any_kind_serve_or_are_refused_in_one_sentence(
    plugin: tuple[str, str], data: st.DataObject
) -> None:
    kind, name = plugin
    load, base = {"objectives": (load_objective, Objective), "samplers": (load_sampler, Sampler)}[kind]
    keys = st.sampled_from(sorted(registry.find(kind, name, base).Settings.model_fields) or ["none"])
    settings = data.draw(st.dictionaries(keys, NUMBERS | SCALARS | st.lists(NUMBERS, max_size=4), max_size=3))
    with one_sentence_at_most():
        made = load(name, **settings)
        if isinstance(made, Sampler):
            made.plan(data.draw(st.floats(0, 1)), np.random.default_rng(0))


@given(*[nested(SCALARS, st.text(alphabet="abc", max_size=2))] * 2)
def test_layers_leave_what_they_are_made_of_alone(one: Any, other: Any) -> None:
    first, second = {"a": one, "b": {"c": 1}}, {"a": other, "b": {"d": 2}}
    before = yaml.safe_dump([first, second], sort_keys=False)
    merged = merged_layers(first, second)
    assert merged["b"] == {"c": 1, "d": 2}
    if not (isinstance(one, dict) and isinstance(other, Mapping)):
        assert merged["a"] is other or yaml.safe_dump(merged["a"]) == yaml.safe_dump(other)
    for inner in (merged["a"], merged["b"]):
        if isinstance(inner, dict):
            inner["new"] = date(2026, 1, 1)
    assert yaml.safe_dump([first, second], sort_keys=False) == before
