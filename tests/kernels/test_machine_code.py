"""The machine code of every Triton kernel as it is shipped, compiled without a GPU: what is promised of it holds.

One subprocess compiles all (the interpreter's flag is read at import, so it cannot be done here), into pytest's own cache:
the second run compiles only what changed.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with the CUDA builds of torch only")

import triton

from loadtests.machine_code import kernel as tool
from loadtests.machine_code.__main__ import KERNELS, RECORDED
from loadtests.machine_code.kernel import CAPABILITIES, Kernel, Report, from_json

pytestmark = pytest.mark.timeout(1500)  # compiles some 150 kernels first, for minutes
REPOSITORY = Path(__file__).parent.parent.parent
Reports = dict[tuple[str, int], Report]

MARGIN = 1.1
"""A recorded figure may grow by so much. With another Triton than the one that it was recorded with: by half."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Reports:
    cache = getattr(request.config, "cache", None)
    compiled = cache.mkdir("triton") if cache else tmp_path_factory.mktemp("triton")
    file = tmp_path_factory.mktemp("machine_code") / "reports.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.machine_code", "--json", str(file)],
        cwd=REPOSITORY,
        env=environment | {"TRITON_CACHE_DIR": str(compiled)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {(report.name, report.capability): report for report in from_json(file.read_text())[1]}


def shipped(capability: int) -> list[Kernel]:
    modules = [importlib.import_module(f"loadtests.machine_code.{name}") for name in KERNELS]
    return [kernel for module in modules for kernel in module.kernels(capability)]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_spills_and_no_stack(reports: Reports, capability: int) -> None:
    mine = [report for report in reports.values() if report.capability == capability]
    assert len(mine) == len(shipped(capability)) > 0
    assert [(r.name, r.spills, r.stack) for r in mine if r.spills or r.stack] == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_promise_is_kept(reports: Reports, capability: int) -> None:
    """Enough blocks on a multiprocessor; tensor cores, asynchronous copies and wide loads where they are promised."""
    broken = []
    for kernel in shipped(capability):
        report = reports[kernel.name, capability]
        if report.blocks < kernel.min_blocks:
            broken.append(f"{kernel.name}: {report.blocks} blocks on a multiprocessor, not {kernel.min_blocks}")
        broken += [f"{kernel.name}: no {name}" for name in kernel.must_have if not getattr(report, name)]
    assert broken == []


def test_the_promises_are_not_empty() -> None:
    assert any("wgmma" in kernel.must_have for kernel in shipped(90))
    assert any("tcgen05" in kernel.must_have for kernel in shipped(100))
    assert any(kernel.min_blocks > 2 for kernel in shipped(80))


def test_nothing_got_worse_than_what_is_recorded(reports: Reports) -> None:
    """After a change that is meant: python -m loadtests.machine_code --record, and the table goes to RESULTS.md."""
    version, recorded = from_json(RECORDED.read_text())
    assert {(r.name, r.capability) for r in recorded} == set(reports)
    margin = MARGIN if version == triton.__version__ else 1.5
    worse = []
    for before in recorded:
        now = reports[before.name, before.capability]
        for name in ("registers", "loop"):
            if getattr(now, name) > margin * getattr(before, name):
                figures = f"{getattr(now, name)} {name}, recorded {getattr(before, name)}"
                worse.append(f"{before.name} sm_{before.capability}: {figures}")
    assert worse == []


# ---- the reader -----------------------------------------------------------------------------------------------------


def test_loops_are_found_innermost_first_to_last() -> None:
    """
    0  start
    1  outer loop <--.
    2    first loop <.|
    3    jump to 2  -'|
    4    second loop<.|
    5    HGMMA       ||
    6    jump to 4  -'|
    7  jump to 1  ----'
    8  jump to itself, the end
    """
    text = ["NOP", "NOP", "LDG", "BRA 0x20", "NOP", "HGMMA", "BRA.U !UP0, 0x40", "BRA 0x10", "BRA 0x80"]
    loops = tool._innermost_loops([16 * i for i in range(9)], text)
    assert loops == [text[2:4], text[4:7]]


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "blocks"),
    [(166, 71 * 1024, 4, 3), (32, 2048, 2, 32), (190, 98 * 1024, 8, 1), (210, 83 * 1024, 4, 2), (16, 0, 16, 4)],
)
def test_blocks_on_a_multiprocessor(registers: int, shared: int, num_warps: int, blocks: int) -> None:
    """210 registers are allocated as 216, for 128 threads 27648 of 65536; 84 KB of 228, with one for the system."""
    assert tool._blocks(90, registers, shared, num_warps) == blocks


def test_reports_survive_their_file() -> None:
    report = from_json(RECORDED.read_text())[1][0]
    assert from_json(tool.to_json([report])) == (triton.__version__, [report])
    assert report.name in tool.table([report])
