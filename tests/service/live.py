"""A real service on a real Ray, and what a test may do with it: clients over HTTP, a look into both books, kills by pid.

The server runs in a process of its own (launch.py with HAProxy, or a bare `serve run`). The test process joins its Ray as
one more driver: it reads the router's books, each replica's table, Serve's status, and hands in changed configurations.
The model is simulated: what an answer must be follows from its prompt and its seed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import psutil
import pytest
import yaml  # type: ignore[import-untyped]
from ray._private import auto_init_hook

import serve_app
from serve_app.config import ServeArgs
from serve_app.engine.simulated_runner import _ROOT, _mix
from serve_app.routing.leases import BookedLease
from serve_app.routing.ray_router import NAMESPACE, actor_name
from serve_app.serve_run import free_port
from tests.tiny_models import TOKENIZER_SIZE

# Else a thread that Ray leaves behind may start a new Ray here after the last one has ended. (Ray reads the variable for it
# when it is first imported, which is too early.)
auto_init_hook.enable_auto_connect = False

REPOSITORY = Path(serve_app.__file__).parent.parent
MODES = ("launch", "serve run")
"""launch: `python -m serve_app.launch`, with HAProxy. serve run: Ray's own command and its own proxy."""
APP = "ragged-serve"
KEY = "the-key"
NAMES = ["simulated", "simulated-alias"]
BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 16, 256, 4096
STEP_SECONDS = 0.01
INGRESS_DRAIN_SECONDS = 8.0
PATIENCE = 120.0
"""Seconds after which a condition will never hold. Only a failure waits so long."""
POLICY = {"policy_function": "serve_app.replica.autoscaling:CommittedTokensPolicy"}

Json = dict[str, Any]

launched = pytest.mark.parametrize("service", ["launch"], indirect=True)
"""For a test that need not run both ways."""


def make_config(model: Path, port: int, mode: str) -> Json:
    """deploy/config.yaml with a simulated model, two ingresses, two replicas with small pools.

    With "launch" the number of replicas is the policy's, between two and two: a change of the bounds applies in place. With
    "serve run" what runs on a replica that leaves has a second to end there.
    """
    config: Json = yaml.safe_load((REPOSITORY / "deploy" / "config.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] = {
        "model": {
            "model": str(model),
            "served_model_name": NAMES,
            "runner": "simulated",
            "simulated": {"seconds_per_step": STEP_SECONDS},
        },
        "engine": {"block_size": BLOCK_SIZE, "num_kv_blocks": NUM_BLOCKS, "max_model_len": MAX_MODEL_LEN},
        "api": {"explain": True},
        "drain": {"ingress_seconds": INGRESS_DRAIN_SECONDS},
    }
    if mode == "serve run":
        config["applications"][0]["args"]["drain"]["replica_seconds"] = 1.0
    ingress, replica = (deployment_of(config, name) for name in ("Ingress", "Replica"))
    ingress["num_replicas"] = 2
    if mode == "launch":
        del replica["num_replicas"]
        replica["autoscaling_config"] = {
            "min_replicas": 2,
            "max_replicas": 2,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 1,
            "upscale_delay_s": 0.5,
            "downscale_delay_s": 1,
            "policy": POLICY,
        }
    return config


def deployment_of(config: Json, name: str) -> Json:
    found: Json = next(d for d in config["applications"][0]["deployments"] if d["name"] == name)
    return found


def wait_until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Polls until ``condition()`` is true, and returns what it returned."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} never held"
        time.sleep(0.02)
    return value


class Look(NamedTuple):
    """Both books at about the same time."""

    ledger: dict[str, tuple[str, int]]
    """Lease -> (replica, blocks), as the router has it."""
    tables: dict[str, tuple[str, int]]
    """The same, as the replicas have it."""

    def differences(self) -> set[tuple[str, Any, Any]]:
        """(lease, in the ledger or None, in a table or None) where the two are not the same."""
        ledger, tables = self.ledger, self.tables
        return {
            (lease_id, ledger.get(lease_id), tables.get(lease_id))
            for lease_id in ledger.keys() | tables.keys()
            if ledger.get(lease_id) != tables.get(lease_id)
        }


class Service:
    """One server. ``start`` returns when it is ready."""

    def __init__(self, mode: str, model: Path, directory: Path, config: Json | None = None) -> None:
        """``config``: another one than `make_config`'s, whose port is set here."""
        self.mode = mode
        self.port = free_port(0)
        self.url = f"http://127.0.0.1:{self.port}"
        self.config = make_config(model, self.port, mode) if config is None else config
        self.config["http_options"] = {"host": "127.0.0.1", "port": self.port}
        self._file = directory / "config.yaml"
        self._file.write_text(yaml.safe_dump(self.config))
        self._output = directory / "output.txt"
        self._process: subprocess.Popen[bytes] | None = None
        self._tree: list[psutil.Process] = []

    # ---- its life ------------------------------------------------------------------------------------------------

    def start(self) -> Service:
        command = [sys.executable, "-m", "serve_app.launch", str(self._file)]
        if self.mode == "serve run":
            command = [str(Path(sys.executable).parent / "serve"), "run", str(self._file)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environ |= {
            "RAY_ADDRESS": "local",
            "RAY_AUTH_MODE": "disabled",  # a token file in the home would switch it on, and this process has no token
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAGGED_SERVE_API_KEYS": f"{KEY},another",
        }
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=REPOSITORY,
                env=environ,
                start_new_session=True,
                # A shell may have switched interrupts off for all that it starts in the background, us included.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
            )
        with httpx.Client(timeout=5) as client:
            wait_until(lambda: self._is_up(client), "readiness")
        self._join()
        self.check_whole()
        return self

    def _is_up(self, client: httpx.Client) -> bool:
        assert self._process is None or self._process.poll() is None, self.output
        with contextlib.suppress(httpx.HTTPError):
            return client.get(f"{self.url}/ready").status_code == 200
        return False

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def _join(self) -> None:
        import ray

        (raylet,) = (process for process in self.processes() if process.name() == "raylet")
        (address,) = (part.split("=", 1)[1] for part in raylet.cmdline() if part.startswith("--gcs-address="))
        assert not address.endswith(":0"), address
        self.ray_address = address
        ray.init(address=address, namespace="serve", log_to_driver=False)
        self._ray = ray
        from ray import serve

        self._replicas = serve.get_deployment_handle("Replica", APP)

    def processes(self) -> list[psutil.Process]:
        """Everything that it started and that still lives."""
        assert self._process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            self._tree = list({*self._tree, *psutil.Process(self._process.pid).children(recursive=True)})
        return [p for p in self._tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def stop(self) -> list[psutil.Process]:
        """As Ctrl-C does. Returns what it had to kill of what was left."""
        assert self._process is not None
        self.processes()
        if hasattr(self, "_ray"):
            from ray.serve.context import _set_global_client

            self._replicas.shutdown()
            _set_global_client(None)
            self._ray.shutdown()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
        psutil.wait_procs(self.processes(), 10)
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        psutil.wait_procs(left, 10)
        return left

    # ---- what Serve knows ----------------------------------------------------------------------------------------

    def pids(self, deployment: str) -> dict[str, int]:
        """Id -> process, of the replicas of a deployment that run."""
        found = self._replicas_of(deployment)
        return {replica["replica_id"]: replica["pid"] for replica in found if replica["state"] == "RUNNING"}

    def states(self, deployment: str) -> dict[str, str]:
        """Id -> STARTING, RUNNING, STOPPING, ..."""
        found = self._replicas_of(deployment)
        return {replica["replica_id"]: replica["state"] for replica in found}

    def _replicas_of(self, deployment: str) -> list[Json]:
        """None at the beginning of a deployment of the application."""
        found: list[Json] = self._details()["deployments"].get(deployment, {"replicas": []})["replicas"]
        return found

    def _details(self) -> Json:
        from ray.serve.context import _get_global_client

        details: Json = _get_global_client().get_serve_details()["applications"][APP]
        return details

    def controller_pid(self) -> int:
        """Of Ray Serve's controller. Waits while it is being started anew."""
        from ray.serve.context import _get_global_client

        pid: int = self._ray.get(_get_global_client()._controller.get_pid.remote(), timeout=PATIENCE)
        return pid

    def is_whole(self, num_replicas: int = 2) -> bool:
        """All of its parts run, and the router has heard of the replicas."""
        details = self._details()
        found = {name: one["replicas"] for name, one in details["deployments"].items()}
        wanted = {"Ingress": 2, "Replica": num_replicas}
        if details["status"] != "RUNNING" or any(
            [replica["state"] for replica in found.get(name, [])] != ["RUNNING"] * number
            for name, number in wanted.items()
        ):
            return False
        snapshot = self.snapshot()
        known = snapshot["replicas"]
        return (
            set(known) == {replica["replica_id"] for replica in found["Replica"]}
            and not any(replica["is_silent"] or replica["is_draining"] for replica in known.values())
            and snapshot["num_holders"] >= 2
        )

    def check_whole(self, num_replicas: int = 2) -> None:
        wait_until(lambda: self.is_whole(num_replicas), "a whole service")

    def deploy(self, config: Json) -> None:
        """As `serve deploy` does, whose REST server a Ray without a dashboard lacks. Returns when it has been taken."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        with warnings.catch_warnings():
            # metrics_interval_s: Serve calls it deprecated, and goes by it.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(ray|pydantic)\.")
            schema = ServeDeploySchema.model_validate(copy.deepcopy(config))
        _get_global_client().deploy_apps(schema, _blocking=False)

    # ---- the two books -------------------------------------------------------------------------------------------

    def ask_router(self, method: str) -> Any:
        """`Router.snapshot` or `Router.books`, of the router that lives now: it may be starting."""
        from ray.exceptions import ActorDiedError, ActorUnavailableError

        deadline = time.monotonic() + PATIENCE
        name = actor_name(APP, ServeArgs.parse(self.config["applications"][0]["args"]).model.key)
        while True:
            actor = self._ray.get_actor(name, namespace=NAMESPACE)
            try:
                return self._ray.get(getattr(actor, method).remote(), timeout=PATIENCE)
            except (ActorUnavailableError, ActorDiedError):  # the latter where it died under this very call
                assert time.monotonic() < deadline, "the router never came back"
                time.sleep(0.05)

    def snapshot(self) -> Json:
        found: Json = self.ask_router("snapshot")
        return found

    def change(self, deployment: str, **values: Any) -> None:
        """Deploys the configuration with other values for a deployment, and keeps them."""
        deployment_of(self.config, deployment).update(values)
        self.deploy(self.config)

    def books(self) -> dict[str, tuple[BookedLease, ...]]:
        """Each replica's live leases, as the ledger has them."""
        found: dict[str, tuple[BookedLease, ...]] = self.ask_router("books")
        return found

    def holders(self) -> dict[str, str]:
        """Lease -> the ingress that holds it, as the ledger has it."""
        return {row.lease_id: row.holder_id for rows in self.books().values() for row in rows}

    def describe(self) -> dict[str, Json]:
        """What each replica says of itself, asked of all at once."""
        asked = {
            replica_id: self._replicas.options(method_name="describe", session_id=replica_id).remote()
            for replica_id in self.pids("Replica")
        }
        return {replica_id: answer.result(timeout_s=PATIENCE) for replica_id, answer in asked.items()}

    def look(self) -> Look:
        tables = {
            row.lease_id: (replica_id, row.num_blocks)
            for replica_id, said in self.describe().items()
            for row in said["leases"]
        }
        ledger = {
            row.lease_id: (replica_id, row.num_blocks) for replica_id, rows in self.books().items() for row in rows
        }
        return Look(ledger, tables)

    def is_at_rest(self) -> bool:
        """Nobody runs, waits, or holds anything, in either book."""
        snapshot = self.snapshot()
        return (
            not snapshot["num_leases"]
            and not snapshot["num_queued_requests"]
            and not any(self.books().values())
            and all(
                not said["leases"]
                and not said["num_unfinished"]
                and not said["num_used_blocks"]
                and said["num_free_blocks"] == said["num_blocks"]
                for said in self.describe().values()
            )
        )

    def check_rest(self) -> None:
        wait_until(self.is_at_rest, "rest")

    # ---- clients -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def client(self) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE) as made:
            yield made

    def stream(self, number: int, max_tokens: int, **fields: Any) -> Stream:
        """Starts a streamed completion, read on a thread of its own."""
        return Stream(self.url, number, max_tokens, fields)


def prompt_of(number: int) -> list[int]:
    """A prompt that no other number has. Lengths of every kind, from one token to a few blocks."""
    return [1 + number // 90, 1 + number % 90] + [(7 * number + i) % TOKENIZER_SIZE for i in range((number * 13) % 45)]


def tokens_of(number: int, max_tokens: int, choice_index: int = 0) -> list[int]:
    """What the service must answer to ``prompt_of(number)`` and the seed ``number``, by the simulated model's definition."""
    digest = _ROOT
    for token in prompt_of(number):
        digest = _mix(digest, token)
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(_mix(digest, _mix(number, choice_index)) % TOKENIZER_SIZE)
        digest = _mix(digest, tokens[-1])
    return tokens


def completion(number: int, max_tokens: int, **fields: Any) -> Json:
    """The body that asks for ``tokens_of(number, max_tokens)``."""
    return {
        "model": NAMES[0],
        "prompt": prompt_of(number),
        "seed": number,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }


HEADERS = {"authorization": f"Bearer {KEY}"}


class Stream:
    """A client that reads one streamed completion to its end, or until ``hang_up``."""

    def __init__(self, url: str, number: int, max_tokens: int, fields: Json) -> None:
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.is_done = False
        """[DONE] has come."""
        self.error: Exception | None = None
        """What broke it."""
        self._number, self._max_tokens = number, max_tokens
        self._body = completion(number, max_tokens, stream=True, **fields)
        self._url = url
        self._hangs_up = False
        self._thread = threading.Thread(target=self._read, name=f"stream {number}", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with (
                httpx.Client(timeout=PATIENCE, headers=HEADERS) as client,
                client.stream("POST", f"{self._url}/v1/completions", json=self._body) as response,
            ):
                if response.status_code != 200:
                    raise AssertionError(f"status {response.status_code}: {response.read()!r}")
                for line in response.iter_lines():
                    if self._hangs_up:
                        return
                    self._take(line)
        except Exception as error:
            self.error = error

    def _take(self, line: str) -> None:
        if not line:
            return
        assert line.startswith("data: "), line
        assert not self.is_done, f"{line} after the end"
        if line == "data: [DONE]":
            self.is_done = True
            return
        event = json.loads(line.removeprefix("data: "))
        assert "error" not in event, event
        (choice,) = event["choices"]
        self.tokens += choice["token_ids"]
        self.finish_reason = choice["finish_reason"] or self.finish_reason

    def hang_up(self) -> None:
        """Goes away with the next event."""
        self._hangs_up = True

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> Stream:
        self._thread.join(PATIENCE)
        assert self.has_ended, "a stream never ended"
        return self

    def check(self) -> None:
        """It has ended as one that nothing disturbed."""
        self.join()
        assert self.error is None, repr(self.error)
        assert self.tokens == tokens_of(self._number, self._max_tokens)
        assert (self.finish_reason, self.is_done) == ("length", True)
