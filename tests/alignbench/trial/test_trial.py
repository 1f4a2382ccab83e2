"""A trial from the command line, and a model's own images."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alignbench.embedded.drawing.palette import COLORS
from alignbench.load import load_backbone
from alignbench.trial import measuring, own_images, trial
from alignbench.trial.record import Trial
from tests.support.command_line import in_this_process


@pytest.mark.usefixtures("laid_out")
def test_a_trial_writes_its_record_table_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "QUICK", trial.Size(drawn=6, own=0))
    monkeypatch.setattr(measuring, "REPETITIONS", 3)
    done = in_this_process("check", "--eval", "mode_coverage", "--quick", "--json", "--out", "t", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = Trial.read(tmp_path / "t" / "trial.json")
    assert json.loads(done.stdout) == json.loads(record.model_dump_json())
    assert record.evals == {"mode_coverage": {}}
    by_name = {v.metric: v for v in record.verdicts}
    assert "everything" not in by_name["mode_coverage"].blind_to
    assert {"place", "size", "background"} <= set(by_name["coverage_color"].blind_to)
    table = pd.read_csv(tmp_path / "t" / "trial.csv")
    assert set(table.prompts) == {16, 32, 64, 128}
    assert set(table.images) == {4, 8, 16}
    assert (tmp_path / "t" / "trial.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval", "pickscore"], "'pickscore' scores single images; a trial of diversity needs a set metric"),
        (["--eval", "mode_coverag"], "mode_coverage"),
        (["--eval", "mode_coverage", "--set", "sampler.steps=3"], "--set of a trial takes evals.NAME.key=value"),
        (["--eval", "mode_coverage", "--set", "evals.diversity.pixels=false"], "which is not asked for"),
        (["--eval", ","], "--eval needs the name of a metric"),
        (["--quick"], "belong to --eval"),
    ],
)
def test_what_is_no_trial_is_refused_in_a_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = in_this_process("check", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not list(tmp_path.glob("results/*"))


def test_prompts_of_the_model_leave_their_color_open() -> None:
    prompts = trial._prompts(12)
    assert len(set(prompts)) == 12
    assert not [prompt for prompt in prompts if COLORS.keys() & set(prompt.split())]
    assert any('"' in prompt for prompt in prompts)
    assert any('"' not in prompt for prompt in prompts)


def test_images_from_near_one_noise_resemble_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_images, "STEPS", 2)
    policy = load_backbone("tiny", device="cpu")
    pool = own_images.own_pool(policy, "a circle", np.random.default_rng(0))
    assert len(pool.free) == own_images.IMAGES
    assert pool.images.dtype == np.uint8
    assert len(pool.latents) == len(pool.images)
    colors = [own_images.read_colors(image)[0] for image in pool.images[pool.conditions["background"].collapsed]]
    assert len(set(colors)) == 1

    def spread(members: np.ndarray) -> float:
        return float(pool.images[members].astype(float).std(axis=0).mean())

    assert spread(pool.conditions["one noise"].collapsed) < 0.8 * spread(pool.free)
