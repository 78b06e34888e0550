"""The launcher: its checks, its words, and one run each of a server that starts, and of one that cannot."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml  # type: ignore[import-untyped]

from serve_app import launch, serve_run
from serve_app.launch import Screen, descendants
from serve_app.serve_run import (
    CannotStartError,
    Drain,
    check_port,
    check_ray,
    environment,
    free_port,
    host_and_port,
    real_error,
    targets,
    why_no_haproxy,
)
from tests.tiny_models import make_tiny_model

REPOSITORY = Path(launch.__file__).parent.parent


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


# ---- the surroundings ------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_said(listener: socket.socket) -> None:
    port = port_of(listener)
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(CannotStartError, match=rf"port {port} is in use: .*or change http_options.port in my.yaml"):
            check_port(host, port, "my.yaml")
    assert free_port(port) != port
    listener.close()
    check_port("127.0.0.1", port, "my.yaml")
    assert free_port(port) == port


def test_a_host_that_is_not_here_is_said() -> None:
    with pytest.raises(
        CannotStartError, match=r"cannot listen on 192\.0\.2\.77:0 \(.+\): change http_options in my.yaml"
    ):
        check_port("192.0.2.77", 0, "my.yaml")


def test_which_ray(listener: socket.socket) -> None:
    live = f"127.0.0.1:{port_of(listener)}"
    assert check_ray({}, None) == "local"
    assert check_ray({"RAY_ADDRESS": ""}, None) == "local"
    assert check_ray({"RAY_ADDRESS": "local"}, live) == "local"
    assert check_ray({"RAY_ADDRESS": live}, None) == live
    assert check_ray({"RAY_ADDRESS": "auto"}, live) == live
    assert check_ray({"RAY_ADDRESS": f"ray://{live}"}, None) == f"ray://{live}"
    with pytest.raises(CannotStartError, match=rf"already running here, at {live}: .* RAY_ADDRESS={live}; .* ray stop"):
        check_ray({}, live)
    listener.close()
    assert check_ray({}, live) == "local"  # the file is older than the end of that Ray
    with pytest.raises(CannotStartError, match="but nothing answers there"):
        check_ray({"RAY_ADDRESS": live}, None)
    for running in (None, live):
        with pytest.raises(CannotStartError, match="RAY_ADDRESS is auto, but no Ray is running here"):
            check_ray({"RAY_ADDRESS": "auto"}, running)
    with pytest.raises(CannotStartError, match="RAY_ADDRESS is 'here'; it must be host:port, auto or local"):
        check_ray({"RAY_ADDRESS": "here"}, None)


def test_addresses() -> None:
    assert host_and_port("10.0.0.1:6379") == ("10.0.0.1", 6379)
    assert host_and_port("ray://[::1]:10001/") == ("::1", 10001)
    assert host_and_port("auto") is host_and_port("host:") is None


def test_what_the_user_set_wins() -> None:
    chosen = environment({}, with_haproxy=True, work="/w")
    assert chosen["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert float(chosen["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"]) < 5
    assert int(chosen["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= 3600
    assert all(chosen[name].startswith("/w/") for name in chosen if name.endswith(("_LOC", "_PATH", "_FILE")))
    given = {"RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "5", "RAY_USAGE_STATS_ENABLED": "1"}
    assert environment(given, with_haproxy=True, work="/w").keys() == chosen.keys() - given.keys()
    without = environment({"RAY_SERVE_ENABLE_HA_PROXY": "0"}, with_haproxy=True, work="/w")
    assert not [name for name in without if "HAPROXY" in name or "HA_PROXY" in name]
    assert without["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] == "1"
    assert environment({}, with_haproxy=False, work="/w")["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


def test_haproxy_is_tried(tmp_path: Path) -> None:
    for name, script, expected in (
        ("sound", "exit 0", None),
        ("broken", "exit 3", "does not run (exit code 3)"),
    ):
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        reason = why_no_haproxy({"RAY_SERVE_HAPROXY_BINARY_PATH": str(file)})
        assert reason == (None if expected is None else f"{file} {expected}")
    assert "does not run" in (why_no_haproxy({"RAY_SERVE_HAPROXY_BINARY_PATH": str(tmp_path / "none")}) or "")


# ---- the drain -------------------------------------------------------------------------------------------------------


class WatchedDrain(Drain):
    """One router, of which the test says how many requests run."""

    def __init__(self, seconds: float) -> None:
        self.said: list[str] = []
        self.looks: list[float] = []
        self.num_left = 1
        super().__init__(lambda _, text: self.said.append(text), {"router": seconds})

    def _look(self, name: str, seconds: float) -> int:
        self.looks.append(seconds)
        return self.num_left


def test_a_drain_ends_with_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_run, "DRAIN_LOOK_SECONDS", 0.001)
    drain = WatchedDrain(600.0)

    def end_it() -> None:
        while len(drain.looks) < 3:
            time.sleep(0.001)
        drain.num_left = 0

    threading.Thread(target=end_it).start()
    with pytest.raises(KeyboardInterrupt):
        drain.on_signal(signal.SIGINT, None)
    assert drain.said[:2] == ["draining: 1 requests run or wait"] * 2
    assert drain.looks == sorted(drain.looks, reverse=True), "the time that is left"


def test_a_drain_ends_at_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_run, "DRAIN_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(serve_run, "TELL_SECONDS", 0.0)
    drain = WatchedDrain(0.02)
    with pytest.raises(KeyboardInterrupt):
        drain.on_signal(signal.SIGINT, None)
    assert drain.num_left == 1
    assert drain.looks[-1] < 0


def test_a_second_signal_ends_at_once() -> None:
    drain = WatchedDrain(600.0)
    before = signal.signal(signal.SIGUSR1, drain.on_signal)

    def signal_again() -> None:
        while not drain.looks:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=signal_again)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            drain.on_signal(signal.SIGUSR1, None)
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
        assert drain.num_left == 1, "it was interrupted"
        drain.num_left = 0


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("", ""),
        ("Deployment 'Replica' takes long to be scheduled.", "Deployment 'Replica' takes long to be scheduled."),
        (
            (
                "Deploying app 'a' failed with exception:\nTraceback (most recent call last):\n"
                '  File "x.py", line 3, in f\n'
                "    raise E\nserve_app.errors.ConfigurationError: args.x is 3; it must be 4\n"
            ),
            "args.x is 3; it must be 4",
        ),
        (
            (
                "The deployment failed to start 1 times in a row. Error:\n\x1b[36mray::ServeReplica.initialize()\x1b[39m "
                '(pid=1)\n    f()\nRuntimeError: Traceback (most recent call last):\n  File "y.py", line 1\n'
                "FileNotFoundError: no file 'z'"
            ),
            "FileNotFoundError: no file 'z'",
        ),
        (
            "ray.exceptions.RayTaskError(WeightsError): serve_app.errors.WeightsError: serve_app.errors.WeightsError: cut",
            "cut",
        ),
    ],
)
def test_the_real_error(message: str, expected: str) -> None:
    assert real_error(message) == expected


def test_targets_of_a_file() -> None:
    deployments = [
        {"name": "Ingress"},
        {"name": "Replica", "num_replicas": 3},
        {"name": "Scaled", "num_replicas": "auto", "autoscaling_config": {"min_replicas": 2, "initial_replicas": 4}},
    ]
    assert targets({"deployments": deployments}) == {"Ingress": 1, "Replica": 3, "Scaled": 4}
    assert targets({"deployments": None}) == {}


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_line() -> None:
    file = io.StringIO()
    screen = Screen(file, time.monotonic())
    for text in ("a", "a", "b"):
        screen.show(text)
    screen.say("c")
    assert file.getvalue() == "[  0 s] a\n[  0 s] b\nc\n"
    file = FakeTerminal()
    screen = Screen(file, time.monotonic())
    screen.show("a")
    screen.show("b")
    screen.say("c")
    assert file.getvalue() == "\r\x1b[K[  0 s] a\r\x1b[K[  0 s] b\r\x1b[Kc\n"


# ---- processes -------------------------------------------------------------------------------------------------------

FAMILY = """
import os, signal, subprocess, sys, time
from serve_app import launch, serve_run
launch.adopt_orphans()
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
middle = f'''import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {stubborn!r}], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
'''
launch.REST_SECONDS = 0.3
child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", middle])
assert child.wait() == 0
before = launch.descendants(os.getpid())
killed = launch.end_descendants(child, 0.1)
print(len(before), killed, len(launch.descendants(os.getpid())))
"""


def test_an_orphan_in_a_session_of_its_own_is_found_and_killed() -> None:
    """Its parent has ended, it ignores SIGTERM, and it left the process group."""
    done = subprocess.run([sys.executable, "-c", FAMILY], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.stdout.split() == ["1", "1", "0"], done.stderr


def test_descendants_as_psutil_sees_them() -> None:
    command = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '600'])"]
    child = subprocess.Popen(command, start_new_session=True)
    try:
        me = psutil.Process(child.pid)
        while not me.children():
            time.sleep(0.01)
        assert descendants(child.pid) == [one.pid for one in me.children(recursive=True)]
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert descendants(child.pid) == []


# ---- whole runs ------------------------------------------------------------------------------------------------------


def write_config(tmp_path: Path, model: str, port: int) -> Path:
    """deploy/config.yaml with a simulated model at another port."""
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "deploy" / "config.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    args = {"model": {"model": model, "served_model_name": "tiny", "runner": "simulated"}}
    config["applications"][0]["args"] = args | {"engine": {"num_kv_blocks": 96, "max_model_len": 512}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


class Run:
    """The launcher as a process, its output in a file."""

    def __init__(self, file: Path, tmp_path: Path, **variables: str) -> None:
        self._output = tmp_path / "output.txt"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # Beside another Ray on this machine, if there is one.
        environ |= {"RAY_ADDRESS": "local", **variables}
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve_app.launch", str(file)],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
                env=environ,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 180.0) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def close(self) -> None:
        for _ in range(2):  # the second time at once
            if self.process.poll() is None:
                self.process.terminate()
                time.sleep(0.5)
        self.process.wait(60)


def test_a_wrong_file_is_said_and_nothing_starts(tmp_path: Path) -> None:
    file = write_config(tmp_path, str(tmp_path), 8000)
    file.write_text(file.read_text().replace("num_kv_blocks", "num_kv_block"))
    run = Run(file, tmp_path)
    assert run.process.wait(120) == 2, run.output
    assert "args.engine.num_kv_block is 96; that key is unknown; did you mean 'num_kv_blocks'?" in run.output
    assert "Traceback" not in run.output


@pytest.mark.slow
def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    run = Run(write_config(tmp_path, str(tmp_path / "nowhere"), free_port(0)), tmp_path)
    try:
        assert run.process.wait(180) == 1, run.output
    finally:
        run.close()
    assert f"it cannot be served: model '{tmp_path}/nowhere' is not a directory\n" in run.output
    assert "Traceback" not in run.output


@pytest.mark.slow
def test_it_serves_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Without HAProxy, to the first SIGINT. (With it, to SIGTERM: below.)"""
    port = free_port(0)
    model = make_tiny_model(tmp_path / "model", vocab_size=300, eos=())
    file = write_config(tmp_path, str(model), port)
    run = Run(file, tmp_path, RAY_SERVE_ENABLE_HA_PROXY="0")
    processes: list[psutil.Process] = []
    try:
        run.wait_for("ready after ")
        assert f"curl -N http://127.0.0.1:{port}/v1/chat/completions" in run.output or not run.wait_for("curl -N", 10)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 5
        processes = psutil.Process(run.process.pid).children(recursive=True)
        work = Path(processes[0].cmdline()[-1])
        assert work.is_dir()
        names = [process.name() for process in processes]
        assert len(names) > 6
        assert "haproxy" not in names
        assert "with Ray Serve's own proxy" in run.output

        # The port is in use now, and a second launch says so.
        (tmp_path / "second").mkdir()
        second = Run(file, tmp_path / "second")
        assert second.process.wait(120) == 2, second.output
        assert f"port {port} is in use" in second.output

        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(120) == 0, run.output
    finally:
        run.close()
    left = [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert left == []
    assert "had to be killed" not in run.output
    assert run.output.endswith("ended\n")
    assert not work.exists()


class Reader(threading.Thread):
    """A client that reads one streamed completion to its end."""

    def __init__(self, port: int, num_tokens: int) -> None:
        super().__init__(daemon=True)
        body = {"model": "tiny", "prompt": "on and on", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        self._request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        self.events: list[str] = []
        self.status = 0
        self.retry_after: str | None = None
        self.start()

    def run(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=120) as answer:
                self.status = answer.status
                for line in answer:
                    if line.strip():
                        self.events.append(line.decode().strip().removeprefix("data: "))
        except urllib.error.HTTPError as error:
            self.status, self.retry_after = error.code, error.headers["retry-after"]
            self.events.append(error.read().decode())

    @property
    def num_tokens(self) -> int:
        """One event a token, one with the reason why it ends, and [DONE]."""
        return sum("choices" in event for event in self.events)


@pytest.mark.slow
def test_a_signal_lets_streams_end_and_says_what_it_cuts(tmp_path: Path) -> None:
    """Two streams run when SIGTERM comes. One ends in time; the other is longer than the time, and is told so."""
    port = free_port(0)
    model = make_tiny_model(tmp_path / "model", vocab_size=300, eos=())
    file = write_config(tmp_path, str(model), port)
    config = yaml.safe_load(file.read_text())
    args = config["applications"][0]["args"]
    args["model"]["simulated"] = {"seconds_per_step": 0.02}
    args["engine"] |= {"max_model_len": 2000, "num_kv_blocks": 200}
    args["drain"] = {"ingress_seconds": 10}
    file.write_text(yaml.safe_dump(config))
    run = Run(file, tmp_path)
    processes: list[psutil.Process] = []
    try:
        run.wait_for("ready after ")
        short, long = Reader(port, 150), Reader(port, 1900)
        deadline = time.monotonic() + 60
        while not (short.num_tokens and long.num_tokens):
            assert time.monotonic() < deadline, (short.events, long.events)
            time.sleep(0.01)
        processes = psutil.Process(run.process.pid).children(recursive=True)
        work = Path(processes[0].cmdline()[-1])
        assert work.is_dir()
        assert "haproxy" in [process.name() for process in processes]
        run.process.send_signal(signal.SIGTERM)
        run.wait_for("draining: nothing new is taken, running answers get up to 10 s")
        refused = Reader(port, 3)
        while refused.is_alive() or refused.status == 200:
            assert time.monotonic() < deadline, refused.events
            refused.join()
            if refused.status == 200:  # it came before the router knew
                refused = Reader(port, 3)
        assert refused.status == 503, refused.events
        assert 1 <= int(refused.retry_after or 0) <= 10
        assert "takes nothing new" in json.loads(refused.events[0])["error"]["message"]
        assert run.process.wait(120) == 0, run.output
        short.join()
        long.join()
    finally:
        run.close()
    assert short.events[-1] == "[DONE]", short.events[-3:]
    assert json.loads(short.events[-2])["choices"][0]["finish_reason"] == "length"
    error = json.loads(long.events[-1])["error"]
    assert "this server ends" in error["message"]
    assert error["code"] == "engine_unavailable"
    assert long.num_tokens > short.num_tokens
    assert "draining: 2 requests run or wait" in run.output
    assert run.output.endswith("ended\n")
    assert "had to be killed" not in run.output
    assert [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert not work.exists()
