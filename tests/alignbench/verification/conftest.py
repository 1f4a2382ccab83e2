"""One true comparison for all tests of this folder; each alters a copy."""

import shutil
from pathlib import Path

import pytest

from tests.support.tampering import true_comparison


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison, which tests only read."""
    return true_comparison(tmp_path_factory.mktemp("verification") / "comparison")


@pytest.fixture
def comparison(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may alter."""
    return Path(shutil.copytree(original, tmp_path / "comparison"))
