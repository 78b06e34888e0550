"""Streams that their clients resume, on a real cluster: through the proxies, and after an ingress died under them."""

from __future__ import annotations

import json
import os
import signal
import threading

import httpx
import openai

from serve_app.api.event_id import decode_event_id
from tests.service.live import HEADERS, NAMES, PATIENCE, Service, completion, launched, tokens_of, wait_until


class Reader:
    """A client that comes back. ``tokens``: all it has seen."""

    def __init__(self, service: Service, number: int, max_tokens: int) -> None:
        self.tokens: list[int] = []
        self.last_id: str | None = None
        self.is_done = False
        self.error: httpx.TransportError | None = None
        """What broke the connection."""
        self._url = f"{service.url}/v1/completions"
        self._body = json.dumps(completion(number, max_tokens, stream=True))

    def read(self, limit: int | None = None) -> Reader:
        """Goes on behind the last event, for ``limit`` events or to the end."""
        resume = {"x-resumable": "1"} if self.last_id is None else {"last-event-id": self.last_id}
        headers = {**HEADERS, **resume, "content-type": "application/json"}
        num_left = limit
        with httpx.stream("POST", self._url, content=self._body, headers=headers, timeout=PATIENCE) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    decode_event_id(line[4:])
                    self.last_id = line[4:]
                elif line.startswith("data: "):
                    self._take(line[6:])
                    num_left = None if num_left is None else num_left - 1
                    if num_left == 0:
                        break
        return self

    def read_on(self) -> None:
        """On a thread: to the end, or until the connection breaks."""
        try:
            self.read()
        except httpx.TransportError as error:
            self.error = error

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.is_done = True
            return
        event = json.loads(data)
        assert "error" not in event, event
        self.tokens += event["choices"][0]["token_ids"]


def test_a_stream_is_resumed(service: Service, client: openai.OpenAI) -> None:
    """An ordinary client takes no notice of the ids; one that hangs up gets the rest, some of it made meanwhile or anew."""
    stream = client.completions.create(
        model=NAMES[0],
        **{name: value for name, value in completion(5, 30).items() if name in ("prompt", "seed", "max_tokens")},
        stream=True,
        extra_headers={"x-resumable": "1"},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert [token for chunk in chunks for token in chunk.model_extra["token_ids"]] == tokens_of(5, 30)  # type: ignore[index]
    reader = Reader(service, 6, 200).read(limit=3)
    service.check_rest()  # its KV is free
    reader.read(limit=20).read()
    assert reader.tokens == tokens_of(6, 200)
    assert reader.is_done
    other = httpx.post(
        f"{service.url}/v1/completions",
        json=completion(7, 200, stream=True),
        headers={**HEADERS, "last-event-id": reader.last_id or ""},
    )
    assert (other.status_code, other.json()["error"]["code"]) == (404, "stream_not_found")


@launched
def test_an_ingress_dies_and_its_clients_come_back(service: Service) -> None:
    """Both books and both ingresses: those whose connection broke go on at the other one, before anybody noticed."""
    pids = service.pids("Ingress")
    readers = [Reader(service, number, 400) for number in range(20, 26)]
    threads = [threading.Thread(target=reader.read_on, daemon=True) for reader in readers]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(len(reader.tokens) >= 5 for reader in readers), "tokens of each stream")
    holders = list(service.holders().values())
    victim = max(pids, key=holders.count)
    assert holders.count(victim) >= 2
    os.kill(pids[victim], signal.SIGKILL)
    for thread in threads:
        thread.join(PATIENCE)
    broken = [reader for reader in readers if reader.error is not None]
    assert len(broken) == holders.count(victim)
    assert all(0 < len(reader.tokens) < 400 for reader in broken)
    for reader in broken:
        reader.read()
    for number, reader in zip(range(20, 26), readers, strict=True):
        assert reader.tokens == tokens_of(number, 400)
        assert reader.is_done
    service.check_whole()
