"""CompileCounter: Triton's hook is installed once it is started, keeps whoever was there, and is heard in the log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from serve_app.runner.recompilation import CompileCounter


def test_counts_from_the_start_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[dict[str, Any]] = []

    def others(**details: Any) -> str:
        heard.append(details)
        return "theirs"

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", others)
    counter = CompileCounter()
    triton.knobs.runtime.jit_post_compile_hook(key="a", repr="before[](...)")
    assert counter.num_compiled == 0
    counter.start()
    counter.start()
    assert triton.knobs.runtime.jit_post_compile_hook(key="b", repr="attend_kernel[num_warps=4](q: *bf16)") == "theirs"
    assert counter.num_compiled == 1
    assert counter.names == ["attend_kernel[num_warps=4](q: *bf16)"]
    assert [details["key"] for details in heard] == ["a", "b"]
    assert "a kernel was compiled after start-up" in caplog.text


def test_triton_calls_it_for_each_new_variant(tmp_path: Path) -> None:
    """With a driver that is made up: what is compiled is never loaded. In a process of its own, not interpreted."""
    script = """
import torch, triton, triton.language as tl
from triton.runtime import driver
from triton.backends.compiler import GPUTarget
from serve_app.runner.recompilation import CompileCounter

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_active_torch_device(self): return None
    def map_python_to_cpp_type(self, t): return t

driver.set_active(Driver())

@triton.jit
def some_kernel(p_x, n, BLOCK: tl.constexpr):
    tl.store(p_x + tl.arange(0, BLOCK), n)

some_kernel.warmup(torch.float32, 7, BLOCK=16, grid=(1,))
counter = CompileCounter()
counter.start()
for n, block in ((9, 16), (7, 16), (32, 16), (64, 16), (1, 16), (7, 32)):
    some_kernel.warmup(torch.float32, n, BLOCK=block, grid=(1,))
    print(n, block, counter.num_compiled)
"""
    (tmp_path / "counting.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(tmp_path / "counting.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # 9 is like 7. A multiple of 16, a one and another constant are new; 64 is like 32.
    assert done.stdout.splitlines() == ["9 16 0", "7 16 0", "32 16 1", "64 16 1", "1 16 2", "7 32 3"]
