"""POST /v1/embeddings: what clients may send, and the answer. Knows OpenAI's shapes; knows no route and no engine.

Fields stand in the three tables of `request_model`. Where they come from: OpenAI's API reference, and vLLM for the extras.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from serve_app.api.fields import CacheSalt, Priority, Prompts, RequestId
from serve_app.api.names import WITHOUT_EFFECT
from serve_app.api.prompts import EncodedPrompt, encode_prompts
from serve_app.api.request_model import MAX_INT, IgnoredField, RequestLimits, RequestModel, Unimplemented
from serve_app.engine.request import GenerateRequest, PoolingParams, SamplingParams
from serve_app.errors import ContextLengthError, InvalidParameterError
from serve_app.text.tokenizer import Tokenizer

_NO_SAMPLING = SamplingParams(max_tokens=1).resolved()


class EmbeddingRequest(RequestModel):
    """POST /v1/embeddings."""

    input: Prompts
    """Text, a list of texts, token ids, or a list of lists of those. Each gives one vector."""

    model: str | None = None
    """A served name. By default the model that is there."""

    encoding_format: Literal["float", "base64"] = "float"
    """float: a list of numbers; base64: the same as float32, little-endian, which is a quarter as long."""

    dimensions: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    """Leading elements of each vector, of a model that was trained for it (matryoshka); else all of them."""

    add_special_tokens: bool = True
    """Make a text's ids as the tokenizer would (bos, eos). Ids are taken as they are."""

    priority: Priority = 0
    """Lower is served earlier."""

    cache_salt: CacheSalt = ""
    """Prefixes are shared only among requests with an equal salt."""

    request_id: RequestId | None = None
    """Names the request in the answer's id and in the logs; wins over the header X-Request-Id."""

    ignored: ClassVar[Mapping[str, IgnoredField]] = {"user": WITHOUT_EFFECT["user"]}
    unimplemented: ClassVar[Unimplemented] = {
        "additional_data": (),
        "embed_dtype": ("float32",),
        "endianness": ("little",),
        "messages": (),
        "mm_processor_kwargs": ({},),
        "normalize": (),
        "padding": (False,),
        "truncate_prompt_tokens": (),
        "truncation_side": (),
        "use_activation": (),
    }

    @property
    def num_chars(self) -> int:
        return sum(len(prompt) for prompt in self.input if isinstance(prompt, str))

    def check(self, limits: RequestLimits) -> None:
        if len(self.input) > limits.max_inputs:
            raise InvalidParameterError("input", f"{len(self.input)} inputs", f"at most {limits.max_inputs} inputs")

    def prompts(self, tokenizer: Tokenizer) -> list[EncodedPrompt]:
        """Takes time in proportion to the text. Raises InvalidPromptError."""
        return encode_prompts(self.input, tokenizer, "input", add_special_tokens=self.add_special_tokens)

    def generate_request(
        self, request_id: str, prompt: EncodedPrompt, pooling: PoolingParams, remaining_ms: float | None = None
    ) -> GenerateRequest:
        return GenerateRequest(
            request_id,
            prompt.token_ids,
            _NO_SAMPLING,
            priority=self.priority,
            cache_salt=self.cache_salt,
            remaining_ms=remaining_ms,
            pooling=pooling,
        )


def check_lengths(prompts: Sequence[EncodedPrompt], max_model_len: int) -> None:
    """A prompt without an answer may fill the whole context. Raises ContextLengthError."""
    for i, prompt in enumerate(prompts):
        if len(prompt.token_ids) > max_model_len:
            raise ContextLengthError(
                f"input {i} has {len(prompt.token_ids)} tokens; it may have at most {max_model_len}"
            )


def encode_vector(vector: bytes, encoding_format: str) -> bytes:
    """``vector``: float32, little-endian. The JSON of it: numbers that are exactly those, or a string."""
    if encoding_format == "base64":
        return b'"' + base64.b64encode(vector) + b'"'
    return json.dumps(struct.unpack(f"<{len(vector) // 4}f", vector), separators=(",", ":")).encode("ascii")


def embeddings_body(
    vectors: Sequence[bytes], *, request_id: str, created: int, model: str, num_prompt_tokens: int
) -> bytes:
    """The answer. ``vectors``: what `encode_vector` made, in the order of the inputs."""
    head: dict[str, Any] = {"id": "embd-" + request_id, "object": "list", "created": created, "model": model}
    usage = {"prompt_tokens": num_prompt_tokens, "total_tokens": num_prompt_tokens}
    data = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (i, vector) for i, vector in enumerate(vectors)
    )
    before = json.dumps({**head, "usage": usage}, separators=(",", ":")).encode("ascii")
    return before[:-1] + b',"data":[' + data + b"]}"
