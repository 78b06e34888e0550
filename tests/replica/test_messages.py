"""Outbox and encoding: what is put in comes out once, in order, in few objects."""

from __future__ import annotations

import pickle
import random

import pytest

from serve_app.engine.request import FinishReason, TokenLogprobs, TokenOutput
from serve_app.replica.messages import Message, Outbox, decode, merge, size_of


def take(message: Message, names: dict[int, str], cached: dict[int, int]) -> list[TokenOutput]:
    """What a reader makes of a message."""
    _, plain, rich = message
    outputs = [
        TokenOutput(names[key], key, (token,), num_cached_tokens=cached.get(key, 0))
        for key, token in zip(plain[::2], plain[1::2], strict=True)
    ]
    for entry in rich:
        outputs.append(decode(entry, names[entry[0]], entry[0]))
        cached[entry[0]] = outputs[-1].num_cached_tokens
    return outputs


def random_output(rng: random.Random, key: int, num_cached: int, is_last: bool) -> TokenOutput:
    tokens = (rng.randrange(1000),) if rng.random() < 0.9 or not is_last else ()
    logprobs = tuple(TokenLogprobs(token, -0.5, ((token, -0.5), (7, -1.25))) for token in tokens)
    return TokenOutput(
        f"r{key}",
        key,
        tokens,
        logprobs if key % 3 == 1 else None,
        (None, TokenLogprobs(4, -2.0)) if key % 3 == 2 and rng.random() < 0.2 else None,
        rng.choice(list(FinishReason)) if is_last else None,
        tokens[-1] if is_last and tokens else None,
        num_cached,
        "why" if is_last else None,
        "code" if is_last else None,
        bytes(range(8)) if is_last and key % 2 else None,
    )


@pytest.mark.parametrize("seed", range(10))
def test_what_is_put_in_comes_out_once_and_in_order(seed: int) -> None:
    rng = random.Random(seed)
    outbox = Outbox(window_messages=rng.choice((1, 3, 100)))
    names = {key: f"r{key}" for key in range(6)}
    cached = {key: rng.choice((0, 8)) for key in names}
    left = {key: rng.randint(1, 40) for key in names}
    put: dict[int, TokenOutput] = {}
    got: dict[int, TokenOutput] = {}
    known: dict[int, int] = {}
    seen, num_gathered, num_waits = 0, 0, 0
    while left or not outbox.is_empty:
        for key in [key for key in left if rng.random() < 0.7]:
            left[key] -= 1
            output = random_output(rng, key, cached[key], left[key] == 0)
            put[key] = merge(put[key], output) if key in put else output
            outbox.put(key, output)
            num_gathered += 1
            if not left[key]:
                del left[key]
        while rng.random() < 0.7:
            message = outbox.message_after(seen)
            if message is None:
                num_waits += outbox.has_gathered
                break
            assert message[0] == seen + 1
            assert pickle.loads(pickle.dumps(message)) == message
            seen = message[0]
            for output in take(message, names, known):
                got[output.choice_index] = (
                    merge(got[output.choice_index], output) if output.choice_index in got else output
                )
        if rng.random() < 0.4:
            outbox.ack(rng.randint(outbox.acked, seen))
            outbox.ack(rng.randint(0, seen) // 2)  # an old one
        if outbox.acked < seen and rng.random() < 0.3:  # a stream that broke: all of it again, the same
            again = outbox.acked
            while again < seen:
                message = outbox.message_after(again)
                assert message is not None
                again = message[0]
    assert got == put
    assert outbox.size == 0
    assert outbox._num_cached == {}
    assert num_gathered > 6
    assert num_waits > 0 or outbox.window_messages > 3


def test_one_token_costs_two_numbers() -> None:
    outbox = Outbox(10)
    for key in range(128):
        outbox.put(key, TokenOutput(f"a long request id {key}", 0, (key + 1000,), num_cached_tokens=32))
    _, plain, rich = outbox.message_after(0) or pytest.fail("no message")
    assert (len(plain), len(rich)) == (0, 128)  # once for each: how many tokens were cached
    for key in range(128):
        outbox.put(key, TokenOutput(f"a long request id {key}", 0, (key + 1000,), num_cached_tokens=32))
    message = outbox.message_after(1)
    assert message == (2, tuple(x for key in range(128) for x in (key, key + 1000)), ())
    assert len(pickle.dumps(message, protocol=5)) < 128 * 6
    assert outbox.size == 256
    outbox.clear()
    assert outbox.is_empty
    assert outbox.size == 0


def test_numbers_out_of_reach_are_named() -> None:
    outbox = Outbox(10)
    for _ in range(3):
        outbox.put(0, TokenOutput("a", 0, (1,)))
        outbox.message_after(outbox.number)
    outbox.ack(2)
    for number in (1, 4):
        with pytest.raises(ValueError, match=f"message {number} is out of reach; 2 to 3 can be followed"):
            outbox.message_after(number)
    outbox.ack(99)
    assert outbox.acked == 3
    assert outbox.message_after(3) is None


def test_sizes_count_log_probabilities() -> None:
    entry = TokenLogprobs(1, -0.5, ((1, -0.5), (2, -1.0)))
    assert size_of(TokenOutput("a", 0)) == 1
    assert size_of(TokenOutput("a", 0, (1, 2, 3))) == 3
    assert size_of(TokenOutput("a", 0, (1,), (entry,), (None, entry, entry))) == 1 + 3 * 3
    assert size_of(TokenOutput("a", 0, embedding=bytes(4 * 1024))) == 1 + 64
