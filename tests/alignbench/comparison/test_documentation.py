from alignbench.comparison.planning import Request
from tests.support.command_line import ROOT


def test_every_key_of_a_comparison_file_is_documented() -> None:
    section = (ROOT / "docs" / "configuration.md").read_text().split("## Comparison files")[1].split("\n## ")[0]
    assert [key for key in Request.model_fields if f"`{key}`" not in section] == []
