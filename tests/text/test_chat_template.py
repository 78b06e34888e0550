"""Chat templates render as transformers' apply_chat_template does, and refuse with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import ConfigurationError, InvalidParameterError, InvalidRequestError
from serve_app.text.chat_template import ChatTemplate, _compile
from serve_app.text.tokenizer import Tokenizer
from tests.text.tokenizers_made import write_directory

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- if message.tool_calls|length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
        {{- message.tool_calls[0].function.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MACROS = """\
{% macro turn(role, content) %}
[{{ role | upper }}] {% if content is string %}{{ content }}{% else %}{% for part in content %}
{% if part.type != 'text' %}{% continue %}{% endif %}{{ part.text }}{% endfor %}{% endif %}

{% endmacro %}
{% set ns = namespace(turns=0, stopped=false) %}
{% for document in documents or [] %}
doc {{ loop.index }}: {{ document.title }} <{{ document.text | tojson }}>
{% endfor %}
{% for message in messages %}
    {% if ns.turns >= 3 %}
        {% set ns.stopped = true %}
        {% break %}
    {% endif %}
    {% set ns.turns = ns.turns + 1 %}
{{ turn(message.role, message.content) }}
{% if message.reasoning_content %}think: {{ message.reasoning_content }} {{ message.thinking }}{% endif %}
{% endfor %}
{{ ns.turns }} {{ ns.stopped }} {{ missing }} {{ eos_token }}{# a comment #}
"""

GENERATION = """\
{% set seen = 'none' %}
{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}
{% set seen = 'inside' %}
<a>{{ message.content }}{{ loop.index }}{{ eos_token }}</a>
{% endgeneration %}
{% else %}
<u>{{ message.content }}</u>
{% endif %}
{% endfor %}
{{ seen }}{% if add_generation_prompt %}<a>{% endif %}
"""

TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA_3, "macros": MACROS, "generation": GENERATION}

USER = {"role": "user", "content": "  <b>Größe</b> & 'quotes' {{ 7 }} \n"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": " Be brief. "}, USER],
    "turns": [USER, {"role": "assistant", "content": "Hi  "}, USER, {"role": "assistant", "content": "Bye 😀"}],
    "nulls": [{**USER, "name": None, "tool_calls": None}],
    "reasoning": [USER, {"role": "assistant", "content": "4", "reasoning": "2+2"}],
}
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"b": "<&>", "a": [1, None, True]}}}]
TOOL_CALL = {
    "role": "assistant",
    "tool_calls": [{"function": {"name": "größe", "arguments": {"x": "<1>", "ü": 2}}}],
}
DOCUMENTS = [{"title": "One", "text": 'a "b" <c>'}, {"title": "Two", "text": "ü"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("model"), config={"tokenizer_class": "PreTrainedTokenizerFast"})


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def ours(directory: Path, source: str | dict[str, str]) -> ChatTemplate:
    return ChatTemplate(source, Tokenizer.from_directory(directory).special_tokens)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_renders_as_transformers(template: str, chat: str, directory: Path, theirs: Any) -> None:
    rendered = set()
    for kwargs in (
        {},
        {"add_generation_prompt": True},
        {"add_generation_prompt": True, "enable_thinking": False, "date_string": "1 May", "missing": "here"},
        {"tools": TOOLS, "documents": DOCUMENTS, "bos_token": "<other>"},
    ):
        wanted = theirs.apply_chat_template(CHATS[chat], chat_template=TEMPLATES[template], tokenize=False, **kwargs)
        own = {name: kwargs[name] for name in ("add_generation_prompt", "tools", "documents") if name in kwargs}
        others = {name: value for name, value in kwargs.items() if name not in own}
        text = ours(directory, TEMPLATES[template]).render(CHATS[chat], **own, template_kwargs=others)
        assert text == wanted
        rendered.add(text)
    assert len(rendered) > 1  # the arguments did reach the template


def test_tool_calls_and_parts(directory: Path, theirs: Any) -> None:
    parts = [{"type": "text", "text": "look: "}, {"type": "image"}, {"type": "text", "text": "there"}]
    for template, chat in ((LLAMA_3, [USER, TOOL_CALL, USER]), (MACROS, [{"role": "user", "content": parts}, USER])):
        text = ours(directory, template).render(chat, tools=TOOLS)
        assert text == theirs.apply_chat_template(chat, chat_template=template, tokenize=False, tools=TOOLS)
    assert "look: there" in text


@pytest.mark.parametrize("template", ["chatml", "llama 3", "macros"])
@pytest.mark.parametrize(
    "content", ["So far", "ends in space ", " 1\n2\n", [{"type": "text", "text": "in "}, {"type": "x"}]]
)
def test_continues_the_final_message_as_transformers(template: str, content: Any, directory: Path, theirs: Any) -> None:
    if isinstance(content, list) and template != "macros":
        content = content[0]["text"] * 2
    chat = [USER, {"role": "assistant", "content": content}]
    kwargs = {"continue_final_message": True}
    wanted = theirs.apply_chat_template(chat, chat_template=TEMPLATES[template], tokenize=False, **kwargs)
    text = ours(directory, TEMPLATES[template]).render(chat, continue_final_message=True)
    assert text == wanted
    assert text.rstrip().endswith(("So far", "space", "2", "in"))
    assert chat[1]["content"] == content  # the caller's messages are left alone


def test_named_templates(directory: Path) -> None:
    template = ours(directory, {"default": "plain", "tool_use": "tools"})
    assert (template.render([USER]), template.render([USER], tools=TOOLS)) == ("plain", "tools")
    with pytest.raises(InvalidRequestError, match=r"no default chat template \(named ones: rag\)"):
        ours(directory, {"rag": "x"}).render([USER])
    with pytest.raises(InvalidRequestError, match=r"no default chat template \(named ones: none\)"):
        ours(directory, {}).render([USER])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the messages: roles must alternate"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str \\(not "int"\\) to str'),
        ("{{ messages.append(1) }}", "access to attribute 'append' .* is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ raise_exception('long ' * 999) }}", "long long .*\\.\\.\\.$"),
    ],
)
def test_a_refusal_is_the_callers_mistake(source: str, message: str, directory: Path) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        ours(directory, source).render([USER])
    assert len(str(caught.value)) < 400


def test_bad_arguments(directory: Path) -> None:
    template = ours(directory, CHATML)
    with pytest.raises(InvalidParameterError, match="messages is \\[\\]"):
        template.render([])
    with pytest.raises(InvalidParameterError, match="messages is 'hello'"):
        template.render(["hello"])  # type: ignore[list-item]
    with pytest.raises(InvalidParameterError, match="continue_final_message"):
        template.render([USER], add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(InvalidParameterError, match=r"chat_template_kwargs is \['messages', 'tools'\]"):
        template.render([USER], template_kwargs={"tools": [], "messages": [], "fine": 1})
    with pytest.raises(InvalidRequestError, match="no text to go on with"):
        template.render([USER, {"role": "assistant", "content": None}], continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="does not show the final message"):
        ours(directory, "{{ messages[0].content }}").render(
            [USER, USER | {"content": "x"}], continue_final_message=True
        )


def test_a_template_that_does_not_compile_is_the_models_fault() -> None:
    with pytest.raises(ConfigurationError, match="does not compile: line 2"):
        ChatTemplate("fine\n{% if %}")


def test_templates_are_compiled_once() -> None:
    before = _compile.cache_info()
    ChatTemplate("never seen before {{ bos_token }}")
    ChatTemplate("never seen before {{ bos_token }}", {"bos_token": "<s>"})
    after = _compile.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 1)
