"""The two formats: what a line carries, and what a client cannot make of it."""

from __future__ import annotations

import doctest
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator

import pytest

from serve_app import logs
from serve_app.logs import LogOptions, about, about_stream, client_id_of

FORGED = "an-id\n12:00:00 CRITICAL serve_app: all is lost\r\x1b[2K\x85\u2028\ud800"

Set = Callable[[LogOptions], io.StringIO]


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Set]:
    """`configure`, with what it writes. The root is as it was afterwards."""
    root = logging.getLogger(logs.ROOT)
    before = root.handlers[:], root.level, root.propagate

    def configure(options: LogOptions) -> io.StringIO:
        written = io.StringIO()
        monkeypatch.setattr(sys, "__stderr__" if options.format == "json" else "stderr", written)
        logs.configure("replica", "r1", options)
        return written

    yield configure
    root.handlers[:], root.level, root.propagate = before


def test_a_line_of_json(set_up: Set) -> None:
    written = set_up(LogOptions("json"))
    logger = logs.get_logger("serve_app.some.module")
    logger.info(
        "%d tokens", 3, extra=about_stream("my~id~0123abcd#2", status=200, level="forged", none=None, all=["a"])
    )
    logger.debug("not at this level")
    (line,) = written.getvalue().splitlines()
    said = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said.pop("time"))
    assert said == {
        "level": "INFO",
        "logger": "serve_app.some.module",
        "message": "3 tokens",
        "role": "replica",
        "process": "r1",
        "request_id": "my~id",
        "stream_id": "my~id~0123abcd#2",
        "status": 200,
        "all": ["a"],
    }


def test_a_line_of_text(set_up: Set) -> None:
    written = set_up(LogOptions("text", "DEBUG"))
    logs.get_logger("serve_app.some.module").debug(
        "it %s", "ends", extra=about("my-id", status=200, all=["a", "b"], x=None)
    )
    line = written.getvalue()
    assert re.fullmatch(r"\d\d:\d\d:\d\d DEBUG serve_app.some.module: my-id: it ends status=200 all=a,b\n", line)


def test_configured_again_it_writes_once(set_up: Set) -> None:
    set_up(LogOptions("json"))
    written = set_up(LogOptions("text"))
    logs.get_logger("serve_app.x").warning("once")
    assert written.getvalue().count("once") == 1


@pytest.mark.parametrize("format", logs.FORMATS)
def test_a_client_cannot_begin_a_line(set_up: Set, format: str) -> None:
    """Neither by its id, nor by what stands in a message, a field or an exception."""
    written = set_up(LogOptions(format))
    logger = logs.get_logger("serve_app.x")
    try:
        raise ValueError(FORGED)
    except ValueError:
        logger.exception("%s", FORGED, extra=about(FORGED, field=FORGED))
    text = written.getvalue()
    text.encode()  # whole characters
    assert not set(text) & set("\r\x1b\x85\u2028")
    first, *more = text.splitlines()
    if format == "json":
        said = json.loads(first)
        assert more == []
        assert FORGED == said["message"] == said["request_id"] == said["field"]
        assert "ValueError: an-id" in said["exception"]
    else:
        assert first.count("all is lost") == 3
        assert more[0] == "    Traceback (most recent call last):"
        assert all(line.startswith("    ") for line in more)


def test_ids() -> None:
    assert doctest.testmod(logs).attempted == 1
    assert client_id_of("a~0123abcd") == "a"
    assert client_id_of("a~b#1") == "a~b#1"
    # A client may choose an id that looks like one of ours: ours are made of it, and it comes out again.
    assert client_id_of("a~0123abcd#1~89abcdef#0") == "a~0123abcd#1"
    assert about("a~0123abcd")["request_id"] == "a~0123abcd"
