"""The soak: random traffic, clients that leave, bad input, kills; and now and then silence, when nothing may be left over.

    python -m loadtests.soak                                        20 minutes
    python -m loadtests.soak --minutes 1.5 --period 20 --faults 4   what the tests run

The cluster is the drill's, with small pools, so that sequences are preempted. The traffic is the drill's mix, streamed or
whole, read to the end or left at any point, and every abuse of tests/api/abuses.py. Each answer that was read to the end is
compared byte for byte with an undisturbed one; each refusal must be the one that is due. Killed, or stopped and woken, are
the youngest replica, the youngest ingress and the router; the oldest replica and the oldest ingress live through all of it,
so that what leaks there is seen.

Every minute or so the traffic stops. Then, in both books and in every process: no lease, no request, no block that is not
free, no task, file descriptor or thread more than in the first silence; the ledger, the tables and the schedulers check
themselves. Memory may rise at first (caches fill) and must then be flat: the slope is that of the last two thirds.

Exit code 1: an answer differs, a refusal is another one, or something was left over.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from loadtests.drill import Offline, cluster, drill_config, undisturbed
from loadtests.http_answer import Wire
from loadtests.stream_mix import AnswerRead, Item, first_difference, make_items, num_differing_bytes
from tests.api.abuses import ABUSES, Abuse
from tests.service.live import HEADERS, PATIENCE, Service, wait_until

ANSWER_SECONDS = 240.0
"""A request that is not answered by then is lost."""
CALM_SECONDS = 5.0
SLACK = {"fds": 4, "threads": 3, "tasks": 4}
"""How much more of a kind there may be at the end: a connection of Ray's, a pool's next thread, a channel's four tasks."""
MAX_GROWTH_MIB = 8.0
"""RSS that may come in the last two thirds of a soak, in each process; and MAX_SLOPE beside it."""
MAX_SLOPE = 0.5
"""MiB a minute."""

Json = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- traffic


class Traffic:
    """Requests of every kind, ``num_workers`` at a time, on a thread and an event loop of its own."""

    def __init__(
        self, url: str, items: list[Item], expected: dict[int, AnswerRead], num_workers: int, rng: random.Random
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.num_ingress_kills = 0
        """A request that an ingress takes along is no mistake."""
        self._host, self._port = "127.0.0.1", int(url.rsplit(":", 1)[1])
        self._items, self._expected, self._rng = items, expected, rng
        self._flows = threading.Event()
        self._is_over = False
        self._num_open = 0
        self._serial = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all(num_workers)), name="traffic", daemon=True)
        self._thread.start()

    def flow(self) -> None:
        self._flows.set()

    def pause(self) -> None:
        """Returns when every request has ended."""
        self._flows.clear()
        wait_until(lambda: self._num_open == 0, "the end of all requests")

    def stop(self) -> None:
        self._is_over = True
        self._thread.join(PATIENCE)

    async def _all(self, num_workers: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(num_workers):
                group.create_task(self._worker())

    async def _worker(self) -> None:
        while not self._is_over:
            if not self._flows.is_set():
                await asyncio.sleep(0.05)
                continue
            self._num_open += 1
            self._serial += 1
            serial, kills = self._serial, self.num_ingress_kills
            what = "?"
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    if self._rng.random() < 0.3:
                        abuse = self._rng.choice(ABUSES)
                        what = f"abuse {abuse.name!r}"
                        await self._abuse(abuse)
                    else:
                        item = self._rng.choice(self._items)
                        what = f"{item.kind.name} (soak-{serial})"
                        await self._ask(item, f"soak-{serial}")
            except (OSError, EOFError, ValueError, AssertionError) as error:
                if self.num_ingress_kills != kills and isinstance(error, OSError | EOFError):
                    self.counters["went with an ingress"] += 1
                else:
                    self.wrong.append(f"{what}: {type(error).__name__}: {error}")
            finally:
                self._num_open -= 1

    async def _ask(self, item: Item, request_id: str) -> None:
        """One item of the mix, streamed or whole, by a client that may leave."""
        rng = self._rng
        is_streamed, leaves = rng.random() < 0.7, rng.random() < 0.4
        fields: Json = {"request_id": request_id}
        if is_streamed:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        if rng.random() < 0.5:
            fields["cache_salt"] = request_id
        num_left = rng.randrange(200) if leaves else None
        answer = AnswerRead()
        async with Wire(self._host, self._port) as wire:
            await wire.send("POST", item.kind.path, HEADERS, json.dumps(item.sent(**fields)).encode())
            if leaves and not is_streamed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.random()):
                        await wire.status()
                self.counters["left before the answer"] += 1
                return
            status = await wire.status()
            if status in (429, 503):
                self.counters[f"refused with {status}"] += 1
                return
            assert status == 200, f"status {status}: {(await wire.body())[:300]!r}"
            if not is_streamed:
                answer.take_body(await wire.body())
            else:
                async for data in wire.events():
                    answer.take_event(data, time.monotonic())
                    if num_left is not None and answer.num_tokens > num_left:
                        self.counters["left in the stream"] += 1
                        return
        if not answer.is_done and answer.error is None:
            raise EOFError("the body ended without [DONE]")
        assert answer.error is None, answer.error
        one, other = answer.canonical(), self._expected[item.number].canonical()
        assert not num_differing_bytes(one, other), first_difference(one, other)
        self.counters["streamed" if is_streamed else "whole"] += 1

    async def _abuse(self, abuse: Abuse) -> None:
        headers = {} if abuse.needs_keys else dict(HEADERS)
        body = abuse.made_body()
        async with Wire(self._host, self._port) as wire:
            if abuse.leaves in ("in headers", "in body"):
                await wire.send_part(abuse.method, abuse.path, {**headers, **abuse.headers}, body, abuse.leaves)
            else:
                await wire.send(abuse.method, abuse.path, {**headers, **abuse.headers}, body)
            if abuse.status is None:
                await asyncio.sleep(self._rng.random() * 0.2)
                self.counters["abuses that leave"] += 1
                return
            status = await wire.status()
            said = await wire.body()
            if status in (429, 503):
                self.counters[f"refused with {status}"] += 1
                return
            assert status == abuse.status, f"status {status} and not {abuse.status}: {said[:200]!r}"
            if abuse.code is not None and b'"error"' in said:
                code = json.loads(said)["error"]["code"]
                assert code == abuse.code, f"code {code} and not {abuse.code}"
        self.counters["abuses refused"] += 1


# -------------------------------------------------------------------------------------------------------------- faults


class Faults:
    """Kills at random moments, on a thread of its own, while the traffic flows."""

    def __init__(
        self, service: Service, traffic: Traffic, rng: random.Random, say: Callable[[str], None], seconds: float
    ) -> None:
        """``seconds``: from one to the next, on average."""
        self.counters: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._service, self._traffic, self._rng, self._say = service, traffic, rng, say
        self._seconds = seconds
        self._first = {name: set(service.pids(name)) for name in ("Replica", "Ingress")}
        """Of each, one of these is never touched: the first by name."""
        self._kept = {name: min(found) for name, found in self._first.items()}
        self._flows, self._is_over = threading.Event(), threading.Event()
        self._is_idle = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)
        self._thread.start()

    @property
    def kept(self) -> dict[str, str]:
        """Deployment -> the replica of it that lives through all."""
        return self._kept

    def flow(self) -> None:
        self._flows.set()

    def pause(self) -> None:
        """Returns when no fault is under way."""
        self._flows.clear()
        assert self._is_idle.wait(PATIENCE)
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        self._is_over.set()
        self._flows.set()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                if not self._flows.is_set():
                    self._is_idle.set()
                    self._flows.wait()
                    self._is_idle.clear()
                    continue
                if self._is_over.wait(self._rng.uniform(0.4, 1.6) * self._seconds):
                    return
                if self._flows.is_set():
                    self._one()
        except BaseException as error:
            self.failure = error
        finally:
            self._is_idle.set()

    def _one(self) -> None:
        what = self._rng.choices(
            ["kill a replica", "stop a replica", "kill the router", "kill an ingress"], [6, 2, 3, 1]
        )[0]
        if what == "kill the router":
            os.kill(self._service.snapshot()["pid"], signal.SIGKILL)
        else:
            name = "Ingress" if what == "kill an ingress" else "Replica"
            pids = self._service.pids(name)
            others = sorted(i for i in pids if i != self._kept[name])
            if not others or self._kept[name] not in pids:
                return  # the other one is not back yet
            pid = pids[self._rng.choice(others)]
            if what == "kill an ingress":
                self._traffic.num_ingress_kills += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP if what == "stop a replica" else signal.SIGKILL)
                if what == "stop a replica":
                    self._is_over.wait(self._rng.uniform(1, 8))
                    os.kill(pid, signal.SIGCONT)
        self.counters[what] += 1
        self._say(what)


# ------------------------------------------------------------------------------------------------------------- silence


@dataclass(frozen=True)
class Sample:
    """One process in one silence."""

    minute: float
    fds: int
    threads: int
    tasks: int | None
    """Of asyncio; None: nobody asked it."""
    rss: float
    """MiB."""


def look_at(pid: int, minute: float, tasks: int | None) -> Sample:
    process = psutil.Process(pid)
    with process.oneshot():
        return Sample(minute, process.num_fds(), process.num_threads(), tasks, process.memory_info().rss / 2**20)


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Least squares, in units of y for one of x; 0 for fewer than three points.

    >>> slope([(0.0, 5.0), (1.0, 7.0), (2.0, 9.0)])
    2.0
    """
    if len(samples) < 3:
        return 0.0
    mean_x = sum(x for x, _ in samples) / len(samples)
    mean_y = sum(y for _, y in samples) / len(samples)
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread if spread else 0.0


def leaks(name: str, samples: Sequence[Sample], *, slack: dict[str, int] = SLACK) -> list[str]:
    """What there is more of at the end than in the first silence. Memory is judged where there are six samples.

    >>> leaks("a", [Sample(i, 10 + 3 * i, 5, 7, 100.0) for i in range(6)])
    ['a: fds 10 13 16 19 22 25']
    """
    found = []
    for kind in ("fds", "threads", "tasks"):
        values = [getattr(sample, kind) for sample in samples]
        if None not in values and len(values) >= 2 and values[-1] > values[0] + slack[kind]:
            found.append(f"{name}: {kind} {' '.join(map(str, values))}")
    late = rising(samples)
    if len(late) >= 4:
        growth, pace = late[-1][1] - late[0][1], slope(late)
        if growth > MAX_GROWTH_MIB and pace > MAX_SLOPE:
            found.append(f"{name}: RSS rises by {pace:.2f} MiB a minute, {growth:.1f} MiB in all")
    return found


def rising(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """(minute, MiB) of the last two thirds."""
    return [(sample.minute, sample.rss) for sample in samples[len(samples) // 3 :]]


class Silence:
    """Looks at everything at rest. ``kept``: deployment -> the replica that lives through all."""

    def __init__(self, service: Service, kept: dict[str, str], started: float) -> None:
        self.samples: dict[str, list[Sample]] = {}
        self._service, self._kept, self._started = service, kept, started
        from ray import serve

        self._ingresses = serve.get_deployment_handle("Ingress", "ragged-serve")

    def look(self) -> None:
        """Waits for rest, checks the books, takes a sample of each process that lives long. Raises AssertionError."""
        service = self._service
        service.check_whole()
        service.check_rest()
        service.ask_router("check_invariants")
        for replica_id in service.pids("Replica"):
            handle = service._replicas.options(method_name="check_invariants", session_id=replica_id)
            handle.remote().result(timeout_s=PATIENCE)
        wait_until(lambda: all(not s["num_running"] and not s["num_waiting"] for s in self._ask_ingresses()), "rest")
        ingress = next(s for s in self._ask_ingresses() if s["ingress_id"] == self._kept["Ingress"])
        # The last messages are acknowledged in their own time.
        wait_until(lambda: not any(s["num_unread_tokens"] for s in service.describe().values()), "acknowledgements")
        replica = service.describe()[self._kept["Replica"]]
        minute = (time.monotonic() - self._started) / 60
        self._add("the old ingress", ingress["pid"], minute, ingress["num_tasks"])
        self._add("the old replica", replica["pid"], minute, replica["num_tasks"])
        router = service.snapshot()["pid"]
        self._add(f"the router {router}", router, minute, None)
        for process in service.processes():
            with contextlib.suppress(psutil.Error):
                if process.name() == "haproxy":
                    self._add(f"haproxy {process.pid}", process.pid, minute, None)
                elif "ServeController" in " ".join(process.cmdline()):
                    self._add("the controller", process.pid, minute, None)

    def _add(self, name: str, pid: int, minute: float, tasks: int | None) -> None:
        self.samples.setdefault(name, []).append(look_at(pid, minute, tasks))

    def _ask_ingresses(self) -> list[Json]:
        """What each says of itself: a call goes to any, so it is made until all have answered."""
        wanted = set(self._service.pids("Ingress"))
        said: dict[str, Json] = {}
        deadline = time.monotonic() + PATIENCE
        while wanted - said.keys():
            assert time.monotonic() < deadline, f"{wanted - said.keys()} never answered"
            answer = self._ingresses.describe.remote().result(timeout_s=PATIENCE)
            said[answer["ingress_id"]] = answer
        return list(said.values())


# ---------------------------------------------------------------------------------------------------------------- main


def soak(arguments: argparse.Namespace) -> int:
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rng = random.Random(arguments.seed)
    items = make_items(16, long_words=(100, 300), seed=arguments.seed)
    say("undisturbed answers")
    Offline().choose_stop_strings(items)
    config = drill_config()
    config["applications"][0]["args"]["engine"] |= {"num_kv_blocks": 128}
    seconds = 60.0 * arguments.minutes
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as directory, cluster(Path(directory), config) as service:
        expected = undisturbed(service, items)
        traffic = Traffic(service.url, items, expected, arguments.workers, rng)
        faults = Faults(service, traffic, random.Random(arguments.seed), say, arguments.faults)
        begun = time.monotonic()
        silence = Silence(service, faults.kept, begun)
        say("traffic")
        try:
            while (left := begun + seconds - time.monotonic()) > 0 or len(next(iter(silence.samples.values()), ())) < 3:
                traffic.flow()
                faults.flow()
                time.sleep(min(max(left, 10.0), arguments.period))
                faults.pause()
                service.check_whole()
                # Calm traffic until both ingresses have channels to both replicas: a silence must find what the last found.
                time.sleep(CALM_SECONDS)
                traffic.pause()
                silence.look()
                say(f"silence: {_spell(traffic.counters)}; {len(traffic.wrong)} wrong")
                for name in ("the old ingress", "the old replica"):
                    say(f"  {name}: {silence.samples[name][-1]}")
            counters = service.snapshot()["counters"]
        except AssertionError as error:
            wrong.append(f"in a silence: {error}")
            counters = {}
        finally:
            faults.stop()
            traffic.stop()
            (arguments.log or Path(directory) / "server.txt").write_text(service.output)
    wrong += traffic.wrong
    print(f"\n{'process':28}{'silences':>9}{'fds':>12}{'threads':>12}{'tasks':>12}{'RSS MiB':>16}{'MiB/min':>9}")
    for name, samples in silence.samples.items():
        wrong += leaks(name, samples)
        first, last = samples[0], samples[-1]
        cells = [f"{first.fds} -> {last.fds}", f"{first.threads} -> {last.threads}"]
        cells.append("-" if last.tasks is None else f"{first.tasks} -> {last.tasks}")
        rss = f"{first.rss:.1f} -> {last.rss:.1f}"
        pace = f"{slope(rising(samples)):.2f}" if len(rising(samples)) >= 3 else "-"
        print(f"{name:28}{len(samples):9}" + "".join(f"{cell:>12}" for cell in cells) + f"{rss:>16}{pace:>9}")
    print(f"\nrequests: {_spell(traffic.counters)}\nfaults: {_spell(faults.counters)}")
    print(f"{time.monotonic() - started:.0f} s in all\n")
    for text in wrong[:20]:
        print(f"WRONG: {text}")
    result = {
        "bench": "soak",
        "minutes": arguments.minutes,
        "requests": traffic.counters,
        "faults": faults.counters,
        "ledger": counters,
        "samples": {name: [vars(sample) for sample in samples] for name, samples in silence.samples.items()},
        "wrong": wrong,
    }
    print(json.dumps(result))
    return 1 if wrong else 0


def _spell(counters: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counters.items()))


def main() -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--minutes", type=float, default=20.0)
    made.add_argument("--period", type=float, default=50.0, help="seconds of traffic between two silences")
    made.add_argument("--faults", type=float, default=7.5, help="seconds of traffic between two faults, on average")
    made.add_argument("--workers", type=int, default=12, help="requests at a time")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--log", type=Path, help="write what the server said here")
    return soak(made.parse_args())


if __name__ == "__main__":
    sys.exit(main())
