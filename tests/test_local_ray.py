"""local_ray: what is not started, and who gives way."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from ray._private import node, parameter

from serve_app import local_ray
from tests.service.live import wait_until


def test_ray_is_told_to_leave_out_what_serves_nothing_and_is_left_as_it_was() -> None:
    """Also if it cannot start. The names are those of this Ray: one that it does not know would raise."""
    made, method = parameter.RayParams, node.Node.start_api_server
    assert "start_api_server" in inspect.getsource(node.Node.start_head_processes)
    seen = []

    def start() -> None:
        seen.append(parameter.RayParams(num_cpus=1, include_dashboard=False))
        one = node.Node.__new__(node.Node)
        one.start_api_server(include_dashboard=False, raise_on_failure=False)
        assert one.webui_url == ""
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), local_ray._only_what_serves():
        start()
    assert (parameter.RayParams, node.Node.start_api_server) == (made, method)
    assert (seen[0].no_monitor, seen[0].num_cpus, seen[0].include_dashboard) == (True, 1, False)


@pytest.fixture
def family() -> Iterator[subprocess.Popen[bytes]]:
    """A process with two children that sleep: one is called as Ray's log monitor is."""
    sleep = "import time; time.sleep(600)"
    code = f"""
import subprocess, sys, time
for name in ("log_monitor.py", "raylet"):
    subprocess.Popen([sys.executable, "-c", {sleep!r}, name])
print("ready", flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    try:
        assert parent.stdout.readline() == b"ready\n"
        yield parent
    finally:
        for pid in (*local_ray._descendants(parent.pid), parent.pid):
            os.kill(pid, 9)
        parent.wait()
        parent.stdout.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_only_watches_gives_way(family: subprocess.Popen[bytes]) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    children = set(local_ray._descendants(family.pid))
    assert len(children) == 2
    (watcher,) = wait_until(lambda: local_ray.let_watchers_give_way(family.pid), "the child's command line")
    assert watcher in children
    assert os.getpriority(os.PRIO_PROCESS, watcher) == local_ray.NICENESS
    (other,) = children - {watcher}
    assert os.getpriority(os.PRIO_PROCESS, other) == before
    assert os.getpriority(os.PRIO_PROCESS, family.pid) == before
