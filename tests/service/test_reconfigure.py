"""A changed user_config applies in place: no replica is started anew, and streams go on."""

from __future__ import annotations

import httpx

from tests.service.live import BLOCK_SIZE, HEADERS, NUM_BLOCKS, Service, completion, launched, tokens_of, wait_until

pytestmark = launched


def post(service: Service, number: int, max_tokens: int, **fields: object) -> httpx.Response:
    body = completion(number, max_tokens, **fields)
    return httpx.post(f"{service.url}/v1/completions", json=body, headers=HEADERS, timeout=60)


def test_limits_apply_in_place(service: Service) -> None:
    before = service.pids("Ingress"), service.pids("Replica")
    stream = service.stream(1, 300)
    wait_until(lambda: stream.tokens, "the first token")

    def all_answer(status: int, n: int) -> bool:
        """Two ingresses take turns: both must have heard of it."""
        return all(post(service, 2, 1, n=n).status_code == status for _ in range(6))

    assert all_answer(200, 4)
    service.change("Ingress", user_config={"limits": {"max_n": 3}})
    wait_until(lambda: all_answer(400, 4), "the new limit")
    refusal = post(service, 2, 1, n=4).json()["error"]
    assert refusal["param"] == "n"
    assert "3" in refusal["message"]
    assert all_answer(200, 3)
    service.change("Ingress", user_config={})
    wait_until(lambda: all_answer(200, 4), "the old limit")
    stream.check()
    wait_until(lambda: (service.pids("Ingress"), service.pids("Replica")) == before, "the same processes")


def test_the_queue_limit_applies_in_place(service: Service) -> None:
    before = service.pids("Ingress"), service.pids("Replica")
    version = service.snapshot()["options_version"]
    router: dict[str, object] = {"policy": "reserve", "max_queued_requests": 0}
    service.change("Ingress", user_config={"router": router})
    wait_until(lambda: service.snapshot()["policy"] == "reserve", "the policy")
    assert service.snapshot()["options_version"] > version
    # Each fills one pool.
    max_tokens = (NUM_BLOCKS - 4) * BLOCK_SIZE
    streams = [service.stream(i, max_tokens) for i in range(2)]
    wait_until(lambda: all(stream.tokens for stream in streams), "two full pools")
    refusal = post(service, 3, 100)
    assert refusal.status_code == 429, refusal.text
    assert int(refusal.headers["retry-after"]) >= 1
    assert refusal.json()["error"]["code"] is not None

    service.change("Ingress", user_config={"router": router | {"max_queued_requests": 5}})
    waiting = service.stream(3, 100)

    def is_waiting() -> bool:
        nonlocal waiting
        if waiting.has_ended:  # it came before the new limit
            assert "status 429" in repr(waiting.error)
            waiting = service.stream(3, 100)
        return bool(service.snapshot()["num_queued_requests"] == 1)

    wait_until(is_waiting, "a request that waits")
    assert waiting.tokens == []
    streams[0].hang_up()
    waiting.check()
    assert waiting.tokens == tokens_of(3, 100)
    streams[1].hang_up()
    for stream in streams:
        assert stream.join().error is None
    service.change("Ingress", user_config={})
    wait_until(lambda: service.snapshot()["policy"] == "expect", "the old policy")
    wait_until(lambda: (service.pids("Ingress"), service.pids("Replica")) == before, "the same processes")
