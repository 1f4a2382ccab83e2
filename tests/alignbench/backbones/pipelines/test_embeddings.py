"""Embeddings of prompts of different lengths."""

import torch

from alignbench.backbones.pipelines.embeddings import Embeddings


def test_prompts_are_kept_without_the_padding_at_their_end() -> None:
    states = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[True, False, False], [True, False, True]])
    first, second = Embeddings(states, None, mask).split()
    assert first.states.tolist() == [[[0, 1]]]
    assert second.states.shape == (1, 3, 2)  # padding between tokens that are read stays, with its mask
    assert second.mask is not None
    assert second.mask.tolist() == [[True, False, True]]


def test_joined_prompts_get_masked_padding() -> None:
    short, long = Embeddings(torch.ones(1, 1, 2), torch.full((1, 3), 1.0)), Embeddings(torch.ones(1, 3, 2), torch.zeros(1, 3))
    both = Embeddings.joined([short, long])
    assert both.states.tolist() == [[[1, 1], [0, 0], [0, 0]], [[1, 1]] * 3]
    assert both.mask is not None
    assert both.mask.tolist() == [[True, False, False], [True, True, True]]
    assert both.pooled is not None
    assert both.pooled.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_prompts_of_one_length_that_are_read_whole_get_no_mask() -> None:
    assert Embeddings.joined([Embeddings(torch.ones(1, 2, 2)), Embeddings(torch.zeros(2, 2, 2))]).mask is None


def test_rows_are_prompts_by_their_index() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    rows = Embeddings(torch.arange(4.0).reshape(2, 2, 1), None, mask)[torch.tensor([1, 1, 0])]
    assert rows.states.flatten(1).tolist() == [[2, 3], [2, 3], [0, 1]]
    assert rows.mask is not None
    assert rows.mask.tolist() == [[True, True], [True, True], [True, False]]
