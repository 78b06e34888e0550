"""One log format for every process: text, or one JSON object a line. Knows handlers, levels and formats; knows nothing of
what is logged.

    text   21:30:05 INFO serve_app.api.requests: my-id: request ended status=200 duration_ms=81.4
    json   {"time": "2026-11-22T21:30:05.123Z", "level": "INFO", "logger": "serve_app.api.requests", "message": "request
           ended", "role": "ingress", "process": "x1y2", "request_id": "my-id", "status": 200, "duration_ms": 81.4}

A line about one request says so by `about`, and by nothing else: calls and tasks here belong to no request, so a context
variable would be empty or another's.

Clients choose request ids, and parts of messages. Neither format lets one begin a line: control characters are escaped, and
in text every further line of an exception is indented.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
from typing import Any, NamedTuple, TextIO

ROOT = "serve_app"
FORMATS = ("text", "json")

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line and paragraph separators, changes of direction, halves of surrogate pairs."""


class LogOptions(NamedTuple):
    """How a process logs."""

    format: str = "text"
    """One of FORMATS."""

    level: str = "INFO"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (pass ``__name__``). INFO goes to stderr, unless the application has set logging up."""
    root = logging.getLogger(ROOT)
    if not root.handlers and not logging.getLogger().handlers:
        _install(root, TextFormatter())
        if root.level == logging.NOTSET:
            root.setLevel(logging.INFO)
    return logging.getLogger(name)


def configure(role: str, process_id: str, options: LogOptions) -> None:
    """From now on this process logs to stderr so, whatever was set up before. ``role``: ingress, router or replica.

    JSON goes to the stderr that the process was started with: Ray Serve puts another in its place, which writes a head of
    its own before each line.
    """
    root = logging.getLogger(ROOT)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    if options.format == "json":
        _install(root, JsonFormatter(role, process_id), sys.__stderr__)
    else:
        _install(root, TextFormatter())
    root.setLevel(options.level)


def about(request_id: str, **fields: object) -> dict[str, Any]:
    """``extra`` of a line about one request. ``request_id``: the client's. ``fields``: plain values, which stand behind the
    message, and in JSON under names of their own; None is left out."""
    return {"request_id": request_id, "fields": fields}


def about_stream(stream_id: str, **fields: object) -> dict[str, Any]:
    """The same where the id is one that was made of the client's: see `client_id_of`."""
    return about(client_id_of(stream_id), stream_id=stream_id, **fields)


def client_id_of(stream_id: str) -> str:
    """The client's id of a request. Its prompts are told apart by ``~`` and eight digits behind it, and the attempts at one
    of them by ``#`` and a number behind that.

    >>> client_id_of("my~id~0123abcd#1")
    'my~id'
    """
    made = _MADE.fullmatch(stream_id)
    return stream_id if made is None else made[1]


_MADE = re.compile(r"(.*)~[0-9a-f]{8}(?:#[0-9]+)?", re.DOTALL)


def escaped(text: str) -> str:
    """``text`` on one line, without what could move a terminal's cursor."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class TextFormatter(logging.Formatter):
    """For people."""

    def __init__(self) -> None:
        super().__init__(datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        parts = [f"{self.formatTime(record, self.datefmt)} {record.levelname} {record.name}: "]
        if (request_id := getattr(record, "request_id", None)) is not None:
            parts.append(escaped(f"{request_id}: "))
        parts.append(escaped(record.getMessage()))
        for name, value in getattr(record, "fields", {}).items():
            if value is not None:
                parts.append(escaped(f" {name}={_plain(value)}"))
        parts += ["\n    " + escaped(line) for line in _exception(record).splitlines()]
        return "".join(parts)


class JsonFormatter(logging.Formatter):
    """For programs."""

    def __init__(self, role: str, process_id: str) -> None:
        super().__init__()
        self._process = {"role": role, "process": process_id}

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        content: dict[str, Any] = {
            "time": time.removesuffix("+00:00") + "Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
        }
        if (request_id := getattr(record, "request_id", None)) is not None:
            content["request_id"] = request_id
        if exception := _exception(record):
            content["exception"] = exception
        fields = {name: value for name, value in getattr(record, "fields", {}).items() if value is not None}
        # Ours win: a field may not pass for one of them. ASCII alone: no separator of lines stays in it.
        return json.dumps({**content, **fields, **content}, default=str)


def _install(root: logging.Logger, formatter: logging.Formatter, stream: TextIO | None = None) -> None:
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter)
    root.addHandler(handler)
    root.propagate = False


def _exception(record: logging.LogRecord) -> str:
    if not record.exc_info:
        return record.exc_text or ""
    return logging.Formatter().formatException(record.exc_info)


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
