"""Bad requests as data: what is sent, and the refusal that is due. Knows nothing of the server; no tests.

`level` says what refuses: "protocol" (the request models alone), "engine" (a prompt or an id that this model cannot have),
"route" (path, method, key, size, served names), "connection" (the client goes away; nobody is left to be answered).
For engine, the model's vocabulary and context are taken to be smaller than a million.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
MESSAGES = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Abuse:
    name: str
    path: str
    body: bytes | Callable[[], bytes]
    """Large bodies are made when they are needed."""
    status: int | None
    """None: the client is not there to see it."""
    code: str | None = None
    param: str | None = None
    level: Literal["protocol", "engine", "route", "connection"] = "protocol"
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    needs_keys: bool = False
    """Only against a server that asks for API keys; such a server gets a right key with all others."""
    leaves: Literal["", "in headers", "in body", "before answer", "in stream", "after first byte"] = ""
    """Where the client goes away, or turns silent and then goes away."""

    def made_body(self) -> bytes:
        return self.body() if callable(self.body) else self.body


def completion(**fields: Any) -> bytes:
    return json.dumps({"prompt": "hello", "max_tokens": 4, **fields}).encode()


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": MESSAGES, "max_tokens": 4, **fields}).encode()


def message(**fields: Any) -> bytes:
    return json.dumps({"messages": [fields]}).encode()


def _bad(name: str, fields: dict[str, Any], param: str, code: str = "invalid_parameter") -> Abuse:
    return Abuse(name, COMPLETIONS, completion(**fields), 400, code, param)


def _bad_chat(name: str, body: bytes, param: str, code: str = "invalid_parameter") -> Abuse:
    return Abuse(name, CHAT, body, 400, code, param)


def _bad_body(name: str, body: bytes | Callable[[], bytes], path: str = COMPLETIONS) -> Abuse:
    return Abuse(name, path, body, 400, "invalid_body")


SCHEMA = "response_format.json_schema.schema"


def _bad_format(name: str, value: Any, param: str, code: str = "invalid_parameter") -> Abuse:
    return _bad_chat(f"response_format: {name}", chat(response_format=value), param, code)


def _bad_schema(
    name: str, schema: Any, param: str, code: str = "invalid_parameter", level: Any = "protocol", strict: Any = True
) -> Abuse:
    def body() -> bytes:
        made = schema() if callable(schema) else schema
        return chat(
            response_format={"type": "json_schema", "json_schema": {"name": "a", "strict": strict, "schema": made}}
        )

    return Abuse(f"schema: {name}", CHAT, body, 400, code, param, level)


def _bad_structured(
    name: str, value: Any, param: str, code: str = "invalid_parameter", level: Any = "protocol"
) -> Abuse:
    return Abuse(
        f"structured_outputs: {name}", COMPLETIONS, completion(structured_outputs=value), 400, code, param, level
    )


def _chain(length: int) -> dict[str, Any]:
    links = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(length)}
    return {"$defs": {**links, f"a{length}": {"type": "null"}}, "$ref": "#/$defs/a0"}


def _bad_tools(
    name: str, tools: Any, param: str, code: str = "invalid_parameter", level: Any = "protocol", **fields: Any
) -> Abuse:
    return Abuse(f"tools: {name}", CHAT, lambda: chat(tools=tools, **fields), 400, code, param, level)


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def _bad_call(name: str, call: Any, param: str, code: str = "invalid_parameter", role: str = "assistant") -> Abuse:
    body = json.dumps({"messages": [*MESSAGES, {"role": role, "content": "a", "tool_calls": [call]}]}).encode()
    return _bad_chat(f"tool_calls: {name}", body, f"messages[1].tool_calls{param}", code)


def call(arguments: Any = "{}", **fields: Any) -> dict[str, Any]:
    return {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}, **fields}


def _conversation(*messages: dict[str, Any]) -> bytes:
    return json.dumps({"messages": [*MESSAGES, *messages]}).encode()


DEEP = "[" * 500 + "]" * 500

ABUSES: tuple[Abuse, ...] = (
    # ---- what is no JSON object
    _bad_body("empty body", b""),
    _bad_body("white space", b" \r\n\t "),
    _bad_body("broken JSON", b'{"prompt": "hello"'),
    _bad_body("trailing comma", b'{"prompt": "hello",}'),
    _bad_body("two objects", b'{"prompt": "hello"}{}'),
    _bad_body("single quotes", b"{'prompt': 'hello'}"),
    _bad_body("comment", b'{"prompt": "hello" /* hi */}'),
    _bad_body("form data", b"prompt=hello&max_tokens=3"),
    _bad_body("a list", b"[]", CHAT),
    _bad_body("a string", b'"hello"'),
    _bad_body("null", b"null"),
    _bad_body("bad UTF-8", b'{"prompt": "\xff\xfe"}'),
    _bad_body("overlong UTF-8", b'{"prompt": "\xc0\xaf"}'),
    _bad_body("UTF-8 cut in a character", b'{"prompt": "\xe6\x9d"}'),
    _bad_body("UTF-16", '{"prompt": "hello"}'.encode("utf-16")),
    _bad_body("byte order mark", b"\xef\xbb\xbf" + completion()),
    _bad_body("raw null byte in a string", b'{"prompt": "a\x00b"}'),
    _bad_body("null bytes", b"\x00" * 100),
    _bad_body("unpaired surrogate", b'{"prompt": "a\\ud800b"}'),
    _bad_body("unpaired surrogate in a chat", b'{"messages": [{"role": "user", "content": "\\uDFFF"}]}', CHAT),
    _bad_body("unpaired surrogate in a name", b'{"prompt": "a", "\\udc00": 1}'),
    _bad_body("NaN", b'{"prompt": "a", "temperature": NaN}'),
    _bad_body("Infinity", b'{"prompt": "a", "temperature": -Infinity}'),
    _bad_body("thousands of digits", b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}"),
    _bad_body("a name given twice", b'{"prompt": "a", "n": 1, "n": 2}'),
    _bad_body("a name given twice inside", b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}', CHAT),
    _bad_body("100,000 lists deep", lambda: b"[" * 100_000),
    _bad_body("objects without end", lambda: b'{"a":' * 50_000),
    _bad_body("closed, and 500 deep", b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}"),
    # ---- names
    _bad("unknown field", {"temprature": 1}, "temprature", "unknown_parameter"),
    _bad("unknown field, null", {"temprature": None}, "temprature", "unknown_parameter"),
    _bad("name in capitals", {"Temperature": 1}, "Temperature", "unknown_parameter"),
    _bad("suffix", {"suffix": "the end"}, "suffix", "unsupported_parameter"),
    _bad("best_of", {"best_of": 3}, "best_of", "unsupported_parameter"),
    _bad("beam search", {"use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
    _bad("guided decoding", {"guided_regex": "a*"}, "guided_regex", "unsupported_parameter"),
    _bad("store", {"store": True}, "store", "unsupported_parameter"),
    _bad("service_tier", {"service_tier": "flex"}, "service_tier", "unsupported_parameter"),
    _bad_chat("audio", chat(modalities=["text", "audio"]), "modalities", "unsupported_parameter"),
    _bad_chat("functions", chat(functions=[{"name": "f", "parameters": {}}]), "functions", "unsupported_parameter"),
    _bad_chat("function_call", chat(function_call={"name": "f"}), "function_call", "unsupported_parameter"),
    _bad_chat("a template of the client", chat(chat_template="{{ 1 }}"), "chat_template", "unsupported_parameter"),
    # ---- tools
    _bad_tools("no list", {"f": {}}, "tools"),
    _bad_tools("200 of them", [tool(f"f{i}") for i in range(200)], "tools"),
    _bad_tools("half a megabyte", [tool(description="x" * 500_000)], "tools"),
    _bad_tools("a string", ["f"], "tools[0]"),
    _bad_tools("without a function", [{"type": "function"}], "tools[0].function", "missing_parameter"),
    _bad_tools("without a name", [{"type": "function", "function": {}}], "tools[0].function.name", "missing_parameter"),
    _bad_tools("another type", [{**tool(), "type": "custom"}], "tools[0].type"),
    _bad_tools("a name with a blank", [tool("get weather")], "tools[0].function.name"),
    _bad_tools("a long name", [tool("f" * 65)], "tools[0].function.name"),
    _bad_tools("a name given twice", [tool(), tool("g"), tool()], "tools[2].function.name"),
    _bad_tools("an unknown name", [tool(), tool("g", returns={})], "tools[1].function.returns", "unknown_parameter"),
    _bad_tools("a name of responses", [{**tool(), "name": "f"}], "tools[0].name", "unknown_parameter"),
    _bad_tools("a description that is none", [tool(description=["a"])], "tools[0].function.description"),
    _bad_tools("a schema that is a string", [tool(parameters="{}")], "tools[0].function.parameters"),
    _bad_tools("a schema of a list", [tool(parameters={"type": "array"})], "tools[0].function.parameters.type"),
    _bad_tools(
        "properties in a list", [tool(parameters={"properties": ["a"]})], "tools[0].function.parameters.properties"
    ),
    _bad_tools(
        "a property without a schema",
        [tool(parameters={"properties": {"a": "string"}})],
        "tools[0].function.parameters.properties.a",
    ),
    _bad_tools("required is true", [tool(parameters={"required": True})], "tools[0].function.parameters.required"),
    _bad_tools("strict is a string", [tool(strict="yes")], "tools[0].function.strict"),
    _bad_tools("an unknown choice", [tool()], "tool_choice", tool_choice="any"),
    _bad_tools("a chosen name alone", [tool()], "tool_choice.type", tool_choice={"name": "f"}),
    _bad_tools("a chosen tool without a name", [tool()], "tool_choice.function", tool_choice={"type": "function"}),
    _bad_tools("a chosen tool that is not there", [tool()], "tool_choice", tool_choice=tool("g")),
    _bad_tools("a choice with a schema", [tool()], "tool_choice", tool_choice=tool(parameters={})),
    _bad_tools("a choice of nothing", [], "tool_choice", tool_choice="required"),
    _bad_tools(
        "allowed tools without any",
        [tool()],
        "tool_choice.allowed_tools.tools",
        tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
    ),
    _bad_tools(
        "an unknown mode",
        [tool()],
        "tool_choice.allowed_tools.mode",
        tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "any", "tools": [tool()]}},
    ),
    _bad_tools("parallel is a number", [tool()], "parallel_tool_calls", parallel_tool_calls=2),
    _bad_chat("an unknown effort", chat(reasoning_effort="enormous"), "reasoning_effort"),
    _bad_call("no object", "f", "[0]"),
    _bad_call("an empty one", {}, "[0].id", "missing_parameter"),
    _bad_call("of the user", call(), "", role="user"),
    _bad_call("an empty id", call(id=""), "[0].id"),
    _bad_call("broken arguments", call('{"a": 1'), "[0].function.arguments"),
    _bad_call("arguments in a list", call("[1]"), "[0].function.arguments"),
    _bad_call("arguments that are NaN", call('{"a": NaN}'), "[0].function.arguments"),
    _bad_call("arguments as an object", call({"a": 1}), "[0].function.arguments"),
    _bad_call("deep arguments", call('{"a": ' + DEEP + "}"), "[0].function.arguments"),
    _bad_call("an unknown name", call(result=5), "[0].result", "unknown_parameter"),
    _bad_chat(
        "a result without a call",
        _conversation({"role": "tool", "content": "5", "tool_call_id": "a"}),
        "messages[1].tool_call_id",
    ),
    _bad_chat(
        "a result of another call",
        _conversation(
            {"role": "assistant", "tool_calls": [call()]}, {"role": "tool", "content": "5", "tool_call_id": "b"}
        ),
        "messages[2].tool_call_id",
    ),
    _bad_chat(
        "a result that names no call",
        _conversation({"role": "assistant", "tool_calls": [call()]}, {"role": "tool", "content": "5"}),
        "messages[2].tool_call_id",
    ),
    _bad_chat(
        "a result before its call",
        _conversation(
            {"role": "tool", "content": "5", "tool_call_id": "a"}, {"role": "assistant", "tool_calls": [call()]}
        ),
        "messages[1].tool_call_id",
    ),
    # ---- structured output
    _bad_format("response_format is a string", "json", "response_format"),
    _bad_format("response_format is empty", {}, "response_format.type"),
    _bad_format("unknown type", {"type": "yaml"}, "response_format.type"),
    _bad_format("structural tags", {"type": "structural_tag"}, "response_format.type", "unsupported_parameter"),
    _bad_format("json_schema without it", {"type": "json_schema"}, "response_format.json_schema"),
    _bad_format(
        "a schema in the wrong place",
        {"type": "json_schema", "schema": {}},
        "response_format.schema",
        "unknown_parameter",
    ),
    _bad_format("no schema", {"type": "json_schema", "json_schema": {"name": "a"}}, SCHEMA),
    _bad_schema("a schema is a list", [], SCHEMA),
    _bad_schema("strict is a number", {}, "response_format.json_schema.strict", strict=1),
    _bad_schema("unknown JSON type", {"type": "text"}, f"{SCHEMA}.type"),
    _bad_schema("a property is no schema", {"properties": {"a": {"items": 5}}}, f"{SCHEMA}.properties.a.items"),
    _bad_schema("not", {"items": {"not": {}}}, f"{SCHEMA}.items.not", "unsupported_parameter"),
    _bad_schema("if", {"if": {}, "then": {}}, f"{SCHEMA}.if", "unsupported_parameter"),
    _bad_schema("unique items", {"uniqueItems": True}, f"{SCHEMA}.uniqueItems", "unsupported_parameter"),
    _bad_schema("a reference to nothing", {"$ref": "#/$defs/a"}, f"{SCHEMA}.$ref"),
    _bad_schema("a reference to another host", {"$ref": "http://127.0.0.1/a"}, f"{SCHEMA}.$ref"),
    _bad_schema("a reference to a file", {"$ref": "file:///etc/passwd"}, f"{SCHEMA}.$ref"),
    _bad_schema("recursive without an end", {"$ref": "#"}, SCHEMA),
    _bad_schema(
        "each node holds another one",
        {
            "$defs": {"N": {"type": "object", "properties": {"n": {"$ref": "#/$defs/N"}}, "required": ["n"]}},
            "$ref": "#/$defs/N",
        },
        f"{SCHEMA}.$defs.N",
    ),
    _bad_schema("5 MB of choices", lambda: {"enum": [f"{i:05}" * 10 for i in range(100_000)]}, SCHEMA),
    _bad_schema("5 MB of properties", lambda: {"properties": {f"p{i:06}" * 5: {} for i in range(120_000)}}, SCHEMA),
    _bad_structured("nothing", {}, "structured_outputs"),
    _bad_structured("two kinds", {"regex": "a", "choice": ["b"]}, "structured_outputs"),
    _bad_structured("unknown kind", {"jsn": {}}, "structured_outputs.jsn", "unknown_parameter"),
    _bad_structured("a tag", {"structural_tag": "{}"}, "structured_outputs.structural_tag", "unsupported_parameter"),
    _bad_structured("a schema that is broken JSON", {"json": "{"}, "structured_outputs.json"),
    _bad_structured("an empty regex", {"regex": ""}, "structured_outputs.regex"),
    _bad_structured("a long regex", {"regex": "a|" * 50_000}, "structured_outputs.regex"),
    _bad_structured("no choices", {"choice": []}, "structured_outputs.choice"),
    _bad_structured("a choice is a number", {"choice": ["a", 5]}, "structured_outputs.choice[1]"),
    _bad_structured("too many choices", {"choice": [str(i) for i in range(5000)]}, "structured_outputs.choice"),
    _bad_structured("a grammar of nothing", {"grammar": " "}, "structured_outputs.grammar"),
    _bad_structured("a rule that is not there", {"grammar": "root ::= a"}, "structured_outputs.grammar"),
    _bad_structured(
        "white space for a regex",
        {"regex": "a", "disable_any_whitespace": True},
        "structured_outputs.disable_any_whitespace",
    ),
    _bad_structured(
        "white space that is none", {"json": {}, "whitespace_pattern": "[^ ]"}, "structured_outputs.whitespace_pattern"
    ),
    _bad(
        "two constraints",
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
    ),
    _bad_schema(
        "look-around", {"properties": {"a": {"pattern": "(?=a)"}}}, f"{SCHEMA}.properties.a.pattern", level="engine"
    ),
    _bad_schema(
        "nothing fits",
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 2, "maximum": 1}},
        f"{SCHEMA}.items",
        level="engine",
    ),
    _bad_schema("options that overlap", {"oneOf": [{}, {"type": "object"}]}, f"{SCHEMA}.oneOf", level="engine"),
    _bad_schema(
        "patterns whose intersection takes hours",
        {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b"} for i in range(10, 40)]},
        SCHEMA,
        level="engine",
    ),
    _bad_schema("2,000 references in a row", lambda: _chain(2000), SCHEMA, level="engine"),
    _bad_structured("an open group", {"regex": "(a"}, "structured_outputs.regex", level="engine"),
    _bad_structured("a back-reference", {"regex": r"(a)\1"}, "structured_outputs.regex", level="engine"),
    _bad_structured("a rule that is itself", {"grammar": "start: start"}, "structured_outputs.grammar", level="engine"),
    _bad_structured("a grammar in no language", {"grammar": "hello"}, "structured_outputs.grammar", level="engine"),
    _bad_structured(
        "a token of the model", {"grammar": "start: <|im_end|>"}, "structured_outputs.grammar", level="engine"
    ),
    # ---- types and ranges
    Abuse("no prompt", COMPLETIONS, b"{}", 400, "missing_parameter", "prompt"),
    Abuse("prompt is null", COMPLETIONS, b'{"prompt": null}', 400, "missing_parameter", "prompt"),
    Abuse("no messages", CHAT, b"{}", 400, "missing_parameter", "messages"),
    Abuse("chat sent to completions", COMPLETIONS, chat(), 400, "unknown_parameter", "messages"),
    _bad("prompt is a number", {"prompt": 5}, "prompt"),
    _bad("prompt is an object", {"prompt": {"text": "a"}}, "prompt"),
    _bad("prompt is an empty list", {"prompt": []}, "prompt"),
    _bad("prompts of two kinds", {"prompt": ["a", 1]}, "prompt[1]"),
    _bad("a token id is true", {"prompt": [1, True]}, "prompt[1]"),
    _bad("a token id is a float", {"prompt": [1, 2.0]}, "prompt[1]"),
    _bad("a token id is negative", {"prompt": [[1], [2, -3]]}, "prompt[1][1]"),
    _bad("a token id is beyond int32", {"prompt": [2**40]}, "prompt[0]"),
    _bad("an empty list of ids", {"prompt": [[1], []]}, "prompt[1]"),
    _bad("lists in lists in lists", {"prompt": [[[1]]]}, "prompt[0][0]"),
    _bad("n is 0", {"n": 0}, "n"),
    _bad("n is huge", {"n": 1_000_000}, "n"),
    _bad("n is true", {"n": True}, "n"),
    _bad("n is a string", {"n": "1"}, "n"),
    _bad("n is a float", {"n": 1.0}, "n"),
    _bad("max_tokens is 0", {"max_tokens": 0}, "max_tokens"),
    _bad("max_tokens is negative", {"max_tokens": -1}, "max_tokens"),
    _bad("max_tokens is beyond int32", {"max_tokens": 10**30}, "max_tokens"),
    _bad("min_tokens above max_tokens", {"min_tokens": 5}, "min_tokens"),
    _bad("temperature is negative", {"temperature": -0.1}, "temperature"),
    _bad("top_p is 2", {"top_p": 2}, "top_p"),
    Abuse(
        "no float holds it",
        COMPLETIONS,
        b'{"prompt": "a", "temperature": 1e999}',
        400,
        "invalid_parameter",
        "temperature",
    ),
    _bad("temperature is a long integer", {"temperature": 10**400}, "temperature"),
    _bad("top_p is 0", {"top_p": 0}, "top_p"),
    _bad("top_k is -2", {"top_k": -2}, "top_k"),
    _bad("top_k is beyond int32", {"top_k": 10**20}, "top_k"),
    _bad("min_p above 1", {"min_p": 1.5}, "min_p"),
    _bad("repetition_penalty is 0", {"repetition_penalty": 0}, "repetition_penalty"),
    _bad("presence_penalty is 3", {"presence_penalty": 3}, "presence_penalty"),
    _bad("frequency_penalty is a list", {"frequency_penalty": [1]}, "frequency_penalty"),
    _bad("logprobs is true", {"logprobs": True}, "logprobs"),
    _bad("logprobs is huge", {"logprobs": 1000}, "logprobs"),
    _bad("echo is 1", {"echo": 1}, "echo"),
    _bad("stream is a string", {"stream": "true"}, "stream"),
    _bad("stop is a number", {"stop": 5}, "stop"),
    _bad("a stop string is empty", {"stop": ["a", ""]}, "stop[1]"),
    _bad("too many stop strings", {"stop": [str(i) for i in range(1000)]}, "stop"),
    _bad("a stop token id is a string", {"stop_token_ids": ["5"]}, "stop_token_ids[0]"),
    _bad("logit_bias is a list", {"logit_bias": [1]}, "logit_bias"),
    _bad("logit_bias names a word", {"logit_bias": {"hello": 1}}, 'logit_bias["hello"]'),
    _bad("logit_bias is too strong", {"logit_bias": {"5": 101}}, "logit_bias[5]"),
    _bad("too many bias entries", {"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
    _bad("too many prompts", {"prompt": ["a"] * 5000}, "prompt"),
    _bad("seed is beyond 64 bits", {"seed": 2**64}, "seed"),
    _bad("stream_options without stream", {"stream_options": {}}, "stream_options"),
    _bad(
        "unknown stream option",
        {"stream": True, "stream_options": {"usage": True}},
        "stream_options.usage",
        "unknown_parameter",
    ),
    _bad("cache_salt is long", {"cache_salt": "s" * 5000}, "cache_salt"),
    _bad("request_id has a line end", {"request_id": "a\r\nset-cookie: b"}, "request_id"),
    _bad("request_id has a null byte", {"request_id": "a\x00"}, "request_id"),
    _bad("a megabyte of name", {"x" * 1_000_000: 1}, "x" * 77 + "...", "unknown_parameter"),
    _bad("a megabyte where a number belongs", {"n": "9" * 1_000_000}, "n"),
    _bad_chat("no message", chat(messages=[]), "messages"),
    _bad_chat("messages is a string", chat(messages="hello"), "messages"),
    _bad_chat("a message is a string", chat(messages=["hello"]), "messages[0]"),
    _bad_chat("unknown role", message(role="robot", content="a"), "messages[0].role"),
    _bad_chat("no role", message(content="a"), "messages[0].role", "missing_parameter"),
    _bad_chat("no content", message(role="user"), "messages[0].content"),
    _bad_chat("content is a number", message(role="user", content=5), "messages[0].content"),
    _bad_chat("an image", message(role="user", content=[{"type": "image_url"}]), "messages[0].content[0].type"),
    _bad_chat("a part without text", message(role="user", content=[{"type": "text"}]), "messages[0].content[0].text"),
    _bad_chat("a part is a string", message(role="user", content=["a"]), "messages[0].content[0]"),
    _bad_chat(
        "unknown field of a message",
        message(role="user", content="a", mood="bad"),
        "messages[0].mood",
        "unknown_parameter",
    ),
    _bad_chat("top_logprobs alone", chat(top_logprobs=3), "top_logprobs"),
    _bad_chat("logprobs is a number", chat(logprobs=3), "logprobs"),
    _bad_chat("max_tokens with two values", chat(max_completion_tokens=5), "max_completion_tokens"),
    _bad_chat(
        "a prompt that both ends and goes on",
        chat(continue_final_message=True, add_generation_prompt=True),
        "add_generation_prompt",
    ),
    _bad_chat("template arguments as a string", chat(chat_template_kwargs="a"), "chat_template_kwargs"),
    Abuse("nothing to tokenize", TOKENIZE, b"{}", 400, "invalid_parameter", "prompt"),
    Abuse("tokenize a number", TOKENIZE, b'{"prompt": 5}', 400, "invalid_parameter", "prompt"),
    Abuse("detokenize text", DETOKENIZE, b'{"tokens": "a"}', 400, "invalid_parameter", "tokens"),
    Abuse("detokenize a negative id", DETOKENIZE, b'{"tokens": [1, -1]}', 400, "invalid_parameter", "tokens[1]"),
    Abuse("detokenize nothing", DETOKENIZE, b"{}", 400, "missing_parameter", "tokens"),
    # ---- what this model cannot have
    Abuse(
        "empty prompt text",
        COMPLETIONS,
        completion(prompt="", add_special_tokens=False),
        400,
        "invalid_prompt",
        level="engine",
    ),
    Abuse(
        "an id outside the vocabulary",
        COMPLETIONS,
        completion(prompt=[5, 1_000_000]),
        400,
        "invalid_prompt",
        level="engine",
    ),
    Abuse(
        "a bias outside the vocabulary",
        COMPLETIONS,
        completion(logit_bias={"1000000": 1}),
        400,
        "invalid_parameter",
        "logit_bias",
        level="engine",
    ),
    Abuse(
        "a prompt longer than the context",
        COMPLETIONS,
        lambda: completion(prompt=[5] * 1_000_000),
        400,
        "context_length_exceeded",
        level="engine",
    ),
    Abuse(
        "a long text in a chat",
        CHAT,
        lambda: chat(messages=[{"role": "user", "content": "hello " * 300_000}]),
        400,
        "context_length_exceeded",
        level="engine",
    ),
    # ---- path, method, key, size, model
    Abuse("unknown path", "/v1/compleations", completion(), 404, "not_found", level="route"),
    Abuse("path with a line end", "/v1/completions%0d%0a", completion(), 404, "not_found", level="route"),
    Abuse("climbing path", "/v1/../../etc/passwd", b"", 404, "not_found", level="route", method="GET"),
    Abuse("GET a completion", COMPLETIONS, b"", 405, "method_not_allowed", level="route", method="GET"),
    Abuse("DELETE a chat", CHAT, b"", 405, "method_not_allowed", level="route", method="DELETE"),
    Abuse("POST to models", "/v1/models", b"{}", 405, "method_not_allowed", level="route"),
    Abuse("wrong model", COMPLETIONS, completion(model="gpt-17"), 404, "model_not_found", "model", level="route"),
    Abuse("wrong model in a chat", CHAT, chat(model="gpt-17"), 404, "model_not_found", "model", level="route"),
    Abuse(
        "wrong model asked for", "/v1/models/gpt-17", b"", 404, "model_not_found", "model", level="route", method="GET"
    ),
    Abuse("10 MB body", COMPLETIONS, lambda: completion(prompt="a" * 10_000_000), 413, "body_too_large", level="route"),
    Abuse("no key", COMPLETIONS, completion(), 401, "invalid_api_key", level="route", needs_keys=True),
    Abuse(
        "wrong key",
        CHAT,
        chat(),
        401,
        "invalid_api_key",
        level="route",
        headers={"content-type": "application/json", "authorization": "Bearer wrong"},
        needs_keys=True,
    ),
    Abuse(
        "key in the wrong scheme",
        "/v1/models",
        b"",
        401,
        "invalid_api_key",
        level="route",
        method="GET",
        headers={"authorization": "Basic d3Jvbmc6a2V5"},
        needs_keys=True,
    ),
    # ---- clients that go away
    Abuse("leaves in its headers", COMPLETIONS, completion(), None, level="connection", leaves="in headers"),
    Abuse("leaves in its body", COMPLETIONS, completion(), None, level="connection", leaves="in body"),
    Abuse(
        "leaves before the answer",
        COMPLETIONS,
        completion(max_tokens=50),
        None,
        level="connection",
        leaves="before answer",
    ),
    Abuse(
        "leaves after the first byte",
        CHAT,
        chat(max_tokens=50, stream=True),
        None,
        level="connection",
        leaves="after first byte",
    ),
    Abuse(
        "leaves in the stream",
        COMPLETIONS,
        completion(max_tokens=50, stream=True, n=4),
        None,
        level="connection",
        leaves="in stream",
    ),
)
