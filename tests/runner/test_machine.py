"""The numerics fingerprint: every part of a machine that decides bits is in it, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.runner import machine
from serve_app.runner.machine import fingerprint, gpu_machine
from tests.tiny_models import make_tiny_model
from tests.tiny_runs import make_runner


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def test_fingerprint_changes_with_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {fingerprint({}), fingerprint({"weights": "a"}), fingerprint({"weights": "b"}), fingerprint({"dtype": "a"})}
    for name, value in (
        ("_processor_name", lambda: "another"),
        ("has_amx", lambda: "another"),
        ("_version", lambda package: "another" if package == "numba" else machine.__name__),
        ("_version", lambda package: "another" if package == "llvmlite" else machine.__name__),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(machine, name, value)
            seen.add(fingerprint({}))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        seen.add(fingerprint({}))
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        seen.add(fingerprint({}))
    torch.set_num_threads(2)
    seen.add(fingerprint({}))
    torch.set_num_threads(1)
    assert len(seen) == 11
    assert fingerprint({}) in seen
    assert all(len(x) == 16 and int(x, 16) >= 0 for x in seen)


def test_fingerprint_of_a_runner(directory: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    same = make_runner(directory, block_size=16, num_kv_blocks=7, max_num_seqs=3).fingerprint
    assert same == make_runner(directory).fingerprint
    variants = [
        make_runner(directory, deterministic=False),
        make_runner(directory, kv_cache_dtype="float16"),
        make_runner(directory, dtype="bfloat16"),
        make_runner(directory, num_threads=2),
        make_runner(directory, load_format="dummy"),
        make_runner(directory, load_format="dummy", seed=1),
        make_runner(other),
    ]
    assert len({same, *(runner.fingerprint for runner in variants)}) == 8


def test_the_processor_is_in_the_fingerprint_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path, *rest: Any) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert machine._processor_name()


def test_a_gpu_is_its_name_who_compiles_and_every_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gpu_machine("a GPU", (9, 0))
    seen = {fingerprint({}, gpu) for gpu in (first, gpu_machine("another", (9, 0)), gpu_machine("a GPU", (10, 0)))}
    torch.set_num_threads(2)
    assert fingerprint({}, gpu_machine("a GPU", (9, 0))) in seen, "the processor's threads are not in it"
    torch.set_num_threads(1)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_version", lambda package: "another")
        seen.add(fingerprint({}, gpu_machine("a GPU", (9, 0))))
    assert len(seen) == 4
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "a.py").write_text("BLOCK = 64")
    (tmp_path / "runner").mkdir()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "runner" / "machine.py"))
    for text in ("BLOCK = 64", "BLOCK = 32"):
        (kernels / "a.py").write_text(text)
        seen.add(fingerprint({}, gpu_machine("a GPU", (9, 0))))
    assert len(seen) == 6


def test_the_gpu_path_needs_no_numba_no_ray_and_no_pydantic() -> None:
    """A machine with a GPU may have neither: a bench there carries this package alone."""
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "llvmlite", "ray", "pydantic", "fastapi"):
            raise ImportError("absent: " + name)
sys.meta_path.insert(0, Absent())
import serve_app.llm, serve_app.runner.model_runner, serve_app.runner.cuda_device, serve_app.kernels.cuda
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
