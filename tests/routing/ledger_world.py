"""A small service in virtual time: one ledger, fake replicas that keep LeaseTables, holders, and a bad network.

Every message takes its own time, so messages overtake each other. With ``faults`` they also get lost or come twice,
holders, replicas and the router die, and replicas drain. After every event all that it touched is compared with all that
it can be compared with; each check fails with a message of its own (``load: ``, ``budget: ``, ``difference: ``, ...), which
the planted faults name.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from serve_app.errors import LeaseRefusedError, OverloadedError, RaggedServeError, RequestTooLargeError
from serve_app.replica.lease_table import LeaseTable
from serve_app.routing.leases import Lease, LeaseRequest, ReplicaReport, num_blocks_for
from serve_app.routing.ledger import Ledger
from serve_app.routing.ledger_options import LedgerOptions

BLOCK_SIZE = 16
MAX_MODEL_LEN = 1024
OPTIONS = LedgerOptions(
    max_queued_requests=12,
    max_queued_tokens=3000,
    max_queue_seconds=4.0,
    lease_seconds=3.0,
    replica_seconds=1.0,
    submit_seconds=2.0,
)
MAX_DELAY = 0.25
ROUTER = "router"


@dataclass(eq=False)
class Replica:
    replica_id: str
    table: LeaseTable
    max_num_seqs: int = 1 << 30
    num_reports: int = 0
    is_dead: bool = False
    is_draining: bool = False


@dataclass(eq=False)
class Ask:
    """One attempt of one request at its holder."""

    request: LeaseRequest
    outcomes: list[Lease | RaggedServeError] = field(default_factory=list)
    is_given_up: bool = False


@dataclass(eq=False)
class Stream:
    """A granted lease, as the world knows it."""

    lease: Lease
    holder_id: str
    num_output_tokens: int
    max_output_tokens: int
    num_choices: int
    phase: str = "granted"
    """granted -> open -> ended; or granted -> given up."""


class World:
    def __init__(self, seed: int, policy: str, *, faults: bool = False, num_replicas: int = 3) -> None:
        self.rng = random.Random(seed)
        self.policy = policy
        self.faults = faults
        self.now = 0.0
        self.num_events = 0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.seen: Counter[str] = Counter()
        self.is_closing = False
        self.touched: set[str] = set()
        """Since the last check: ROUTER, and ids of replicas."""
        self.options = replace(OPTIONS, policy=policy)
        self.epoch = 1
        self.ledger: Ledger | None = Ledger(self.options, self.epoch)
        self.pending: set[str] = set()
        """Requests that the ledger in force let wait."""
        self.replicas: dict[str, Replica] = {}
        self.told_draining: set[str] = set()
        """What the latest reports told the ledger in force."""
        self.reported: dict[str, tuple[int, float]] = {}
        """Replica -> the highest report number that the ledger in force took, and when."""
        self.holders: dict[str, bool] = {}
        """Holder -> alive."""
        self.asks: dict[str, Ask] = {}
        self.streams: dict[str, Stream] = {}
        self.own: set[str] = set()
        """Leases that the ledger in force granted."""
        self.settled: set[str] = set()
        for _ in range(num_replicas):
            self.start_replica()
        for _ in range(2):
            self.start_holder()

    # ---- time and messages

    def at(self, delay: float, event: Callable[[], None]) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (self.now + delay, self.num_events, event))

    def send(self, event: Callable[[], None], *, lossy: bool = True) -> None:
        """The message arrives after a time of its own; with faults perhaps never, or twice."""
        copies = 1
        if self.faults and lossy:
            copies = self.rng.choices([0, 1, 2], [0.05, 0.92, 0.03])[0]
            self.seen["lost" if copies == 0 else "doubled" if copies == 2 else "sent"] += 1
        for _ in range(copies):
            self.at(min(MAX_DELAY, self.rng.expovariate(1 / 0.04)), event)

    def to_router(self, event: Callable[[Ledger], None], *, lossy: bool = True) -> None:
        def arrive() -> None:
            if self.ledger is not None:
                self.touched.add(ROUTER)
                event(self.ledger)
                self.pump()

        self.send(arrive, lossy=lossy)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.events and self.events[0][0] <= until:
            self.now, _, event = heapq.heappop(self.events)
            event()
            self.check()
        self.now = until

    # ---- router

    def pump(self) -> None:
        assert self.ledger is not None
        for request_id, answer in self.ledger.grants(self.now):
            assert request_id in self.pending, f"answered twice: {request_id} does not wait"
            self.pending.discard(request_id)
            self.answer(request_id, answer)
        due = self.ledger.next_event_at(self.now)
        assert due is None or due >= self.now, "busy: the ledger's next event is in the past"
        assert not self.pending or due is not None, f"waits: {self.pending} wait for no event"

    def tick(self, epoch: int) -> None:
        """The router's own timer."""
        if self.ledger is not None and self.epoch == epoch:
            self.touched.add(ROUTER)
            self.pump()
            self.at(0.1, lambda: self.tick(epoch))

    def take_request(self, ledger: Ledger, request: LeaseRequest) -> None:
        self.pending.discard(request.request_id)
        answer: Lease | RaggedServeError | None
        try:
            answer = ledger.request(request, self.now)
        except (OverloadedError, RequestTooLargeError) as error:
            answer = error
            self.seen[type(error).__name__] += 1
        if answer is None:
            self.pending.add(request.request_id)
        elif isinstance(answer, OverloadedError):
            assert 1 <= answer.retry_after <= 60, f"retry after: {answer.retry_after}"
            self.answer(request.request_id, answer)
        else:
            self.answer(request.request_id, answer)

    def answer(self, request_id: str, answer: Lease | RaggedServeError) -> None:
        ask = self.asks[request_id]
        if isinstance(answer, Lease) and answer.lease_id not in self.streams:
            self.check_grant(ask.request, answer)
            limit = ask.request.num_choices * ask.request.max_output_tokens
            num_output = max(1, int(limit * self.rng.betavariate(1, 3)))
            self.streams[answer.lease_id] = Stream(
                answer, ask.request.holder_id, num_output, limit, ask.request.num_choices
            )
            self.own.add(answer.lease_id)
        self.send(lambda: self.receive(request_id, answer))

    def check_grant(self, request: LeaseRequest, lease: Lease) -> None:
        ledger = self.ledger
        assert ledger is not None
        self.seen["granted"] += 1
        replica_id = lease.replica_id
        assert not ledger.is_rebuilding, "grant: the ledger is rebuilding"
        assert lease.epoch == self.epoch, "grant: wrong epoch"
        assert replica_id not in request.not_on, f"grant: {replica_id} is avoided"
        assert replica_id not in self.told_draining, f"grant: {replica_id} is draining"
        _, reported_at = self.reported[replica_id]
        assert self.now - reported_at <= self.options.replica_seconds, f"grant: {replica_id} is silent"
        row = next(row for row in ledger.rows(replica_id) if row.lease_id == lease.lease_id)
        assert row.num_blocks * BLOCK_SIZE == lease.num_tokens, "booking: the lease is not what is booked"
        whole = num_blocks_for(request.num_prompt_tokens, request.max_output_tokens, request.num_choices, BLOCK_SIZE)
        least = num_blocks_for(request.num_prompt_tokens, 1, request.num_choices, BLOCK_SIZE)
        assert (whole if self.policy == "reserve" else least) <= row.num_blocks <= whole, "booking: too few or too many"
        self.seen["booked less"] += row.num_blocks < whole
        free = ledger.snapshot()["replicas"][replica_id]["num_free_blocks"]
        assert free >= 0, f"budget: a grant left {free} blocks"
        others = sum(row.num_seqs for row in ledger.rows(replica_id)) - request.num_choices
        most = self.replicas[replica_id].max_num_seqs
        assert others + min(request.num_choices, most) <= most + max(1, most // 8), f"places: {others} of {most} taken"
        self.seen["standing by"] += others >= most

    def restart_router(self) -> None:
        if self.ledger is None:
            return
        self.ledger = None
        self.seen["restarts"] += 1
        self.at(self.rng.uniform(0.1, 1.0), self.start_router)

    def start_router(self) -> None:
        self.epoch += 1
        self.ledger = Ledger(self.options, self.epoch, rebuilding=True, grace_seconds=1.0)
        self.pending.clear()
        self.own.clear()
        self.reported.clear()
        self.told_draining.clear()
        if self.rng.random() < 0.5:
            self.ledger.expect_replicas(r.replica_id for r in self.replicas.values() if not r.is_dead)
        epoch = self.epoch
        self.at(0.0, lambda: self.tick(epoch))

    # ---- replicas

    def start_replica(self) -> None:
        replica = Replica(
            f"replica-{len(self.replicas)}", LeaseTable(self.rng.choice([20, 31, 40])), self.rng.choice([2, 9, 50])
        )
        self.replicas[replica.replica_id] = replica
        self.at(self.rng.uniform(0, 0.25), lambda: self.replica_beat(replica))

    def replica_beat(self, replica: Replica) -> None:
        """Expires, reports."""
        if replica.is_dead:
            return
        self.touched.add(replica.replica_id)
        for lease_id in replica.table.expired(self.now, self.options.lease_seconds):
            self.seen["expired at the replica"] += 1
            self.end_stream(replica, lease_id)
        replica.num_reports += 1
        report = ReplicaReport(
            replica.replica_id,
            replica.num_reports,
            BLOCK_SIZE,
            replica.table.num_blocks,
            MAX_MODEL_LEN,
            "numerics",
            replica.table.rows(),
            replica.table.num_ended,
            is_draining=replica.is_draining,
            max_num_seqs=replica.max_num_seqs,
        )
        self.to_router(lambda ledger: self.take_report(ledger, report))
        self.at(0.25, lambda: self.replica_beat(replica))

    def take_report(self, ledger: Ledger, report: ReplicaReport) -> None:
        before = ledger.counters["reports_out_of_order"] + ledger.counters["reports_after_end"]
        ledger.report(report, self.now)
        if ledger.counters["reports_out_of_order"] + ledger.counters["reports_after_end"] > before:
            self.seen["dropped reports"] += 1
            return
        self.reported[report.replica_id] = (report.report_number, self.now)
        if report.is_draining:
            self.told_draining.add(report.replica_id)
        booked = {row.lease_id: row.num_blocks for row in ledger.rows(report.replica_id)}
        shown = {row.lease_id: row.num_blocks for row in report.leases}
        for lease_id in shown.keys() & booked.keys():
            assert booked[lease_id] == shown[lease_id], f"blocks: {lease_id} {booked[lease_id]} {shown[lease_id]}"
        for lease_id in shown.keys() - booked.keys():
            assert lease_id in self.settled, f"difference: {lease_id} is shown, not booked and not settled"
        places = {row.lease_id: row.num_seqs for row in report.leases}
        assert all(places.get(row.lease_id, row.num_seqs) == row.num_seqs for row in ledger.rows(report.replica_id)), (
            "places: not those that the replica shows"
        )

    def open_stream(self, replica: Replica, stream: Stream) -> None:
        if replica.is_dead:
            self.at(0.1, lambda: self.lose_stream(stream))
            return
        self.touched.add(replica.replica_id)
        lease = stream.lease
        if lease.lease_id in replica.table or stream.phase in ("ended", "lost"):
            return  # the message came twice: submit is idempotent
        try:
            replica.table.open(
                lease.lease_id, stream.holder_id, lease.num_tokens // BLOCK_SIZE, self.now, stream.num_choices
            )
        except LeaseRefusedError:
            assert self.faults or self.policy == "expect", "refused: the ledger granted what does not fit"
            self.seen["refused by a replica"] += 1
            self.send(lambda: self.settle(stream, None), lossy=False)
            return
        self.seen["opened"] += 1
        booked = sum(row.num_blocks for row in replica.table.rows())
        assert booked <= replica.table.num_blocks, f"budget: opened {booked} blocks of {replica.table.num_blocks}"
        if stream.phase == "given up":
            self.seen["opened late"] += 1
        stream.phase = "open"
        seconds = self.rng.expovariate(1.0)
        if self.policy == "expect":
            self.at(seconds * self.rng.random(), lambda: self.grow_stream(replica, stream))
        self.at(seconds, lambda: self.end_stream(replica, lease.lease_id))

    def grow_stream(self, replica: Replica, stream: Stream) -> None:
        """The stream has come to what it will be. What it holds in the end is a guess here, at least what it has."""
        lease_id = stream.lease.lease_id
        if replica.is_dead or lease_id not in replica.table:
            return
        self.touched.add(replica.replica_id)
        booked = stream.lease.num_tokens // BLOCK_SIZE
        if self.rng.random() < 0.3:
            replica.table.grow(lease_id, min(booked + self.rng.randint(1, 6), replica.table.num_blocks))
            self.seen["grown"] += 1

    def end_stream(self, replica: Replica, lease_id: str) -> None:
        self.touched.add(replica.replica_id)
        if replica.is_dead or not replica.table.end(lease_id):
            return
        stream = self.streams[lease_id]
        stream.phase = "ended"
        self.send(lambda: self.settle(stream, stream.num_output_tokens), lossy=False)

    def kill_replica(self) -> None:
        alive = [r for r in self.replicas.values() if not r.is_dead]
        if not alive:
            return
        replica = self.rng.choice(alive)
        replica.is_dead = True
        self.seen["replicas killed"] += 1
        for row in replica.table.rows():
            stream = self.streams[row.lease_id]
            self.at(self.rng.uniform(0.01, 0.2), lambda stream=stream: self.lose_stream(stream))
        if self.rng.random() < 0.5:  # else the router only hears nothing more
            self.to_router(lambda ledger: ledger.forget_replica(replica.replica_id, self.now))
        self.at(self.rng.uniform(0.1, 1.0), self.start_replica)

    def lose_stream(self, stream: Stream) -> None:
        """The holder learns that the replica is gone: it settles, and asks again for the same request."""
        if stream.phase == "lost":
            return
        stream.phase = "lost"
        self.settle(stream, None)
        request = next(
            (a.request for a in self.asks.values() if stream.lease in a.outcomes and self.holders[stream.holder_id]),
            None,
        )
        if request is not None:
            self.seen["failed over"] += 1
            self.ask(
                replace(
                    request,
                    request_id=f"{request.request_id}+",
                    not_on=request.not_on | {stream.lease.replica_id},
                    is_continuation=True,
                )
            )

    def drain_replica(self) -> None:
        alive = [r for r in self.replicas.values() if not r.is_dead]
        if len([r for r in alive if not r.is_draining]) < 2:
            return
        replica = self.rng.choice(alive)
        self.seen["drained"] += 1
        replica.is_draining = True
        self.at(0.2, self.start_replica)

    # ---- holders

    def start_holder(self) -> None:
        holder_id = f"ingress-{len(self.holders)}"
        self.holders[holder_id] = True
        self.at(0.0, lambda: self.holder_beat(holder_id))

    def holder_beat(self, holder_id: str) -> None:
        if not self.holders[holder_id]:
            return
        self.to_router(lambda ledger: ledger.renew(holder_id, self.now))
        for replica in self.replicas.values():
            self.send(lambda replica=replica: self.take_renewal(replica, holder_id))
        self.at(0.5, lambda: self.holder_beat(holder_id))

    def take_renewal(self, replica: Replica, holder_id: str) -> None:
        self.touched.add(replica.replica_id)
        replica.table.renew(holder_id, self.now)

    def kill_holder(self) -> None:
        alive = [holder_id for holder_id, is_alive in self.holders.items() if is_alive]
        if not alive:
            return
        holder_id = self.rng.choice(alive)
        self.holders[holder_id] = False
        self.seen["holders killed"] += 1
        self.at(0.3, self.start_holder)

    def arrive(self) -> None:
        """A client's request; then the next one."""
        if self.is_closing:
            return
        rng = self.rng
        alive = [holder_id for holder_id, is_alive in self.holders.items() if is_alive]
        stem = rng.randrange(4)
        num_prompt = rng.choice([1, 7, 16, 40, 100, 190, 700])
        if alive:
            self.ask(
                LeaseRequest(
                    f"request-{len(self.asks)}",
                    rng.choice(alive),
                    num_prompt,
                    rng.choice([1, 5, 33, 90, 150]),
                    rng.choice([1, 1, 1, 2]),
                    rng.choice([0, 0, 0, -1, 2]),
                    tuple(1000 * stem + i for i in range(num_prompt // BLOCK_SIZE)),
                    remaining_ms=rng.choice([None, None, 1500.0]),
                )
            )
        self.at(rng.expovariate(15.0), self.arrive)

    def ask(self, request: LeaseRequest) -> None:
        self.asks[request.request_id] = Ask(request)
        self.repeat(request.request_id)
        if self.rng.random() < 0.1:
            self.at(self.rng.uniform(0.0, 1.0), lambda: self.give_up(request.request_id))

    def repeat(self, request_id: str) -> None:
        """Asks, and asks again as long as nothing comes."""
        ask = self.asks[request_id]
        if ask.outcomes or ask.is_given_up or not self.holders[ask.request.holder_id]:
            return
        self.to_router(lambda ledger: self.take_request(ledger, ask.request))
        self.at(1.0, lambda: self.repeat(request_id))

    def give_up(self, request_id: str) -> None:
        ask = self.asks[request_id]
        if ask.outcomes or not self.holders[ask.request.holder_id]:
            return
        ask.is_given_up = True

        def take(ledger: Ledger) -> None:
            self.pending.discard(request_id)
            lease = ledger.withdraw(request_id)
            if lease is not None:
                self.seen["given back"] += 1
                self.settled.add(lease.lease_id)

        self.seen["given up"] += 1
        self.to_router(take)

    def receive(self, request_id: str, answer: Lease | RaggedServeError) -> None:
        ask = self.asks[request_id]
        if not self.holders[ask.request.holder_id] or answer in ask.outcomes:
            return
        if ask.outcomes or ask.is_given_up:  # a late answer to a repeated or withdrawn request
            if isinstance(answer, Lease):
                self.settle(self.streams[answer.lease_id], None)
            return
        ask.outcomes.append(answer)
        if not isinstance(answer, Lease):
            return
        stream = self.streams[answer.lease_id]
        if self.rng.random() < 0.05:
            stream.phase = "given up"
            self.settle(stream, None)
            return
        replica = self.replicas[answer.replica_id]
        self.send(lambda: self.open_stream(replica, stream))
        if self.faults:
            self.at(1.5, lambda: self.check_opened(stream))
        if self.rng.random() < 0.1:
            self.at(self.rng.uniform(0.0, 1.0), lambda: self.end_stream(replica, answer.lease_id))

    def check_opened(self, stream: Stream) -> None:
        """The submit got no reply: it was lost."""
        if stream.phase == "granted":
            stream.phase = "given up"
            self.settle(stream, None)

    def settle(self, stream: Stream, num_output_tokens: int | None) -> None:
        if stream.phase == "granted":
            stream.phase = "given up"
        if not self.holders[stream.holder_id]:
            return
        lease_id = stream.lease.lease_id

        def take(ledger: Ledger) -> None:
            ledger.settle(lease_id, num_output_tokens, self.now)
            self.settled.add(lease_id)
            self.seen["settled"] += 1
            assert all(lease_id != row.lease_id for row in ledger.rows(stream.lease.replica_id)), (
                f"settled: {lease_id} is still booked"
            )

        self.to_router(take)

    # ---- checks

    def check(self) -> None:
        touched, self.touched = self.touched, set()
        if not touched:
            return
        for replica_id in touched - {ROUTER}:
            table = self.replicas[replica_id].table
            table.check_invariants()
            free = table.num_free_blocks
            assert free >= 0 or self.policy == "expect", f"budget: {replica_id} has {free} blocks free"
            self.seen["past the pool"] += free < 0
        if self.ledger is None:
            return
        if ROUTER in touched:
            self.check_ledger(self.ledger)
        if not self.faults:
            for replica_id in self.ledger.book.replicas:
                if touched & {ROUTER, replica_id}:
                    booked = {row.lease_id: row.num_blocks for row in self.ledger.rows(replica_id)}
                    self.check_difference(replica_id, booked)

    def check_ledger(self, ledger: Ledger) -> None:
        ledger.check_invariants()
        snapshot = ledger.snapshot()
        for replica_id, shown in snapshot["replicas"].items():
            rows = {row.lease_id: row.num_blocks for row in ledger.rows(replica_id)}
            load = sum(rows.values())
            assert shown["num_booked_blocks"] == load, f"load: {replica_id} {shown['num_booked_blocks']} is not {load}"
            if self.policy == "reserve":
                own = sum(num_blocks for lease_id, num_blocks in rows.items() if lease_id in self.own)
                assert own <= shown["num_blocks"], f"budget: {own} blocks granted of {shown['num_blocks']}"
                assert self.faults or shown["num_free_blocks"] >= 0, "budget: negative"
        num_queued = snapshot["num_queued_requests"]
        assert len(self.pending) == num_queued, "queue: it is not who waits"
        if not self.faults:  # else streams that go on come in beyond its limits
            assert num_queued <= self.options.max_queued_requests, f"queue: {num_queued} requests wait"
            assert num_queued == 1 or snapshot["num_queued_tokens"] <= self.options.max_queued_tokens, "queue: tokens"

    def check_difference(self, replica_id: str, booked: dict[str, int]) -> None:
        """Without faults: the two tables differ by the grants and the settlements in flight, and by nothing else."""
        table = {row.lease_id: row.num_blocks for row in self.replicas[replica_id].table.rows()}
        for lease_id in table.keys() - booked.keys():
            raise AssertionError(f"difference: {lease_id} is open and not booked")
        for lease_id in booked.keys() - table.keys():
            assert lease_id in self.streams, f"difference: {lease_id} is booked and nobody knows"
            phase = self.streams[lease_id].phase
            assert lease_id not in self.settled, f"difference: {lease_id} is settled and booked"
            assert phase in ("granted", "given up", "ended"), f"difference: {lease_id} is booked and {phase}"
            self.seen[f"in flight, {phase}"] += 1
        for lease_id in booked.keys() & table.keys():
            assert booked[lease_id] == table[lease_id] or self.policy == "expect", f"blocks: {lease_id}"
            self.seen["in both tables"] += 1

    def check_in_flight(self) -> None:
        """Without faults: each grant whose submit or settlement is in flight is booked."""
        assert self.ledger is not None
        booked = {row.lease_id for replica_id in self.replicas for row in self.ledger.rows(replica_id)}
        for lease_id, stream in self.streams.items():
            if stream.phase in ("granted", "open") and lease_id not in self.settled:
                assert lease_id in booked, f"difference: {lease_id} is {stream.phase} and not booked"

    def close(self) -> None:
        """No more arrivals; after a while nothing is left anywhere, and everybody has an answer."""
        self.is_closing = True
        self.run(25.0)
        ledger = self.ledger
        assert ledger is not None
        assert not self.pending, f"waits: {self.pending}"
        for replica in self.replicas.values():
            left = replica.table.rows()
            assert replica.is_dead or not left, f"leak: {replica.replica_id} holds {left}"
            assert not ledger.rows(replica.replica_id), f"leak: {replica.replica_id} is booked"
        for ask in self.asks.values():
            if self.holders[ask.request.holder_id] and not ask.is_given_up:
                assert len(ask.outcomes) == 1, f"waits: {ask.request.request_id} has {len(ask.outcomes)} answers"


def random_world(seed: int, policy: str, *, faults: bool = False, seconds: float = 20.0) -> World:
    """One random run, checked after every event. Raises AssertionError beginning with the name of the check."""
    world = World(seed, policy, faults=faults)
    world.at(0.1, world.arrive)
    world.tick(world.epoch)
    if faults:
        for mean, event in (
            (4.0, world.kill_holder),
            (5.0, world.kill_replica),
            (7.0, world.restart_router),
            (9.0, world.drain_replica),
        ):
            at = world.rng.expovariate(1 / mean)
            while at < seconds:
                world.at(at, event)
                at += world.rng.expovariate(1 / mean)
        world.run(seconds)
    else:
        while world.now < seconds:
            world.run(0.5)
            world.check_in_flight()
    world.close()
    return world
