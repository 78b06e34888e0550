"""The drill: streams of every kind go on while replicas, and the router, are killed under them. Not a byte may be missing.

    python -m loadtests.drill            20 kills of replicas, 3 of the router, 2 replicas that hang; some minutes
    python -m loadtests.drill --short    4 kills, 1 of the router, 1 that hangs: what the tests run

A real cluster (deploy/config.yaml's shape: HAProxy, two ingresses, two replicas, one router), the real engine, the bundled
model in deterministic mode. First each request of the mix is answered undisturbed: offline, all of them in one batch, and by
the service, one at a time and not as a stream. Both must agree. Then the same requests run as streams, many at a time, in
small steps, so that a long prompt takes many. Meanwhile processes get SIGKILL, at random moments. A hung replica is one with
SIGSTOP; it is woken when its streams have moved, and what it then still says must reach nobody.

What a kill hits is known from both sides: the victim tells which requests it has, and how far they are in its KV cache,
milliseconds before it is killed; what had reached the client, the client knows. Most moments are random (see `steps`).

Killed are only processes that this drill's own cluster names: actors of its application, by the ids that Ray Serve and the
router give. Exit code 1: a stream differs or was lost, or the kills landed in too few places to prove anything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml  # type: ignore[import-untyped]

from loadtests.http_answer import Wire
from loadtests.stream_mix import (
    CHAT,
    KINDS,
    AnswerRead,
    Item,
    first_difference,
    make_items,
    num_differing_bytes,
    stop_string,
)
from tests.service.live import HEADERS, PATIENCE, REPOSITORY, Service, deployment_of

MODEL = REPOSITORY / "serve_app" / "demo_model"
ENGINE: dict[str, Any] = {
    "num_threads": 1,
    "num_kv_blocks": 1024,
    "max_num_batched_tokens": 24,
    "max_num_seqs": 24,
    "deterministic": True,
}
NEEDED_AFTER, NEEDED_IN = 0.3, 0.1
"""Shares of the kills that must hit a stream behind its first token, and inside its prefill."""
STREAM_SECONDS = 300.0
"""A stream that has not ended by then is lost."""

BEFORE, IN, AFTER = "before", "in", "after"
"""Where a hit stream was: nothing of its prompt computed, a part of it, or its first token was at the client."""

Json = dict[str, Any]


def drill_config() -> Json:
    """deploy/config.yaml with the bundled model in small steps, and two ingresses."""
    config: Json = yaml.safe_load((REPOSITORY / "deploy" / "config.yaml").read_text())
    application = config["applications"][0]
    application["args"]["model"] = {"model": str(MODEL)}
    application["args"]["engine"] = ENGINE
    deployment_of(config, "Ingress")["num_replicas"] = 2
    deployment_of(config, "Ingress")["user_config"]["router"]["max_queue_seconds"] = 120
    return config


# -------------------------------------------------------------------------------------------------------- undisturbed


NUM_DEFAULT_TOKENS = 256
"""Every item of the mix says max_tokens."""


class Offline:
    """An engine in this process, which runs all requests in one batch. ``fingerprint``: of its numerics; bytes are promised
    only where that is equal."""

    def __init__(self) -> None:
        from serve_app.llm import LLM
        from serve_app.text.chat_template import ChatTemplate
        from serve_app.text.output_format import OutputFormat

        self._llm = LLM(MODEL, **ENGINE)
        assert self._llm.tokenizer is not None
        self._tokenizer = self._llm.tokenizer
        self._template = ChatTemplate(self._tokenizer.chat_templates, self._tokenizer.special_tokens)
        self._format = OutputFormat.of(self._tokenizer)
        self.fingerprint: str = self._llm.runner.fingerprint

    def choose_stop_strings(self, items: list[Item]) -> None:
        """For the items that get one, from what they say without."""
        items = [item for item in items if item.kind.stops]
        answers = self._run(items)
        for item in items:
            first = answers[item.number][0]
            texts = [self._tokenizer.decode([token], skip_special_tokens=True) for token in first.token_ids]
            item.body["stop"] = [stop_string(first.text, texts), "never said: \u00e9"]

    def answers(self, items: list[Item]) -> dict[int, list[tuple[list[int], str | None]]]:
        """(token ids, finish reason) of each choice, by the number of the item."""
        return {
            number: [(list(choice.token_ids), choice.finish_reason) for choice in choices]
            for number, choices in self._run(items).items()
        }

    def _run(self, items: list[Item]) -> dict[int, list[Any]]:
        from serve_app.api.protocol import ChatCompletionRequest, CompletionRequest

        prompts, sampling, owners = [], [], []
        for item in items:
            kind = ChatCompletionRequest if item.kind.path == CHAT else CompletionRequest
            request = kind.parse(json.dumps(item.body).encode())
            for prompt in request.prompts(self._tokenizer, self._template):
                grammars = request.grammars(prompt, self._format) if request.is_held else None
                prompts.append(list(prompt.token_ids))
                params = request.sampling_params(NUM_DEFAULT_TOKENS)
                sampling.append(dataclasses.replace(params, grammar=grammars.text if grammars is not None else None))
                owners += [item.number] * request.n
        found: dict[int, list[Any]] = {}
        for owner, completion in zip(owners, self._llm.generate(prompts, sampling, use_tqdm=False), strict=True):
            found.setdefault(owner, []).append(completion)
        return found


def undisturbed(service: Service, items: list[Item]) -> dict[int, AnswerRead]:
    """Each answer by the service, one at a time, whole."""
    found = {}
    with httpx.Client(timeout=STREAM_SECONDS, headers=HEADERS) as client:
        for item in items:
            response = client.post(f"{service.url}{item.kind.path}", json=item.sent())
            if response.status_code != 200:
                raise RuntimeError(f"{item.kind.name}: status {response.status_code}: {response.text}")
            answer = found[item.number] = AnswerRead()
            answer.take_body(response.content)
    return found


# ------------------------------------------------------------------------------------------------------------- streams


@dataclass
class Hit:
    """One kill, as one stream met it."""

    where: str
    was_replaying: bool
    """It was already on its second replica or a later one, which had not caught up."""


@dataclass
class StreamRun:
    """One request of the mix, sent once."""

    serial: int
    item: Item
    answer: AnswerRead = field(default_factory=AnswerRead)
    hits: list[Hit] = field(default_factory=list)
    num_refusals: int = 0
    """Times that it was sent and answered with 429."""
    num_differing: int | None = None
    """Bytes; None: it was lost."""

    @property
    def request_id(self) -> str:
        return f"drill-{self.serial}"


class Load:
    """``num_streams`` at a time, for ever, until `finish`. On a thread and an event loop of its own."""

    def __init__(self, url: str, items: list[Item], expected: dict[int, AnswerRead], num_streams: int) -> None:
        self.live: dict[str, StreamRun] = {}
        """Request id -> stream that runs."""
        self.ended: list[StreamRun] = []
        self._host, self._port = "127.0.0.1", int(url.rsplit(":", 1)[1])
        self._items, self._expected = items, expected
        self._serials = itertools.count()
        self._is_over = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(num_streams,), name="load", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Starts no more streams, and returns when those that run have ended."""
        self._is_over = True
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self, num_streams: int) -> None:
        try:
            asyncio.run(self._all(num_streams))
        except BaseException as error:
            self._failure = error

    async def _all(self, num_streams: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(num_streams):
                group.create_task(self._worker())

    async def _worker(self) -> None:
        while not self._is_over:
            serial = next(self._serials)
            run = StreamRun(serial, self._items[serial % len(self._items)])
            self.live[run.request_id] = run
            try:
                async with asyncio.timeout(STREAM_SECONDS):
                    while not run.answer.has_ended:
                        await self._stream(run)
            except (OSError, EOFError, ValueError) as error:
                run.answer.error = f"{type(error).__name__}: {error}"
            finally:
                del self.live[run.request_id]
            if run.answer.error is None and run.answer.is_done:
                one, other = run.answer.canonical(), self._expected[run.item.number].canonical()
                run.num_differing = num_differing_bytes(one, other)
            self.ended.append(run)

    async def _stream(self, run: StreamRun) -> None:
        fields: Json = {"stream": True, "stream_options": {"include_usage": True}, "request_id": run.request_id}
        if run.serial % 4:  # else it may find its prompt in the prefix cache
            fields["cache_salt"] = run.request_id
        async with Wire(self._host, self._port) as wire:
            await wire.send("POST", run.item.kind.path, HEADERS, json.dumps(run.item.sent(**fields)).encode())
            if (status := await wire.status()) == 429:  # not accepted: nothing is promised yet
                run.num_refusals += 1
                await asyncio.sleep(0.5)
                return
            if status != 200:
                run.answer.error = f"status {status}: {(await wire.body())[:500]!r}"
                return
            async for data in wire.events():
                run.answer.take_event(data, time.monotonic())
        if not run.answer.has_ended:
            run.answer.error = "the body ended without [DONE]"


# --------------------------------------------------------------------------------------------------------------- kills


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


class Killer:
    """Sends the signals, and writes down what they hit."""

    def __init__(self, service: Service, load: Load, rng: random.Random, say: Callable[[str], None]) -> None:
        self.num_kills = 0
        self.num_alone = 0
        """Kills of the only replica that was up."""
        self.num_router_kills = 0
        self.num_hung = 0
        self.num_dropped = 0
        """Sequences that hung replicas had when they were stopped, and went on with when they woke."""
        self._service, self._load, self._rng, self._say = service, load, rng, say
        self.landed: Counter[str] = Counter()
        """Kills that hit at least one stream at such a place."""
        self._gone: set[str] = set()
        """Replicas that were killed, or hang: Ray Serve may not know yet."""

    def up(self) -> dict[str, int]:
        """Id -> process, of the replicas that run."""
        pids = self._service.pids("Replica")
        return {i: pid for i, pid in pids.items() if i not in self._gone and is_alive(pid)}

    def sequences(self, replica_id: str) -> list[tuple[str, int, int, int, int]]:
        """(request, choice, tokens of the prompt, of the output, computed), as the replica says. [] if it does not."""
        handle = self._service._replicas.options(method_name="describe", session_id=replica_id)
        try:
            said = handle.remote().result(timeout_s=2)
        except Exception as error:  # whatever Ray makes of a replica that goes: the drill picks another
            self._say(f"replica {replica_id} says nothing: {type(error).__name__}")
            return []
        found: list[tuple[str, int, int, int, int]] = said["sequences"]
        return found

    def wait_for_two(self) -> None:
        """Until a replica can be killed that is not the only one."""
        deadline = time.monotonic() + PATIENCE
        while len(self.up()) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)

    def kill_replica(self, *, alone: bool = False, in_prefill: bool = False) -> None:
        """A random one, with streams on it. ``alone``: waits until it is the only one that is up. ``in_prefill``: until
        it computes a prompt."""
        victim, pid, sequences = self._victim(alone=alone, in_prefill=in_prefill)
        num_up = len(self.up())
        os.kill(pid, signal.SIGKILL)
        self._gone.add(victim)
        self.num_kills += 1
        self.num_alone += num_up == 1
        hits = self._note(sequences)
        self.landed.update(hits.keys())
        self._say(f"killed replica {victim} ({num_up} up): {_spell(hits)}")

    def hang_replica(self, seconds: float) -> None:
        """Stops a random one for ``seconds``, and wakes it."""
        victim, pid, sequences = self._victim()
        os.kill(pid, signal.SIGSTOP)
        self._gone.add(victim)
        self.num_hung += 1
        self.num_dropped += len(sequences)
        self._say(f"stopped replica {victim}: {_spell(self._note(sequences))}")
        try:
            time.sleep(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._say(f"woke replica {victim}")
        self._gone.discard(victim)

    def kill_router(self) -> None:
        pid = self._service.snapshot()["pid"]
        os.kill(pid, signal.SIGKILL)
        self.num_router_kills += 1
        self._say(f"killed the router with {len(self._load.live)} streams open")

    def _victim(
        self, *, alone: bool = False, in_prefill: bool = False
    ) -> tuple[str, int, list[tuple[str, int, int, int, int]]]:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            up = self.up()
            if up and (not alone or len(up) == 1):
                victim = self._rng.choice(sorted(up))
                sequences = self.sequences(victim)
                if any(0 < s[4] < s[2] or not in_prefill for s in sequences):
                    return victim, up[victim], sequences
            time.sleep(0.05)
        raise TimeoutError(f"no victim for {PATIENCE:g} s (alone: {alone}, in a prefill: {in_prefill})")

    def _note(self, sequences: list[tuple[str, int, int, int, int]]) -> Counter[str]:
        """Which streams that run are hit, and where. Called right after the signal."""
        most: dict[str, tuple[int, int, int]] = {}
        for engine_id, _, num_prompt, num_output, num_computed in sequences:
            name = engine_id.split("~")[0]
            most[name] = max(most.get(name, (0, 0, 0)), (num_computed, num_output, num_prompt))
        hits: Counter[str] = Counter()
        for name, (num_computed, num_output, num_prompt) in most.items():
            run = self._load.live.get(name)
            if run is None:
                continue
            where = AFTER if run.answer.num_tokens else IN if 0 < num_computed < num_prompt else BEFORE
            if where == BEFORE and num_computed:
                where = AFTER  # its first token was on the way
            is_replay = bool(run.hits) and num_computed < num_prompt + num_output - 1
            run.hits.append(Hit(where, is_replay))
            hits[where] += 1
        return hits


def _spell(hits: Counter[str]) -> str:
    return f"{hits.total()} streams, {hits[BEFORE]} before, {hits[IN]} in and {hits[AFTER]} after their prefill"


def steps(num_kills: int, num_router_kills: int, num_hung: int) -> list[str]:
    """What happens, in order. Every fourth kill is of the only replica that is up, right after another; every fifth
    waits until its victim computes a prompt. All other moments are random, once two replicas are up."""
    kills = ["alone" if i % 4 == 3 else "in prefill" if i % 5 == 1 else "kill" for i in range(num_kills)]
    others = ["router"] * num_router_kills + ["hang"] * num_hung
    for i, other in enumerate(others):
        at = (i + 1) * len(kills) // (len(others) + 1)
        kills.insert(at + (at < len(kills) and kills[at] == "alone"), other)  # never between it and the kill before
    return kills


# --------------------------------------------------------------------------------------------------------------- judge


def verdict(runs: list[StreamRun], killer: Killer, num_kills: int) -> tuple[list[tuple[str, str]], list[str]]:
    """The table, and what is wrong."""
    hits = Counter(hit.where for run in runs for hit in run.hits)
    hit_runs = [run for run in runs if run.hits]
    lost = [run for run in runs if run.num_differing is None]
    resumed = [run for run in hit_runs if run.num_differing is not None]
    num_differing = sum(run.num_differing or 0 for run in runs)
    total = hits.total() or 1
    gaps = [run.answer.longest_gap for run in resumed]
    calm = [run.answer.longest_gap for run in runs if not run.hits and run.num_differing is not None]
    table = [
        ("streams", f"{len(runs)}"),
        ("of so many kinds", f"{len({run.item.kind.name for run in runs})}"),
        ("tokens", f"{sum(run.answer.num_tokens for run in runs)}"),
        ("refused with 429 and sent again", f"{sum(run.num_refusals for run in runs)}"),
        ("replicas killed", f"{killer.num_kills}"),
        ("of these, the only one that was up", f"{killer.num_alone}"),
        ("replicas stopped and woken", f"{killer.num_hung}"),
        ("sequences on them, dropped", f"{killer.num_dropped}"),
        ("routers killed", f"{killer.num_router_kills}"),
        ("streams hit", f"{len(hit_runs)}"),
        ("resumed", f"{len(resumed)}"),
        ("resumed more than once", f"{sum(len(run.hits) > 1 for run in resumed)}"),
        ("hit most often", f"{max((len(run.hits) for run in runs), default=0)} times"),
        ("kills that hit a stream after its first token", f"{killer.landed[AFTER]}"),
        ("kills that hit a stream in its prefill", f"{killer.landed[IN]}"),
        ("hits before the prefill", f"{hits[BEFORE]} ({hits[BEFORE] / total:.0%})"),
        ("hits in the prefill", f"{hits[IN]} ({hits[IN] / total:.0%})"),
        ("hits after the first token", f"{hits[AFTER]} ({hits[AFTER] / total:.0%})"),
        ("hits in the replay after another hit", f"{sum(hit.was_replaying for run in runs for hit in run.hits)}"),
        ("longest gap between tokens, s", f"{max(gaps, default=0.0):.1f}"),
        ("median of the resumed streams' longest gaps, s", f"{statistics.median(gaps) if gaps else 0.0:.1f}"),
        ("longest gap of streams that were not hit, s", f"{max(calm, default=0.0):.1f}"),
        ("differing bytes", f"{num_differing}"),
        ("lost", f"{len(lost)}"),
    ]
    wrong = [f"{run.item.kind.name} ({run.request_id}, {len(run.hits)} hits): {run.answer.error}" for run in lost]
    wrong += [
        f"{run.item.kind.name} ({run.request_id}, {len(run.hits)} hits): {run.num_differing} bytes differ"
        for run in runs
        if run.num_differing
    ]
    if killer.num_kills < num_kills:
        wrong.append(f"{killer.num_kills} kills; {num_kills} are needed")
    if not killer.num_alone:
        wrong.append("no kill while only one replica was up")
    if not resumed:
        wrong.append("no stream was resumed")
    for where, needed in ((AFTER, NEEDED_AFTER), (IN, NEEDED_IN)):
        if killer.landed[where] < needed * killer.num_kills:
            wrong.append(f"{killer.landed[where]} of {killer.num_kills} kills hit a stream {where} its prefill")
    if any(
        len(choice.token_ids) < 200 for run in runs if not run.answer.error for choice in run.answer.choices.values()
    ):
        wrong.append("an answer has fewer than 200 tokens")
    return table, wrong


# ---------------------------------------------------------------------------------------------------------------- main


@contextlib.contextmanager
def cluster(directory: Path, config: Json) -> Iterator[Service]:
    """A server of its own, ready, and ended with all that it started."""
    service = Service("launch", MODEL, directory, config)
    try:
        yield service.start()
    finally:
        left = service.stop()
        if left:
            print(f"the server left {left}", flush=True)


def drill(arguments: argparse.Namespace) -> int:
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    num_kills, num_router_kills, num_hung = (4, 1, 1) if arguments.short else (arguments.kills, 3, 2)
    rng = random.Random(arguments.seed)
    items = make_items(arguments.items, seed=arguments.seed)
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    say(f"{len(items)} requests of {len({item.kind.name for item in items})} kinds, offline, in one batch")
    offline = Offline()
    offline.choose_stop_strings(items)
    alone, fingerprint = offline.answers(items), offline.fingerprint
    del offline
    say("starting the cluster")
    with tempfile.TemporaryDirectory() as directory, cluster(Path(directory), drill_config()) as service:
        say(f"{service.url} is ready; each request by itself")
        expected = undisturbed(service, items)
        for item in items:
            if expected[item.number].fingerprint != fingerprint:
                say(f"WRONG: fingerprints {expected[item.number].fingerprint} and {fingerprint} differ")
                return 1
            choices = [expected[item.number].choices[i] for i in sorted(expected[item.number].choices)]
            ended = [
                (c.token_ids, "stop" if c.calls else c.finish_reason) for c in choices
            ]  # a call ends as an answer does
            if ended != alone[item.number]:
                say(f"WRONG: {item.kind.name}: the service and the offline engine differ with no fault at all")
                return 1
        say(f"{arguments.streams} streams at a time")
        load = Load(service.url, items, expected, arguments.streams)
        killer = Killer(service, load, rng, say)
        try:
            for step in steps(num_kills, num_router_kills, num_hung):
                if step == "alone":  # right after another
                    time.sleep(rng.uniform(0.2, 1.5))
                else:
                    killer.wait_for_two()
                    time.sleep(rng.uniform(0.5, 4.0))
                if step == "router":
                    killer.kill_router()
                elif step == "hang":
                    killer.hang_replica(rng.uniform(7.0, 9.0))
                else:
                    killer.kill_replica(alone=step == "alone", in_prefill=step == "in prefill")
                bad = [run for run in load.ended if run.num_differing != 0]
                say(f"  {len(load.ended)} streams have ended, {len(bad)} of them wrong; {len(load.live)} run")
            load.finish()
            say("the last streams have ended; waiting for rest")
            service.check_whole()
            service.check_rest()
        finally:
            (arguments.log or Path(directory) / "server.txt").write_text(service.output)
        table, wrong = verdict(load.ended, killer, num_kills)
    print()
    for name, value in table:
        print(f"{name:48}{value:>16}")
    print(f"{'seconds in all':48}{time.monotonic() - started:16.0f}\n")
    for text in wrong[:20]:
        print(f"WRONG: {text}")
    for run in [run for run in load.ended if run.num_differing][:5]:
        print(f"  {first_difference(run.answer.canonical(), expected[run.item.number].canonical())}")
    print(json.dumps({"bench": "drill", "short": arguments.short, "table": dict(table), "wrong": wrong}))
    return 1 if wrong else 0


def main() -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--short", action="store_true", help="4 kills, 1 of the router, 1 that hangs")
    made.add_argument("--kills", type=int, default=20, help="of replicas")
    made.add_argument("--streams", type=int, default=12, help="at a time")
    made.add_argument("--items", type=int, default=len(KINDS), help="different requests")
    made.add_argument("--seed", type=int, default=0, help="of the requests, the victims and the moments")
    made.add_argument("--log", type=Path, help="write what the server said here")
    return drill(made.parse_args())


if __name__ == "__main__":
    sys.exit(main())
