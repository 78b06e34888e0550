"""What holds for every test: one torch thread, no network, what `gpu` means, and when a skip is a failure.

Knows no part of serve_app. Tests write under ``tmp_path`` only.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Triton kernels run in the interpreter where there is no GPU (asked of its device files: a core test imports no torch).
# Read when a module with kernels is first imported.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Read when huggingface_hub and tokenizers are first imported, so set before any test file is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# OpenMP threads that wait by spinning make a busy machine many times slower; read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A slow machine is not a bug: no deadline per example, and none of the checks that measure time.
hypothesis.settings.register_profile(
    "ragged-serve",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ragged-serve")


def skips_are_failures() -> bool:
    """Set by .ci/run: there, a test that did not run is a test that did not pass."""
    return os.environ.get("RAGGED_SERVE_NO_SKIPS", "") not in ("", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked ``gpu`` where there is no CUDA device. Imports torch only if something is so marked."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


def pytest_collection_finish() -> None:
    """Each new client of httpx, and each httpx.get, reads the list of certificate authorities again: 50 ms of a core, for
    what no test uses. From now on it is read once. A core test still imports no httpx."""
    transports: Any = sys.modules.get("httpx._transports.default")
    if transports is not None:
        transports.create_ssl_context = functools.cache(transports.create_ssl_context)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Each test starts with one torch thread, whatever the one before it set. A core test still imports no torch."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and skips_are_failures() and not _may_skip(item):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} skipped ({_reason(report)}), and RAGGED_SERVE_NO_SKIPS is set: only tests marked gpu, or"
            ' may_skip("the reason"), may skip here'
        )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole file that skips itself: pytest.importorskip, or skip(allow_module_level=True)."""
    report = yield
    if report.skipped and skips_are_failures():
        report.outcome = "failed"
        report.longrepr = (
            f"{collector.nodeid} skipped as a whole ({_reason(report)}), and RAGGED_SERVE_NO_SKIPS is set: mark its tests"
            ' gpu, or may_skip("the reason"), and let each skip by itself'
        )
    return report


def _may_skip(item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu"):
        return True
    marks: Iterator[pytest.Mark] = item.iter_markers("may_skip")
    return any(mark.args and isinstance(mark.args[0], str) and mark.args[0] for mark in marks)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    # pytest gives a skip as (file, line, reason).
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
