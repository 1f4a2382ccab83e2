"""Mutation testing: breaks one place in the code at a time and checks that a test fails.

`make mutants`, or `python -m tests.support.mutants [WORD ...]`.

`mutations.yaml` names the places. Each is broken in a copy of the tree, where its tests run alone. A break is *killed* where
one of them fails, and *survives* where all pass: then a test is missing. Exit code 1 where one survives or cannot be tried.

With words, only mutations whose place or file has one of the words in its name are tried.
"""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

import yaml
from pydantic import BaseModel, ConfigDict, Field

from tests.support.places import PACKAGES, ROOT, Place, PlaceError

PARTS = (*PACKAGES, "tests", "pyproject.toml")
"""What tests need of the tree."""
PASSED, FAILED = 0, 1
"""Exit codes of pytest."""


class Mutation(BaseModel):
    """One place to break."""

    model_config = ConfigDict(extra="forbid")

    where: str = Field(alias="in")
    """The function, method, class or module that the place is in: `alignbench.rollouts.plan.Plan.replay_rows`."""
    replace: str
    """An expression or a statement that is in there once."""
    by: str
    """What takes its place."""
    wrong: str
    """What would go wrong."""
    tests: list[str] = Field(min_length=1)
    """Files or names of tests of which one must fail."""

    @property
    def place(self) -> Place:
        return Place(self.where, self.replace)

    @property
    def file(self) -> str:
        return self.place.file(ROOT).relative_to(ROOT).as_posix()

    def verdict(self, tree: Path) -> str:
        """Returns `killed`, `SURVIVED`, or why the mutation could not be tried; the copied tree is restored afterwards."""
        try:
            file, broken = self.place.file(tree), self.place.replaced(self.by, tree)
        except PlaceError as error:
            return f"NOT TRIED: {error}"
        whole = file.read_text(encoding="utf-8")
        file.write_text(broken, encoding="utf-8")
        try:
            code, said = pytest(tree, self.tests)
        finally:
            file.write_text(whole, encoding="utf-8")
        if code == FAILED:
            return "killed"
        return "SURVIVED" if code == PASSED else f"NOT TRIED: its tests did not run\n{said}"


def mutations(words: Sequence[str] = ()) -> list[Mutation]:
    """Reads all mutations, or those whose place or file contains one of the words."""
    data = yaml.safe_load((ROOT / "tests" / "mutations.yaml").read_text(encoding="utf-8"))
    found = [Mutation.model_validate(entry) for entry in data]
    return [m for m in found if not words or any(word in m.where or word in m.file for word in words)]


def pytest(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Runs tests in a copied tree up to the first failure; returns exit code and output."""
    # Without byte code: a line can change within the second and the length that Python goes by.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants", *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr)[-2000:]


def copied_tree(folder: Path, files: Collection[str]) -> Path:
    """Copies what tests need. The files in `files` get the layout of a mutated file: without comments."""
    folder.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    for file in files:
        (folder / file).write_text(ast.unparse(ast.parse((ROOT / file).read_text(encoding="utf-8"))), encoding="utf-8")
    return folder


def main(words: Sequence[str]) -> int:
    chosen = mutations(words)
    if not chosen:
        print(f"no mutation is in a place or file with {' or '.join(words)} in its name", file=sys.stderr)
        return 2
    workers = len(os.sched_getaffinity(0))
    files = {mutation.file for mutation in chosen}
    with TemporaryDirectory() as scratch:
        trees: SimpleQueue[Path] = SimpleQueue()
        for worker in range(workers):
            trees.put(copied_tree(Path(scratch) / str(worker), files))

        def tried(mutation: Mutation) -> str:
            tree = trees.get()
            try:
                verdict = mutation.verdict(tree)
            finally:
                trees.put(tree)
            print(f"{verdict:9} {mutation.where}: {mutation.wrong}", flush=True)
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
