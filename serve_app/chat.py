"""A terminal chat with a server of the OpenAI API: streams, keeps the conversation, shows tokens/s.

    python -m serve_app.chat                               with http://127.0.0.1:8000
    python -m serve_app.chat --url http://host:8000 --system "Be brief." --max-tokens 200 --temperature 0.7 --seed 1
    echo "Hello" | python -m serve_app.chat                each line is a message; the answers alone go to stdout

In it: /reset starts over, /quit or Ctrl-D ends, Ctrl-C stops the answer. Knows HTTP and the API; standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import sys
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

API_KEY_VARIABLE = "RAGGED_SERVE_API_KEY"
SILENCE_SECONDS = 300.0
"""A server that says nothing for so long is given up."""
MAX_RETRY_SECONDS = 60.0
"""A longer Retry-After is told, and not waited for."""
HELP = "/reset starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer"

_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""An answer must not steer the terminal."""


class ChatError(Exception):
    """No answer, or only a part. The message is a sentence for the person."""


class BusyError(ChatError):
    """``seconds``: after which the server thinks that there is room."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Thought(str):
    """A piece of what the model thinks before it answers."""


@dataclass
class Progress:
    """Of one answer. Times are seconds of time.monotonic()."""

    started_at: float
    first_at: float | None = None
    last_at: float = 0.0
    num_tokens: int | None = None
    """None: the server did not say."""
    finish_reason: str | None = None

    def __str__(self) -> str:
        if self.first_at is None:
            return "no tokens"
        parts = [f"first token after {self.first_at - self.started_at:.2f} s"]
        if self.num_tokens is not None:
            seconds = self.last_at - self.first_at
            if self.num_tokens > 1 and seconds > 0:
                parts.insert(0, f"{(self.num_tokens - 1) / seconds:.1f} tokens/s")
            parts.insert(0, "1 token" if self.num_tokens == 1 else f"{self.num_tokens} tokens")
        if self.finish_reason == "length":
            parts.append("cut at the longest length (--max-tokens)")
        return ", ".join(parts)


class Client:
    """One server. ``url`` with or without /v1. Raises ChatError for one that is none."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ChatError(f"--url is {url!r}; it must be like http://127.0.0.1:8000")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = parts.hostname, port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.shown_url = f"{parts.scheme}://{parts.netloc}{self._prefix}"
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def first_model(self) -> str:
        """The first name that the server has for its model."""
        with self._ask("GET", "/v1/models") as response:
            try:
                return str(json.loads(response.read())["data"][0]["id"])
            except (ValueError, LookupError, TypeError) as error:
                raise ChatError(f"{self.shown_url} does not answer like an OpenAI API; is --url right?") from error

    def stream(self, body: dict[str, Any], progress: Progress) -> Generator[str, None, None]:
        """The answer's text as it comes; fills in ``progress``. Raises ChatError if it ends before its end."""
        has_ended = False
        with self._ask("POST", "/v1/chat/completions", body) as response:
            for data in _events(response):
                if data == "[DONE]":
                    has_ended = True
                    break
                yield from _read_chunk(data, progress)
        if not has_ended:
            raise ChatError(
                "the answer broke off: the connection ended before [DONE]. The server may have been restarted"
            )

    @contextlib.contextmanager
    def _ask(self, method: str, path: str, body: object = None) -> Iterator[http.client.HTTPResponse]:
        connection = self._kind(self._host, self._port, timeout=SILENCE_SECONDS)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._prefix + path, data, self._headers)
            # It owns the socket where the connection ends with the answer.
            with contextlib.closing(connection.getresponse()) as response:
                if response.status != 200:
                    raise _refusal(response)
                yield response
        except ConnectionRefusedError as error:
            raise ChatError(
                f"nothing listens at {self.shown_url}: is the server up (make serve), and is --url right?"
            ) from error
        except TimeoutError as error:
            raise ChatError(f"{self.shown_url} has said nothing for {SILENCE_SECONDS:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(
                f"the connection to {self.shown_url} failed: {str(error) or type(error).__name__}"
            ) from error
        finally:
            connection.close()


def _refusal(response: http.client.HTTPResponse) -> ChatError:
    try:
        message = str(json.loads(response.read(65536))["error"]["message"])
    except (ValueError, LookupError, TypeError, OSError, http.client.HTTPException):
        message = f"HTTP status {response.status} {response.reason}"
    message = message.translate(_CONTROL)
    if response.status == 401:
        return ChatError(f"{message}. Give a key with --api-key, or in the variable {API_KEY_VARIABLE}")
    if response.status == 429:
        given = response.getheader("retry-after", "")
        return BusyError(message, float(given) if given.isdigit() else 1.0)
    if response.status == 503:
        return ChatError(f"{message}. The server may still be starting, or ending")
    return ChatError(message)


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    """The data of each server-sent event. Ends with the connection, however that ends."""
    lines: list[str] = []
    while True:
        try:
            raw = response.readline()
        except (http.client.IncompleteRead, ConnectionResetError):
            return
        if not raw:
            return
        line = raw.decode("utf-8", errors="replace").rstrip("\r\n")
        if line.startswith("data:"):
            lines.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and lines:
            yield "\n".join(lines)
            lines = []


def _read_chunk(data: str, progress: Progress) -> Iterator[str]:
    try:
        chunk = json.loads(data)
        if chunk.get("error"):
            raise ChatError(f"the answer broke off: {chunk['error'].get('message', 'no reason given')}")
        if chunk.get("usage"):
            progress.num_tokens = int(chunk["usage"]["completion_tokens"])
        for choice in chunk.get("choices") or []:
            progress.finish_reason = choice.get("finish_reason") or progress.finish_reason
            delta = choice.get("delta") or {}
            for text in (Thought(delta.get("reasoning_content") or ""), delta.get("content") or ""):
                if text:
                    progress.last_at = time.monotonic()
                    progress.first_at = progress.first_at or progress.last_at
                    yield text
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ChatError(f"the server sent an event that is no part of a chat: {data[:80]!r}") from error


class Chat:
    """The conversation, and what is on the screen."""

    def __init__(
        self,
        client: Client,
        options: dict[str, Any],
        system: str | None = None,
        *,
        is_interactive: bool,
        out: TextIO = sys.stdout,
        notes: TextIO = sys.stderr,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client = client
        self._options = options
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._start)
        self._is_interactive = is_interactive
        self._out, self._notes = out, notes
        self._sleep = sleep
        self._is_dim = is_interactive and notes.isatty() and "NO_COLOR" not in os.environ

    def handle(self, line: str) -> bool:
        """One line of the person. False: that was the last one. Raises ChatError."""
        line = line.strip()
        if line in ("/quit", "/exit"):
            return False
        if line == "/reset":
            self.messages = list(self._start)
            self.note("a new conversation")
        elif line.startswith("/") and line[1:].isalpha():
            self.note(HELP)
        elif line:
            self._answer(line)
        return True

    def note(self, text: str) -> None:
        self._notes.write(f"\x1b[2m{text}\x1b[0m\n" if self._is_dim else f"{text}\n")
        self._notes.flush()

    def _think(self, piece: Thought) -> None:
        """Shown to a person, dim; no part of the answer, and not sent back."""
        if self._is_interactive:
            text = piece.translate(_CONTROL)
            self._notes.write(f"\x1b[2m{text}\x1b[0m" if self._is_dim else text)
            self._notes.flush()

    def _answer(self, question: str) -> None:
        """What was said before Ctrl-C stays in the conversation. An answer that failed does not, nor does its question."""
        messages = [*self.messages, {"role": "user", "content": question}]
        try:
            text, progress = self._ask(messages)
        except BusyError as busy:
            if busy.seconds > MAX_RETRY_SECONDS:
                raise ChatError(f"{busy}. It says to come back in {busy.seconds:.0f} s") from busy
            self.note(f"the server is busy; once more in {busy.seconds:.0f} s")
            try:
                self._sleep(busy.seconds)
                text, progress = self._ask(messages)
            except KeyboardInterrupt:
                self.note("not sent again")
                return
        if text:
            self.messages = [*messages, {"role": "assistant", "content": text}]
        self.note(str(progress))

    def _ask(self, messages: list[dict[str, str]]) -> tuple[str, Progress]:
        body = {**self._options, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        progress = Progress(started_at=time.monotonic())
        pieces: list[str] = []
        try:
            with contextlib.closing(self._client.stream(body, progress)) as stream:
                for piece in stream:
                    if isinstance(piece, Thought):
                        self._think(piece)
                        continue
                    pieces.append(piece)
                    self._out.write(piece.translate(_CONTROL))
                    self._out.flush()
        except KeyboardInterrupt:
            if not self._is_interactive:
                raise
            self._end_line(pieces)
            self.note("stopped")
            return "".join(pieces), progress
        except ChatError:
            if pieces:
                self._end_line(pieces)
            raise
        self._end_line(pieces)
        return "".join(pieces), progress

    def _end_line(self, pieces: list[str]) -> None:
        if not "".join(pieces).endswith("\n"):
            self._out.write("\n")
            self._out.flush()


def talk(chat: Chat, lines: TextIO, *, is_interactive: bool) -> int:
    """Until the lines end. Returns the exit code: not 0 if a message of a pipe had no answer."""
    code = 0
    while True:
        try:
            line = input("> ") if is_interactive else lines.readline()
            if not is_interactive and not line:
                return code
            if not chat.handle(line):
                return code
        except EOFError:
            sys.stdout.write("\n")
            return code
        except ChatError as error:
            chat.note(str(error))
            code = 0 if is_interactive else 1
        except KeyboardInterrupt:
            if not is_interactive:
                return 130
            sys.stdout.write("\n")
            chat.note(HELP)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m serve_app.chat", description="Chat with the server.", epilog=HELP)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (%(default)s)")
    parser.add_argument("--model", help="name of the model (the server's first)")
    parser.add_argument("--system", help="what the model is told before the conversation")
    parser.add_argument("--max-tokens", type=int, help="most tokens of an answer (the server's default)")
    parser.add_argument("--temperature", type=float, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answers")
    parser.add_argument("--api-key", default=os.environ.get(API_KEY_VARIABLE), help=f"or in {API_KEY_VARIABLE}")
    arguments = parser.parse_args(argv)
    is_interactive = sys.stdin.isatty()
    try:
        client = Client(arguments.url, arguments.api_key)
        options: dict[str, Any] = {"model": arguments.model or client.first_model()}
    except ChatError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    for name in ("max_tokens", "temperature", "seed"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    chat = Chat(client, options, arguments.system, is_interactive=is_interactive)
    if is_interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then has editing and history)
        chat.note(f"{options['model']} at {client.shown_url}; {HELP}")
    try:
        return talk(chat, sys.stdin, is_interactive=is_interactive)
    except BrokenPipeError:  # whoever reads the answers has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    # A shell starts what it puts in the background with Ctrl-C switched off, and so is all that this starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
