"""Benchmarks use the threads that a run would; the other tests use one."""

import os
from collections.abc import Iterator

import pytest
import torch

from alignbench import load_backbone
from alignbench.backbone import Backbone
from tests.benchmarks.flux import TinyFlux


@pytest.fixture(scope="module")
def threads() -> Iterator[int]:
    before, wanted = torch.get_num_threads(), min(8, len(os.sched_getaffinity(0)))
    torch.set_num_threads(wanted)
    yield wanted
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["tiny", "flux"])
def policy(request: pytest.FixtureRequest, threads: int) -> Backbone:
    return TinyFlux() if request.param == "flux" else load_backbone("tiny", device="cpu")
