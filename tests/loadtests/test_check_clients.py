"""The configuration that loadtests/check_clients.py writes is sound, and its model says what the checks expect."""

from __future__ import annotations

from pathlib import Path

import httpx
import yaml

from loadtests.check_clients import ANSWERS, REASONING, TEMPLATE, City, write_config
from serve_app import check_config
from serve_app.text.tool_formats import detect_tool_format
from tests.api.house import House


def test_the_scripted_server_of_the_checks(tmp_path: Path) -> None:
    path = tmp_path / "scripted.yaml"
    write_config(path)
    assert check_config.main([str(path)]) == 0
    found = detect_tool_format(TEMPLATE)
    assert found is not None
    assert found.name == "hermes"
    args = yaml.safe_load(path.read_text())["applications"][0]["args"]
    with House(args, num_replicas=1) as house:
        tools = [{"type": "function", "function": {"name": "City", "parameters": City.model_json_schema()}}]
        for question in ANSWERS:
            body = {"messages": [{"role": "user", "content": question}], "tools": tools}
            answer = httpx.post(house.url + "/v1/chat/completions", json=body, timeout=60).json()
            message = answer["choices"][0]["message"]
            if question == "which city, by a tool":
                assert message["tool_calls"][0]["function"]["name"] == "City"
            assert (message.get("reasoning_content") == REASONING) == (REASONING in ANSWERS[question])
        house.check_rest()
