"""Grammars that compute for ever are refused, and a stream beside them goes on: the whole service in one process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from loadtests.http_answer import Wire
from serve_app.text.grammar_check import TOO_MUCH
from tests.api.house import House
from tests.tiny_models import make_tiny_model

ENGINE = {
    "num_threads": 1,
    "num_kv_blocks": 2048,
    "max_model_len": 30_000,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
}
PATTERNS = {"allOf": [{"pattern": f".*a.{{{i}}}b"} for i in range(10, 40)]}
HOSTILE: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": PATTERNS}}},
    {"structured_outputs": {"json": {"type": "integer", "multipleOf": 99999999}}},
    {
        "structured_outputs": {
            "grammar": "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(3000)) + '\na3000: "x"'
        }
    },
]
"""Each takes all the time that one grammar is given, or more of the stack."""


def test_a_stream_goes_on_beside_grammars_that_take_too_much(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, vocab_size=300, eos=())
    model = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": 0.005}}

    async def refuse(house: House, fields: dict[str, Any]) -> tuple[int, str]:
        async with Wire("127.0.0.1", house.port) as wire:
            body = {"prompt": "a", "max_tokens": 5, **fields}
            if "response_format" in body:
                body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            await wire.send("POST", path, {}, json.dumps(body).encode())
            return await wire.status(), json.loads(await wire.body())["error"]["message"]

    async def run(house: House) -> None:
        refusals: list[tuple[int, str]] = []
        num_meanwhile = 0
        async with Wire("127.0.0.1", house.port) as wire:
            asked = {"prompt": "a", "max_tokens": 20_000, "ignore_eos": True, "stream": True}
            await wire.send("POST", "/v1/completions", {}, json.dumps(asked).encode())
            events = wire.events()
            await anext(events)
            asking = asyncio.gather(*(refuse(house, fields) for fields in HOSTILE))
            while not asking.done():  # ends before the stream does, or anext raises
                await anext(events)
                num_meanwhile += 1
            refusals = await asking
            assert num_meanwhile > 10
            assert b'"text"' in await anext(events)
        for status, message in refusals:
            assert status == 400
            assert TOO_MUCH in message

    with House({"model": model, "engine": ENGINE}, num_replicas=1) as house:
        asyncio.run(run(house))
        house.check_rest()
