"""Service: what the routes do, without HTTP. Checks a request, makes its prompts, starts its streams; `generation` makes the
bytes.

Knows the model's names, its tokenizer and template, and the limits. Knows no route, no header, no Ray: the router and the
channels are handed in. Loads no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from serve_app.api import resume
from serve_app.api.answer_formats import TokenTexts
from serve_app.api.answers import Answer, ResumableAnswer, detokenize_body, make_answer, tokenize_body
from serve_app.api.embeddings import EmbeddingRequest, check_lengths, embeddings_body, encode_vector
from serve_app.api.event_id import ChoiceShown
from serve_app.api.explain import Explainer
from serve_app.api.failover import Failover
from serve_app.api.generation import Generation, Texts, error_of
from serve_app.api.headers import EVENT_ID_HEADER, RESUMABLE_HEADER
from serve_app.api.ingress_counts import IngressCounts, RequestTimes
from serve_app.api.prompts import EncodedPrompt
from serve_app.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    default_chat_max_tokens,
)
from serve_app.api.request_model import RequestLimits
from serve_app.api.request_notes import RequestNotes
from serve_app.api.resume import MAX_CHOICES, Begun, Resumable
from serve_app.api.served_model import ServedModel
from serve_app.api.stream import GenerationStream, Leases, prefix_hashes
from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams
from serve_app.errors import (
    ContextLengthError,
    EngineUnavailableError,
    InvalidEventIdError,
    InvalidParameterError,
    OverloadedError,
    UnknownModelError,
)
from serve_app.replica.channel import Channels
from serve_app.replica.kept import Keep, Origin
from serve_app.routing.router import RouterState
from serve_app.text.grammar_check import GrammarCheck
from serve_app.text.parsed_stream import ParsedStream
from serve_app.text.text_stream import TextStream

LONG_TEXT = 16_384
"""Characters beyond which a text is tokenized off the event loop: some 4 ms."""
MAX_INPUTS_AT_ONCE = 64
"""Of one embedding request: enough to fill a step with short ones, and no more of the router's queue."""
LONG_BODY = 16_384
"""Bytes beyond which a body is parsed there: also 4 ms, if it is a schema."""

T = TypeVar("T")
GenerationRequest = CompletionRequest | ChatCompletionRequest


class Service:
    """One ingress. ``replicas``: what the router said last of the replicas; None before it answered."""

    def __init__(
        self,
        model: ServedModel,
        leases: Leases,
        channels: Channels,
        replicas: Callable[[], RouterState | None],
        limits: RequestLimits | None = None,
        seeds: random.Random | None = None,
    ) -> None:
        self.model = model
        self.limits = limits or RequestLimits()
        self.token_texts = TokenTexts(model.tokenizer)
        self.grammars = GrammarCheck()
        self.requests = RequestNotes()
        self.explainer: Explainer | None = None
        """None: requests are not explained."""
        self.num_running = 0
        """Requests that are being answered."""
        self.keeps_streams = True
        """Replicas keep streams for clients that come back."""
        self._leases = leases
        self._channels = channels
        self._replicas = replicas
        self.failover = Failover()
        """Its limits may change while it runs."""
        self.counts = IngressCounts()
        self._seeds = seeds or random.SystemRandom()
        self._last_state: RouterState | None = None

    # ---- what routes call ----------------------------------------------------------------------------------------

    async def parse(self, kind: type[T], body: bytes) -> T:
        """The request in ``body``, one of protocol.py's models. Raises what its ``parse`` raises."""
        parse: Callable[[bytes, RequestLimits], T] = kind.parse  # type: ignore[attr-defined]
        if len(body) > LONG_BODY:
            return await asyncio.to_thread(parse, body, self.limits)
        return parse(body, self.limits)

    async def start(
        self,
        request: GenerationRequest,
        request_id: str,
        remaining_ms: float | None = None,
        resumable: Resumable | None = None,
        make: Callable[..., Answer] = make_answer,
    ) -> Generation:
        """Everything up to the first lease. ``remaining_ms``: until nobody wants the answer; None: no such time.
        ``resumable``: its client may resume it, or does so now. ``make``: takes what `make_answer` does.

        Raises InvalidRequestErrors, and EngineUnavailableError without a replica.
        """
        arrived_at = asyncio.get_running_loop().time()
        name = self._name_of(request.model)
        state = self.state()
        template, output_format = self.model.chat_template, self.model.output_format
        if isinstance(request, ChatCompletionRequest):
            request.check_format(output_format)
        prompts = await self._off_loop(_num_chars(request), lambda: request.prompts(self.model.tokenizer, template))
        grammar = await self._grammar(request, prompts[0])
        sampling = [self._sampling(request, prompt, state, grammar) for prompt in prompts]
        created, keep, begun = int(time.time()), None, None
        if resumable is not None:
            keep, begun = await self._resume(resumable, request, Origin.of(request_id, created, sampling))
            request_id, created = keep.origin.request_id, keep.origin.created
            sampling = keep.origin.applied_to(sampling)
        answer = make(
            request,
            request_id=request_id,
            created=created,
            model=name,
            prompts=prompts,
            token_texts=self.token_texts,
            system_fingerprint=",".join(state.fingerprints) or None,
            resume_id=None if keep is None else keep.resume_id,
            counts_reasoning=output_format.reasoning is not None,
        )
        streams = []
        texts: Texts = {}
        for i, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            # Clients choose request ids, and may choose one twice: an engine must never see that.
            own_id = f"{request_id}~{uuid.uuid4().hex[:8]}"
            streams.append(
                GenerationStream(
                    request.generate_requests(own_id, prompt, params, remaining_ms),
                    self._leases,
                    self._channels,
                    block_size=state.block_size,
                    prefix_hashes=prefix_hashes(prompt.token_ids, state.block_size, request.cache_salt),
                    failover=self.failover,
                    keep=None if keep is None else keep._replace(prompt_index=i),
                    begun=None if begun is None else begun[i],
                )
            )
            for choice_index in range(request.n):
                texts[i, choice_index] = request.text_stream(
                    self.model.tokenizer, params, prompt, output_format=output_format
                )
        if isinstance(answer, ResumableAnswer) and resumable is not None and resumable.event_id is not None:
            for i, place in enumerate(begun or ()):
                answer.resume_prompt(i, place.num_cached_tokens)
                for choice_index, shown in place.shown.items():
                    token_ids = place.emitted.get(choice_index, ())
                    answer.resume(i, choice_index, shown, token_ids)
                    if not shown.has_ended:
                        await self._read_on(texts[i, choice_index], token_ids, shown)
            answer.is_over = resumable.event_id.is_over
            self.failover.counters["came_back"] += 1
        times = RequestTimes(
            self.counts, arrived_at, sum(len(prompt.token_ids) for prompt in prompts), len(streams) * request.n
        )
        self.counts.params_n.observe(request.n)
        if request.given_max_tokens is not None:
            self.counts.params_max_tokens.observe(request.given_max_tokens)
        return Generation(answer, streams, texts, times, self._count_running)

    async def embed(
        self,
        request: EmbeddingRequest,
        request_id: str,
        remaining_ms: float | None = None,
        streams: list[GenerationStream] | None = None,
    ) -> bytes:
        """The whole answer. Inputs run side by side, MAX_INPUTS_AT_ONCE at most. ``remaining_ms``: as of `start`.
        ``streams``: takes the stream of each input.

        Where the server has no room for an input, fewer run side by side: only when none of them finds room is the request
        refused. A long list would else crowd itself out.

        Raises InvalidRequestErrors, and what a stream raises.
        """
        arrived_at = asyncio.get_running_loop().time()
        name, state, model = self._name_of(request.model), self.state(), self.model
        pooling = model.pooling.params(request.dimensions)
        prompts = await self._off_loop(request.num_chars, lambda: request.prompts(model.tokenizer))
        check_lengths(prompts, state.max_model_len)
        loop = asyncio.get_running_loop()
        deadline = None if remaining_ms is None else loop.time() + remaining_ms / 1000.0
        vectors = [b""] * len(prompts)
        todo = deque(range(len(prompts)))
        num_workers = min(len(prompts), MAX_INPUTS_AT_ONCE)

        async def work() -> None:
            nonlocal num_workers
            while todo:
                i = todo.popleft()
                left = None if deadline is None else (deadline - loop.time()) * 1000.0
                own_id = f"{request_id}~{uuid.uuid4().hex[:8]}"
                asked = request.generate_request(own_id, prompts[i], pooling, left)
                try:
                    vector = await self._embed_one(asked, state.block_size, streams)
                except OverloadedError:
                    if num_workers == 1:
                        raise
                    todo.append(i)  # for the others, who have room
                    break
                vectors[i] = encode_vector(vector, request.encoding_format)
            num_workers -= 1

        self.num_running += 1
        tasks = [asyncio.create_task(work()) for _ in range(num_workers)]
        try:
            await asyncio.gather(*tasks)
        finally:
            self.num_running -= 1
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self.counts.embedded(loop.time() - arrived_at, num_prompt_tokens, len(prompts))
        return embeddings_body(
            vectors, request_id=request_id, created=int(time.time()), model=name, num_prompt_tokens=num_prompt_tokens
        )

    async def _embed_one(
        self, request: GenerateRequest, block_size: int, streams: list[GenerationStream] | None
    ) -> bytes:
        hashes: tuple[int, ...] = ()
        if not request.needs_every_position:
            hashes = prefix_hashes(request.prompt_token_ids, block_size, request.cache_salt)
        stream = GenerationStream(
            [request],
            self._leases,
            self._channels,
            block_size=block_size,
            prefix_hashes=hashes,
            failover=self.failover,
        )
        if streams is not None:
            streams.append(stream)
        async with contextlib.aclosing(stream.batches()) as batches:  # type: ignore[type-var]
            async for batch in batches:
                for output in batch:
                    if output.finish_reason is FinishReason.ERROR:
                        raise error_of(output)
                    if output.embedding is not None:
                        return output.embedding
        raise RuntimeError("the stream is over, and there is no vector")

    async def tokenize(self, request: TokenizeRequest) -> bytes:
        self._name_of(request.model)
        template = self.model.chat_template
        tokens = await self._off_loop(
            len(request.prompt or "") + sum(len(m.content or "") for m in request.messages or ()),
            lambda: request.tokens(self.model.tokenizer, template),
        )
        max_model_len = state.max_model_len if (state := self._known_state()) is not None else 0
        return tokenize_body(tokens, max_model_len, self.token_texts if request.return_token_strs else None)

    async def detokenize(self, request: DetokenizeRequest) -> bytes:
        self._name_of(request.model)
        ids = request.tokens
        vocab_size = self.model.tokenizer.vocab_size
        for token_id in ids:
            if token_id >= vocab_size:
                raise InvalidParameterError("tokens", token_id, f"made of token ids below {vocab_size}")
        decode = self.model.tokenizer.decode
        return detokenize_body(await self._off_loop(4 * len(ids), lambda: decode(ids, skip_special_tokens=False)))

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._describe(name) for name in self.model.names]}

    def describe_model(self, name: str) -> dict[str, Any]:
        """Raises UnknownModelError."""
        return self._describe(self._name_of(name))

    @property
    def is_ready(self) -> bool:
        return self.status == "ready"

    @property
    def status(self) -> str:
        """ready: a replica can serve; loading: none can; draining: the server ends."""
        state = self._replicas()
        if state is not None and state.seconds_left is not None:
            return "draining"
        return "ready" if state is not None and state.replica_ids else "loading"

    def state(self) -> RouterState:
        """The replicas. Raises EngineUnavailableError if none was ever heard of."""
        state = self._known_state()
        if state is None:
            raise EngineUnavailableError("no replica is ready yet: the model is being loaded; see /ready")
        return state

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _count_running(self, num: int) -> None:
        self.num_running += num

    def _known_state(self) -> RouterState | None:
        """The last state in which there were replicas: they may all be away for a moment."""
        state = self._replicas()
        if state is not None and state.block_size:
            self._last_state = state
        return self._last_state

    def _describe(self, name: str) -> dict[str, Any]:
        state = self._known_state()
        return {
            "id": name,
            "object": "model",
            "created": self.model.created,
            "owned_by": "ragged-serve",
            "root": self.model.names[0],
            "parent": None,
            "max_model_len": state.max_model_len if state is not None else None,
        }

    def _name_of(self, name: str | None) -> str:
        if name is None:
            return self.model.names[0]
        if name not in self.model.names:
            raise UnknownModelError(name, self.model.names)
        return name

    async def _grammar(self, request: GenerationRequest, prompt: EncodedPrompt) -> str | None:
        """What holds the answer, checked. All prompts of a request have the same.

        Raises InvalidParameterError with the place in the schema, OverloadedError where too many wait.
        """
        if not request.is_held:
            return None
        grammars = await asyncio.to_thread(request.grammars, prompt, self.model.output_format)
        if grammars is None:
            return None
        verdict = await self.grammars.check(grammars.checked)
        if verdict.problem is not None:
            raise request.refusal(verdict)
        return grammars.text

    def _sampling(
        self, request: GenerationRequest, prompt: EncodedPrompt, state: RouterState, grammar: str | None
    ) -> SamplingParams:
        num_prompt, longest = len(prompt.token_ids), state.max_model_len
        if num_prompt >= longest:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens; with a context of {longest} it may have at most {longest - 1}"
            )
        given, name = request.given_max_tokens, request.max_tokens_name
        if given is not None and name is not None and num_prompt + given > longest:
            raise ContextLengthError(
                f"{name} is {given} and the prompt has {num_prompt} tokens; together they may be at most {longest}"
            )
        configured = self.model.default_chat_max_tokens
        sampling = request.sampling_params(default_chat_max_tokens(num_prompt, longest, configured))
        max_tokens = sampling.max_tokens
        assert max_tokens is not None
        seed = self._seeds.getrandbits(64) if sampling.seed is None else sampling.seed
        max_tokens = min(max_tokens, longest - num_prompt)
        sampling = dataclasses.replace(sampling, max_tokens=max_tokens, seed=seed, grammar=grammar)
        return sampling.resolved(self.model.tokenizer.generation_config)

    async def _resume(
        self, resumable: Resumable, request: GenerationRequest, origin: Origin
    ) -> tuple[Keep, list[Begun] | None]:
        """What the submits of a resumable request carry, and where each prompt stands: None at its beginning."""
        header = RESUMABLE_HEADER if resumable.event_id is None else EVENT_ID_HEADER
        if not request.stream:
            raise InvalidParameterError(header, "given", "left out where stream is not true")
        if not self.keeps_streams:
            raise InvalidParameterError(header, "given", "left out: this server keeps no streams (resume.keep_seconds)")
        if (num_choices := len(origin.seeds) * request.n) > MAX_CHOICES:
            raise InvalidParameterError(
                "n", f"{num_choices} choices in all", f"at most {MAX_CHOICES} of all prompts where {header} is given"
            )
        if resumable.event_id is None:
            return resume.begin(resumable.owner, origin), None
        return await resume.find(
            self._channels,
            [*self.state().replica_ids, *self._channels.replica_ids],
            resumable,
            num_prompts=len(origin.seeds),
            n=request.n,
            with_logprobs=request.num_logprobs is not None,
            with_prompt_logprobs=request.num_prompt_logprobs is not None,
        )

    async def _read_on(self, text: TextStream | ParsedStream, token_ids: Sequence[int], shown: ChoiceShown) -> None:
        """Brings ``text`` to where the reader is. Raises InvalidEventIdError if the id says otherwise."""
        delta = await self._off_loop(4 * len(token_ids), lambda: text.push(token_ids))
        if delta.num_chars != shown.num_chars or delta.finish_reason is not None:
            raise InvalidEventIdError(
                f"says that {shown.num_chars} characters were shown of {shown.num_tokens} tokens; those have"
                f" {delta.num_chars}"
            )

    async def _off_loop(self, num_chars: int, make: Callable[[], T]) -> T:
        return await asyncio.to_thread(make) if num_chars > LONG_TEXT else make()


def _num_chars(request: GenerationRequest) -> int:
    if isinstance(request, ChatCompletionRequest):
        return sum(len(message.content or "") for message in request.messages)
    return sum(len(prompt) for prompt in request.prompt if isinstance(prompt, str))
