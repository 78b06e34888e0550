"""Starts the server and ends it: `serve run FILE` with progress, one sentence for what goes wrong, and nothing left behind.

    python -m serve_app.launch deploy/config.yaml          Ctrl-C or SIGTERM drains and ends everything; again: at once

This process supervises, and loads no Ray. serve_run.py does the work in a child process and tells of it through a pipe, one
JSON object a line. All that the child starts is found again: orphans become children of this process (Linux).

Exit codes: 0 ended by a signal, 1 it failed, 2 the file or the surroundings are wrong and nothing was started.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Sequence
from typing import IO, Any

STOP_SECONDS = 45.0
"""After the drain Serve waits at most 30 s for its parts, then Ray ends. After this the rest is killed."""
REST_SECONDS = 5.0
"""Processes that Ray leaves end by themselves within this, or are told to, and then killed."""
PROBE_SECONDS = 1.0
"""Longest time that the server may take for one answer to this process."""
TICK_SECONDS = 0.1
SHOWN_LINES = 30
"""Of the child's output, where it says no sentence of its own."""
PR_SET_CHILD_SUBREAPER = 36

Event = dict[str, Any]


# ---- processes -------------------------------------------------------------------------------------------------------


def adopt_orphans() -> None:
    """Descendants whose parent has ended become children of this process, so that none is lost. Only on Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Every live process below ``pid``, parents first. Zombies do not count."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it has ended meanwhile
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def reap_orphans(child: subprocess.Popen[bytes]) -> None:
    """Takes the exit status of ended children other than ``child``, which has an owner."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == child.pid:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(ended.si_pid, os.WNOHANG)


def end_descendants(child: subprocess.Popen[bytes], patience: float) -> int:
    """Ends all below this process: waits ``patience`` seconds, then SIGTERM, then SIGKILL. Returns how many were killed."""
    num_killed = 0
    for name, seconds in (("", patience), ("SIGTERM", REST_SECONDS), ("SIGKILL", REST_SECONDS)):
        for pid in descendants(os.getpid()) if name else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[name])
                num_killed += name == "SIGKILL"
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            child.poll()
            reap_orphans(child)
            if not descendants(os.getpid()):
                return num_killed
            time.sleep(0.05)
    return num_killed


# ---- the screen ------------------------------------------------------------------------------------------------------


class Screen:
    """What the person sees: sentences, and below them one line of progress (on a terminal it changes in place)."""

    def __init__(self, file: IO[str], started_at: float) -> None:
        self._file = file
        self._is_terminal = file.isatty()
        self._started_at = started_at
        self._progress = ""
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        with self._lock:
            self._write(("\r\x1b[K" if self._is_terminal and self._progress else "") + text + "\n")
            self._progress = ""

    def show(self, text: str) -> None:
        """Progress. Without a terminal it is a line, written when the text has changed."""
        seconds = time.monotonic() - self._started_at
        with self._lock:
            if self._is_terminal:
                width = shutil.get_terminal_size().columns - 1
                self._write("\r\x1b[K" + f"[{seconds:3.0f} s] {text}"[:width])
            elif text != self._progress:
                self._write(f"[{seconds:3.0f} s] {text}\n")
            self._progress = text

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody looks any more
            self._file.write(text)
            self._file.flush()


# ---- the server, as a client sees it ---------------------------------------------------------------------------------


def ask(url: str, path: str, body: object = None) -> tuple[int, bytes]:
    """(status, body) of one request to the server; status 0 if there is no answer within PROBE_SECONDS."""
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=PROBE_SECONDS)
    try:
        data = None if body is None else json.dumps(body)
        headers = {} if body is None else {"content-type": "application/json"}
        connection.request("GET" if body is None else "POST", parts.path.rstrip("/") + path, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def example(url: str, model: str) -> str:
    """A curl command that this server answers: a chat if the model has a template for it, with a key if one is needed."""
    messages = [{"role": "user", "content": "Hello!"}]
    status, _ = ask(url, "/tokenize", {"model": model, "messages": messages})
    is_closed = status in (401, 403)
    path, body = "/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 32, "stream": True}
    if status == 200 or is_closed:
        path, body = "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 64, "stream": True}
    key = " -H 'authorization: Bearer YOUR-KEY'" if is_closed else ""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl -N {url.rstrip('/')}{path} -H 'content-type: application/json'{key} -d {data}"


# ---- the run ---------------------------------------------------------------------------------------------------------


class Launch:
    """One server, from the check of its file to the end of its last process."""

    def __init__(self, file: str, *, is_verbose: bool) -> None:
        self._file = file
        self._is_verbose = is_verbose
        self._started_at = time.monotonic()
        self._screen = Screen(sys.stdout, self._started_at)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._output: deque[bytes] = deque(maxlen=SHOWN_LINES)
        self._num_signals = 0
        self._num_answered = 0
        """Signals that were acted upon."""
        self._plan: Event | None = None
        self._is_ready = False
        self._has_failed = False
        """The child has said a sentence about its end."""
        self._notes: set[str] = set()

    def run(self) -> int:
        adopt_orphans()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        # Not in TMPDIR: sockets will lie there, whose paths may have 107 bytes.
        work = tempfile.mkdtemp(prefix="ragged-serve-", dir="/tmp")
        try:
            return self._supervise(work)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _on_signal(self, number: int, frame: object) -> None:
        self._num_signals += 1

    def _supervise(self, work: str) -> int:
        ours, theirs = os.pipe()
        command = [sys.executable, "-u", "-m", "serve_app.serve_run", self._file, str(theirs), work]
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs,),
            start_new_session=True,  # a Ctrl-C in the terminal reaches this process alone
        )
        os.close(theirs)
        assert child.stdout is not None
        threads = [
            threading.Thread(target=self._read_events, args=(ours,), daemon=True),
            threading.Thread(target=self._read_output, args=(child.stdout,), daemon=True),
        ]
        for thread in threads:
            thread.start()
        progress = f"checking {self._file}"
        while child.poll() is None and not self._num_signals:
            progress = self._take_events() or progress
            if not (self._is_ready or self._has_failed):
                self._screen.show(progress)
                self._look_whether_ready()
            reap_orphans(child)
            time.sleep(TICK_SECONDS)
        was_asked = self._num_signals > 0
        num_killed = self._stop(child) if was_asked else end_descendants(child, REST_SECONDS)
        for thread in threads:
            thread.join(REST_SECONDS)
        self._take_events()
        if num_killed:
            self._screen.say(f"{num_killed} processes had to be killed")
        if was_asked:
            self._screen.say("ended")
            return 0
        if not self._has_failed:
            what = "the server has ended" if self._is_ready else "the server did not start"
            self._screen.say(f"{what} (exit code {child.returncode}). The last that it wrote:")
            for line in [] if self._is_verbose else self._output:
                self._screen.say("  " + line.decode(errors="replace").rstrip())
        return 2 if child.returncode == 2 else 1

    def _stop(self, child: subprocess.Popen[bytes]) -> int:
        seconds = self._plan["drain_seconds"] if self._plan is not None and self._is_ready else 0.0
        if seconds:
            self._screen.say(
                f"draining: nothing new is taken, running answers get up to {seconds:g} s (Ctrl-C again ends at once)"
            )
        num_signals = self._num_signals
        self._has_failed = True  # whatever it says now, it was asked to end
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGINT)
        deadline = time.monotonic() + seconds + STOP_SECONDS
        while child.poll() is None and time.monotonic() < deadline and self._num_signals == num_signals:
            if (progress := self._take_events()) is not None:
                self._screen.show(progress)
            reap_orphans(child)
            time.sleep(0.05)
        return end_descendants(child, REST_SECONDS if child.poll() is not None else 0.0)

    # ---- what the child says -----------------------------------------------------------------------------------------

    def _read_events(self, descriptor: int) -> None:
        with open(descriptor, encoding="utf-8") as lines:
            for line in lines:
                self._events.put(json.loads(line))

    def _read_output(self, output: IO[bytes]) -> None:
        with output:
            for line in output:
                self._output.append(line)
                if (self._is_ready or self._is_verbose) and not self._num_signals:
                    with contextlib.suppress(OSError, ValueError):  # nobody looks any more
                        sys.stderr.buffer.write(line)
                        sys.stderr.buffer.flush()

    def _take_events(self) -> str | None:
        """Acts on all that has come. Returns the newest progress, if there is one."""
        progress = None
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return progress
            kind = event["event"]
            if kind == "progress":
                progress = event["text"]
            elif kind == "plan":
                self._plan = event
            elif kind == "note":
                if event["text"] not in self._notes:
                    self._notes.add(event["text"])
                    self._screen.say(event["text"])
            elif kind == "failed" and not self._has_failed:
                self._has_failed = True
                self._screen.say(event["text"])

    def _look_whether_ready(self) -> None:
        if self._plan is None:
            return
        url = self._plan["url"]
        status, _ = ask(url, "/ready")
        if status != 200:
            return
        self._is_ready = True
        seconds = time.monotonic() - self._started_at
        self._screen.say(f"ready after {seconds:.1f} s: {url}  (Ctrl-C drains and ends it)")
        self._screen.say("  " + example(url, self._plan["model"]))
        self._screen.say(f"  {os.path.basename(sys.executable)} -m serve_app.chat --url {url}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m serve_app.launch", description="Start the server of a deploy/*.yaml, and end it with Ctrl-C."
    )
    parser.add_argument("file", metavar="FILE", help="a configuration for `serve run`, such as deploy/config.yaml")
    parser.add_argument("-v", "--verbose", action="store_true", help="show all that Ray writes, also while it starts")
    arguments = parser.parse_args(argv)
    return Launch(arguments.file, is_verbose=arguments.verbose).run()


if __name__ == "__main__":
    sys.exit(main())
