"""One thread for every test: the models are tiny, and results must not depend on how many cores a machine has.

Signals mean what they mean in a terminal, also where the tests run in the background: there a shell has them ignored.

Property tests draw the same few examples each time; `make fuzz` draws many, and others each time.

With several workers (`-n`), the files that take longest come first, so that no worker is left with one of them at the end.

Folders of tests lie in memory where there is room: runs flush each of their files, which on a disk takes more time than many a
test. Those of tests that passed are removed at once (`tmp_path_retention_policy`).
"""

import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(_number, signal.SIG_DFL)

# Torch reads the variables above when it is imported, which is not here: the process that starts the workers needs none of it.
import pytest  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

# A busy machine is slow, which says nothing about the code.
_any_speed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("suite", _any_speed, derandomize=True, max_examples=30)
settings.register_profile("mutants", settings.get_profile("suite"), phases=[Phase.explicit, Phase.generate])  # one is enough
settings.register_profile("fuzz", _any_speed, derandomize=False, max_examples=1000, print_blob=True)
settings.load_profile("suite")


LONGEST = (
    "test_diffusers_folder.py",
    "test_processes.py",
    "test_run.py",
    "test_compare.py",
    "test_flux2.py",
    "test_faults.py",
    "test_report.py",
    "test_sharding.py",
    "test_engine.py",
    "test_checking.py",
    "test_costs.py",
    "test_sana.py",
    "test_gaussian_mixture.py",
    "test_train_tiny.py",
    "test_app.py",
    "test_resuming.py",
    "test_qwen_image.py",
    "test_dead_terms.py",
)
"""Files that take longer than all others, the longest first."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist would order files by their number of tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("dist", "no") == "no" and not hasattr(config, "workerinput"):
        return
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """Makes figures quick, leaves torch one thread, and spares the garbage collector the modules and tests, which last.

    Looking through these takes a twentieth of the time.
    """
    import torch

    from tests.support import quick_figures as quick_figures

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lays figures out as matplotlib does; for tests of figures. Others only need that they are drawn."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from tests.support.quick_figures import lay_out

    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lay_out)


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what a page says, or of a command that ends in one: plots take most of a report's time."""
    from alignbench.reports import report

    monkeypatch.setattr(report, "draw_plots", lambda *_: report.Plots())


@pytest.fixture
def few_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures `path_kl` of a run from few rollouts, which would take most of the time of a short run on a large model."""
    monkeypatch.setattr("alignbench.training.run_evaluation.PATHS", 4)


@pytest.fixture(autouse=True)
def _figures_end_with_their_test() -> Iterator[None]:
    """Matplotlib warns about figures that are left open, in whichever test makes one too many."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(autouse=True)
def _one_thread_for_the_next_test_too() -> Iterator[None]:
    """Trainings set the number of threads of the process."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
