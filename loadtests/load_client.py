"""Sends one request of a load test and reads its stream, in a greenlet. Knows HTTP through geventhttpclient, and no locust.

locust's own `iter_content` hands a stream over in pieces of a kilobyte, which hides when each token came: events are read
here as they end (`readline`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gevent
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError

from loadtests.load_plan import Vocabulary
from loadtests.load_stream import FAILED, REFUSED, Outcome, StreamRead
from loadtests.sse import data_of
from loadtests.stream_mix import WORDS

MAX_CONNECTIONS = 65536
"""An open loop must never wait for a connection of its own pool."""
BLOCK_SIZE = 65536
ASK_SECONDS = 60.0

Json = dict[str, Any]


class LoadClient:
    """One server. ``patience``: a stream that says nothing for so many seconds is lost."""

    def __init__(self, url: str, *, api_key: str | None, patience: float) -> None:
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._http = HTTPClient.from_url(
            url,
            concurrency=MAX_CONNECTIONS,
            block_size=BLOCK_SIZE,
            connection_timeout=ASK_SECONDS,
            network_timeout=patience,
        )

    def close(self) -> None:
        self._http.close()

    def stream(self, outcome: Outcome, body: bytes, clock: Callable[[], float]) -> None:
        """Fills the outcome. What breaks is in it, and never raised. ``clock``: seconds since the run began."""
        outcome.sent = clock()
        try:
            response = self._http.request("POST", outcome.path, body=body, headers=self._headers)
        except (OSError, HTTPParseError) as error:
            outcome.kind, outcome.reason, outcome.end = FAILED, f"{type(error).__name__}: {error}", clock()
            return
        if response.status_code != 200:
            outcome.kind = REFUSED if response.status_code in (429, 503) else FAILED
            outcome.reason = f"status {response.status_code}: {_code(response)}"
            outcome.end = clock()
            return
        reading = StreamRead(outcome)
        try:
            while line := response.readline(b"\n\n"):
                if (data := data_of(line)) is not None:
                    reading.take(data, clock())
        except (OSError, ValueError, HTTPParseError) as error:
            reading.finish(clock(), f"{type(error).__name__}: {error}")
        else:
            reading.finish(clock())
        finally:
            response.release()

    def ask(self, method: str, path: str, body: Json | None = None) -> tuple[int, Json]:
        """(status, answer) of a short request. Raises OSError, HTTPParseError, or ValueError for what is no JSON."""
        data = b"" if body is None else json.dumps(body).encode()
        with gevent.Timeout(ASK_SECONDS, TimeoutError(f"{path} did not answer for {ASK_SECONDS:g} s")):
            response = self._http.request(method, path, body=data, headers=self._headers)
            return response.status_code, json.loads(response.read())

    def models(self) -> list[str]:
        """Served names. Raises ValueError if the server says none."""
        status, answer = self.ask("GET", "/v1/models")
        if status != 200 or not answer.get("data"):
            raise ValueError(f"/v1/models answers with status {status}: {answer}")
        return [model["id"] for model in answer["data"]]

    def vocabulary(self, model: str) -> Vocabulary:
        """What its tokenizer makes of ordinary words, by /tokenize, which this server and vLLM have; else a guess."""
        text = " ".join(WORDS)
        asked = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            status, answer = self.ask("POST", "/tokenize", asked)
        except ValueError:
            status, answer = 404, {}
        if status != 200:
            return Vocabulary()
        tokens = answer["tokens"]
        return Vocabulary(tuple(sorted(set(tokens))), len(tokens) / len(WORDS), answer.get("max_model_len"))


def _code(response: Any) -> str:
    """Of an error's body: its code, or how it begins."""
    try:
        body = response.read()
    except (OSError, HTTPParseError) as error:
        return type(error).__name__
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return str(body[:120].decode(errors="replace"))
