"""Pairs on disk: written from a model's images, read back, and trained on without a rollout."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alignbench import UserError, load_backbone, load_objective, run
from alignbench.errors import DiskError, ScorerError
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.tasks import load_task
from alignbench.training.engine import backward
from alignbench.training.pairs import check_pairs, fingerprint, pair_forest, read_pairs, write_pairs
from objectives.dpo import DPO
from tests.support.faults import small_files
from tests.support.plugins import ToyPolicy, toy_config, write_task


def written(folder: Path, images: int = 4) -> Path:
    policy = ToyPolicy(ToyPolicy.Settings())
    judges = MetricSuite(load_task(str(write_task(folder))))
    assert write_pairs(policy, judges, ["train 0", "train 1"], images, 0, folder / "pairs") == 2
    return folder / "pairs" / "pairs.jsonl"


def test_the_brightest_and_the_darkest_of_each_prompt_are_kept(tmp_path: Path) -> None:
    file = written(tmp_path)
    pairs = read_pairs(file)
    assert [p.prompt for p in pairs] == ["train 0", "train 1"]
    for pair, line in zip(pairs, file.read_text().splitlines(), strict=True):
        bright, dark = (np.asarray(Image.open(f))[..., 0].mean() / 255 for f in (pair.chosen, pair.rejected))
        assert (json.loads(line)["chosen_reward"], json.loads(line)["rejected_reward"]) == pytest.approx((bright, dark))
        assert bright > dark


def test_writing_overwrites_nothing(tmp_path: Path) -> None:
    file = written(tmp_path)
    before = file.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_pairs(
            ToyPolicy(ToyPolicy.Settings()), MetricSuite(load_task(str(write_task(tmp_path)))), ["a"], 2, 0, file.parent
        )
    assert file.read_bytes() == before


def test_pairs_that_stopped_half_way_do_not_look_whole(tmp_path: Path) -> None:
    """The scorer dies at the fourth prompt; what was drawn until then is kept under a name that says so."""
    judges = MetricSuite(load_task(str(write_task(tmp_path, "Dying"))))
    with pytest.raises(ScorerError, match="the server is gone"):
        write_pairs(ToyPolicy(ToyPolicy.Settings()), judges, [f"train {i}" for i in range(5)], 2, 0, tmp_path / "pairs")
    with pytest.raises(UserError, match="cannot read the pairs"):
        read_pairs(tmp_path / "pairs" / "pairs.jsonl")
    assert [p.prompt for p in read_pairs(tmp_path / "pairs" / "pairs.partial.jsonl")] == ["train 0", "train 1", "train 2"]


def test_pairs_on_a_full_disk_are_one_sentence(tmp_path: Path) -> None:
    judges = MetricSuite(load_task(str(write_task(tmp_path))))
    with small_files(64), pytest.raises(DiskError, match=r"cannot write .*pairs: "):
        write_pairs(ToyPolicy(ToyPolicy.Settings()), judges, ["train 0"], 2, 0, tmp_path / "pairs")


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("", "holds no pair"),
        ("\n{}\n", "has no column 'prompt'"),
        ('{"prompt": "a", "chosen": "a", "rejected": "b"}\n\n{"prompt": "a", "chosen": "a"}', "line 3: 'rejected' is empty"),
        ('{"prompt": "a", "chosen": 3, "rejected": "b"}', "line 1: 'chosen' must be a text, got 3"),
        ('{"prompt": "a", "chosen": "a", "rejected": "b"}\n{"prompt": "a", "chosen": "a.png"', "line 2 is damaged"),
        ('{"prompt": "a", "chosen": "a.png", "rejected": "b.png"}', "line 1: the chosen image .*a.png does not exist"),
    ],
)
def test_files_that_are_no_pairs_are_refused(tmp_path: Path, lines: str, sentence: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(lines)
    with pytest.raises(UserError, match=sentence):
        read_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match="cannot read the pairs"):
        read_pairs(tmp_path / "nowhere.jsonl")


def test_pairs_come_from_any_table(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "pairs.csv").write_bytes('Chosen;rejected;prompt\na.png;a.png;"x; y"\n'.encode("utf-16"))
    (pair,) = read_pairs(tmp_path / "pairs.csv")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("x; y", tmp_path / "a.png", tmp_path / "a.png")


def test_dpo_prefers_the_chosen_picture(tmp_path: Path) -> None:
    policy = ToyPolicy(ToyPolicy.Settings())
    forest = pair_forest(policy, read_pairs(written(tmp_path)), seed=0, iteration=0, reduction="mean")
    objective = load_objective("dpo", draws=16)
    assert isinstance(objective, DPO)
    winners, losers = objective.pairs(forest)
    assert (winners.tolist(), losers.tolist()) == ([0, 2], [1, 3])
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        found = backward(policy, objective, forest)
        optimizer.step()
    assert objective.diagnostics(found.terms, forest)["implicit_accuracy"] > 0.9


def test_a_run_on_pairs_rolls_nothing_out_and_resumes(tmp_path: Path) -> None:
    changes = {"objective": {"name": "dpo", "draws": 4}, "pairs": str(written(tmp_path)), "save_images": True}
    result = run(toy_config(write_task(tmp_path), **changes), tmp_path / "run")
    assert result.budget.model_rows_rollout == result.budget.reward_calls == 0
    assert result.budget.model_rows_train > 0
    run(toy_config(write_task(tmp_path), **changes), tmp_path / "run", resume=True)


def test_objectives_on_paths_refuse_pairs_in_a_sentence(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path), objective="grpo", pairs=str(written(tmp_path)))
    with pytest.raises(UserError, match="no stochastic step"):
        run(config, tmp_path / "run")


def test_the_tiny_model_encodes_what_it_decodes() -> None:
    policy = load_backbone("tiny", device="cpu")
    pictures = np.full((2, 64, 64, 3), 200, dtype=np.uint8)
    pictures[1, 16:48, 16:48] = (200, 30, 30)
    again = policy.decode(policy.encode_images(list(pictures)))
    # The autoencoder's own error: mean absolute deviation of a few levels of 255.
    assert np.abs(again.astype(int) - pictures).mean() < 10
    with pytest.raises(UserError, match="draws 64 x 64 images; got one of 32 x 64"):
        policy.encode_images([pictures[0][:, :32]])


def test_a_model_that_cannot_encode_says_so(tmp_path: Path) -> None:
    from tests.support.toys import ToyBackbone

    with pytest.raises(UserError, match="'toy' cannot encode images"):
        pair_forest(ToyBackbone(), read_pairs(written(tmp_path)), 0, 0, "mean")


def pair_file(folder: Path, **last: Path) -> Path:
    """Two pairs of 64 x 64 images, of which the second has these instead."""
    Image.new("RGB", (64, 64)).save(folder / "good.png")
    good = {"prompt": "a", "chosen": "good.png", "rejected": "good.png"}
    rows = [good, {**good, **{role: str(file) for role, file in last.items()}}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def test_hidden_colours_of_a_pair_are_not_seen(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    chosen, _ = read_pairs(pair_file(tmp_path, chosen=tmp_path / "clear.png"))[1].images()
    assert chosen.tolist() == [[[255] * 3] * 2]


def test_what_is_wrong_with_the_last_pair_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    Image.new("RGB", (64, 65)).save(tmp_path / "tall.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "tall.png").read_bytes()[:60])
    config = toy_config(write_task(tmp_path), objective="dpo", pairs=str(pair_file(tmp_path, rejected=tmp_path / "cut.png")))
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 2, rejected: cannot open the image .*cut\.png: "):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

    def square(image: np.ndarray) -> None:
        if image.shape[0] != image.shape[1]:
            raise UserError("it is not square")

    tall = read_pairs(pair_file(tmp_path, chosen=tmp_path / "tall.png"))
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 2, chosen: .*tall\.png: it is not square"):
        check_pairs(tall, square)
    check_pairs(tall[:1], square)


def test_a_fingerprint_of_pairs_is_of_what_is_in_the_pictures_wherever_they_lie(tmp_path: Path) -> None:
    file = written(tmp_path)
    pairs = read_pairs(file)
    before = fingerprint(pairs)
    (tmp_path / "moved").mkdir()
    moved = replace(pairs[0], chosen=pairs[0].chosen.rename(tmp_path / "moved" / "x.png"))
    assert fingerprint([moved, *pairs[1:]]) == before
    Image.new("RGB", (4, 4), "red").save(moved.chosen)
    assert fingerprint([moved, *pairs[1:]]) != before
    moved.chosen.unlink()
    with pytest.raises(UserError, match=r"cannot open the image .*x\.png: No such file"):
        fingerprint([moved])
