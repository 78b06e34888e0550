"""A house whose model says what it is told: tools in the Hermes format, and <think>. Knows no test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.api.house import House
from tests.text.tokenizers_made import write_directory

TEMPLATE = """
{%- if tools %}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call one as <tool_call>
{"name": ..., "arguments": ...}
</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and mood == 'open' %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- if reasoning_effort %}[{{ reasoning_effort }}]{% endif %}
{%- endif %}"""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]


def said(name: str, arguments: str) -> str:
    """A call as the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ONE = said("weather", '{"place": "Paris, \\u00e9t\\u00e9 \\"là\\"", "days": 3}')
ANSWERS = {
    "plain": "Just text, and no call.",
    "one call": ONE,
    "text and two calls": "I look.\n" + ONE + "\n" + said("clock", "{}"),
    "think and call": "<think>\nThe user wants it, née.\n</think>\n\n" + ONE,
    "think and answer": "<think>\nIt is 3, I think; 4?\n</think>\n\nIt is 3.",
    "think without end": "<think>\nand on and on",
    "broken call": 'So: <tool_call>\n{"name": "weather", "arguments": {"place": \n</tool_call> and on.',
    "unknown tool": said("rocket", '{"to": "Mars"}'),
    "the result is 21": "It is 21 degrees.",
}
"""What a prompt holds -> what the model says."""


def make_house(directory: Path, answers: Mapping[str, str] = ANSWERS, template: str = TEMPLATE, **fields: Any) -> House:
    """Simulated. ``fields``: of the arguments' ``api`` (by the prefix api_) and of ``engine``, and seconds_per_step."""
    write_directory(directory)
    api = {name.removeprefix("api_"): value for name, value in fields.items() if name.startswith("api_")}
    engine = {name: value for name, value in fields.items() if not name.startswith("api_")}
    simulated = {"answers": dict(answers), "verify": True, "seconds_per_step": engine.pop("seconds_per_step", 0.0)}
    return House(
        {
            "model": {
                "model": str(directory),
                "served_model_name": "model",
                "runner": "simulated",
                "simulated": simulated,
            },
            "engine": {"num_kv_blocks": 512, "max_model_len": 4096, "max_num_batched_tokens": 512, **engine},
            "api": {"chat_template": template, **api},
        }
    )
