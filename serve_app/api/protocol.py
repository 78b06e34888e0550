"""What clients may send, as pydantic models: CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest.

Knows names, types, ranges, and how a request becomes prompts, SamplingParams and GenerateRequests. Knows no route, no
answer and no device. Where it comes from: OpenAI's API reference, and vLLM's protocol for the extras. The messages of chats
are in `messages`, the names that are no fields in `names`, the base of all in `request_model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, ClassVar

from pydantic import Field

from serve_app.api.fields import (
    CacheSalt,
    Count,
    LogitBias,
    MinP,
    Priority,
    Prompts,
    RequestId,
    Seed,
    Stop,
    Temperature,
    TokenIds,
    TopK,
    TopP,
)
from serve_app.api.messages import ChatInput, Message
from serve_app.api.names import CHAT_UNIMPLEMENTED, COMPLETION_UNIMPLEMENTED, RENAMED, WITHOUT_EFFECT
from serve_app.api.prompts import EncodedPrompt, encode_chat, encode_prompts
from serve_app.api.request_model import MAX_INT, IgnoredField, RequestLimits, RequestModel, Unimplemented
from serve_app.api.response_format import Constraint, ResponseFormat, StructuredOutputs
from serve_app.api.tools import ChosenTool, Tool, allowed_tools, check_choice
from serve_app.engine.request import MAX_LOGPROBS, MAX_SEED, GenerateRequest, SamplingParams
from serve_app.errors import InvalidParameterError, UnsupportedParameterError
from serve_app.text.chat_template import ChatTemplate
from serve_app.text.grammar import combined
from serve_app.text.grammar_check import Verdict
from serve_app.text.output_format import Grammars, OutputFormat
from serve_app.text.parsed_stream import ParsedStream
from serve_app.text.text_stream import TextStream
from serve_app.text.tokenizer import Tokenizer
from serve_app.text.tool_grammars import CallableTool

COMPLETION_MAX_TOKENS = 16
"""max_tokens of a completion that does not say it: OpenAI's, and everybody's after it."""

PLAIN = OutputFormat()
"""Of a model whose text is content and nothing else."""


# ---- models ----------------------------------------------------------------------------------------------------------


class StreamOptions(RequestModel):
    """What a stream tells beside its choices."""

    include_usage: bool = False
    """One event more before the end, without choices, with the usage of the whole request."""

    continuous_usage_stats: bool = False
    """The usage so far in every event (of vLLM)."""

    unimplemented: ClassVar[Unimplemented] = {"include_obfuscation": (False,)}


class GenerationInput(RequestModel):
    """The fields that completions and chats share."""

    model: str | None = None
    """A served name. By default the model that is there."""

    n: Annotated[int, Field(ge=1, le=MAX_INT)] = 1
    """Choices for each prompt, each with its own random numbers."""

    max_tokens: Count | None = None
    """Most tokens of an answer. By default 16 for a completion, for a chat what the context leaves (and a set number)."""

    min_tokens: Count = 0
    """Tokens before which nothing but max_tokens ends the answer."""

    temperature: Temperature | None = None
    """0 is greedy. By default what the model's generation_config.json says; so for the next four."""

    top_p: TopP | None = None
    """Sample from the most likely tokens that have this probability together."""

    top_k: TopK | None = None
    """Sample from that many most likely tokens. 0 or -1: from all."""

    min_p: MinP | None = None
    """Leave out tokens less likely than this share of the likeliest one's probability."""

    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    """Above 1: tokens of prompt and answer become less likely. 1: off."""

    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken from the logit of each token that the answer has."""

    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """The same, once for each time the answer has it."""

    logit_bias: LogitBias = Field({})
    """Token id -> added to its logit, -100 to 100."""

    allowed_token_ids: TokenIds | None = None
    """If given, no other token is sampled."""

    response_format: ResponseFormat = None
    """`{"type": "json_object"}`, or `{"type": "json_schema", "json_schema": {"schema": ...}}`: the answer is such JSON."""

    structured_outputs: StructuredOutputs | None = None
    """The same, of vLLM: an object with one of `json` (a schema), `regex`, `choice`, `grammar`, `json_object`."""

    stop: Stop = Field([])
    """Strings that end the answer, without showing."""

    stop_token_ids: TokenIds = Field([])
    """Token ids that end the answer, without showing."""

    include_stop_str_in_output: bool = False
    """Show what ended the answer."""

    ignore_eos: bool = False
    """Go on where the model would end."""

    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    seed: Seed | None = None
    """The same seed, prompt and parameters give the same answer. -1 is no seed; others below 0 count from 2**64."""

    stream: bool = False
    """Answer in server-sent events, as the tokens come."""

    stream_options: StreamOptions | None = None
    """Only with stream."""

    priority: Priority = 0
    """Lower is served earlier."""

    cache_salt: CacheSalt = ""
    """Prefixes are shared only among requests with an equal salt."""

    request_id: RequestId | None = None
    """Names the request in the answer's id and in the logs; wins over the header X-Request-Id."""

    return_token_ids: bool = False
    """Put the ids of prompt and answer beside the text."""

    ignored: ClassVar[Mapping[str, IgnoredField]] = WITHOUT_EFFECT
    renamed: ClassVar[Mapping[str, str]] = RENAMED

    @property
    def constraint(self) -> Constraint | None:
        """What the answer must be."""
        return self.response_format or self.structured_outputs

    @cached_property
    def grammar(self) -> str | None:
        """The constraint, for SamplingParams; not compiled yet. Raises InvalidRequestErrors with the place."""
        return None if self.constraint is None else self.constraint.to_grammar()

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens to report at each position; 0: only the token's own logprob; None: nothing."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    @property
    def given_max_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def max_tokens_name(self) -> str | None:
        """The field in which the client said it. None: it did not."""
        return None if self.max_tokens is None else "max_tokens"

    def prompts(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[EncodedPrompt]:
        """The prompts as token ids. Takes time in proportion to the text: keep long ones off an event loop.

        Raises InvalidPromptError, and for chats what ChatTemplate.render raises.
        """
        raise NotImplementedError

    def text_stream(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        prompt: EncodedPrompt,
        output_token_ids: Sequence[int] = (),
        output_format: OutputFormat = PLAIN,
    ) -> TextStream | ParsedStream:
        """The text of one choice, begun the way this kind of answer begins; see TextStream for ``output_token_ids``.
        ``output_format``: the model's, for answers that are more than text."""
        raise NotImplementedError

    def sampling_params(self, default_max_tokens: int | None = None) -> SamplingParams:
        """``default_max_tokens``: where the request names none (completions: not needed). None: what the context leaves.

        Raises InvalidParameterError. Not yet resolved with generation_config.json; without a seed if none was given.
        """
        max_tokens = self.given_max_tokens
        if max_tokens is None:
            max_tokens = default_max_tokens
        seed = None if self.seed == -1 else self.seed
        return SamplingParams(
            n=self.n,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias or None,
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            grammar=self.grammar,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            seed=None if seed is None else seed % (MAX_SEED + 1),
        )

    @property
    def is_held(self) -> bool:
        """There are `grammars`."""
        return self.constraint is not None

    def grammars(self, prompt: EncodedPrompt, output_format: OutputFormat) -> Grammars | None:
        """What holds the answer to this prompt, if something does: for SamplingParams.grammar, once it is checked.

        Takes time in proportion to schemas. Raises InvalidRequestErrors.
        """
        return None if self.grammar is None else Grammars(self.grammar, self.grammar)

    def refusal(self, verdict: Verdict) -> InvalidParameterError:
        """The error for grammars that the check has found wrong."""
        assert self.constraint is not None
        return self.constraint.refusal(verdict)

    def generate_requests(
        self, request_id: str, prompt: EncodedPrompt, sampling: SamplingParams, remaining_ms: float | None = None
    ) -> list[GenerateRequest]:
        """The choices of one prompt. ``sampling`` is resolved and has a seed; ``request_id`` is that prompt's own."""
        return [
            GenerateRequest(
                request_id,
                prompt.token_ids,
                sampling,
                choice_index=i,
                priority=self.priority,
                cache_salt=self.cache_salt,
                remaining_ms=remaining_ms,
            )
            for i in range(self.n)
        ]

    def check(self, limits: RequestLimits) -> None:
        if self.n > limits.max_n:
            raise InvalidParameterError("n", self.n, f"at most {limits.max_n}")
        for name, limit in (
            ("stop", limits.max_stop),
            ("stop_token_ids", limits.max_stop),
            ("logit_bias", limits.max_bias),
        ):
            if (number := len(getattr(self, name))) > limit:
                raise InvalidParameterError(name, f"{number} entries", f"at most {limit} entries")
        if self.stream_options is not None and not self.stream:
            raise InvalidParameterError(
                "stream_options", self.stream_options.model_dump(), "left out where stream is not true"
            )
        max_tokens = self.given_max_tokens
        if max_tokens is not None and self.min_tokens > max(max_tokens, 1):
            raise InvalidParameterError("min_tokens", self.min_tokens, f"at most max_tokens ({max_tokens})")
        if self.response_format is not None and self.structured_outputs is not None:
            raise InvalidParameterError(
                "structured_outputs", self.structured_outputs.kind, "left out where response_format asks for JSON"
            )
        if self.constraint is not None:
            assert self.grammar  # or it raises
        if self.allowed_token_ids == []:
            raise InvalidParameterError("allowed_token_ids", [], "a list of at least one token id")

    @classmethod
    def _take_names(cls, data: dict[str, Any], path: str = "") -> None:
        super()._take_names(data, path)
        if type(options := data.get("stream_options")) is dict:
            StreamOptions._take_names(options, "stream_options.")


class CompletionRequest(GenerationInput):
    """POST /v1/completions."""

    prompt: Prompts
    """Text, a list of texts, token ids, or a list of lists of those. Each prompt has n choices, numbered on and on."""

    add_special_tokens: bool = True
    """Begin a text's ids as the tokenizer would (bos). Ids are taken as they are."""

    echo: bool = False
    """Begin each choice with its prompt; with logprobs, also those of the prompt. With max_tokens 0, the prompt alone."""

    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report each token's log-probability, and the likeliest tokens, so many."""

    best_of: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    """Must equal n: the best of more are not picked here."""

    unimplemented: ClassVar[Unimplemented] = COMPLETION_UNIMPLEMENTED

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None

    @property
    def shows_prompt_alone(self) -> bool:
        """max_tokens 0: one token is generated, since an engine does no less, and not shown."""
        return self.max_tokens == 0

    @property
    def given_max_tokens(self) -> int | None:
        return COMPLETION_MAX_TOKENS if self.max_tokens is None else max(self.max_tokens, 1)

    def check(self, limits: RequestLimits) -> None:
        super().check(limits)
        if len(self.prompt) > limits.max_prompts:
            raise InvalidParameterError(
                "prompt", f"{len(self.prompt)} prompts", f"at most {limits.max_prompts} prompts"
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidParameterError("max_tokens", 0, "at least 1 where echo is not true")
        if self.best_of is not None and self.best_of != self.n:
            raise UnsupportedParameterError(
                "best_of", f"is {self.best_of}; it must equal n ({self.n}): this server does not pick the best"
            )

    def prompts(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> list[EncodedPrompt]:
        return encode_prompts(self.prompt, tokenizer, "prompt", add_special_tokens=self.add_special_tokens)

    def text_stream(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        prompt: EncodedPrompt,
        output_token_ids: Sequence[int] = (),
        output_format: OutputFormat = PLAIN,
    ) -> TextStream:
        """The answer goes on from a prompt of text, and from an echoed one; ids alone are not read as a text."""
        goes_on = prompt.text is not None or self.echo
        return TextStream(tokenizer, sampling, prompt.token_ids if goes_on else (), output_token_ids)


class ChatCompletionRequest(GenerationInput, ChatInput):
    """POST /v1/chat/completions."""

    messages: list[Message]
    """The conversation. Content is text."""

    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    """The newer name of max_tokens."""

    logprobs: bool = False
    """Report each token's log-probability."""

    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report the likeliest tokens, too, so many. Only with logprobs."""

    tool_choice: ChosenTool | None = None
    """Whether the model may call tools (`auto`), must not (`none`: they are not shown to it), or must (`required`, or
    `{"type": "function", "function": {"name": ...}}`: arguments follow the schema). `allowed_tools`: only some."""

    parallel_tool_calls: bool = True
    """false: the answer ends with its first call."""

    include_reasoning: bool = True
    """false: leave reasoning out of the answer. The usage counts it all the same."""

    unimplemented: ClassVar[Unimplemented] = CHAT_UNIMPLEMENTED
    renamed: ClassVar[Mapping[str, str]] = {**RENAMED, "functions": "tools", "function_call": "tool_choice"}

    @property
    def shown_tools(self) -> list[Tool]:
        return allowed_tools(self.tools, self.tool_choice)

    @property
    def must_call(self) -> bool:
        """A call is forced."""
        return self.tool_choice is not None and self.tool_choice.mode == "required"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def given_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def max_tokens_name(self) -> str | None:
        return super().max_tokens_name if self.max_completion_tokens is None else "max_completion_tokens"

    def check(self, limits: RequestLimits) -> None:
        super().check(limits)
        self._check_chat(self.messages, limits)
        check_choice(self.tool_choice, self.tools)
        if self.max_tokens == 0:
            raise InvalidParameterError("max_tokens", 0, "at least 1")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidParameterError(
                "max_completion_tokens",
                self.max_completion_tokens,
                f"equal to max_tokens ({self.max_tokens}), or alone",
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidParameterError("top_logprobs", self.top_logprobs, "0 where logprobs is not true")

    @classmethod
    def _take_names(cls, data: dict[str, Any], path: str = "") -> None:
        super()._take_names(data, path)
        cls._take_message_names(data)

    def check_format(self, output_format: OutputFormat) -> None:
        """Whether the model can do what is asked for. Raises UnsupportedParameterError."""
        if self.shown_tools and output_format.tools is None:
            raise UnsupportedParameterError(
                "tools",
                "are given; this model's chat template does not show tools to it, or asks for calls in a way that is not"
                " known here (api.tool_parser). For JSON of a schema there is response_format",
            )

    @property
    def is_held(self) -> bool:
        return self._is_forced or any(tool.function.strict for tool in self.shown_tools)

    @property
    def _is_forced(self) -> bool:
        """The model may not write what it likes: calls, or JSON, or the one or the other."""
        return self.must_call or self.constraint is not None

    def grammars(self, prompt: EncodedPrompt, output_format: OutputFormat) -> Grammars | None:
        """Forced calls follow the tools' schemas, and so do free ones of strict tools. Where the model may call and must
        else answer by a schema, it does one or the other. Before all that it may reason."""
        if not self.is_held:
            return None
        place: dict[str, Any] = {"prompt": prompt.text or "", "final_message": self._final_message}
        calls: dict[str, Any] = {"tools": self._callable_tools(), "parallel": self.parallel_tool_calls, **place}
        if self.must_call:
            return output_format.forced_calls(**calls)
        own = super().grammars(prompt, output_format)
        if own is None:
            return output_format.free_calls(**calls)
        if self.shown_tools:
            forced = replace(output_format, reasoning=None).forced_calls(**calls)
            own = Grammars(
                *(
                    combined("start: @json | @calls", {"json": one, "calls": other})
                    for one, other in zip(own, forced, strict=True)
                )
            )
        return output_format.after_reasoning(own, **place)

    def _callable_tools(self) -> list[CallableTool]:
        return [
            CallableTool(
                tool.function.name,
                tool.function.parameters,
                strict=tool.function.strict is True,
                path=f"tools[{self.tools.index(tool)}].function.parameters",
            )
            for tool in self.shown_tools
        ]

    def refusal(self, verdict: Verdict) -> InvalidParameterError:
        if not self.must_call and not self.shown_tools:
            return super().refusal(verdict)
        error = InvalidParameterError("tools", None, "")
        error.args = (f"the schemas of tools cannot be compiled: {verdict.problem}",)
        return error

    @property
    def _final_message(self) -> str | None:
        return self.messages[-1].content if self.continue_final_message else None

    def prompts(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[EncodedPrompt]:
        return [encode_chat(self._render(self.messages, _need(template)), tokenizer, add_special_tokens=False)]

    def text_stream(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        prompt: EncodedPrompt,
        output_token_ids: Sequence[int] = (),
        output_format: OutputFormat = PLAIN,
    ) -> TextStream | ParsedStream:
        """An answer stands alone, except where it goes on with the last message."""
        prompt_token_ids = prompt.token_ids if self.continue_final_message else ()
        parser = output_format.parser(
            prompt.text or "",
            tools={tool.function.name: tool.function.parameters for tool in self.shown_tools},
            is_forced=self._is_forced,
            final_message=self._final_message,
            skip_special_tokens=self.skip_special_tokens,
        )
        if parser is None:
            return TextStream(tokenizer, sampling, prompt_token_ids, output_token_ids)
        text = TextStream(tokenizer, sampling, prompt_token_ids, (), output_format.special_ids)
        stream = ParsedStream(
            text, parser, shows_reasoning=self.include_reasoning, ends_after_call=not self.parallel_tool_calls
        )
        stream.push(output_token_ids)
        return stream


class TokenizeRequest(ChatInput):
    """POST /tokenize: a text, or a chat through the template."""

    model: str | None = None
    """A served name. By default the model that is there."""

    prompt: str | None = None
    """The text. Either this or messages."""

    messages: list[Message] | None = None
    """The conversation."""

    add_special_tokens: bool | None = None
    """Begin the ids as the tokenizer would (bos). By default true for a text, false for a chat."""

    return_token_strs: bool = False
    """Say also what each token reads as."""

    def check(self, limits: RequestLimits) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidParameterError("prompt", self.prompt and "text", "given, or else messages, and not both")
        if self.messages is not None:
            self._check_chat(self.messages, limits)
            return
        for name in ChatInput.model_fields:
            if getattr(self, name):
                raise InvalidParameterError(name, getattr(self, name), "left out where there are no messages")

    @classmethod
    def _take_names(cls, data: dict[str, Any], path: str = "") -> None:
        super()._take_names(data, path)
        cls._take_message_names(data)

    def tokens(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> list[int]:
        """The token ids. Raises as GenerationInput.prompts does. Time in proportion to the text."""
        if self.messages is not None:
            text = self._render(self.messages, _need(template))
            return list(encode_chat(text, tokenizer, add_special_tokens=bool(self.add_special_tokens)).token_ids)
        assert self.prompt is not None
        return tokenizer.encode(self.prompt, self.add_special_tokens is not False)


class DetokenizeRequest(RequestModel):
    """POST /detokenize."""

    model: str | None = None
    """A served name. By default the model that is there."""

    tokens: TokenIds
    """Token ids. Special ones show in the text."""


def default_chat_max_tokens(num_prompt_tokens: int, max_model_len: int, configured: int) -> int:
    """max_tokens of a chat that names none: what the context leaves, up to the configured number; at least 1, for the
    prompt that leaves nothing is refused elsewhere, and by its length."""
    return max(1, min(configured, max_model_len - num_prompt_tokens))


def _need(template: ChatTemplate | None) -> ChatTemplate:
    if template is None:
        raise InvalidParameterError("messages", None, "left out: this model has no chat template; use /v1/completions")
    return template
