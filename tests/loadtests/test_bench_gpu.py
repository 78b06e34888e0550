"""The GPU bench without a GPU: its arithmetic, what it says where there is none, and every part on toy shapes."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtests.gpu_bench import engine, theory
from loadtests.gpu_bench.theory import H200, LLAMA_8B

REPOSITORY = Path(__file__).parents[2]
BENCH = REPOSITORY / "loadtests" / "bench_gpu.py"


def run(*arguments: str, code: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = [sys.executable, str(BENCH)] if code is None else [sys.executable, "-c", code, str(BENCH)]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


# ---- theory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [theory, engine], ids=["theory", "engine"])
def test_examples(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_the_8b_shape_is_llamas() -> None:
    assert LLAMA_8B.num_parameters == 8_030_261_248
    assert LLAMA_8B.kv_bytes_per_token(2) == 128 * 1024
    assert sum(out * width for out, width in theory.products_of(LLAMA_8B).values()) == (
        LLAMA_8B.layer_linear_parameters + LLAMA_8B.head_parameters
    )


def test_pairs_of_chunks_add_up_to_those_of_the_whole() -> None:
    assert theory.visible_pairs([(0, 7), (7, 30), (37, 1)]) == theory.visible_pairs([(0, 38)]) == 38 * 39 // 2


def test_the_steady_state_is_what_a_large_closed_set_comes_to() -> None:
    """256 requests in lockstep, step by step; their decode steps are bound by arithmetic, as the formula takes them."""
    isl, osl = 1000, 1000
    seconds = 256 * theory.step(LLAMA_8B, H200, [(0, isl)], 1).seconds
    for i in range(1, osl):
        seconds += theory.step(LLAMA_8B, H200, [(isl + i - 1, 1)] * 256, 256).seconds
    assert 256 * osl / seconds == pytest.approx(theory.steady_tokens_per_s(LLAMA_8B, H200, isl, osl), rel=0.01)


def test_a_step_of_few_rows_reads_the_weights_and_one_of_many_is_bound_by_products() -> None:
    few, more, many = (theory.step(LLAMA_8B, H200, [(0, 1)] * n, n).products for n in (1, 100, 1000))
    assert few == more == LLAMA_8B.weight_bytes_per_step(2) / H200.bandwidth
    assert many == pytest.approx(1000 * 2 * 7.5e9 / H200.flops, rel=0.01)


def test_prediction_needs_no_torch() -> None:
    code = "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: print(sorted(m for m in ('torch', 'triton', 'transformers') if m in sys.modules))"
    done = run("--predict", code=code)
    assert done.returncode == 0, done.stderr
    *table, loaded = done.stdout.strip().splitlines()
    assert loaded == "[]"
    text = "\n".join(table)
    assert "430 TFLOP/s (55% of the product) | at most 719.2 us" in text  # 309 GFLOP / 430e12
    assert "| 256 decodes at 1000 | 4.93 ms | 7.80 ms | 0.00 ms | 12.73 ms | 20,111 |" in text
    assert "the target of 8,500 is 71% of it" in text


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.may_skip("only a machine without a GPU can show it")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("bench_gpu needs an NVIDIA GPU")
    assert "--predict" in done.stderr


BLOCKED = ("ray", "pydantic", "fastapi", "psutil", "numba", "llvmlite", "vllm")

WITHOUT = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError("absent: " + name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_imports_nothing_that_a_gpu_machine_may_lack() -> None:
    done = run("--dry-run", code=WITHOUT)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        *("ceilings", "correctness", "decode", "prefill", "ops", "engine")
    ]


@pytest.fixture(scope="module")
def tiny() -> tuple[list[str], dict[str, Any]]:
    """(all lines, the JSON of the last one)"""
    done = run("--tiny", "--debug", "--minutes", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    return lines, json.loads(lines[-1])


def test_tiny_runs_every_part(tiny: tuple[list[str], dict[str, Any]]) -> None:
    lines, found = tiny
    assert any(line.startswith("TINY") for line in lines), "toy timings are labelled"
    assert found["tiny"] is True
    assert found["problems"] == []
    assert found["skipped"] == {}
    results = found["results"]
    assert {*results} == {"ceilings", "correctness", "compiled", "decode", "prefill", "ops", "products", "engine"}
    assert len(results["correctness"]) == 7
    assert all(row["ok"] for row in results["correctness"])
    assert results["compiled"] == {"kernels": 1, "spilling": []}
    for part in ("decode", "prefill", "ops", "products"):
        for row in results[part]:
            assert row["bytes"] > 0
            assert row["flops"] > 0
            assert row["floor_us"] > 0
            assert row["us"] > 0
    assert len(found["verdicts"]) == 3
    assert sum("tiny, no verdict" in line for line in lines) == 3


def test_tiny_runs_the_engine_in_both_modes_and_transformers(tiny: tuple[list[str], dict[str, Any]]) -> None:
    answers = tiny[1]["results"]["engine"]
    assert list(answers) == ["fast", "deterministic", "transformers-cb"]
    for name in ("fast", "deterministic"):
        closed = answers[name]["closed"]
        assert closed["recompilations"] == []
        assert closed["replays"] > 0
        assert closed["preempted"] == 0
        assert 0 < closed["of_roofline"] < 1
        assert set(closed["steps"]) == {"decode", "with a chunk"}
        assert sum(kind["steps"] for kind in closed["steps"].values()) == closed["num_steps"]
        assert closed["output_tokens"] == answers[name]["num_requests"] * answers[name]["osl"]
    assert answers["transformers-cb"]["compare"]["tokens_per_s"] > 0


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_no_time_left_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = engine.run_all(H200, time.monotonic() + 5.0, None, tiny=False)
    assert all("are left, and it needs 45" in answer["skipped"] for answer in found.values())
    assert "skipped" in capsys.readouterr().out


def test_a_system_that_fails_is_an_answer(tmp_path: Path) -> None:
    spec = engine.base_spec(tmp_path, H200, tiny=True) | {"system": "vllm"}
    answer = engine.run_one(spec, 60.0, sys.executable)
    assert "No module named 'vllm'" in answer["error"]


def test_price_comes_from_one_and_the_same_load() -> None:
    fast = {"closed": {"tokens_per_s": 100.0, "wall_s": 1.0}, "osl": 1000, "compare": {"tokens_per_s": 50.0}}
    exact = {"closed": {"tokens_per_s": 60.0, "wall_s": 1.0}, "osl": 500, "compare": {"tokens_per_s": 40.0}}
    assert engine.price({"fast": fast, "deterministic": exact | {"osl": 1000}}) == (
        pytest.approx(0.4),
        "1000/1000: 60 against 100",
    )
    assert engine.price({"fast": fast, "deterministic": exact}) == (pytest.approx(0.2), "compared set")
    assert engine.price({"fast": fast}) is None
