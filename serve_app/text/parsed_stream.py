"""ParsedStream: a TextStream whose text is read by an OutputParser. For chats with tools, or models that mark reasoning.

    tokens -> TextStream (stop strings cut here) -> OutputParser -> TextDelta with ``parsed``

Knows no format. Its state follows from the tokens alone, as that of its two parts does, however they are grouped.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.engine.request import FinishReason
from serve_app.text.output_parser import OutputDelta, OutputParser, join
from serve_app.text.text_stream import Parsed, TextDelta, TextStream


class ParsedStream:
    """One choice. Takes what TextStream.push takes.

    Not ``shows_reasoning``: reasoning is counted, and left out. ``ends_after_call``: where a second call begins, the choice
    ends, as with a stop string; the token that shows it is the last that counts.
    """

    def __init__(
        self, stream: TextStream, parser: OutputParser, *, shows_reasoning: bool = True, ends_after_call: bool = False
    ) -> None:
        self._stream = stream
        self._parser = parser
        self._shows_reasoning = shows_reasoning
        self._ends_after_call = ends_after_call
        self._may_reason = True
        """Reasoning has not ended, or may still begin."""
        self.finish_reason: FinishReason | None = None
        self.num_reasoning_tokens = 0
        self.has_called = False

    def push(
        self,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None = None,
        stop_token_id: int | None = None,
    ) -> TextDelta:
        if self.finish_reason is not None:
            return TextDelta()
        if len(token_ids) < 2 or not (self._may_reason or self._ends_after_call):
            return self._push(token_ids, finish_reason, stop_token_id)
        # One by one: what one token is taken for must not depend on its neighbours in an output.
        deltas = []
        for token_id in token_ids[:-1]:
            deltas.append(self._push((token_id,), None, None))
            if self.finish_reason is not None:
                return self._join(deltas)
        deltas.append(self._push(token_ids[-1:], finish_reason, stop_token_id))
        return self._join(deltas)

    def _push(
        self, token_ids: Sequence[int], finish_reason: FinishReason | None, stop_token_id: int | None
    ) -> TextDelta:
        delta = self._stream.push(token_ids, finish_reason, stop_token_id)
        was_reasoning = self._parser.in_reasoning
        output = self._parser.push(delta.text) if delta.text else OutputDelta()
        if self._may_reason:
            is_reasoning = self._parser.in_reasoning
            if was_reasoning or is_reasoning:
                self.num_reasoning_tokens += delta.num_tokens
                self._may_reason = is_reasoning
            elif output.content.strip() or output.tool_calls:
                self._may_reason = False
        if delta.finish_reason is not None:
            output = join([output, self._parser.finish()])
        if self._ends_after_call and any(call.index for call in output.tool_calls):
            output = output._replace(tool_calls=tuple(call for call in output.tool_calls if not call.index))
            delta = delta._replace(finish_reason=FinishReason.STOP)
        self.finish_reason = delta.finish_reason
        self.has_called = self.has_called or bool(output.tool_calls)
        if output.content == delta.text and delta.finish_reason is None and not self._may_reason:
            return delta
        parsed = Parsed(
            output.reasoning if self._shows_reasoning else "",
            output.tool_calls,
            len(delta.text),
            self.num_reasoning_tokens,
            self.has_called,
        )
        return delta._replace(text=output.content, parsed=parsed)

    def _join(self, deltas: list[TextDelta]) -> TextDelta:
        """As one. How it ends says the last."""
        parts = [OutputDelta(delta.text, *(delta.parsed or Parsed())[:2]) for delta in deltas]
        content, reasoning, tool_calls = join(parts)
        num_chars = sum(delta.num_chars for delta in deltas)
        return deltas[-1]._replace(
            text=content,
            num_tokens=sum(delta.num_tokens for delta in deltas),
            parsed=Parsed(reasoning, tool_calls, num_chars, self.num_reasoning_tokens, self.has_called),
        )
