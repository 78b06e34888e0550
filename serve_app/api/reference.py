"""docs/http_api.md, made from the request models: `python -m serve_app.api.reference`. Knows Markdown; decides nothing."""

from __future__ import annotations

import json
import sys

from serve_app.api.embeddings import EmbeddingRequest
from serve_app.api.headers import HEADERS
from serve_app.api.messages import Message
from serve_app.api.names import WITHOUT_EFFECT
from serve_app.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationInput,
    StreamOptions,
    TokenizeRequest,
)
from serve_app.api.request_model import RequestModel
from serve_app.api.responses_protocol import ReasoningOptions, ResponsesRequest, TextOptions

EXPLAIN = """## `GET /v1/requests/{id}/explain`

Where a request ran and why, what it waited for, and each step it took part in. Off unless `api.explain` is true
(docs/configuration.md). `id` is the request's X-Request-Id or the answer's `id`, with `/`, `?` and `#` escaped, of a request
that runs or has ended lately: some thousand are remembered. Any ingress will do. A request belongs to its API key: those of
others are unknown. 404: `request_not_found`, or `not_enabled`; 503: an ingress that may know it does not answer.

Times named `_at` are milliseconds since 1970. What a lost replica knew is lost with it, and null.

| field | meaning |
|---|---|
| `requests` | All requests of that id, the latest one last. |
| `silent` | Parts of the server that did not tell what they know. |

A request:

| field | meaning |
|---|---|
| `state`, `status`, `error`, `finish_reasons`, `usage` | What its client got, or has so far. |
| `received_at`, `duration_ms`, `first_token_ms`, `ingress`, `route`, `model` | When, where and what it was. |
| `queue_ms` | Milliseconds that all its prompts waited, by cause: `router_budget` (no replica had enough free KV\
 cache), `router_places` (all steps were full), `router_fairness` (others were before it), `router_no_replica`, `compiling`\
 (its grammar), `engine` (for a place in a step), `preempted` (to be let in again). |
| `streams` | One for each prompt or input, with its `attempts` and `failovers`. |

An attempt, from the wish for a lease to the end on one replica:

| field | meaning |
|---|---|
| `replica`, `lease`, `lease_tokens` | Where it ran, and the budget booked for it. |
| `asked_at`, `granted_at`, `first_token_at`, `ended_at` | Its way. |
| `tokens_before`, `tokens` | That the client had when it began and when it ended. |
| `failure` | Why it did not end by itself. |
| `router` | The decision: `because` (`most_free_budget`, `longest_cached_prefix`, `granted_to_least_recently`, \
`the_only_one_that_fits`), `waited_for_ms`, and what was seen of each of `replicas`: free and needed tokens, free places,\
 cached prefix, and why it was left out. |
| `engine` | What the replica did: for each of `choices` its wait, `preemptions` and `steps`: number, time,\
 `kind` (prefill, decode, recompute), first position, tokens. |

A failover: `at`, `from`, `to`, `why`, `tokens_kept`, and `first_token_after_ms`.
"""

HEAD = """# The HTTP API

What clients may send, field by field. Made by `python -m serve_app.api.reference`; a test compares. `null` means "not
given", for every field. A name that is in none of these tables is refused, with the nearest known one. Errors have
OpenAI's shape on every route: `{"error": {"message", "type", "param", "code"}}`.
"""


def reference() -> str:
    """The page."""
    shared = list(GenerationInput.model_fields)
    parts = [HEAD]
    parts.append("## Headers of a request\n\n| header | meaning |\n|---|---|")
    parts[-1] += "".join(f"\n| `{name}` | {meaning} |" for name, meaning in HEADERS.items()) + "\n"
    parts.append("## Completions and chats\n\n`POST /v1/completions` and `POST /v1/chat/completions` share these.\n")
    parts.append(_fields(GenerationInput))
    parts.append("`stream_options`:\n\n" + _fields(StreamOptions))
    for title, model in (
        ("`POST /v1/completions` alone", CompletionRequest),
        ("`POST /v1/chat/completions` alone", ChatCompletionRequest),
    ):
        parts.append(f"## {title}\n\n" + _fields(model, without=shared))
    parts.append("A message:\n\n" + _fields(Message))
    parts.append(
        "## `POST /v1/responses`\n\nNothing is stored: what refers to an earlier response is refused by name.\n"
    )
    parts.append(_fields(ResponsesRequest))
    parts.append("`text`:\n\n" + _fields(TextOptions))
    parts.append("`reasoning`:\n\n" + _fields(ReasoningOptions))
    parts.append("## `POST /v1/embeddings`\n\n" + _fields(EmbeddingRequest))
    parts.append("## `POST /tokenize`\n\n" + _fields(TokenizeRequest))
    parts.append("## `POST /detokenize`\n\n" + _fields(DetokenizeRequest))
    parts.append(EXPLAIN)
    parts.append("## Accepted, without effect\n\n| field | value | why |\n|---|---|---|")
    parts[-1] += "".join(f"\n| `{name}` | {field.allowed} | {field.why} |" for name, field in WITHOUT_EFFECT.items())
    parts[-1] += "\n"
    parts.append(
        "## Known elsewhere, not implemented here\n\nAccepted with a value that asks for nothing, else refused by name.\n"
    )
    places: tuple[tuple[str, type[RequestModel]], ...] = (
        ("completions", CompletionRequest),
        ("chats", ChatCompletionRequest),
        ("messages", Message),
        ("responses", ResponsesRequest),
        ("embeddings", EmbeddingRequest),
    )
    for title, place in places:
        parts.append(f"In {title}: " + _unimplemented(place) + ".\n")
    return "\n".join(parts)


def _fields(model: type[RequestModel], without: list[str] | None = None) -> str:
    lines = ["| field | meaning |", "|---|---|"]
    for name, field in model.model_fields.items():
        if name not in (without or ()):
            lines.append(f"| `{name}` | {' '.join((field.description or '').split())} |")
    return "\n".join(lines) + "\n"


def _unimplemented(model: type[RequestModel]) -> str:
    def describe(name: str) -> str:
        neutral = " or ".join(f"`{json.dumps(value)}`" for value in model.unimplemented[name])
        return f"`{name}`" + (f" ({neutral})" if neutral else "")

    return ", ".join(describe(name) for name in sorted(model.unimplemented))


if __name__ == "__main__":
    sys.stdout.write(reference())
