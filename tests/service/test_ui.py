"""The page's feed through Ray Serve's proxy and through HAProxy: it streams, shows every replica, and wants a key."""

from __future__ import annotations

import json

import httpx

from tests.service.live import HEADERS, PATIENCE, Service


def test_the_page_and_its_feed(service: Service) -> None:
    page = httpx.get(f"{service.url}/ui")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert httpx.get(f"{service.url}/ui/main.js").headers["content-type"].startswith("text/javascript")
    assert httpx.get(f"{service.url}/ui/events").status_code == 401
    stream = service.stream(501, 100)
    tokens: dict[str, int] = {}
    num_messages = 0
    with httpx.stream("GET", f"{service.url}/ui/events", headers=HEADERS, timeout=PATIENCE) as feed:
        assert feed.status_code == 200
        for line in feed.iter_lines():  # to be read while it goes on: a proxy that gathered it would give nothing
            if not line.startswith("data: "):
                continue
            num_messages += 1
            message = json.loads(line.removeprefix("data: "))
            for replica_id, told in message["replicas"].items():
                tokens[replica_id] = max(tokens.get(replica_id, 0), told.get("num_tokens", 0))
            if num_messages >= 3 and len(tokens) == 2 and stream.has_ended and any(tokens.values()):
                break
    assert set(tokens) == set(service.pids("Replica"))
    stream.check()
