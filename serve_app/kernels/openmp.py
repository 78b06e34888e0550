"""Runs a compiled kernel on torch's own OpenMP threads. Knows how to call; knows nothing of what is computed.

Two OpenMP runtimes in one process spin against each other: alternating torch's pool with numba's costs 10 to 50 % on
small layers. A kernel here is a numba ``cfunc`` that takes one address, of an int64 vector of arguments, and every
thread of the team enters it with the same one:

    arguments   [ next work item | next thread | num_items | kernel's own: addresses, sizes, float bits ... ]
                  ^0               ^1            ^2          ^FIRST

The runtime is the one torch has loaded (its C entry point GOMP_parallel is part of libgomp's ABI and is also exported
by LLVM's and Intel's). Where there is none, or one thread is asked for, the kernel runs on the caller's thread.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numba import types

FIRST = 3
"""Place of a kernel's first own argument."""
SIGNATURE = types.void(types.intp)
"""Of a kernel."""
EXACT = {"contract"}
# numpy's error model: 1 / 0 is inf. Python's would end the kernel there, with the work items of other sequences undone.
OPTIONS: dict[str, Any] = {"cache": True, "fastmath": EXACT, "error_model": "numpy"}
"""How numba compiles kernels, and the functions they are made of."""


def _find_gomp_parallel() -> Callable[..., Any] | None:
    candidates = [None, *sorted(Path(torch.__file__).parent.glob("lib/lib*omp*.so*"))]
    for candidate in candidates:
        try:
            function = ctypes.CDLL(None if candidate is None else str(candidate)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function  # type: ignore[no-any-return]
    return None


_gomp_parallel = _find_gomp_parallel()
_Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
HAS_THREADS = _gomp_parallel is not None


def float_bits(value: float) -> int:
    """A float32 as the int that travels in the argument vector."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def run(kernel: Any, num_items: int, *arguments: int) -> None:
    """Runs ``kernel`` (a numba CFunc) until its ``num_items`` work items are done. Releases the GIL.

    ``arguments`` are data pointers, sizes, or `float_bits`; the caller keeps the tensors behind them alive.
    """
    vector = _vector_type(FIRST + len(arguments))(0, 0, num_items, *arguments)
    num_threads = min(torch.get_num_threads(), num_items)
    if num_threads > 1 and _gomp_parallel is not None:
        _gomp_parallel(kernel.address, ctypes.addressof(vector), num_threads, 0)
    elif num_items:
        _callable(kernel.address)(ctypes.addressof(vector))


@functools.cache
def _vector_type(length: int) -> Callable[..., ctypes.Array[ctypes.c_int64]]:
    return ctypes.c_int64 * length


@functools.cache
def _callable(address: int) -> Callable[[int], None]:
    return _Kernel(address)
