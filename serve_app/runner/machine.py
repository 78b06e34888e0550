"""The numerics fingerprint: what of a machine decides bits. Knows names and versions; computes nothing.

Imports neither numba nor Triton, so that either device can do without the other's compiler.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import torch


def fingerprint(parts: dict[str, object], machine: dict[str, object] | None = None) -> str:
    """Engines with equal fingerprints promise equal bits in deterministic mode. ``parts``: whatever decides them.

    ``machine``: what computes; by default this machine's processor and what is compiled for it.
    """
    text = json.dumps({**(cpu_machine() if machine is None else machine), **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cpu_machine() -> dict[str, object]:
    """What decides the bits of a CPU's kernels."""
    return {
        "processor": _processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": has_amx(),
        "torch": torch.__version__,
        "numba": _version("numba"),
        "llvmlite": _version("llvmlite"),
        "threads": torch.get_num_threads(),
    }


def gpu_machine(name: str, capability: tuple[int, int]) -> dict[str, object]:
    """What decides the bits of the Triton kernels: the GPU, who compiles them, and all of kernels/, tile shapes included."""
    sources = hashlib.sha256()
    for path in sorted((Path(__file__).parent.parent / "kernels").glob("*.py")):
        sources.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        "gpu": name,
        "capability": capability,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "kernels": sources.hexdigest(),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "cpu family", "model\t", "stepping", "flags")
    return hashlib.sha256("\n".join(sorted({x for x in lines if x.startswith(wanted)})).encode()).hexdigest()


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def has_amx() -> bool:
    """True if bfloat16 products run on matrix tiles (AMX), where they are several times faster than float32."""
    try:
        return bool(torch.cpu._is_amx_tile_supported())
    except AttributeError:
        return False
