"""TextStream: from the tokens of one choice to the text its reader sees. Joins detokenizer and stop strings.

Knows SamplingParams and token ids; knows no engine, no HTTP. Its state follows from the tokens alone, in whatever groups
they come: that is what lets an answer go on, after a failover, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from serve_app.engine.request import FinishReason, SamplingParams
from serve_app.text.detokenizer import make_detokenizer
from serve_app.text.output_parser import ToolCallDelta
from serve_app.text.stop_strings import StopStrings
from serve_app.text.tokenizer import Tokenizer


class Parsed(NamedTuple):
    """What a parser made of the text beside content. See `serve_app.text.parsed_stream`."""

    reasoning: str = ""

    tool_calls: tuple[ToolCallDelta, ...] = ()

    num_chars: int = 0
    """Of the text that the parser took."""

    num_reasoning_tokens: int = 0
    """Of the choice, up to here."""

    has_called: bool = False
    """The choice has begun a call, here or before."""


class TextDelta(NamedTuple):
    """What one push made."""

    text: str = ""
    """New text, final. May lag behind the tokens: half characters and possible stop strings are held back."""

    num_tokens: int = 0
    """How many of the pushed tokens count as shown; fewer than were pushed only where a stop string cut them off.
    Logprobs are cut by the same number."""

    finish_reason: FinishReason | None = None
    """Set once, in the delta that ends the choice."""

    stop_string: str | None = None
    """The stop string that ended it, if one did."""

    parsed: Parsed | None = None
    """What a parser made of the text, where that is not ``text`` alone."""

    @property
    def num_chars(self) -> int:
        """New characters of the model's own text, with what stands around calls and reasoning."""
        return len(self.text) if self.parsed is None else self.parsed.num_chars


class TextStream:
    """Text of one choice. The tokens that count are those up to and including the one whose text completed the stop
    string; the text is cut at the match.

    ``output_token_ids`` are tokens that an earlier stream has shown already: a stream made from them goes on where the
    other one stood, including what that one held back. If the stop string is already among them, it is finished.

    ``prompt_token_ids``: give the prompt for a completion and nothing for a chat (see `make_detokenizer`).

    ``min_tokens`` as in vLLM: a stop string counts only if a token after the first ``min_tokens`` completes it. (A
    byte-fallback run gives its text with the token that ends the run, so that one is taken as completing it.)

    ``shown_special_ids``: special tokens that an OutputParser needs to see although skip_special_tokens leaves them out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        output_token_ids: Sequence[int] = (),
        shown_special_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._detokenizer = make_detokenizer(
            tokenizer, prompt_token_ids, sampling.skip_special_tokens, shown_special_ids
        )
        self._stop_strings = StopStrings(sampling.stop, sampling.include_stop_str_in_output)
        self._min_tokens = sampling.min_tokens
        self._show_stop_token = sampling.include_stop_str_in_output
        self.num_tokens = 0
        """Tokens that count as shown, in all: the completion tokens of the usage."""
        self.finish_reason: FinishReason | None = None
        """Why the choice has ended, or None while it goes on."""
        self.stop_string: str | None = None
        self.push(output_token_ids)

    def push(
        self,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None = None,
        stop_token_id: int | None = None,
    ) -> TextDelta:
        """Takes the next tokens; the three arguments are the fields of a TokenOutput.

        With a ``finish_reason`` the text ends here, and what was held back comes out. A ``stop_token_id`` (the last of
        ``token_ids``) is counted but gives no text, unless include_stop_str_in_output. A stop string wins over the given
        reason. Once finished, a push returns an empty delta: tokens that were under way when the stop string matched.
        """
        if self.finish_reason is not None:
            return TextDelta()
        num_with_text = len(token_ids)
        if stop_token_id is not None and not self._show_stop_token:
            num_with_text -= 1
        num_before = self.num_tokens
        pieces: list[str] = []
        matched = False
        for i, token_id in enumerate(token_ids):
            self.num_tokens += 1
            if i < num_with_text and (matched := self._match(self._detokenizer.push((token_id,)), pieces)):
                break
        if finish_reason is not None and not matched and not self._match(self._detokenizer.flush(), pieces):
            pieces.append(self._stop_strings.flush())
            self.finish_reason = finish_reason
        return TextDelta("".join(pieces), self.num_tokens - num_before, self.finish_reason, self.stop_string)

    def _match(self, text: str, pieces: list[str]) -> bool:
        """Appends what of ``text`` is safe to show. True if a stop string ended the choice."""
        shown, self.stop_string = self._stop_strings.push(text, may_match=self.num_tokens > self._min_tokens)
        pieces.append(shown)
        if self.stop_string is None:
            return False
        self.finish_reason = FinishReason.STOP
        return True
