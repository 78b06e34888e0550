"""The drill and the soak in their short forms: kills by SIGKILL under real streams of the real engine, in clusters of their
own (see loadtests/drill.py and loadtests/soak.py, which say what must hold)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.service.live import REPOSITORY


@pytest.fixture(autouse=True)
def _whole_and_at_rest() -> None:
    """In place of the conftest's: these tests want no service beside their own."""


def run(module: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines(), done.stderr[-3000:]
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_streams_outlive_their_replicas() -> None:
    table = run("loadtests.drill", "--short")["table"]
    assert (table["differing bytes"], table["lost"]) == ("0", "0")
    assert int(table["replicas killed"]) >= 4
    assert int(table["of these, the only one that was up"]) >= 1
    assert int(table["resumed"]) >= 1


def test_nothing_is_left_over() -> None:
    result = run("loadtests.soak", "--minutes", "1.5", "--period", "20", "--faults", "4")
    assert result["wrong"] == []
    requests, faults = result["requests"], result["faults"]
    assert min(requests[name] for name in ("streamed", "whole", "left in the stream", "abuses refused")) >= 1, requests
    assert sum(faults.values()) >= 3, faults
    assert all(len(result["samples"][name]) >= 3 for name in ("the old ingress", "the old replica"))
