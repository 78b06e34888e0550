"""A bad day in pictures: an overload, then a killed replica, as clients, alerts, dashboard and the page see them.

    python -m loadtests.bad_day DIRECTORY                 a quarter of an hour: pictures, day.json, Prometheus' data
    python -m loadtests.bad_day DIRECTORY --redraw        the pictures of the dashboard again, from that data
    python -m loadtests.bad_day DIRECTORY --short         two minutes, in which no alert with a `for:` can fire

Starts what `make serve` starts, with a simulated model (what a step costs, and so how much is too much, does not hang on
this machine), Prometheus with deploy/monitoring's files, and two load tests with locust: users who come all day, and a
flood. The kill is loadtests/kills.py's. docs/bad_day.md tells one such day. Needs a Chromium or Chrome and `prometheus`:
on PATH, or where the variable PROMETHEUS says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from deploy.monitoring import draw
from deploy.monitoring.draw import Ask, Band, Range
from serve_app.serve_run import free_port
from tests.ui.chromium import Chromium, Page, find

Json = dict[str, Any]

ROOT = Path(__file__).parent.parent
MONITORING = ROOT / "deploy/monitoring"
VARIABLE = "PROMETHEUS"
PATIENCE = 180.0
MAX_BYTES = 300_000
"""Of a picture."""

ENGINE = {
    "block_size": 16,
    "num_kv_blocks": 224,
    "max_model_len": 2048,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
}
STEP = {"seconds_per_step": 0.06, "seconds_per_token": 0.0003}
"""Two replicas with 16 sequences each and a step of 65 ms: some 490 tokens a second, or 5 answers of 90 tokens."""
ANSWER = "Every step takes one token for each of us who decode, and fills the rest of the budget with your prompt. "
LENGTHS = ["--prompt-lens", "32-256", "--output-lens", "32-192", "--endpoint", "completions"]
USERS_RATE, FLOOD_RATE = 2.5, 14.0
"""Requests a second: half of what fits, and nearly three times what fits beside them."""


class Day(NamedTuple):
    """Lengths of its parts, in seconds."""

    calm: float = 60.0
    flood: float = 400.0
    rest: float = 80.0
    """From the flood's end to the kill, about: the killer's own count begins when it has joined Ray."""
    after: float = 110.0

    @property
    def users(self) -> float:
        return self.calm + self.flood + self.rest + self.after


SHORT = Day(15.0, 60.0, 30.0, 40.0)

PICTURES = {
    "bad_day_clients.png": ([draw.ALERTS, "What clients see"], "day"),
    "bad_day_budget.png": (["The budget"], "day"),
    "bad_day_lost.png": ([draw.ALERTS, "When parts are lost"], "kill"),
}
"""File -> rows of the dashboard, and which part of the day."""


# ---- what runs -------------------------------------------------------------------------------------------------------


def server_config(port: int) -> Json:
    """deploy/config.yaml with the simulated model and small pools."""
    config: Json = yaml.safe_load((ROOT / "deploy/config.yaml").read_text(encoding="utf-8"))
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    model = {"model": "demo", "runner": "simulated", "simulated": {**STEP, "answers": {" ": ANSWER * 12}}}
    config["applications"][0]["args"] = {"model": model, "engine": ENGINE, "log": {"level": "WARNING"}}
    return config


def prometheus_config(port: int | None) -> Json:
    """deploy/monitoring/prometheus.yml for a server on another port; None: one that asks nobody, for old data."""
    config: Json = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    if port is None:
        return {"global": config["global"]}
    (server,) = (job for job in config["scrape_configs"] if job["job_name"] == "ragged-serve")
    server["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    config["scrape_configs"] = [server]
    return config


@contextlib.contextmanager
def running(command: list[str], log: Path, url: str, folder: Path = ROOT) -> Iterator[None]:
    """A process that is up when ``url`` answers 200, and is told to end. Raises RuntimeError if it ends by itself."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder)
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5).status_code == 200
    return False


@contextlib.contextmanager
def served(directory: Path) -> Iterator[str]:
    """The address of a server like `make serve`'s."""
    port = free_port(0)
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump(server_config(port)), encoding="utf-8")
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "serve_app.launch", str(file)]
    with running(command, directory / "server.log", f"{url}/ready"):
        yield url


@contextlib.contextmanager
def watched(program: str, directory: Path, port: int | None) -> Iterator[str]:
    """The address of a Prometheus that looks at the server, and keeps its data in ``directory``."""
    (directory / "prometheus.yml").write_text(yaml.safe_dump(prometheus_config(port)), encoding="utf-8")
    shutil.copy(MONITORING / "alerts.yaml", directory)
    own = free_port(0)
    command = [program, "--config.file=prometheus.yml", "--storage.tsdb.path=prometheus"]
    command += [f"--web.listen-address=127.0.0.1:{own}"]
    url = f"http://127.0.0.1:{own}"
    with running(command, directory / "prometheus.log", f"{url}/-/ready", directory):
        yield url


class LoadTest:
    """One run of locust, from when it is made."""

    def __init__(self, name: str, directory: Path, url: str, rate: float, seconds: float, options: list[str]) -> None:
        self.log = directory / f"{name}.log"
        command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests/locustfile.py"), "--headless"]
        command += ["--only-summary", "--host", url, "--rate", f"{rate:g}", "--run-time", f"{seconds:.0f}s"]
        command += ["--report", str(directory / f"{name}.html"), *LENGTHS, *options]
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT)

    def results(self) -> Json:
        """Waits for its end. Raises RuntimeError if it has none."""
        self._process.wait()
        lines = self.log.read_text(errors="replace").splitlines()
        found = [line for line in lines if line.startswith('{"bench": "load"')]
        if not found:
            raise RuntimeError(f"locust ended without figures: {lines[-5:]}")
        figures: Json = json.loads(found[-1])
        return figures

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


# ---- the day ---------------------------------------------------------------------------------------------------------


def live(day: Day, directory: Path, url: str, prometheus: str, browser: Chromium, say: Callable[[str], None]) -> Json:
    """Lives through it, and takes pictures of pages meanwhile. When what began (Unix seconds), and the loads' figures."""
    page = browser.page(1040, 1060)
    page.goto(f"{url}/ui")
    page.wait("document.querySelectorAll('canvas').length == 2")
    kill_period = day.calm + day.flood + day.rest
    loads: dict[str, LoadTest] = {}
    with contextlib.ExitStack() as ends:

        def load(name: str, rate: float, seconds: float, *options: str) -> None:
            loads[name] = LoadTest(name, directory, url, rate, seconds, list(options))
            ends.callback(loads[name].end)

        start = time.time()
        load("users", USERS_RATE, day.users, "--seed", "1", "--kill-period", f"{kill_period:g}", "--kills", "1")
        say(f"calm: {USERS_RATE:g} requests a second")
        page.js("document.querySelector('#prompt').focus()")
        page.type("What is ragged, continuous batching?")
        page.press("Enter")
        time.sleep(max(0.0, start + day.calm - time.time()))
        flood = time.time()
        load("flood", FLOOD_RATE, day.flood, "--seed", "2")
        say(f"overload: {FLOOD_RATE:g} more")
        time.sleep(max(0.0, flood + day.flood * 0.92 - time.time()))
        shoot(page, directory / "bad_day_ui_overload.png")
        alerts_page(browser, prometheus, directory / "bad_day_prometheus.png", say)
        calm = max(time.time(), flood + day.flood)
        time.sleep(max(0.0, calm - time.time()))
        say("the flood is over; waiting for the kill")
        time.sleep(max(0.0, start + kill_period - 5 - time.time()))
        kill = kill_seen(page, directory / "bad_day_ui_kill.png", say)
        say("waiting for the users")
        results = {name: one.results() for name, one in loads.items()}
    page.close()
    # The page's clock is up to a second late; the killer's own is exact.
    kills = results["users"].get("kills", [])
    return {
        "start": start,
        "flood": flood,
        "calm": calm,
        "kill": kills[0]["time"] if kills else kill,
        "end": time.time(),
        "loads": results,
    }


def kill_seen(page: Page, file: Path, say: Callable[[str], None]) -> float:
    """When the page says that streams were resumed; its picture shows them a moment later. What follows needs no page."""
    shown = "[...document.querySelectorAll('.replica:not(.gone) canvas')].map((c) => Number(c.dataset.steps))"
    at = time.time()
    try:
        page.wait("document.querySelector('#log').textContent.includes('resumed')", 60.0)
        at = time.time()
        steps = max(page.js(shown))
        page.wait(f"Math.max(...{shown}) > {steps} + 25")
        shoot(page, file)
    except AssertionError as error:
        say(f"no picture of the kill: {error}")
    return at


def shoot(page: Page, file: Path) -> None:
    page.js("window.scrollTo(0, 0)")
    page.screenshot(file)


def alerts_page(browser: Chromium, prometheus: str, file: Path, say: Callable[[str], None]) -> None:
    """Prometheus' own page, the older one: what fires unfolded, what is quiet hidden. Debian's program finds the page's
    files only where its package is installed, and new versions have this page no more."""
    if not answers(f"{prometheus}/classic/alerts"):
        say("this Prometheus does not show its older pages: no picture of them")
        return
    page = browser.page(1040, 100)
    page.goto(f"{prometheus}/classic/alerts")
    page.click("label:has(#inactiveAlerts)")
    page.click("div.show-annotations")
    page.js("document.querySelectorAll('.alert-danger.alert_header').forEach((row) => row.click())")
    page.js("document.querySelectorAll('.alert_details pre').forEach((rule) => rule.remove())")
    page.js("window.scrollTo(0, 0)")
    page.screenshot(file, whole=True)
    page.close()


# ---- what is drawn and told ------------------------------------------------------------------------------------------


def parts(told: Json) -> list[Band]:
    return [
        Band(told["flood"], told["calm"], "the flood"),
        Band(told["kill"], told["kill"], "a replica is killed"),
    ]


def spans(told: Json) -> dict[str, Range]:
    return {
        "day": draw.whole_range(told["start"], told["end"]),
        "kill": draw.whole_range(told["kill"] - 90, told["end"]),
    }


def pictures(told: Json, ask: Ask, directory: Path, browser: Chromium) -> None:
    dashboard = json.loads(draw.FILE.read_text(encoding="utf-8"))
    for name, (rows, span) in PICTURES.items():
        drawn = draw.draw(dashboard, ask, spans(told)[span], rows=rows, bands=parts(told))
        file = directory / name.replace(".png", ".svg")
        file.write_text(drawn, encoding="utf-8")
        page = browser.page(draw.WIDTH, 100)
        page.goto(file.resolve().as_uri())
        page.screenshot(directory / name, whole=True)
        page.close()


def alert_times(ask: Ask, told: Json) -> list[Json]:
    """Of each alert: when it was pending and firing first, and whether it still is at the end."""
    span = Range(told["start"], told["end"], 5.0)
    return [
        {
            "alert": alert.name,
            "severity": alert.severity,
            "pending": alert.since("pending", span),
            "firing": alert.since("firing", span),
            "ended": next(
                (
                    at
                    for at, before, now in zip(span.times[1:], alert.states, alert.states[1:], strict=False)
                    if before == "firing" and now is None
                ),
                None,
            ),
        }
        for alert in draw.alerts(ask, span)
    ]


def answers_of(ask: Ask, begin: float, end: float) -> dict[str, int]:
    """Status -> HTTP answers of the API between two times: the differences of its counters."""
    counted: list[dict[str, int]] = []
    for at in (begin, end):
        query = 'sum by (status) (ragged_serve_http_answers_total{route=~"/v1/.*"})'
        found = ask("query", {"query": query, "time": at})["result"]
        counted.append({series["metric"]["status"]: int(float(series["value"][1])) for series in found})
    return {status: number - counted[0].get(status, 0) for status, number in counted[1].items()}


def tell(told: Json) -> list[str]:
    """The day in lines of Markdown; times count from its beginning."""

    def at(moment: float | None) -> str:
        return "" if moment is None else "{:.0f}:{:02.0f}".format(*divmod(round(moment - told["start"]), 60))

    lines = [
        f"flood {at(told['flood'])} to {at(told['calm'])}, kill {at(told['kill'])}, end {at(told['end'])}",
        "",
        "| alert | severity | pending | firing | ended |",
        "|---|---|---|---|---|",
    ]
    for one in told["alerts"]:
        times = " | ".join(at(one[key]) for key in ("pending", "firing", "ended"))
        lines.append(f"| {one['alert']} | {one['severity']} | {times} |")
    lines += [
        "",
        "| | completed | refused | failed | lost | TTFT ms: median, p99 | longest gap ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in told["loads"].items():
        counts = " | ".join(str(found.get(key)) for key in ("completed", "refused", "failed_with_an_error", "lost"))
        lines.append(
            f"| {name} | {counts} | {found.get('median_ttft_ms', 0):.0f}, {found.get('p99_ttft_ms', 0):.0f} |"
            f" {found.get('p99_itl_ms', 0):.0f} |"
        )
    lines += ["", *(f"HTTP answers, {part}: {found}" for part, found in told["answers"].items())]
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--redraw", action="store_true", help="from the data of an earlier day in this directory")
    parser.add_argument(
        "--short", action="store_true", help="two minutes: tries the machinery, tells nothing of alerts"
    )
    options = parser.parse_args(arguments)
    program, chromium = os.environ.get(VARIABLE) or shutil.which("prometheus"), find()
    if program is None or chromium is None:
        sys.exit(f"needs Prometheus (on PATH, or the variable {VARIABLE}) and a Chromium or Chrome")
    options.directory.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what runs is ended then, too
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    file = options.directory / "day.json"
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as ends:
        browser = ends.enter_context(Chromium(chromium, Path(scratch)))
        if options.redraw:
            told = json.loads(file.read_text(encoding="utf-8"))
            prometheus = ends.enter_context(watched(program, options.directory, None))
            ask = draw.prometheus(prometheus)
        else:
            url = ends.enter_context(served(options.directory))
            prometheus = ends.enter_context(watched(program, options.directory, httpx.URL(url).port))
            say(f"server {url}, Prometheus {prometheus}")
            told = live(SHORT if options.short else Day(), options.directory, url, prometheus, browser, say)
            ask = draw.prometheus(prometheus)
            whiles = {"calm": ("start", "flood"), "flood": ("flood", "calm"), "afterwards": ("calm", "end")}
            told["answers"] = {part: answers_of(ask, told[a], told[b]) for part, (a, b) in whiles.items()}
            told["alerts"] = alert_times(ask, told)
            file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        pictures(told, ask, options.directory, browser)
    sizes = {path.name: path.stat().st_size for path in sorted(options.directory.glob("bad_day_*.png"))}
    print("\n".join(tell(told)))
    print(json.dumps({"bench": "bad_day", "pictures": sizes}))
    if too_large := [name for name, size in sizes.items() if size > MAX_BYTES]:
        sys.exit(f"too large for a page: {', '.join(too_large)}")


if __name__ == "__main__":
    main()
