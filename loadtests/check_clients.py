"""Agent frameworks against a running server whose model says what it is told: tools, structured answers, streams, reasoning.

    python loadtests/check_clients.py --config scripted.yaml      writes a configuration with a scripted model
    make serve CONFIG=scripted.yaml
    python loadtests/check_clients.py --url http://127.0.0.1:8000

The last one runs where pydantic-ai, instructor and LangChain are installed, which need not be the server's environment (they
bring some 25 packages, and instructor wants an older openai than the tests have):

    pip install "pydantic-ai-slim[openai]" instructor langchain-openai

Prints a line for each check, and one of JSON last. Exit code 1: a check failed. Knows the clients, not the server.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

PACKAGES = ("openai", "pydantic-ai-slim", "instructor", "langchain-openai")
CITY = '{"name": "Paris", "people": 2100000}'
REASONING = "The user asks for a sum."


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ANSWERS = {
    "how is the weather in Paris": call("get_weather", '{"place": "Paris"}'),
    "it is sunny": "It is sunny in Paris.",
    "which city, by a tool": call("City", CITY),
    "which city, by an output tool": call("final_result", CITY),
    "which city, as JSON": CITY,
    "what is one and two": f"<think>{REASONING}</think>It is 3.",
}
TEMPLATE = """{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
<tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}
{% for m in messages %}{{ m.role }}: {{ m.content or '' }}{% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}
{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"""


class City(BaseModel):
    """A city and how many live there."""

    name: str
    people: int


EXPECTED = City(name="Paris", people=2_100_000)


def write_config(path: Path) -> None:
    """deploy/config.yaml with another model."""
    import yaml

    config = yaml.safe_load((Path(__file__).parent.parent / "deploy" / "config.yaml").read_text())
    arguments = config["applications"][0].setdefault("args", {})
    arguments["model"] = {"runner": "simulated", "served_model_name": "model", "simulated": {"answers": ANSWERS}}
    arguments["api"] = {
        **(arguments.get("api") or {}),
        "chat_template": TEMPLATE,
        "tool_parser": "hermes",
        "reasoning_parser": "think",
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False))


# ---- the checks ------------------------------------------------------------------------------------------------------


def openai_client(url: str) -> Any:
    import openai

    return openai.OpenAI(base_url=url, api_key="any", max_retries=0)


def instructor_modes(url: str) -> None:
    import instructor

    for mode, question in (
        (instructor.Mode.TOOLS, "which city, by a tool"),
        (instructor.Mode.JSON_SCHEMA, "which city, as JSON"),
        (instructor.Mode.JSON, "which city, as JSON"),
    ):
        client = instructor.from_openai(openai_client(url), mode=mode)
        messages: Any = [{"role": "user", "content": question}]
        found = client.create(model="model", response_model=City, messages=messages)
        assert found.model_dump() == EXPECTED.model_dump(), (mode, found)  # it makes a class of its own


def pydantic_model(url: str) -> Any:
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    return OpenAIChatModel("model", provider=OpenAIProvider(base_url=url, api_key="any"))


def pydantic_ai_tools(url: str) -> None:
    from pydantic_ai import Agent

    agent = Agent(pydantic_model(url))
    places = []

    @agent.tool_plain
    def get_weather(place: str) -> str:
        """The weather of a place."""
        places.append(place)
        return "it is sunny"

    question = "how is the weather in Paris"
    assert agent.run_sync(question).output == ANSWERS["it is sunny"]

    async def stream() -> str:
        async with agent.run_stream(question) as run:
            return "".join([piece async for piece in run.stream_text(delta=True)])

    assert asyncio.run(stream()) == ANSWERS["it is sunny"]
    assert places == ["Paris", "Paris"]


def pydantic_ai_outputs(url: str) -> None:
    from pydantic_ai import Agent, NativeOutput

    model = pydantic_model(url)
    assert Agent(model, output_type=City).run_sync("which city, by an output tool").output == EXPECTED
    assert Agent(model, output_type=NativeOutput(City)).run_sync("which city, as JSON").output == EXPECTED


def pydantic_ai_reasoning(url: str) -> None:
    """Once, although it comes under two names."""
    from pydantic_ai import Agent

    agent = Agent(pydantic_model(url))
    parts = agent.run_sync("what is one and two").all_messages()[-1].parts
    assert [part.content for part in parts] == [REASONING, "It is 3."], parts

    async def stream() -> list[Any]:
        async with agent.run_stream("what is one and two") as run:
            async for _ in run.stream_text():
                pass
            return [part.content for part in run.all_messages()[-1].parts]

    assert asyncio.run(stream()) == [REASONING, "It is 3."]


def langchain_tools(url: str) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def get_weather(place: str) -> str:
        """The weather of a place."""
        return "it is sunny"

    model = ChatOpenAI(model="model", base_url=url, api_key="any", max_retries=0).bind_tools([get_weather])
    messages: list[Any] = [HumanMessage("how is the weather in Paris")]
    answer = model.invoke(messages)
    assert [found["args"] for found in answer.tool_calls] == [{"place": "Paris"}]
    whole = None
    for chunk in model.stream(messages):
        whole = chunk if whole is None else whole + chunk
    assert [found["args"] for found in whole.tool_calls] == [{"place": "Paris"}]
    messages += [answer, *(get_weather.invoke(found) for found in answer.tool_calls)]
    assert model.invoke(messages).content == ANSWERS["it is sunny"]


def langchain_outputs(url: str) -> None:
    from langchain_openai import ChatOpenAI

    for method, question in (
        ("function_calling", "which city, by a tool"),
        ("json_schema", "which city, as JSON"),
        ("json_mode", "which city, as JSON"),
    ):
        model = ChatOpenAI(model="model", base_url=url, api_key="any", max_retries=0)
        found = model.with_structured_output(City, method=method).invoke(question)
        assert found == EXPECTED, (method, found)


CHECKS: tuple[Callable[[str], None], ...] = (
    instructor_modes,
    pydantic_ai_tools,
    pydantic_ai_outputs,
    pydantic_ai_reasoning,
    langchain_tools,
    langchain_outputs,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="write a configuration here, and end")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    if arguments.config is not None:
        write_config(arguments.config)
        return 0
    failed = []
    for check in CHECKS:
        try:
            check(arguments.url.rstrip("/") + "/v1")
        except Exception:
            traceback.print_exc()
            failed.append(check.__name__)
        print(f"{check.__name__}: {'failed' if check.__name__ in failed else 'as expected'}")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(json.dumps({"checks": len(CHECKS), "failed": failed, "versions": versions}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
