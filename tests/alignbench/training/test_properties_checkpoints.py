"""No byte of a checkpoint changes unnoticed."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from alignbench import UserError, load_objective
from alignbench.files.digests import SUMS
from alignbench.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    policy_weights,
    save_checkpoint,
)
from alignbench.training.tensors import EMA, TrainedTensors
from tests.support.toys import ToyNet


def saved(folder: Path, iteration: int) -> Path:
    """A checkpoint of a model whose weights all are its iteration."""
    model = ToyNet(4, hidden=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(iteration)
    optimizer = torch.optim.AdamW(model.parameters())
    state = Checkpoint(
        iteration=iteration, config={"seed": 0}, budget={}, metrics=[{"reward": 0.5}], ratio_deviation=0.0, started="now"
    )
    ema = EMA(list(model.parameters()), 0.9, 1)
    return save_checkpoint(folder, state, TrainedTensors(model, optimizer, ema, load_objective("grpo")), keep=2)


def restored(folder: Path) -> tuple[nn.Module, list[str]]:
    model = ToyNet(4, hidden=2)
    optimizer, ema = torch.optim.AdamW(model.parameters()), EMA(list(model.parameters()), 0.9, 1)
    found = load_checkpoint(folder, {"seed": 0}, TrainedTensors(model, optimizer, ema, load_objective("grpo")))
    return model, found.passed_over


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoints")
    for iteration in (1, 2):
        saved(made, iteration)
    return made


def goes_back_to_the_first(folder: Path) -> None:
    with pytest.raises(UserError, match="iteration-2 is damaged"):
        policy_weights(folder)
    model, passed_over = restored(folder)
    assert len(passed_over) == 1
    assert all(bool((p == 1).all()) for p in model.parameters())


FILES = ["weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", SUMS]


@given(st.sampled_from(FILES), st.integers(0, 10**6), st.integers(1, 255), st.integers(0, 3))
def test_a_changed_byte_anywhere_is_noticed(folder: Path, name: str, at: int, flip: int, more: int) -> None:
    file = folder / "iteration-2" / name
    whole = file.read_bytes()
    damaged = bytearray(whole)
    if not damaged:
        return
    for i in range(more + 1):
        damaged[(at + 7 * i) % len(damaged)] ^= flip
    if damaged == whole:
        return
    file.write_bytes(damaged)
    try:
        goes_back_to_the_first(folder)
    finally:
        file.write_bytes(whole)
    assert all(bool((p == 2).all()) for p in restored(folder)[0].parameters())


@pytest.mark.parametrize("end", [b"\r", b"\x0b", b"\x1c", b" \n", b""])
def test_other_line_ends_in_the_list_of_sums_are_noticed(folder: Path, end: bytes) -> None:
    file = folder / "iteration-2" / SUMS
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + end)
    try:
        goes_back_to_the_first(folder)
    finally:
        file.write_bytes(whole)


@given(
    st.sampled_from(FILES), st.integers(0, 10**6), st.sampled_from(["cut", "longer", "gone", "renamed", "another's", "a copy"])
)
def test_a_file_that_is_cut_grown_gone_or_anothers_is_noticed(folder: Path, name: str, at: int, how: str) -> None:
    file = folder / "iteration-2" / name
    whole, other = file.read_bytes(), file.with_name("other")
    match how:
        case "cut":
            file.write_bytes(whole[: at % max(len(whole), 1)])
        case "longer":
            file.write_bytes(whole + bytes([at % 256]))
        case "gone":
            file.unlink()
        case "renamed":
            file.rename(other)
        case "another's":
            file.write_bytes((folder / "iteration-1" / name).read_bytes())
        case "a copy":
            shutil.copy(file, other)
    changed = not file.exists() or file.read_bytes() != whole or other.exists()
    try:
        if changed:
            goes_back_to_the_first(folder)
    finally:
        file.write_bytes(whole)
        other.unlink(missing_ok=True)
