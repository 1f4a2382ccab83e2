"""Streams that are closed, full, or cannot hold every letter."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignbench.runtime import streams
from tests.support.command_line import ROOT


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of sh, in which $AB is the command."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "AB": f"{sys.executable} -m alignbench", **environment}
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=cwd, env=variables, timeout=120, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("$AB list >&-", 0, ""),
        ("$AB list nothing 2>&-", 2, ""),
        ("$AB list <&- >&-", 0, ""),
        ("$AB list >/dev/full", 1, "alignbench: error: cannot write to standard output: No space left on device\n"),
        ("$AB list nothing 2>/dev/full", 2, ""),
        ("{ $AB list; echo $? >code; } | true; exit $(cat code)", 0, ""),
    ],
)
def test_a_stream_that_cannot_be_written_is_one_sentence_or_none(tmp_path: Path, line: str, code: int, says: str) -> None:
    done = shell(line, tmp_path)
    assert (done.returncode, done.stderr) == (code, says)


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What libraries print on stderr would otherwise end up in it."""
    code = (
        "from alignbench.runtime import streams; streams.open_closed(); import os, sys; opened = open('file', 'w'); "
        "assert opened.fileno() > 2; os.write(2, b'noise'); os.write(1, b'noise'); print('noise', file=sys.stderr)"
    )
    done = shell(f'{sys.executable} -c "{code}" <&- >&- 2>&-', tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_json_has_escapes_of_its_own_where_the_encoding_lacks_a_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's would be no JSON: `\\xe9`, `\\U0001f600`."""
    document = '{\n  "name": "café 😀 д"\n}'
    for encoding, shown in (("utf-8", document), ("ascii", '{\n  "name": "caf\\u00e9 \\ud83d\\ude00 \\u0434"\n}')):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        streams.print_json(document)
        sys.stdout.flush()
        assert raw.getvalue().decode(encoding) == shown + "\n"


def test_streams_of_tests_and_notebooks_stay_what_they_are() -> None:
    before = sys.stdout, sys.stderr
    with streams.tolerant() as output:
        assert (sys.stdout, sys.stderr) == before
        assert output.problem() is None


def test_letters_that_a_stream_lacks_end_no_command(tmp_path: Path) -> None:
    done = shell('$AB list "прогон 😀"', tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.startswith("alignbench: error: unknown kind '\\u043f")
    assert done.stderr.isascii()
    assert done.stderr.count("\n") == 1


def test_a_folder_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    done = shell("mkdir gone && cd gone && rmdir ../gone && $AB run", tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "alignbench: error: the current folder has been removed; change to another one first\n",
    )
