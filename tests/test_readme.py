"""The pages say what the code says: tables are made from it, examples are Python, links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from serve_app import check_config
from serve_app.api.reference import reference
from serve_app.engine.config import EngineConfig

REPOSITORY = Path(__file__).parent.parent


def options(markdown: str) -> dict[str, object]:
    """Option -> default, of the table that begins with ``| option | default |``."""
    table = markdown.split("| option | default |", 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \| \S.* \|$", table, flags=re.MULTILINE)
    assert len(rows) == table.count("\n") - 1, "a row of the table does not read | `name` | `default` | meaning |"
    return {name: ast.literal_eval(default) for name, default in rows}


def test_the_option_table_is_engine_config() -> None:
    told = options((REPOSITORY / "README.md").read_text())
    fields = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    assert told == fields
    assert list(told) == list(fields), "the table follows the order of the fields"


def test_a_table_that_lies_is_caught() -> None:
    honest = (REPOSITORY / "README.md").read_text()
    assert options(honest.replace("| `block_size` | `32` |", "| `block_size` | `33` |")) != options(honest)
    assert "seed" not in options(re.sub(r"\| `seed` .*\n", "", honest))
    with pytest.raises(AssertionError, match="a row of the table"):
        options(honest.replace("| `seed` | `0` |", "| seed | 0 |"))


def test_the_examples_are_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_the_pages_that_are_made_from_the_code_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert (REPOSITORY / "docs/http_api.md").read_text() == reference()
    assert check_config.main(["--reference"]) == 0
    made = capsys.readouterr().out
    page = (REPOSITORY / "docs/configuration.md").read_text()
    assert made
    assert page.endswith(made), "run: python -m serve_app.check_config --reference"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / page).read_text()):
        assert target.startswith("https://") or (REPOSITORY / target).exists(), f"{page} links to {target}"
