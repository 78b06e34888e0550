"""Pictures of the page at /ui: an ordinary load, an overload, and a kill, each as a headless Chromium shows it.

    .venv/bin/python -m loadtests.picture_ui [ordinary] [overload] [kill] [--directory docs]

The whole service runs in this process (tests/api/house.py) with the simulated model: what a step costs, and so the picture,
does not hang on this machine. The loads are seeded; who runs where, and which step is the last one, is not. Writes
ui.png, ui_overload.png and ui_kill.png, and says what each shows. Needs a Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.api.house import House
from tests.ui.chromium import Chromium, find

ROOT = Path(__file__).parent.parent

ENGINE = {
    "block_size": 16,
    "num_kv_blocks": 320,
    "max_model_len": 2048,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 48,
}
STEP = {"seconds_per_step": 0.02, "seconds_per_token": 0.00005}
ANSWER = (
    "Every step takes one token for each of us who decode, and fills what is left of the budget with your prompt. " * 6
)
WIDTH, HEIGHT = 1040, 950
MAX_BYTES = 200_000


class Scene(NamedTuple):
    file: str
    per_second: float
    """Requests that arrive, Poisson."""
    max_queued: int
    is_ready: str
    """JavaScript that is true when the picture may be taken."""
    kills: bool = False


FULL = "[...document.querySelectorAll('.replica:not(.gone) canvas')].every((c) => c.dataset.steps > 90)"
LOG = "document.querySelector('#log').textContent"
SCENES = {
    "ordinary": Scene("ui.png", 9.0, 256, FULL),
    "overload": Scene("ui_overload.png", 60.0, 48, f"{FULL} && /[0-9]{{2}} requests refused/.test({LOG})"),
    "kill": Scene("ui_kill.png", 9.0, 256, f"{LOG}.includes('resumed') && /go(es)? on here/.test({LOG})", kills=True),
}


class Load:
    """Clients that come at random and read their answers, until it is closed."""

    def __init__(self, url: str, per_second: float) -> None:
        self._url = url
        self._rng = random.Random(8)
        self._per_second = per_second
        self._over = threading.Event()
        self._clients: list[threading.Thread] = []
        self.statuses: dict[int, int] = {}
        self._thread = threading.Thread(target=self._arrive, daemon=True)
        self._thread.start()

    def _arrive(self) -> None:
        while not self._over.wait(self._rng.expovariate(self._per_second)):
            length = self._rng.choice((6, 12, 20, 40, 90, 220))
            words = " ".join(self._rng.choice(("harbour", "gull", "wave", "sail", "night")) for _ in range(length))
            body = {"prompt": words, "max_tokens": self._rng.randrange(20, 140), "ignore_eos": True}
            client = threading.Thread(target=self._ask, args=(body,), daemon=True)
            client.start()
            self._clients.append(client)

    def _ask(self, body: dict[str, Any]) -> None:
        with contextlib.suppress(httpx.HTTPError):
            status = httpx.post(self._url + "/v1/completions", json=body, timeout=120).status_code
            self.statuses[status] = self.statuses.get(status, 0) + 1

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        for client in self._clients:
            client.join()


@contextlib.contextmanager
def served(scene: Scene) -> Iterator[House]:
    answers = {"batch": ANSWER}
    model = {"model": "demo", "runner": "simulated", "simulated": {**STEP, "answers": answers}}
    router = {"max_queued_requests": scene.max_queued, "max_queue_seconds": 8.0}
    with House({"model": model, "engine": ENGINE}, user_config={"router": router, "log_level": "ERROR"}) as house:
        yield house


def take(scene: Scene, browser: Chromium, directory: Path) -> dict[str, Any]:
    with served(scene) as house:
        page = browser.page(WIDTH, HEIGHT)
        page.goto(house.url + "/ui")
        page.wait("document.querySelectorAll('canvas').length == 2")
        load = Load(house.url, scene.per_second)
        page.wait(FULL)
        page.js("document.querySelector('#prompt').focus()")
        page.type("What is ragged, continuous batching?")
        page.press("Enter")
        page.wait("document.querySelector('#messages .model')?.textContent.length > 60")
        if scene.kills:
            _kill_the_busiest(house)
        page.wait(scene.is_ready)
        if scene.kills:
            steps = page.js("document.querySelector('.replica:not(.gone) canvas').dataset.steps")
            page.wait(f"document.querySelector('.replica:not(.gone) canvas').dataset.steps > {steps} + 25")
        page.js("window.scrollTo(0, 0)")
        file = directory / scene.file
        page.screenshot(file)
        page.close()
        load.close()
        assert page.troubles == [], page.troubles
    size = file.stat().st_size
    assert size < MAX_BYTES, f"{file} has {size} bytes"
    return {"file": scene.file, "bytes": size, "statuses": load.statuses}


def _kill_the_busiest(house: House) -> None:
    victim = max(house.replicas, key=lambda replica: len(replica.table.rows()))

    async def kill() -> None:
        victim.reporter.cancel()
        house.transport.kill(victim.replica_id)

    house.run(kill())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scenes", nargs="*", help=f"of {', '.join(SCENES)}; all of them by default")
    parser.add_argument("--directory", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    path = find()
    if path is None:
        sys.exit("there is no Chromium or Chrome on this machine")
    names = options.scenes or list(SCENES)
    if unknown := set(names) - set(SCENES):
        parser.error(f"no scene is called {unknown.pop()!r}; there are {', '.join(SCENES)}")
    taken = []
    with tempfile.TemporaryDirectory() as scratch, Chromium(path, Path(scratch)) as browser:
        for name in names:
            taken.append(take(SCENES[name], browser, options.directory))
            print(f"{name}: {taken[-1]}")
    print(json.dumps({"pictures": taken}))


if __name__ == "__main__":
    main()
