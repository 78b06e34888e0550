"""LLM: the offline face. Text or token ids in, completions out, all prompts batched together. Knows no HTTP, no Ray."""

from __future__ import annotations

import dataclasses
import operator
import random
import struct
import sys
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import (
    FinishReason,
    GenerateRequest,
    PoolingParams,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from serve_app.errors import ConfigurationError, InvalidParameterError, InvalidPromptError, RaggedServeError
from serve_app.models.decoder_config import read_json
from serve_app.runner.model_runner import ModelRunner
from serve_app.text.chat_template import ChatTemplate
from serve_app.text.pooling_config import load_pooling_config
from serve_app.text.text_stream import TextStream
from serve_app.text.tokenizer import Tokenizer

__all__ = ["LLM", "Completion", "Embedding", "SamplingParams"]


@dataclass
class Completion:
    """One answer. With n > 1 a prompt has n of them, one after the other."""

    prompt: str | None
    """The prompt's text; None if it came as token ids."""
    prompt_token_ids: list[int]
    choice_index: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    """Empty if the model has no tokenizer."""
    finish_reason: str | None = None
    """stop, length, or error (then ``error`` says what happened)."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None if it was an eos token."""
    logprobs: list[TokenLogprobs] | None = None
    """One per token, if asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One per prompt token, None for the first; with the first choice, if asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    error: str | None = None


@dataclass
class Embedding:
    """The vector of one prompt."""

    prompt: str | None
    """The prompt's text; None if it came as token ids."""
    prompt_token_ids: list[int]
    embedding: list[float] = field(default_factory=list)
    """float32 values, of length 1 unless the checkpoint says otherwise."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    error: str | None = None
    """Then there is no vector."""


class LLM:
    """A model and an engine in this process.

        llm = LLM(model="path or hub id", max_num_batched_tokens=512)
        completions = llm.generate(["The capital of France is"], SamplingParams(max_tokens=64))

    ``dtype``: auto, float32, bfloat16 or float16; ``device``: auto (a GPU if there is one), cpu or cuda;
    ``load_format``: auto, or dummy for random weights from the config alone; ``revision``: of a hub repository;
    ``implementation``: auto, or transformers to run a model through that package that we have a page of our own for;
    ``tokenizer``: a directory, where it is not the model's. Every field of EngineConfig is an option by its name. Raises
    a StartupError that says what is wrong.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        load_format: str = "auto",
        revision: str | None = None,
        implementation: str = "auto",
        tokenizer: str | Path | None = None,
        **engine_options: Any,
    ) -> None:
        known = [f.name for f in dataclasses.fields(EngineConfig)]
        for name in engine_options:
            if name not in known:
                raise ConfigurationError(f"unknown option {name!r}; the engine's options are {', '.join(known)}")
        self.config = EngineConfig(**engine_options)
        self.runner = ModelRunner(
            model,
            self.config,
            dtype=dtype,
            device=device,
            load_format=load_format,
            revision=revision,
            implementation=implementation,
            tokenizer=tokenizer,
        )
        self.engine = Engine(self.config, self.runner)
        directory = self.runner.directory if tokenizer is None else Path(tokenizer)
        has_tokenizer = (directory / "tokenizer.json").is_file()
        if tokenizer is not None or (has_tokenizer or load_format != "dummy"):
            self.tokenizer: Tokenizer | None = Tokenizer.from_directory(directory)
        else:
            self.tokenizer = None
        self.generation_config = read_json(self.runner.directory / "generation_config.json") or {}
        self._seeds = random.Random(self.config.seed)
        self._num_requests = 0

    def generate(
        self,
        prompts: str | SequenceOf[str] | SequenceOf[SequenceOf[int]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[Completion]:
        """Completions in the order of the prompts (text or token ids); one SamplingParams for all, or one for each.

        ``use_tqdm``: show a progress bar; None: if stderr is a terminal. Raises InvalidRequestError naming the first
        prompt or parameter that is wrong, before anything runs.
        """
        given: list[str | SequenceOf[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
        params = self._params_for(given, sampling_params)
        groups = [self._requests(prompt, p) for prompt, p in zip(given, params, strict=True)]
        self._check(groups)
        answers = [
            _Answer(request, prompt if isinstance(prompt, str) else None, self.tokenizer)
            for group, prompt in zip(groups, given, strict=True)
            for request in group
        ]
        self._run(groups, answers, "Generating", use_tqdm)
        return [answer.completion for answer in answers]

    def embed(
        self,
        prompts: str | SequenceOf[str] | SequenceOf[SequenceOf[int]],
        *,
        pooling: str | None = None,
        dimensions: int | None = None,
        use_tqdm: bool | None = None,
    ) -> list[Embedding]:
        """One vector for each prompt (text or token ids), in their order.

        ``pooling``: last or mean; None: what the checkpoint says, else last. ``dimensions``: leading elements to keep, of
        a model that was trained for it. Raises as `generate` does, and UnsupportedModelError.
        """
        given: list[str | SequenceOf[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
        config = load_pooling_config(self.runner.directory, pooling)
        params = config.params(dimensions)
        sampling = SamplingParams(max_tokens=1).resolved()
        groups = [[self._request(self._token_ids(prompt), sampling, params)] for prompt in given]
        self._check(groups)
        vectors = [
            _Vector(request, prompt if isinstance(prompt, str) else None)
            for (request,), prompt in zip(groups, given, strict=True)
        ]
        self._run(groups, vectors, "Embedding", use_tqdm)
        return [vector.embedding for vector in vectors]

    def chat(
        self,
        messages: SequenceOf[dict[str, Any]] | SequenceOf[SequenceOf[dict[str, Any]]],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool | None = None,
        **template_kwargs: Any,
    ) -> list[Completion]:
        """One conversation (a list of messages) or several, through the model's chat template."""
        tokenizer = self._need_tokenizer("chat")
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        template = ChatTemplate(tokenizer.chat_templates, tokenizer.special_tokens)
        texts = [template.render(c, add_generation_prompt=True, template_kwargs=template_kwargs) for c in conversations]
        prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _params_for(
        self, prompts: SequenceOf[Any], given: SamplingParams | SequenceOf[SamplingParams] | None
    ) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            given = [given or SamplingParams()] * len(prompts)
        if len(given) != len(prompts):
            raise InvalidParameterError(
                "sampling_params", f"{len(given)} entries", f"one for each of {len(prompts)} prompts"
            )
        return [p.resolved(self.generation_config) for p in given]

    def _token_ids(self, prompt: str | SequenceOf[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._need_tokenizer("a text prompt").encode(prompt))
        try:
            return tuple(operator.index(token_id) for token_id in prompt)  # numpy's and torch's integers, too
        except TypeError as error:
            shown = repr(prompt)
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            raise InvalidPromptError(f"a prompt is text or a list of token ids, not {shown} ({error})") from error

    def _check(self, groups: list[list[GenerateRequest]]) -> None:
        for i, group in enumerate(groups):
            try:
                self.engine.scheduler.check(group)
                if (grammar := group[0].sampling.grammar) is not None:
                    self.runner.compile_grammar(grammar)
            except RaggedServeError as error:
                error.args = (f"prompt {i}: {error}",)
                raise

    def _requests(self, prompt: str | SequenceOf[int], params: SamplingParams) -> list[GenerateRequest]:
        """The choices of one prompt."""
        ids = self._token_ids(prompt)
        if params.stop:
            self._need_tokenizer("stop strings")
        if params.seed is None:
            params = dataclasses.replace(params, seed=self._seeds.getrandbits(64))
        first = self._request(ids, params)
        return [dataclasses.replace(first, choice_index=i) for i in range(params.n)]

    def _request(
        self, ids: tuple[int, ...], params: SamplingParams, pooling: PoolingParams | None = None
    ) -> GenerateRequest:
        self._num_requests += 1
        return GenerateRequest(f"offline-{self._num_requests}", ids, params, pooling=pooling)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigurationError(f"{what} needs a tokenizer; {self.runner.directory} has no tokenizer.json")
        return self.tokenizer

    def _run(
        self,
        groups: list[list[GenerateRequest]],
        answering: SequenceOf[_Answer | _Vector],
        what: str,
        use_tqdm: bool | None,
    ) -> None:
        """``answering``: one for each request, in their order."""
        requests = [request for group in groups for request in group]
        answers: dict[tuple[str, int], _Answer | _Vector] = {
            (r.request_id, r.choice_index): a for r, a in zip(requests, answering, strict=True)
        }
        hidden = not (sys.stderr.isatty() if use_tqdm is None else use_tqdm)
        with tqdm(total=len(answers), desc=what, unit="seq", disable=hidden) as bar:
            try:
                for group in groups:
                    self.engine.add(group)
                num_tokens = 0
                while self.engine.has_work:
                    for output in self.engine.step():
                        answer = answers[output.request_id, output.choice_index]
                        num_tokens += len(output.token_ids)
                        if answer.take(output) and output.finish_reason is None:
                            self.engine.abort(output.request_id, output.choice_index)
                        if answer.ends_now:
                            bar.update()
                            elapsed = bar.format_dict["elapsed"] or 1e-9
                            bar.set_postfix_str(f"{num_tokens / elapsed:.0f} tokens/s", refresh=False)
            except BaseException:
                for request_id, choice_index in answers:
                    self.engine.abort(request_id, choice_index)
                self.engine.scheduler.take_ended()
                raise


class _Answer:
    """A completion in the making."""

    def __init__(self, request: GenerateRequest, text: str | None, tokenizer: Tokenizer | None) -> None:
        prompt = list(request.prompt_token_ids)
        sampling = request.sampling
        self.completion = Completion(text, prompt, request.choice_index)
        if sampling.logprobs is not None:
            self.completion.logprobs = []
        # A completion continues its prompt's text; token ids alone are decoded by themselves, as transformers does.
        self._text = None if tokenizer is None else TextStream(tokenizer, sampling, prompt if text is not None else ())
        self.ends_now = False

    def take(self, output: TokenOutput) -> bool:
        """Adds one output; True if the answer is complete. What comes after that is overshoot, and dropped."""
        completion = self.completion
        self.ends_now = False
        if completion.finish_reason is not None:
            return False
        num_shown, reason, stop_string = len(output.token_ids), output.finish_reason, None
        if self._text is not None:
            delta = self._text.push(output.token_ids, reason, output.stop_token_id)
            completion.text += delta.text
            num_shown, reason, stop_string = delta.num_tokens, delta.finish_reason, delta.stop_string
        completion.token_ids += output.token_ids[:num_shown]
        if completion.logprobs is not None and output.logprobs is not None:
            completion.logprobs += output.logprobs[:num_shown]
        if output.prompt_logprobs is not None:
            completion.prompt_logprobs = list(output.prompt_logprobs)
        completion.num_cached_tokens = output.num_cached_tokens or completion.num_cached_tokens
        if reason is not None:
            completion.finish_reason = str(reason)
            completion.error = output.error
            completion.stop_reason = stop_string
            if reason is FinishReason.STOP and stop_string is None:
                completion.stop_reason = output.stop_token_id
            self.ends_now = True
        return self.ends_now


class _Vector:
    """An embedding in the making."""

    def __init__(self, request: GenerateRequest, text: str | None) -> None:
        self.embedding = Embedding(text, list(request.prompt_token_ids))
        self.ends_now = False

    def take(self, output: TokenOutput) -> bool:
        """Always True: a vector comes with one output."""
        self.ends_now = True
        self.embedding.error = output.error
        self.embedding.num_cached_tokens = output.num_cached_tokens
        if output.embedding is not None:
            self.embedding.embedding = list(struct.unpack(f"<{len(output.embedding) // 4}f", output.embedding))
        return True
