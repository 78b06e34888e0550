"""Compile every Triton kernel as it is shipped, without a GPU, and print what the machine code says.

python -m loadtests.machine_code                     the table, for sm_80, sm_90 and sm_100
python -m loadtests.machine_code --record            also to recorded.json, which the tests compare with
python -m loadtests.machine_code --only "decode D128" --capability 90 [--record]      some kernels; records only those
python -m loadtests.machine_code --json FILE         all reports to FILE
python -m loadtests.machine_code --print             the recorded table; compiles nothing

A process for each core compiles: Triton holds the interpreter's lock for most of its time.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RECORDED = HERE / "recorded.json"
KERNELS = sorted(file.stem for file in HERE.glob("*.py") if file.stem not in ("__init__", "__main__", "kernel"))
"""The other files of this folder; each has ``kernels(capability) -> list[Kernel]``. New ops add a file, or a line in one."""


def main() -> None:
    parser = argparse.ArgumentParser(description="What the machine code of the Triton kernels says.")
    parser.add_argument("--record", action="store_true", help="keep the reports in recorded.json")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    parser.add_argument("--print", action="store_true", help="print what is recorded, and compile nothing")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--capability", type=int, help="80, 90 or 100; all without it")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported, which is below
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from loadtests.machine_code.kernel import CAPABILITIES, compile_kernel, from_json, table, to_json

    if arguments.print:
        print(table(from_json(RECORDED.read_text())[1]))
        return
    shipped = set()
    wanted = []
    for capability in CAPABILITIES:
        for name in KERNELS:
            for kernel in importlib.import_module(f"loadtests.machine_code.{name}").kernels(capability):
                shipped.add((kernel.name, capability))
                if arguments.only in kernel.name and arguments.capability in (None, capability):
                    wanted.append((kernel, capability))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
            reports = list(processes.map(compile_kernel, *zip(*wanted, strict=True))) if wanted else []
    print(table(reports))
    print(f"\n{len(reports)} kernels in {time.monotonic() - started:.0f} s", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(to_json(reports))
    if arguments.record:
        known = from_json(RECORDED.read_text())[1] if RECORDED.exists() else []
        merged = {(r.name, r.capability): r for r in [*known, *reports]}
        RECORDED.write_text(to_json([merged[key] for key in sorted(merged.keys() & shipped)]))


if __name__ == "__main__":
    main()
