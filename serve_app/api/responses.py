"""The answer of /v1/responses, whole or as OpenAI's typed events. Knows their shapes; knows no engine and no route.

Made like the other answers (see `answers`), of what TextStream and its parser make of each output:

    response.created, response.in_progress
    for each item      response.output_item.added ... response.output_item.done
      reasoning        content_part.added, reasoning_text.delta ..., reasoning_text.done, content_part.done
      message          content_part.added, output_text.delta ...,    output_text.done,    content_part.done
      function_call    function_call_arguments.delta ...,            function_call_arguments.done
    response.completed or response.incomplete, with the whole answer

Reasoning ends where anything else begins. All of the answer's text is one message, which ends with the answer; so which
items there are does not depend on how the tokens came. (Their order does in one case: text that comes only behind a call,
and in the same push.) Ids follow from the request's. An error in the stream is an event `error`, in the shape of both: the
typed event's, and OpenAI's error object, at which its client raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from serve_app.api.answer_formats import ChatFormat, TokenTexts
from serve_app.api.answers import Answer
from serve_app.api.error_response import error_response
from serve_app.api.prompts import EncodedPrompt
from serve_app.api.protocol import ChatCompletionRequest
from serve_app.api.responses_protocol import ResponsesRequest
from serve_app.api.tools import tool_call_id
from serve_app.text.text_stream import Parsed

_DELTAS = {"reasoning": "response.reasoning_text", "message": "response.output_text"}
_PREFIXES = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}


class _Item:
    """One item of the output. ``call_id`` and ``name``: of a function_call."""

    def __init__(self, kind: str, index: int, request_id: str, call_id: str = "", name: str = "") -> None:
        self.kind = kind
        self.index = index
        self.id = f"{_PREFIXES[kind]}{request_id}_{index}"
        self.call_id = call_id
        self.name = name
        self.texts: list[str] = []
        self.logprobs: list[Any] = []
        self.status = "in_progress"

    def show(self, *, is_new: bool = False) -> dict[str, Any]:
        """``is_new``: as it is added, before its first part."""
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            return {**item, "call_id": self.call_id, "name": self.name, "arguments": "".join(self.texts)}
        content = [] if is_new else [self.part()]
        if self.kind == "message":
            return {**item, "role": "assistant", "content": content}
        return {**item, "summary": [], "content": content}

    def part(self) -> dict[str, Any]:
        text = "".join(self.texts)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}


class ResponseAnswer(Answer):
    """``asked``: the request, checked. The others: as of `make_answer`."""

    def __init__(
        self,
        asked: ResponsesRequest,
        *,
        request_id: str,
        created: int,
        model: str,
        prompts: Sequence[EncodedPrompt],
        token_texts: TokenTexts,
        counts_reasoning: bool = False,
    ) -> None:
        super().__init__(ChatFormat(), asked.chat, {"id": "resp_" + request_id}, prompts, token_texts, counts_reasoning)
        self.media_type = "text/event-stream" if asked.stream else "application/json"
        self._asked = asked
        self._request_id = request_id
        self._fields = _fields_of(asked, request_id, created, model)
        self._items: list[_Item] = []
        self._open: dict[str, _Item] = {}
        """By kind: one at most."""
        self._num_calls = 0
        self._num_events = 0
        self._events: list[bytes] = []

    def end(self) -> bytes:
        if not self._asked.stream:
            return _to_json(self._response())
        self._send(f"response.{self._status}", response=self._response())
        return self._take_events()

    def error_event(self, error: BaseException) -> bytes:
        content = json.loads(error_response(error).body)["error"]
        told = {name: content[name] for name in ("code", "message", "param")}
        self._send("error", **told, error=content)
        return self._take_events()

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _give(
        self,
        choice: Any,
        text: str,
        parsed: Parsed | None,
        token_ids: Sequence[int],
        logprobs: dict[str, list[Any]] | None,
        *,
        is_first: bool,
    ) -> bytes:
        if is_first:
            for kind in ("created", "in_progress"):
                self._send(f"response.{kind}", response=self._response())
        calls = () if parsed is None else parsed.tool_calls
        if parsed is not None and parsed.reasoning:
            self._add("reasoning", parsed.reasoning)
        if text or (logprobs is not None and self._open.keys() <= {"message"} and not calls and not self._num_calls):
            self._add("message", text, [] if logprobs is None else logprobs["content"])
        for call in calls:
            if call.index == self._num_calls:
                self._begin_call(call.name or "")
            self._add("function_call", call.arguments)
        if choice.finish_reason is not None:
            if not self._items:
                self._add("message", "")
            for item in sorted(self._open.values(), key=lambda item: item.index):
                self._close(item)
        return self._take_events()

    @property
    def _status(self) -> str:
        reason = self._choices[0].finish_reason
        return "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"

    def _begin_call(self, name: str) -> None:
        if "function_call" in self._open:
            self._close(self._open["function_call"])
        call_id = tool_call_id(self._head["id"], 0, self._num_calls)
        self._num_calls += 1
        self._begin("function_call", call_id, name)

    def _begin(self, kind: str, call_id: str = "", name: str = "") -> _Item:
        if kind != "reasoning" and "reasoning" in self._open:
            self._close(self._open["reasoning"])
        item = self._open[kind] = _Item(kind, len(self._items), self._request_id, call_id, name)
        self._items.append(item)
        self._send("response.output_item.added", output_index=item.index, item=item.show(is_new=True))
        if kind != "function_call":
            self._send("response.content_part.added", **self._at(item), part=item.part())
        return item

    def _add(self, kind: str, text: str, logprobs: Sequence[Any] = ()) -> None:
        item = self._open.get(kind) or self._begin(kind)
        item.texts.append(text)
        item.logprobs += logprobs
        if not text and not logprobs:
            return
        if kind == "function_call":
            self._send("response.function_call_arguments.delta", item_id=item.id, output_index=item.index, delta=text)
        else:
            more = {"logprobs": list(logprobs)} if kind == "message" else {}
            self._send(f"{_DELTAS[kind]}.delta", **self._at(item), delta=text, **more)

    def _close(self, item: _Item) -> None:
        text = "".join(item.texts)
        del self._open[item.kind]
        # What was being written when max_output_tokens came is cut; what ended before is whole.
        item.status = "incomplete" if self._status == "incomplete" else "completed"
        if item.kind == "function_call":
            at = {"item_id": item.id, "output_index": item.index}
            self._send("response.function_call_arguments.done", **at, name=item.name, arguments=text)
        else:
            more = {"logprobs": item.logprobs} if item.kind == "message" else {}
            self._send(f"{_DELTAS[item.kind]}.done", **self._at(item), text=text, **more)
            self._send("response.content_part.done", **self._at(item), part=item.part())
        self._send("response.output_item.done", output_index=item.index, item=item.show())

    def _at(self, item: _Item) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": item.index, "content_index": 0}

    def _response(self) -> dict[str, Any]:
        status = self._status
        ended = status != "in_progress"
        return {
            **self._fields,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [item.show() for item in self._items],
            "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._choices[0].num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }

    def _send(self, kind: str, **fields: Any) -> None:
        if not self._asked.stream:
            return
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        self._events.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), _to_json(event)))

    def _take_events(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)


def answer_maker(asked: ResponsesRequest) -> Callable[..., ResponseAnswer]:
    """In place of `make_answer`, for the chat that ``asked`` stands for."""

    def make(
        chat: ChatCompletionRequest, *, system_fingerprint: str | None, resume_id: bytes | None, **known: Any
    ) -> ResponseAnswer:
        assert chat is asked.chat
        assert resume_id is None
        return ResponseAnswer(asked, **known)

    return make


def _fields_of(asked: ResponsesRequest, request_id: str, created: int, model: str) -> dict[str, Any]:
    """What the answer says of its request."""
    return {
        "id": "resp_" + request_id,
        "object": "response",
        "created_at": created,
        "error": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata,
        "model": model,
        "parallel_tool_calls": asked.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": asked.reasoning.effort, "summary": None},
        "store": False,
        "temperature": asked.temperature,
        "text": {"format": asked.text.format},
        "tool_choice": asked.tool_choice,
        "tools": asked.tools,
        "top_logprobs": asked.top_logprobs,
        "top_p": asked.top_p,
        "truncation": "disabled",
    }


def _to_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode("ascii")
