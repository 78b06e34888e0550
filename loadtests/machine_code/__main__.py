"""Compile every Triton kernel as it is shipped, without a GPU, and print what the machine code says.

python -m loadtests.machine_code                     the table, for sm_80, sm_90 and sm_100
python -m loadtests.machine_code --json FILE         also to FILE; tests/kernels/test_machine_code.py compares that with
                                                     loadtests/machine_code/recorded.json
python -m loadtests.machine_code --only "decode D128" --capability 90
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = sorted(file.stem for file in HERE.glob("*.py") if file.stem not in ("__init__", "__main__", "kernel"))
"""The other files of this folder; each has ``kernels(capability) -> list[Kernel]``. New ops add a file, or a line in one."""


def main() -> None:
    parser = argparse.ArgumentParser(description="What the machine code of the Triton kernels says.")
    parser.add_argument("--json", type=Path, help="write the reports to this file too")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--capability", type=int, help="80, 90 or 100; all without it")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported, which is below
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        from loadtests.machine_code.kernel import CAPABILITIES, compile_kernel, table, to_json

        reports = []
        started = time.process_time()
        for capability in [arguments.capability] if arguments.capability else CAPABILITIES:
            for name in KERNELS:
                kernels = importlib.import_module(f"loadtests.machine_code.{name}").kernels
                reports += [compile_kernel(k, capability) for k in kernels(capability) if arguments.only in k.name]
    print(table(reports))
    print(
        f"\n{len(reports)} kernels, {time.process_time() - started:.0f} s of CPU time in this process", file=sys.stderr
    )
    if arguments.json:
        arguments.json.write_text(to_json(reports))


if __name__ == "__main__":
    main()
