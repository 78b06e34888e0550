"""Kernel: a Triton kernel to be compiled without a GPU; Report: what its machine code says. Knows no kernel by name.

Read with the tools that ship inside triton. What counts, per multiprocessor: NVIDIA's CUDA C++ Programming Guide, compute
capabilities, and the allocation units of its occupancy calculator.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90, 100)
"""A100, H100 and H200, B200."""

_SHARED_KB = {80: 164, 90: 228, 100: 228}
_REGISTERS, _THREADS, _MAX_BLOCKS = 65536, 2048, 32
_RESERVED_SHARED = 1024
"""Bytes of shared memory that the system takes for each block."""


@dataclass(frozen=True)
class Kernel:
    """One specialisation of a kernel, as it is launched."""

    name: str
    """What it is called in the table: the same on every capability."""

    function: str
    """Where it is: "serve_app.kernels.norms:_rms_norm_kernel"."""

    arguments: Mapping[str, str]
    """Types of the arguments that are no constants, in Triton's spelling: "*bf16", "i32", "i64", "fp32". Pointers and
    integers count as multiples of 16, but for those that the kernel does not specialize and those of ``unaligned``."""

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True
    """Whether the compiler may round a product and a sum as one."""

    unaligned: tuple[str, ...] = ()
    min_blocks: int = 1
    """Blocks that must find room on a multiprocessor at once."""

    must_have: tuple[str, ...] = ()
    """Fields of Report that must not be 0: "wgmma", "tcgen05", "mma", "async_copies", "wide_loads", "tma"."""


@dataclass(frozen=True)
class Report:
    name: str
    capability: int
    registers: int
    spills: int
    """Loads from and stores to local memory."""
    stack: int
    shared: int
    """Bytes for each block."""
    num_warps: int
    blocks: int
    """How many find room on a multiprocessor at once."""
    instructions: int
    loop: int
    """Instructions of the main loop: the shortest that multiplies matrices (no masks), else the longest; 0: none."""
    mma: int
    wgmma: int
    tcgen05: int
    async_copies: int
    tma: int
    wide_loads: int
    """Loads of 16 bytes a thread from global memory."""
    loops: tuple[int, ...] = field(default=())
    """Instructions of all innermost loops, in the order of the code."""


def compile_kernel(kernel: Kernel, capability: int) -> Report:
    """Raises whatever the compiler raises. Not where TRITON_INTERPRET is set."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.function.split(":")
    function = getattr(importlib.import_module(module), name)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        if parameter.name in kernel.constants:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = kernel.constants[parameter.name]
            continue
        kind = signature[parameter.name] = kernel.arguments[parameter.name]
        specialized = not (parameter.do_not_specialize or parameter.name in kernel.unaligned)
        if specialized and kind[0] in "*i":
            attributes[(i,)] = [["tt.divisibility", 16]]
    unknown = (set(kernel.arguments) | set(kernel.constants)) - set(signature)
    assert not unknown, f"{kernel.name} has no arguments {unknown}"
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    options |= {"enable_fp_fusion": kernel.enable_fp_fusion}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _read(kernel, capability, compiled.asm["cubin"], compiled.metadata.shared)


def _read(kernel: Kernel, capability: int, cubin: bytes, shared: int) -> Report:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _cuobjdump("--dump-resource-usage", str(file))
        code = _cuobjdump("-sass", str(file))
    fields = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", usage))
    shared += int(fields["SHARED"])
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    addresses = [int(address, 16) for address, _ in lines]
    instructions = [re.sub(r"^@!?U?P\w+\s+", "", text) for _, text in lines]
    loops = _innermost_loops(addresses, instructions)

    def count(pattern: str, within: list[str] = instructions) -> int:
        return sum(re.match(pattern, instruction) is not None for instruction in within)

    with_products = [body for body in loops if count("HGMMA|HMMA|UTC.*MMA", body)]
    main = min(with_products, key=len) if with_products else max(loops, key=len, default=[])
    registers = int(fields["REG"])
    return Report(
        name=kernel.name,
        capability=capability,
        registers=registers,
        spills=count("STL|LDL"),
        stack=int(fields["STACK"]),
        shared=shared,
        num_warps=kernel.num_warps,
        blocks=_blocks(capability, registers, shared, kernel.num_warps),
        instructions=len(instructions),
        loop=len(main),
        mma=count("HMMA"),
        wgmma=count("HGMMA"),
        tcgen05=count("UTC.*MMA"),
        async_copies=count(r"LDGSTS\S*\.128"),
        tma=count("UTMALDG"),
        wide_loads=count(r"LDG\.\S*128"),
        loops=tuple(len(body) for body in loops),
    )


def _cuobjdump(option: str, file: str) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [str(tools / "cuobjdump"), option, file]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={"PATH": str(tools)}).stdout


def _innermost_loops(addresses: list[int], instructions: list[str]) -> list[list[str]]:
    """Bodies of the backward branches that hold no other one. A branch to itself ends the code and is no loop."""
    place = {address: i for i, address in enumerate(addresses)}
    spans = []
    for i, instruction in enumerate(instructions):
        target = re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)$", instruction.strip())
        if target and place.get(int(target[1], 16), i) < i:
            spans.append((place[int(target[1], 16)], i + 1))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [instructions[start:end] for start, end in inner]


def _blocks(capability: int, registers: int, shared: int, num_warps: int) -> int:
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * 32 * num_warps)
    by_shared = _SHARED_KB[capability] * 1024 // (shared + _RESERVED_SHARED)
    return min(by_registers, by_shared, _THREADS // (32 * num_warps), _MAX_BLOCKS)


def to_json(reports: Sequence[Report]) -> str:
    """A report a line, so that a change reads as one."""
    import triton

    lines = ",\n".join(json.dumps(dataclasses.asdict(report)) for report in reports)
    return f'{{"triton": "{triton.__version__}", "reports": [\n{lines}\n]}}\n'


def from_json(text: str) -> tuple[str, list[Report]]:
    """(version of Triton, reports)."""
    content = json.loads(text)
    return content["triton"], [Report(**{**entry, "loops": tuple(entry["loops"])}) for entry in content["reports"]]


def table(reports: Sequence[Report]) -> str:
    """Markdown: a row for each kernel and capability."""
    rows = [
        "| kernel | sm | registers | spills | shared KB | blocks / SM | loop | loops | matrix | cp.async | LDG.128 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        kinds = (("wgmma", r.wgmma), ("tcgen05", r.tcgen05), ("mma", r.mma))
        matrix = ", ".join(f"{count} {kind}" for kind, count in kinds if count) or "-"
        loops = " ".join(map(str, r.loops)) or "-"
        rows.append(
            f"| {r.name} | {r.capability} | {r.registers} | {r.spills + r.stack} | {r.shared / 1024:.0f} | {r.blocks}"
            f" x {r.num_warps} warps | {r.loop} | {loops} | {matrix} | {r.async_copies + r.tma} | {r.wide_loads} |"
        )
    return "\n".join(rows)
