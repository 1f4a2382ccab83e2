from pathlib import Path

import pytest

from alignbench import UserError
from alignbench.files.digests import digest_of, read_sums, sums_text

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"""The digest of `abc` in FIPS 180-2, appendix B.1."""


def test_a_digest_is_that_of_the_standard(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_of(tmp_path / "file") == ABC


def test_a_list_is_read_as_it_was_written_in_the_order_of_names(tmp_path: Path) -> None:
    digests = {"b/c d.png": "f" * 64, "a": ABC}
    (tmp_path / "list").write_text(sums_text(digests))
    assert (tmp_path / "list").read_text() == f"{ABC}  a\n{'f' * 64}  b/c d.png\n"
    assert read_sums(tmp_path / "list") == digests


@pytest.mark.parametrize("line", ["", "abc  a", f"{ABC} a", f"{ABC}  ../a", f"{ABC}  /a", f"{ABC}  a\n{ABC}  a"])
def test_a_line_that_is_not_a_digest_and_a_file_below_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "list").write_text(f"{ABC}  first\n{line}\n")
    with pytest.raises(UserError, match=r"line [23] is not a digest and the name of a file"):
        read_sums(tmp_path / "list")


def test_only_a_regular_file_has_a_digest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a regular file"):
        digest_of(tmp_path)
