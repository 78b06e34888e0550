"""The Ray that `make serve` starts for itself, started so that it is soon of use. Knows Ray's own processes, not Serve's.

`ray.init` waits for the dashboard's process before it starts the node, also where `include_dashboard` is false: that process
then loads one module, which counts usage, and serves nothing. And it starts the autoscaler, which has no nodes to add here.
Neither is started. What else only watches gives way to what serves.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

WATCHERS = ("ray::DashboardAgent", "dashboard/agent.py", "log_monitor.py")
"""Parts of command lines."""
NICENESS = 10


def start(address: str, **options: Any) -> None:
    """`ray.init` of a Ray of our own, with these options."""
    import ray

    with _only_what_serves():
        ray.init(address=address, include_dashboard=False, **options)
    let_watchers_give_way(os.getpid())


@contextlib.contextmanager
def _only_what_serves() -> Iterator[None]:
    """`ray.init` has no options for it: Ray 2.60's own parameters and node are changed while it runs."""
    from ray._private import node, parameter

    def no_dashboard(self: Any, **_arguments: Any) -> None:
        self._webui_url = ""

    with (
        mock.patch.object(parameter, "RayParams", functools.partial(parameter.RayParams, no_monitor=True)),
        mock.patch.object(node.Node, "start_api_server", no_dashboard),
    ):
        yield


def let_watchers_give_way(pid: int) -> list[int]:
    """Lowers the priority of the WATCHERS below process ``pid``. Returns their ids; without /proc there are none."""
    found: list[int] = []
    if not sys.platform.startswith("linux"):
        return found
    for child in _descendants(pid):
        with contextlib.suppress(OSError):  # it has ended
            command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if any(name in command for name in WATCHERS):
                os.setpriority(os.PRIO_PROCESS, child, NICENESS)
                found.append(child)
    return found


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                    yield int(child)
                    yield from _descendants(int(child))
