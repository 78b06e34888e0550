"""The terminal chat: against the whole service, against a server that misbehaves, on a terminal and in a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from serve_app import chat
from serve_app.chat import BusyError, Chat, ChatError, Client, Progress
from tests.api.house import House
from tests.tiny_models import make_tiny_model

DONE = b"data: [DONE]\n\n"
Reply = Callable[["Handler"], None]


def event(text: str = "", **more: Any) -> bytes:
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}\n\n'


class Handler(BaseHTTPRequestHandler):
    """Answers each request with the next of the server's replies."""

    server: FakeServer

    def do_GET(self) -> None:
        self.send(200, json.dumps({"data": [{"id": "the-model"}, {"id": "another"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        self.server.replies.pop(0)(self)

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Reply] = []
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = make_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=300)
    model: dict[str, Any] = {"model": str(directory), "served_model_name": "tiny", "runner": "simulated"}
    model["simulated"] = {"seconds_per_step": 0.005}  # so that an answer takes time
    engine = {"num_kv_blocks": 96, "max_model_len": 512}
    with House({"model": model, "engine": engine, "api": {"default_chat_max_tokens": 12}}) as made:
        yield made
        made.check_rest()


def stream(*parts: bytes) -> Reply:
    return lambda handler: handler.send(200, b"".join(parts), content_type="text/event-stream")


def refuse(status: int, message: str, **headers: str) -> Reply:
    return lambda handler: handler.send(status, json.dumps({"error": {"message": message}}).encode(), **headers)


class Person:
    """A chat with what it wrote."""

    def __init__(self, url: str, *, api_key: str | None = None, system: str | None = None, **options: Any) -> None:
        self.out, self.notes = io.StringIO(), io.StringIO()
        self.slept: list[float] = []
        self.chat = Chat(
            Client(url, api_key),
            {"model": "tiny", **options},
            system,
            is_interactive=False,
            out=self.out,
            notes=self.notes,
            sleep=self.slept.append,
        )

    def say(self, line: str) -> tuple[str, str]:
        """What came to stdout, and the notes."""
        before = len(self.out.getvalue()), len(self.notes.getvalue())
        assert self.chat.handle(line)
        return self.out.getvalue()[before[0] :], self.notes.getvalue()[before[1] :]


# ---- the whole service -----------------------------------------------------------------------------------------------


def test_a_conversation_with_the_service(house: House) -> None:
    person = Person(house.url + "/v1/", system="be brief", max_tokens=7, temperature=0.0, seed=1)
    first, note = person.say("hello")
    assert first.endswith("\n")
    assert len(first) > 1
    assert note.startswith("7 tokens, ")
    assert " tokens/s, first token after 0." in note
    assert "cut at the longest length" in note
    person.say("and on")
    assert [message["role"] for message in person.chat.messages] == ["system", *["user", "assistant"] * 2]
    answer = person.chat.messages[2]["content"]
    assert "".join(c for c in answer if c.isprintable()) == "".join(c for c in first if c.isprintable())
    assert person.say("/reset") == ("", "a new conversation\n")
    assert person.chat.messages == [{"role": "system", "content": "be brief"}]
    assert person.say("hello")[0] == first  # the same seed, and nothing of the first conversation is left
    assert not person.chat.handle(" /quit ")


def test_the_first_model_is_the_default(house: House) -> None:
    assert Client(house.url).first_model() == "tiny"


def test_a_wrong_model_is_said(house: House) -> None:
    person = Person(house.url)
    person.chat._options["model"] = "nobody"
    with pytest.raises(ChatError, match="there is no model 'nobody' here; served: tiny"):
        person.say("hello")


def test_in_a_pipe_the_answers_alone_go_to_stdout(house: House) -> None:
    done = run_chat(["--url", house.url, "--seed", "3", "--temperature", "0"], "hello\n\n/reset\nhello\n")
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.splitlines())) == 1
    assert done.stdout.count("\n") == 2
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["12", "a", "12"]
    assert "\x1b" not in done.stdout + done.stderr


# ---- a server that misbehaves ----------------------------------------------------------------------------------------


def test_what_is_asked(server: FakeServer) -> None:
    server.replies = [stream(event("Hi"), USAGE, DONE)]
    person = Person(server.url, api_key="secret", system="s", max_tokens=5, temperature=0.5, seed=7)
    out, note = person.say("  hello ")
    assert out == "Hi\n"
    assert note.startswith("3 tokens, first token after ") or "tokens/s" in note
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret"
    assert body == {
        "model": "tiny",
        "max_tokens": 5,
        "temperature": 0.5,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}],
    }


def test_what_the_model_thinks_is_no_part_of_the_answer(server: FakeServer) -> None:
    thought = b'data: {"choices": [{"delta": {"reasoning_content": "hm\\u001b", "reasoning": "hm\\u001b"}}]}\n\n'
    server.replies = [stream(thought, event("yes"), DONE)]
    person = Person(server.url)
    person.chat._is_interactive = True
    out, notes = person.say("hello")
    assert out.strip() == "yes"
    assert "hm" in notes
    assert "\x1b" not in notes
    assert person.chat.messages[-1] == {"role": "assistant", "content": "yes"}


def test_odd_framing_is_read(server: FakeServer) -> None:
    pretty = json.dumps({"choices": [{"delta": {"content": "é\x1b[31m!"}}]}, ensure_ascii=False, indent=1)
    lines = "".join(f"data: {line}\r\n" for line in pretty.splitlines()).encode()
    server.replies = [stream(b": ping\n\nretry: 5\nevent: x\n\n", lines, b"\r\n", event("a\nb\n"), b"data:[DONE]\n\n")]
    person = Person(server.url)
    assert person.say("hello")[0] == "é[31m!a\nb\n"  # no escape sequence reaches the terminal
    assert person.chat.messages[-1]["content"] == "é\x1b[31m!a\nb\n"


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("parts", [(), (event("Hel"), event("lo"))], ids=["before", "within"])
def test_a_stream_without_done_is_no_answer(server: FakeServer, is_chunked: bool, parts: tuple[bytes, ...]) -> None:
    def break_off(handler: Handler) -> None:
        if is_chunked:
            handler.protocol_version = "HTTP/1.1"
            handler.close_connection = True
            framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
            handler.send(200, framed + b"ff\r\ndata: ", transfer_encoding="chunked")
        else:
            handler.send(200, b"".join(parts))

    server.replies = [break_off, stream(event("again"), DONE)]
    person = Person(server.url)
    with pytest.raises(ChatError, match=r"broke off: the connection ended before \[DONE\]"):
        person.say("hello")
    assert person.out.getvalue() == ("Hello\n" if parts else "")
    assert person.chat.messages == []
    assert person.say("hello")[0] == "again\n"
    assert len(server.asked[1][2]["messages"]) == 1


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (refuse(401, "an API key is needed"), "an API key is needed. Give a key with --api-key, or in the variable"),
        (refuse(400, "the prompt is\x1b too long"), "the prompt is too long"),
        (refuse(503, "no replica"), "no replica. The server may still be starting, or ending"),
        (lambda handler: handler.send(502, b"<html>"), "HTTP status 502 Bad Gateway"),
        (stream(event("a"), b'data: {"error": {"message": "a replica is lost"}}\n\n'), "broke off: a replica is lost"),
        (stream(b"data: nonsense\n\n"), "an event that is no part of a chat: 'nonsense'"),
        (stream(b"data: [1]\n\n"), "an event that is no part of a chat: '[1]'"),
        (lambda handler: handler.wfile.write(b"SSH-2.0\r\n"), "the connection to http"),
        (refuse(429, "busy", retry_after="3600"), "busy. It says to come back in 3600 s"),
    ],
)
def test_refusals_are_sentences(server: FakeServer, reply: Reply, sentence: str) -> None:
    server.replies = [reply]
    person = Person(server.url)
    with pytest.raises(ChatError) as caught:
        person.say("hello")
    assert sentence in str(caught.value)
    assert person.chat.messages == []
    assert person.slept == []


def test_a_busy_server_is_asked_once_more(server: FakeServer) -> None:
    server.replies = [refuse(429, "full", retry_after="7"), stream(event("Hi"), DONE)]
    person = Person(server.url)
    out, note = person.say("hello")
    assert out == "Hi\n"
    assert note.startswith("the server is busy; once more in 7 s\n")
    assert person.slept == [7.0]


def test_and_only_once(server: FakeServer) -> None:
    server.replies = [refuse(429, "full", retry_after="2"), refuse(429, "still full", retry_after="2")]
    person = Person(server.url)
    with pytest.raises(BusyError, match="still full"):
        person.say("hello")
    assert person.slept == [2.0]
    assert not server.replies


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = run_chat(["--url", f"127.0.0.1:{port}"], "hello\n")
    assert done.returncode == 1
    assert done.stderr == (
        f"nothing listens at http://127.0.0.1:{port}: is the server up (make serve), and is --url right?\n"
    )


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port", ""])
def test_a_wrong_url_is_said(url: str) -> None:
    with pytest.raises(ChatError, match="it must be like http://127"):
        Client(url)


def test_not_an_api(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.send(200, b"<html>"))
    with pytest.raises(ChatError, match="does not answer like an OpenAI API"):
        Client(server.url).first_model()


def test_a_failed_message_of_a_pipe_shows_in_the_exit_code(server: FakeServer) -> None:
    server.replies = [refuse(400, "too long"), stream(event("Hi"), DONE)]
    done = run_chat(["--url", server.url], "one\ntwo")
    assert (done.returncode, done.stdout) == (1, "Hi\n")
    assert done.stderr.startswith("too long\n")


def test_progress_of_short_answers() -> None:
    progress = Progress(started_at=1.0)
    assert str(progress) == "no tokens"
    progress.first_at = progress.last_at = 1.5
    assert str(progress) == "first token after 0.50 s"
    progress.num_tokens = 1
    assert str(progress) == "1 token, first token after 0.50 s"
    progress.num_tokens, progress.last_at = 11, 3.5
    assert str(progress) == "11 tokens, 5.0 tokens/s, first token after 0.50 s"


# ---- a terminal ------------------------------------------------------------------------------------------------------


class Terminal:
    """The chat on a terminal of its own."""

    def __init__(self, url: str) -> None:
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "serve_app.chat", "--url", url]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=Path(chat.__file__).parent.parent
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, text: str) -> str:
        """What was shown up to the end of ``text``, since the last call."""
        while text not in self.shown:
            if not select.select([self._ours], [], [], 30)[0]:
                pytest.fail(f"it never showed {text!r}: {self.shown!r}")
            try:
                self.shown += os.read(self._ours, 4096).decode()
            except OSError:
                pytest.fail(f"it ended without {text!r}: {self.shown!r}")
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def interrupt_until_it_shows(self, text: str) -> None:
        """Between its prompt and its wait for a key, input() takes note of a signal only with the next key."""
        for _ in range(30):
            self.process.send_signal(signal.SIGINT)
            if select.select([self._ours], [], [], 1.0)[0]:
                break
        self.wait_for(text)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(server: FakeServer) -> Iterator[Terminal]:
    made = Terminal(server.url)
    yield made
    made.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(server: FakeServer, terminal: Terminal) -> None:
    has_gone = threading.Event()

    def say_and_stall(handler: Handler) -> None:
        handler.send(200, event("half an answer"))
        assert handler.connection.recv(1) == b""  # until the client closes
        has_gone.set()

    server.replies = [say_and_stall, stream(event("whole"), USAGE, DONE)]
    assert "the-model at http" in terminal.wait_for("> ")
    terminal.type("one\n")
    terminal.wait_for("half an answer")
    terminal.process.send_signal(signal.SIGINT)
    assert "stopped" in terminal.wait_for("> ")
    assert has_gone.wait(20)
    terminal.type("two\n")
    assert "whole" in terminal.wait_for("> ")
    assert [message["content"] for message in server.asked[1][2]["messages"]] == ["one", "half an answer", "two"]
    terminal.interrupt_until_it_shows("/reset starts over")  # nothing to stop: it says what there is
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(20) == 0


def test_ctrl_d_ends_it(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0


def run_chat(arguments: list[str], text: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serve_app.chat", *arguments]
    environ = {name: value for name, value in os.environ.items() if name != chat.API_KEY_VARIABLE}
    root = Path(chat.__file__).parent.parent
    return subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=60, check=False, cwd=root, env=environ
    )
