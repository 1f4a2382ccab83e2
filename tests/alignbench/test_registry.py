import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from pydantic import Field

from alignbench import Plan, Sampler, Step, UserError, load_objective, load_sampler, registry, settings

SAMPLER = '''"""{name}: {line}

More words.
"""

from alignbench import Plan, Sampler
from alignbench.rollouts.plan import Step


class {cls}(Sampler):
    def plan(self, progress, rng):
        return Plan((Step(),) * {steps})
'''


class Third(Sampler):
    """For dotted paths and entry points."""

    class Settings(settings.Settings):
        steps: int = Field(3, ge=1)

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        return Plan((Step(),) * self.settings.steps)


def not_a_sampler() -> None:
    """Stands for anything else that a dotted path may name."""


HERE = f"{__name__}:Third"


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of samplers of its own, in place of the one that ships."""
    folder = tmp_path / "plugin_folder_for_tests"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    straight = SAMPLER.format(name="straight", line="no noise at all.", cls="Straight", steps=2)
    (folder / "straight.py").write_text(straight)
    (folder / "longer.py").write_text(SAMPLER.format(name="longer", line="as straight.", cls="Longer", steps=5))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.PACKAGES, "samplers", folder.name)
    yield folder
    for module in [m for m in sys.modules if m.partition(".")[0] == folder.name]:
        del sys.modules[module]


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch) -> list[metadata.EntryPoint]:
    """Fill it, and these are the installed entry points of samplers."""
    points: list[metadata.EntryPoint] = []

    def installed(group: str) -> list[metadata.EntryPoint]:
        return points if group == "alignbench.samplers" else []

    monkeypatch.setattr(metadata, "entry_points", installed)
    return points


def point(name: str, value: str) -> metadata.EntryPoint:
    return metadata.EntryPoint(name, value, "alignbench.samplers")


def problem(name: str, **given: object) -> str:
    with pytest.raises(UserError) as caught:
        load_sampler(name, **given)
    return str(caught.value)


# --- what ships


def test_the_objectives_and_samplers_that_ship_are_known_and_helpers_are_not() -> None:
    assert {"tmpo", "grpo"} <= set(registry.names("objectives"))
    assert {"independent", "fixed_tree", "dynamic_tree"} <= set(registry.names("samplers"))
    assert "tiny" in registry.names("backbones")
    for kind in registry.PACKAGES:
        assert not any(name.startswith("_") for name in registry.names(kind))


def test_everything_that_ships_has_a_line() -> None:
    for kind in registry.PACKAGES:
        assert all(len(line) > 10 for line in registry.describe(kind).values())


def test_listing_imports_neither_torch_nor_a_plug_in() -> None:
    script = (
        "import sys; from alignbench import registry\n"
        "for kind in registry.PACKAGES: assert registry.describe(kind)\n"
        "print([m for m in sys.modules if m in ('torch', 'objectives.tmpo', 'diffusers', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("dynamictree", "there is no sampler 'dynamictree'; did you mean 'dynamic_tree'"),
        ("_tree", "there is no sampler '_tree'"),
        ("zzz", "there is no sampler 'zzz'; known: "),
        ("", "there is no sampler ''; known: "),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known(name: str, sentence: str) -> None:
    assert sentence in problem(name)


def test_an_unknown_setting_is_refused_with_the_nearest_known() -> None:
    assert problem("dynamic_tree", kapa=3) == "sampler dynamic_tree: there is no key 'kapa'; did you mean 'kappa'?"


def test_a_plug_in_knows_its_name_and_settings() -> None:
    objective = load_objective("grpo", clip=0.5)
    assert objective.name == "grpo"
    assert objective.settings.clip == 0.5


# --- a file in the package


@pytest.mark.usefixtures("entry_points")
def test_a_file_dropped_into_the_package_is_found_under_its_name(plugins: Path) -> None:
    assert registry.describe("samplers") == {"straight": "no noise at all.", "longer": "as straight."}
    assert registry.names("samplers") == ["longer", "straight"]
    sampler = load_sampler("longer")
    assert sampler.name == "longer"
    assert len(sampler.plan(0.0, np.random.default_rng(0)).steps) == 5


@pytest.mark.usefixtures("entry_points")
def test_only_files_whose_docstring_starts_with_their_name_are_plug_ins(plugins: Path) -> None:
    (plugins / "helper.py").write_text('"""Helps."""\n')
    (plugins / "bare.py").write_text("x = 1\n")
    (plugins / "_private.py").write_text('"""_private: hidden."""\n')
    (plugins / "broken.py").write_text("def (\n")
    (plugins / "latin.py").write_bytes(b'"""latin: \xe9"""\n')
    assert registry.names("samplers") == ["longer", "straight"]
    # Whoever asks for one is told what it lacks.
    assert problem("bare") == (
        f"{plugins / 'bare.py'} is not a plug-in (sampler): its docstring must begin with 'bare: ' and say what it is"
    )
    assert problem("broken").startswith("sampler 'broken' cannot be read: ")
    assert problem("_private").startswith("there is no sampler '_private'")


@pytest.mark.usefixtures("entry_points")
def test_a_class_that_cannot_be_made_is_refused_in_a_sentence(plugins: Path) -> None:
    text = SAMPLER.format(name="unready", line="has no plan.", cls="Unready", steps=1)
    (plugins / "unready.py").write_text(text.replace("def plan", "def plans"))
    assert problem("unready").endswith("must define exactly one Sampler for 'unready'; it defines Unready without plan")
    assert problem(f"{plugins.name}.unready:Unready").startswith(f"sampler {plugins.name}.unready:Unready cannot be created: ")
    (plugins / "other.py").write_text(
        text.replace("unready", "other").replace("def plan", "def __init__(self): ...\n    def plan")
    )
    assert problem("other").startswith("sampler other cannot be created: Unready.__init__() takes 1 positional argument but 2")


@pytest.mark.usefixtures("entry_points")
def test_describing_does_not_import(plugins: Path) -> None:
    (plugins / "explosive.py").write_text('"""explosive: raises when imported."""\nraise RuntimeError("boom")\n')
    assert registry.describe("samplers")["explosive"] == "raises when imported."
    assert problem("explosive") == "sampler 'explosive' cannot be imported: RuntimeError: boom"


@pytest.mark.usefixtures("entry_points")
def test_a_plug_in_whose_own_import_is_missing_is_refused_by_name(plugins: Path) -> None:
    (plugins / "needy.py").write_text('"""needy: wants what is not there."""\nimport not_installed_anywhere\n')
    assert problem("needy") == (
        "sampler 'needy' cannot be imported: ModuleNotFoundError: No module named 'not_installed_anywhere'"
    )


@pytest.mark.usefixtures("entry_points")
def test_a_file_must_define_exactly_one_class_of_its_kind(plugins: Path) -> None:
    (plugins / "empty.py").write_text('"""empty: defines nothing."""\nfrom alignbench import Sampler\n')
    two = SAMPLER.format(name="two", line="defines two.", cls="One", steps=1)
    (plugins / "two.py").write_text(two + "\n\nclass Two(One):\n    pass\n")
    assert problem("empty").endswith("must define exactly one Sampler for 'empty'; it defines none")
    assert problem("two").endswith("must define exactly one Sampler for 'two'; it defines One, Two")


@pytest.mark.usefixtures("entry_points")
def test_abstract_bases_in_a_file_do_not_count(plugins: Path) -> None:
    text = SAMPLER.format(name="based", line="has a base.", cls="Based", steps=1)
    text = text.replace("class Based(Sampler)", "class Base(Sampler):\n    pass\n\n\nclass Based(Base)")
    (plugins / "based.py").write_text(text)
    assert type(load_sampler("based")).__name__ == "Based"


# --- dotted paths


def test_a_dotted_path_names_a_class() -> None:
    sampler = load_sampler(HERE, steps=4)
    assert isinstance(sampler, Third)
    assert len(sampler.plan(0.0, np.random.default_rng(0)).steps) == 4
    assert problem(HERE, step=4).endswith("there is no key 'step'; did you mean 'steps'?")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (f"{__name__}:Thirt", f"module {__name__} has no 'Thirt'; did you mean 'Third'?"),
        (f"{__name__}:not_a_sampler", "is not a Sampler class; derive it from alignbench.Sampler"),
        ("no.such.module:X", "sampler 'no.such.module:X' cannot be imported: ModuleNotFoundError"),
        (":X", "sampler ':X' cannot be imported"),
        ("objectives.tmpo:TMPO", "'objectives.tmpo:TMPO' is not a Sampler class"),
    ],
)
def test_a_dotted_path_that_leads_nowhere_is_refused(name: str, sentence: str) -> None:
    assert sentence in problem(name)


# --- entry points


def test_an_installed_packages_entry_point_is_found(entry_points: list[metadata.EntryPoint]) -> None:
    entry_points.append(point("third", HERE))
    assert "third" in registry.names("samplers")
    assert "third" not in registry.names("objectives")
    assert isinstance(load_sampler("third"), Third)
    assert load_sampler("third").name == "third"


def test_a_file_wins_over_an_entry_point_of_its_name(plugins: Path, entry_points: list[metadata.EntryPoint]) -> None:
    entry_points.append(point("straight", HERE))
    assert type(load_sampler("straight")).__name__ == "Straight"
    assert registry.names("samplers") == ["longer", "straight"]


def test_an_entry_point_that_does_not_load_is_listed_and_refused_when_asked_for(
    entry_points: list[metadata.EntryPoint],
) -> None:
    entry_points.append(point("ghost", "no_such_package.module:Ghost"))
    entry_points.append(point("other", f"{__name__}:not_a_sampler"))
    assert registry.describe("samplers")["ghost"] == "from no_such_package.module:Ghost"
    assert problem("ghost").startswith("sampler 'ghost' (no_such_package.module:Ghost) cannot be imported: ")
    assert problem("other") == "'other' is not a Sampler class; derive it from alignbench.Sampler"
