"""openmp.run: every work item exactly once, on any number of threads, on those that torch has."""

from __future__ import annotations

import struct
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numba import cfunc, types

from serve_app.kernels import openmp
from serve_app.kernels.openmp import FIRST, float_bits
from serve_app.kernels.simd import as_float, atomic_next, load_i64, store

SIGNATURE = types.void(types.intp)


@cfunc(SIGNATURE)
def mark_items(arguments: int) -> None:
    """out[item] += scale * item; out[num_items] counts the threads that came."""
    num_items = load_i64(arguments, 2)
    out = load_i64(arguments, FIRST)
    scale = as_float(load_i64(arguments, FIRST + 1))
    store(np.float32(atomic_next(arguments + 8) + 1), out, num_items, 0)
    while True:
        item = atomic_next(arguments)
        if item >= num_items:
            break
        store(scale * np.float32(item), out, item, 0)


@cfunc(SIGNATURE)
def fail_at_item_3(arguments: int) -> None:
    num_items = load_i64(arguments, 2)
    out = load_i64(arguments, FIRST)
    while True:
        item = atomic_next(arguments)
        if item >= num_items:
            break
        if item == 3:
            raise ValueError
        store(np.float32(1.0), out, item, 0)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -2.25e-38, 1e-45, 3.4e38, float("inf"), float("-inf"), 0.1])
def test_float_bits_travel(value: float) -> None:
    number = float_bits(value)
    assert -(2**31) <= number < 2**31
    out = np.full(3, np.nan, dtype=np.float32)
    openmp.run(mark_items, 2, out.ctypes.data, number)
    assert struct.pack("<f", out[1]) == struct.pack("<f", value)


def test_nan_travels() -> None:
    assert struct.unpack("<f", struct.pack("<i", float_bits(float("nan"))))[0] != 0.0
    out = np.zeros(3, dtype=np.float32)
    openmp.run(mark_items, 2, out.ctypes.data, float_bits(float("nan")))
    assert np.isnan(out[1])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_items", [1, 2, 5, 1000])
def test_every_item_once(num_items: int, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    for _ in range(20):
        out = np.full(num_items + 1, np.nan, dtype=np.float32)
        openmp.run(mark_items, num_items, out.ctypes.data, float_bits(2.0))
        assert np.array_equal(out[:-1], 2.0 * np.arange(num_items, dtype=np.float32))
        assert 1 <= out[-1] <= min(num_threads, num_items)


def test_no_items() -> None:
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        out = np.full(1, 7.0, dtype=np.float32)
        openmp.run(mark_items, 0, out.ctypes.data, 0)
        assert out[0] == 7.0  # no thread ever came


def test_without_a_runtime_the_caller_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(openmp, "_gomp_parallel", None)
    out = np.full(10, np.nan, dtype=np.float32)
    openmp.run(mark_items, 9, out.ctypes.data, float_bits(1.0))
    assert np.array_equal(out, [*range(9), 1.0])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_exception_in_a_kernel_is_reported_not_fatal(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A C callback can raise nothing to its caller: numba reports it as unraisable (an error in our tests), and the
    thread that had it is done. So the kernels raise nothing: cpu.py compiles them in numpy's error model."""
    torch.set_num_threads(num_threads)
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    out = np.zeros(6, dtype=np.float32)
    openmp.run(fail_at_item_3, 6, out.ctypes.data)
    assert [entry.exc_type for entry in seen] == [ValueError]
    assert out[:3].tolist() == [1.0, 1.0, 1.0]
    assert out[3] == 0.0
