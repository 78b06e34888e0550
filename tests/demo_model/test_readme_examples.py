"""The examples of the toy model's README, run against the whole service: they print what it says they print."""

from __future__ import annotations

import re

import pytest

from serve_app.demo_model import train
from tests.api.house import House


def test_the_examples_print_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (train.DIRECTORY / "README.md").read_text(), flags=re.DOTALL)
    code = "".join(blocks)
    expected = re.findall(r"^# (.*)$", code, flags=re.MULTILINE)
    assert len(expected) >= 8
    engine = {"num_kv_blocks": 256, "num_threads": 1}
    with House({"model": {"model": "demo", "dtype": "float32"}, "engine": engine}, num_replicas=1) as house:
        exec(compile(code.replace("http://127.0.0.1:8000", house.url), "README.md", "exec"), {})
        house.check_rest()
    assert capsys.readouterr().out.splitlines() == expected
