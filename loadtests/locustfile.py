"""Load tests with locust: streamed chats and completions against any OpenAI-compatible server (docs/load_testing.md).

    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000                             the web UI
    locust -f loadtests/locustfile.py --host ... --headless --rate 4 -t 60s --slo-ttft-ms 500  exit code 1 if it is missed

With --rate, or a trace, the loop is open: requests are sent when they are due, each in a greenlet of its own, whatever
became of those before, and every time counts from when a request was due. locust's users then only wait. Without, each of
its users sends the next request when the last one has ended, as users of locust do (a closed loop).

Beside locust's own row for a request, each has rows of the types TTFT, ITL, TPOT (ms), TOKENS/S and GOODPUT (good requests;
the others are its failures). They are entries of locust's statistics, so the master adds up those of its workers, and are
left out of "Aggregated", where requests alone count. The figures of the report are `load_stats`'s, which travel to the
master with locust's reports. Needs the extra `load`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from geventhttpclient.response import HTTPParseError
from locust import LoadTestShape, User, constant, events, runners, task
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner
from locust.util.timespan import parse_timespan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loadtests.load_client import LoadClient
from loadtests.load_plan import ARRIVALS, ENDPOINTS, SHAPES, SYNTHETIC, Plan, Planned, PlanOptions, level
from loadtests.load_report import report
from loadtests.load_stats import LOOK_SECONDS, Slo, Tally, table
from loadtests.load_stream import COMPLETED, Outcome

Json = dict[str, Any]

LEAD_SECONDS = 0.5
"""Between the start of a run and its second 0: all workers must have heard of it."""
DRAIN_SECONDS = 300.0
"""A run that is over waits so long for its last streams."""
STOP_SECONDS = 60.0
"""A user that is stopped early (in a spike that is over, or by hand) may end its stream, if --stop-timeout says nothing."""
ROOT = Path(__file__).resolve().parents[1]

runners.HEARTBEAT_LIVENESS = 20
"""Seconds after which a master gives a silent worker up. By default 3, which one on a busy machine can need."""


# ------------------------------------------------------------------------------------------------------------- options


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    """Not in groups: locust's web form shows the parser's own alone."""
    add = parser.add_argument
    add("--workload", default=SYNTHETIC, help="synthetic, azure, mooncake, or the path of a trace")
    add("--rate", type=float, default=0.0, help="requests a second, in an open loop; 0: users, or the trace")
    add("--arrivals", default="poisson", choices=ARRIVALS, help="of an open loop")
    add("--shape", default="steady", choices=SHAPES, help="of the rate, or of the number of users, over time")
    add("--endpoint", default="mixed", choices=tuple(ENDPOINTS), help="what is asked for")
    add("--prompt-lens", default="32-256", help="tokens of a synthetic prompt, shortest and longest")
    add("--output-lens", default="16-64", help="tokens of its answer")
    add("--length-distribution", default="lognormal", choices=("lognormal", "uniform"))
    add("--length-scale", type=float, default=1.0, help="factor of a trace's lengths")
    add("--seed", type=int, default=0, help="of arrivals, lengths and texts")
    add("--model", default="", help="served name; else the first that the server says")
    add("--api-key", default="", env_var="RAGGED_SERVE_API_KEY", is_secret=True, help="also RAGGED_SERVE_API_KEY")
    add("--patience", type=float, default=120.0, help="seconds without an event after which a stream is lost")
    for name, words in (
        ("ttft", "time to first token"),
        ("tpot", "mean time of a token behind the first"),
        ("itl", "longest gap between two events"),
        ("e2el", "whole time"),
    ):
        add(f"--slo-{name}-ms", type=float, default=0.0, help=f"{words}; 0: no limit")
    add("--slo-share", type=float, default=0.99, help="of all requests that must be good, else exit code 1")
    add("--report", default="load_report.html", include_in_web_ui=False, help="file; empty: none")
    add("--kill-period", type=float, default=0.0, help="seconds before each kill of a replica, through Ray; 0: none")
    add("--kills", type=int, default=1_000_000, help="how many at most")


def positive(value: float) -> float | None:
    """0 stands for None: locust's web form keeps the type of what a field had."""
    return value if value > 0 else None


def read_slo(options: Any) -> Slo:
    return Slo(
        ttft_ms=positive(options.slo_ttft_ms),
        tpot_ms=positive(options.slo_tpot_ms),
        itl_ms=positive(options.slo_itl_ms),
        e2el_ms=positive(options.slo_e2el_ms),
        share=options.slo_share,
    )


def read_plan_options(options: Any, seconds: float | None) -> PlanOptions:
    return PlanOptions(
        workload=options.workload,
        rate=positive(options.rate),
        shape=options.shape,
        process=options.arrivals,
        seconds=seconds,
        endpoint=options.endpoint,
        prompt_lens=read_range("--prompt-lens", options.prompt_lens),
        output_lens=read_range("--output-lens", options.output_lens),
        distribution=options.length_distribution,
        length_scale=options.length_scale,
        seed=options.seed,
    )


def read_range(name: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise ValueError(f"{name} is {text!r}; it must be two numbers, like 32-256") from None


def run_seconds(options: Any) -> float | None:
    """--run-time, as the command line or the web form has it."""
    given = options.run_time
    return float(parse_timespan(given) if isinstance(given, str) else given) if given else None


# ----------------------------------------------------------------------------------------------------------- a process


class Load:
    """What one process of locust sends: everything, or a worker's share. `events` drive it."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.tally = Tally(Slo())
        """What this process counted, and at a master what its workers did."""
        self.kills: list[Json] = []
        """{"at": seconds, "replica": id, ...}."""
        self.kill_error: str | None = None
        self.share = (0, 1)
        """This process sends the requests whose number, modulo the second, is the first."""
        self.seconds: float | None = None
        self.num_open = 0
        self.has_sent_all = False
        self.is_running = False
        self.run = 0
        """The number of the run: what a worker tells of an earlier one does not count."""
        self._begin = 0.0
        self._number = 0
        self._greenlets: list[gevent.Greenlet] = []

    @property
    def options(self) -> Any:
        return self.environment.parsed_options

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._begin

    def begin(self) -> None:
        """Raises OSError, ValueError or HTTPParseError for what cannot be: a server that is not there, an option."""
        self.end()
        self.tally, self.kills, self.kill_error = Tally(read_slo(self.options)), [], None
        self.num_open, self.has_sent_all, self._number = 0, False, 0
        if not isinstance(self.environment.runner, WorkerRunner):  # which has heard it of the master
            self.seconds = run_seconds(self.options)
        if not isinstance(self.environment.runner, MasterRunner):
            self._begin_to_send()
        self._begin = time.perf_counter() + LEAD_SECONDS
        self.is_running = True

    def _begin_to_send(self) -> None:
        if not self.environment.host:
            raise ValueError("say which server: --host http://127.0.0.1:8000")
        self._client = LoadClient(self.environment.host, api_key=self.options.api_key, patience=self.options.patience)
        self._model = self.options.model or self._client.models()[0]
        vocabulary = self._client.vocabulary(self._model)
        self.plan = Plan(read_plan_options(self.options, self.seconds), vocabulary)
        self._greenlets = [gevent.spawn(self._watch)]
        if self.plan.is_open:
            self._greenlets.append(gevent.spawn(self._send_when_due))

    def end(self) -> None:
        self.is_running = False
        gevent.killall(self._greenlets)
        self._greenlets = []

    @property
    def is_over(self) -> bool:
        """Nothing more is sent."""
        if not self.is_running:
            return True
        return self.has_sent_all or (self.seconds is not None and self.now() >= self.seconds)

    # ---- requests ------------------------------------------------------------------------------------------------

    def _send_when_due(self) -> None:
        """The open loop: spawns each request at its time, and waits for none."""
        index, num_workers = self.share
        for request in self.plan.scheduled():
            if request.number % num_workers != index:
                continue
            assert request.due is not None
            body = self.plan.body(request, self._model)  # made before it is due
            if (left := request.due - self.now()) > 0:
                gevent.sleep(left)
            self.num_open += 1
            gevent.spawn(self._send, request, body, request.due)
        self.has_sent_all = True

    def send_next(self) -> None:
        """One request of a closed loop, due now."""
        index, num_workers = self.share
        request = self.plan.request(self._number * num_workers + index)
        self._number += 1
        body = self.plan.body(request, self._model)
        self.num_open += 1
        self._send(request, body, self.now())

    def _send(self, request: Planned, body: bytes, due: float) -> None:
        """A stream that is cut off because the run is stopped by hand counts nowhere."""
        outcome, run = Outcome(request.path, due), self.run
        try:
            self._client.stream(outcome, body, self.now)
            if run == self.run:
                self._count(outcome, is_cut=request.is_cut)
        finally:
            if run == self.run:
                self.num_open -= 1

    def _count(self, outcome: Outcome, *, is_cut: bool) -> None:
        is_good = self.tally.add(outcome, is_cut=is_cut)
        kind = "chat" if "chat" in outcome.path else "completions"
        self.environment.events.request.fire(
            request_type="POST",
            name=outcome.path,
            response_time=outcome.e2el * 1000,
            response_length=outcome.num_output_tokens,
            exception=None if outcome.kind == COMPLETED else RuntimeError(f"{outcome.kind}: {outcome.reason}"),
            context={"kind": outcome.kind, "is_good": is_good},
        )
        stats = self.environment.stats
        good = stats.get(kind, "GOODPUT")
        good.log(outcome.e2el * 1000, outcome.num_output_tokens)
        if not is_good:
            good.log_error(None)
        if outcome.kind != COMPLETED:
            return
        stats.get(kind, "TTFT").log(outcome.ttft * 1000, 0)
        if outcome.num_output_tokens > 1:
            stats.get(kind, "TPOT").log(outcome.tpot * 1000, 0)
            stats.get(kind, "TOKENS/S").log(1 / max(outcome.tpot, 1e-6), 0)
        row = stats.get(kind, "ITL")
        for gap in outcome.itls:
            row.log(gap * 1000, 0)

    def _watch(self) -> None:
        """How much this process computes, and how long it is kept from running: a busy client measures itself."""
        second, cpu = time.perf_counter(), time.process_time()
        while True:
            at = time.perf_counter()
            gevent.sleep(LOOK_SECONDS)
            now, cpu_now = time.perf_counter(), time.process_time()
            self.tally.histograms["stall"].add(now - at - LOOK_SECONDS)
            if now - second >= 1.0:
                self.tally.add_cpu(max(0.0, self.now()), (cpu_now - cpu) / (now - second), cpu_now - cpu)
                second, cpu = now, cpu_now

    # ---- the end -------------------------------------------------------------------------------------------------

    def tell(self) -> Json:
        """What a worker tells its master: where it is, and what it counted since it last told."""
        told = {
            "run": self.run,
            "is_over": self.is_over,
            "num_open": self.num_open,
            "tally": self.tally.to_data(),
        }
        self.tally = Tally(self.tally.slo)
        return told

    def results(self) -> Json:
        found = self.tally.results()
        if self.options.kill_period > 0:
            found["kills"] = self.kills
        return found

    def wrong(self) -> list[str]:
        found = self.tally.wrong()
        if self.options.kill_period > 0 and not self.kills:
            found.append("no replica was killed")
        return found + ([self.kill_error] if self.kill_error else [])

    def asked(self) -> Json:
        """The options of this run that are the load test's own, without secrets."""
        names = "workload rate arrivals shape endpoint prompt_lens output_lens length_distribution length_scale seed"
        asked = {name: getattr(self.options, name) for name in names.split()}
        return {
            "host": self.environment.host,
            "seconds": self.seconds,
            "users": self.options.num_users,
            **asked,
            "slo_share": self.options.slo_share,
        }

    def html(self) -> str:
        return report(self.tally, self.results(), title="Load test", options=self.asked(), wrong=self.wrong())


load: Load
"""Of this process."""


class Streams(User):
    """One of locust's users: sends the next request when the last has ended, or in an open loop does nothing."""

    wait_time = constant(0)

    @task
    def stream(self) -> None:
        if load.is_over or load.plan.is_open:
            gevent.sleep(0.1)
            return
        if (left := -load.now()) > 0:
            gevent.sleep(left)
        load.send_next()


class Shape(LoadTestShape):
    """How many users there are at a time, and when a run has ended: when nothing more is due and the last stream is over."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        options = load.options
        num_users = max(1, int(options.num_users or 1))
        seconds = run_seconds(options)
        # Not `get_run_time`: that begins before the first request is due.
        now = load.now() if load.is_running else 0.0
        if load.is_running and self._is_over(now, seconds):
            return None
        if options.rate > 0 or options.workload != SYNTHETIC:
            num_users = max(1, self.runner.worker_count)
        elif seconds is not None:
            # In steps of a second; locust calls this once a second anyway.
            num_users = max(1, round(num_users * level(options.shape, min(1.0, max(0.0, int(now) / seconds)))))
        return num_users, max(1.0, float(options.spawn_rate or 1), num_users / 10)

    def _is_over(self, now: float, seconds: float | None) -> bool:
        is_over, num_open = all_ended(load)
        return (is_over and not num_open) or (seconds is not None and now >= seconds + DRAIN_SECONDS)


def all_ended(load: Load) -> tuple[bool, int]:
    """Whether nothing more is sent, and how many streams are open, here or at all workers as far as they have told."""
    if isinstance(load.environment.runner, MasterRunner):
        told = list(workers.values())
        return bool(told) and all(state["is_over"] for state in told), sum(state["num_open"] for state in told)
    return load.is_over, load.num_open


# ------------------------------------------------------------------------------------------------------------- locust's


workers: dict[str, Json] = {}
"""At a master: what each worker last told."""


@events.init.add_listener
def on_init(environment: Environment, runner: Any, web_ui: Any, **_: Any) -> None:
    global load
    load = Load(environment)
    environment.stop_timeout = environment.stop_timeout or STOP_SECONDS
    if isinstance(runner, WorkerRunner):
        runner.register_message("load_share", take_share)
    if web_ui is not None:

        @web_ui.app.route("/load-report")
        def load_report() -> str:
            return load.html()


def take_share(environment: Environment, msg: Any, **_: Any) -> None:
    """A worker hears, just before a run, which requests are its own."""
    load.run, load.share, load.seconds = msg.data["run"], tuple(msg.data["share"]), msg.data["seconds"]


@events.test_start.add_listener
def on_test_start(environment: Environment, **_: Any) -> None:
    runner = environment.runner
    if not isinstance(runner, WorkerRunner):
        load.run += 1
    if isinstance(runner, MasterRunner):
        workers.clear()
        ready = sorted(client.id for client in runner.clients.ready)
        for index, worker_id in enumerate(ready):
            workers[worker_id] = {"is_over": False, "num_open": 0}
            seconds = run_seconds(environment.parsed_options)
            runner.send_message(
                "load_share", {"run": load.run, "share": (index, len(ready)), "seconds": seconds}, worker_id
            )
    killer = None
    try:
        if not isinstance(runner, WorkerRunner) and load.options.kill_period > 0:
            killer = start_killer()
        load.begin()
    except (OSError, ValueError, HTTPParseError) as error:
        print(f"the load cannot start: {environment.host}: {error}", file=sys.stderr, flush=True)
        environment.process_exit_code = 1
        if killer is not None and killer.stdin is not None:
            killer.stdin.close()  # it ends by that
        is_alone = load.options.headless or isinstance(runner, WorkerRunner)
        gevent.spawn_later(1.0, runner.quit if is_alone else runner.stop)  # once locust has started what it is about to
        return
    if killer is not None:
        gevent.spawn(note_kills, killer)


@events.test_stop.add_listener
def on_test_stop(**_: Any) -> None:
    load.end()


@events.report_to_master.add_listener
def on_report_to_master(client_id: str, data: Json) -> None:
    data["load"] = load.tell()


@events.worker_report.add_listener
def on_worker_report(client_id: str, data: Json) -> None:
    told = data.get("load")
    if told is not None and client_id in workers and told["run"] == load.run:
        load.tally.merge(told["tally"])
        workers[client_id] = {"is_over": told["is_over"], "num_open": told["num_open"]}


def start_killer() -> subprocess.Popen[bytes]:
    """Runs `kills` in a process of its own (Ray and gevent do not mix), which has joined Ray when this returns. Raises
    ValueError with what it says if it cannot."""
    command = [sys.executable, "-m", "loadtests.kills", "--period", str(load.options.kill_period)]
    command += ["--kills", str(load.options.kills), "--seed", str(load.options.seed)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environ)
    assert process.stdout is not None
    said = read_json(process.stdout)
    if "ready" not in said:
        raise ValueError(f"no replicas can be killed: {said.get('error', 'see above')}")
    return process


def read_json(lines: Any) -> Json:
    """The next line that is JSON; Ray may print others. {} at the end."""
    for line in lines:
        if line.startswith(b"{"):
            return dict(json.loads(line))
    return {}


def note_kills(process: subprocess.Popen[bytes]) -> None:
    """Writes down what it says, until nothing more is sent."""
    assert process.stdin is not None
    assert process.stdout is not None

    def read(lines: Any, run: int) -> None:
        while said := read_json(lines):
            print(f"kill: {said}", file=sys.stderr, flush=True)
            if run == load.run and "replica" in said:
                load.kills.append({"at": load.now(), **said})
            elif run == load.run:
                load.kill_error = f"no more kills: {said.get('error')}"

    reading = gevent.spawn(read, process.stdout, load.run)
    while load.is_running and process.poll() is None and not all_ended(load)[0]:
        gevent.sleep(0.1)
    process.stdin.close()  # it ends by that
    process.wait()
    reading.join()


@events.quitting.add_listener
def on_quitting(environment: Environment, **_: Any) -> None:
    """The exit code of a headless run. Fired in reverse order: workers have told everything by now."""
    if is_reporting() and environment.process_exit_code is None:
        environment.process_exit_code = 1 if load.wrong() or environment.runner.exceptions else 0


@events.quit.add_listener
def on_quit(**_: Any) -> None:
    """Its report, behind locust's own."""
    if not is_reporting():
        return
    results, wrong = load.results(), load.wrong()
    print("\n".join(table(results)))
    if path := load.options.report:
        Path(path).write_text(load.html(), encoding="utf-8")
        print(f"report: {path}")
    for text in load.tally.warnings():
        print(f"WARNING: {text}")
    for text in wrong:
        print(f"WRONG: {text}")
    print(json.dumps({"bench": "load", "asked": load.asked(), **results, "wrong": wrong}), flush=True)


def is_reporting() -> bool:
    return load.options.headless and not isinstance(load.environment.runner, WorkerRunner)
