"""Mutation testing: breaks one line at a time and checks that a test fails.

`make mutants`, or `python -m tests.support.mutants [WORD ...]`.

`mutations.yaml` names the lines. Each is broken in a copy of the tree, where its tests run alone. A break is *killed* where one
of them fails, and *survives* where all pass: then a test is missing. Exit code 1 where one survives or cannot be tried.

With words, only mutations of files whose path has one of them are tried.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

import yaml
from pydantic import BaseModel, ConfigDict, Field

ROOT = Path(__file__).parents[2]
PARTS = ("alignbench", "objectives", "samplers", "evals", "tests", "pyproject.toml")
"""What tests need of the tree."""
PASSED, FAILED = 0, 1
"""Exit codes of pytest."""


class Mutation(BaseModel):
    """One line to break."""

    model_config = ConfigDict(extra="forbid")

    file: str
    was: str
    """A text that is in the file once."""
    broken: str
    """What takes its place."""
    wrong: str
    """What would go wrong."""
    tests: list[str] = Field(min_length=1)
    """Files or names of tests of which one must fail."""

    def verdict(self, tree: Path) -> str:
        """`killed`, `SURVIVED`, or why it could not be tried; the copied tree is whole again afterwards."""
        file = tree / self.file
        whole = file.read_text(encoding="utf-8")
        if whole.count(self.was) != 1:
            return f"NOT TRIED: its text is in the file {whole.count(self.was)} times"
        file.write_text(whole.replace(self.was, self.broken), encoding="utf-8")
        try:
            code, said = pytest(tree, self.tests)
        finally:
            file.write_text(whole, encoding="utf-8")
        if code == FAILED:
            return "killed"
        return "SURVIVED" if code == PASSED else f"NOT TRIED: its tests did not run\n{said}"


def mutations(words: Sequence[str] = ()) -> list[Mutation]:
    """All of them, or those of files whose path has one of the words."""
    data = yaml.safe_load((ROOT / "tests" / "mutations.yaml").read_text(encoding="utf-8"))
    found = [Mutation.model_validate(entry) for entry in data]
    return [m for m in found if not words or any(word in m.file for word in words)]


def pytest(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of tests in a copied tree, up to the first that fails."""
    # Without byte code: a line can change within the second and the length that Python goes by.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants", *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr)[-2000:]


def copied_tree(folder: Path) -> Path:
    folder.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    return folder


def main(words: Sequence[str]) -> int:
    chosen = mutations(words)
    if not chosen:
        print(f"no mutation is of a file with {' or '.join(words)} in its path", file=sys.stderr)
        return 2
    workers = len(os.sched_getaffinity(0))
    with TemporaryDirectory() as scratch:
        trees: SimpleQueue[Path] = SimpleQueue()
        for worker in range(workers):
            trees.put(copied_tree(Path(scratch) / str(worker)))

        def tried(mutation: Mutation) -> str:
            tree = trees.get()
            try:
                verdict = mutation.verdict(tree)
            finally:
                trees.put(tree)
            print(f"{verdict:9} {mutation.file}: {mutation.wrong}", flush=True)
            return verdict

        code, said = pytest(Path(scratch) / "0", sorted({test for mutation in chosen for test in mutation.tests}))
        if code != PASSED:
            print(f"the tests do not pass as the code is:\n{said}", file=sys.stderr)
            return 1
        with ThreadPoolExecutor(workers) as pool:
            verdicts = list(pool.map(tried, chosen))
    killed = verdicts.count("killed")
    print(f"{killed} of {len(verdicts)} were killed, {verdicts.count('SURVIVED')} survived")
    return 0 if killed == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
