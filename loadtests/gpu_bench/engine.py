"""The engine on the card: ours fast and deterministic, transformers and vLLM, each in a process that gives back the card.

Two request sets. The closed set: as many requests as run at once (256, or what the cache holds), 1,000 tokens in and
1,000 out; where the time does not do, fewer tokens out, and the rest of the run is extrapolated from the decode steps,
whose time grows with the context in a straight line. The compared set is small enough for the slowest system, and every
system runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loadtests.gpu_bench import child, theory
from loadtests.gpu_bench.theory import LLAMA_8B, Ceilings
from loadtests.workloads import ModelShape, write_config

Answer = dict[str, Any]

TINY = ModelShape("llama-tiny", "LlamaForCausalLM", 32, 1, 4, 2, 16, 48, 97, False, 64)

SHARES = {"fast": 3.0, "deterministic": 2.5, "transformers-cb": 1.5, "vllm": 3.0}
"""Of the time that is left, among the systems still to come; what one does not use is left for the next."""
LEAST = 45.0
"""Where less is left, a system is not started."""


def base_spec(directory: Path, ceilings: Ceilings, tiny: bool) -> child.Spec:
    """What all systems are told. Writes the model's config into ``directory``."""
    shape = TINY if tiny else LLAMA_8B
    model = write_config(shape, directory / shape.name)
    if tiny:  # the interpreter knows no bfloat16
        config = json.loads((model / "config.json").read_text()) | {"dtype": "float32"}
        (model / "config.json").write_text(json.dumps(config))
    sizes: child.Spec = {
        "rows": 256,
        "budget": 4096,
        "block_size": 64,
        "max_model_len": 2048,
        "isl": 1000,
        "osls": [1000, 500, 250, 125],
        "compare": [64, 128],
    }
    if tiny:
        sizes = {
            "rows": 2,
            "budget": 16,
            "block_size": 16,
            "max_model_len": 48,
            "isl": 9,
            "osls": [3],
            "compare": [2, 2],
        }
    return {
        "model": str(model),
        "shape": list(dataclasses.astuple(shape)),
        "utilization": 0.9,
        "num_requests": None,
        "ceilings": [ceilings.bandwidth, ceilings.flops],
        "deterministic": False,
        "tiny": tiny,
        **sizes,
    }


def run_all(ceilings: Ceilings, deadline: float, vllm_python: str | None, tiny: bool) -> dict[str, Answer]:
    """Answers by system; {"error": ...} of one that failed, {"skipped": ...} of one for which no time was left."""
    found: dict[str, Answer] = {}
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as directory:
        spec = base_spec(Path(directory), ceilings, tiny)
        systems = ["fast", "deterministic", "transformers-cb"] + (["vllm"] if vllm_python else [])
        for i, name in enumerate(systems):
            left = deadline - time.monotonic()
            share = left * SHARES[name] / sum(SHARES[other] for other in systems[i:])
            if left < (1.0 if tiny else LEAST):
                found[name] = {"skipped": f"{left:.0f} s are left, and it needs {LEAST:.0f}"}
            else:
                changes = {
                    "system": "ours" if name in ("fast", "deterministic") else name,
                    "deterministic": name == "deterministic",
                    "num_requests": found.get("fast", {}).get("num_requests"),
                }
                python = vllm_python if name == "vllm" else None
                found[name] = run_one(spec | changes, max(share, min(left, LEAST)), python or sys.executable)
            print(f"{name:16} {_one_line(found[name])}", flush=True)
    return found


def run_one(spec: child.Spec, seconds: float, python: str) -> Answer:
    """One system in a fresh process. What it had found out when its time was up counts."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as directory:
        log, path, answer_path = (Path(directory) / name for name in ("log", "spec.json", "answer.json"))
        # 10 s to spare: a run that is late would otherwise lose its answer
        deadline = time.monotonic() + max(seconds - 10.0, seconds / 2)
        path.write_text(json.dumps({**spec, "answer": str(answer_path), "deadline": deadline}))
        with log.open("wb") as output:
            process = subprocess.Popen(
                [python, str(Path(child.__file__).resolve()), str(path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=directory,
                env=dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )
            try:
                code: int | str = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = f"not done after {seconds:.0f} s"
            finally:
                # Its own session: whatever it started and left behind ends with it, and nothing else.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        answer: Answer = json.loads(answer_path.read_text()) if answer_path.exists() else {}
        if code != 0:
            lines = log.read_text(errors="replace").strip().splitlines()
            said = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "nothing")
            answer["error"] = f"exit {code}: {said.strip()[:300]}"
        return answer


def tokens_per_s(answer: Answer, osl: int = 1000) -> tuple[float, bool] | None:
    """(output tokens a second for answers of ``osl`` tokens, whether that was extrapolated); None: not known.

    With 2 requests of 10 tokens out of 4 run in 1 s, and decode steps of 0.1 s + 0.01 s a token of context, the other 6
    tokens, at contexts 14 to 19, take 0.6 + 0.99 s: 20 tokens in 2.59 s.

    >>> closed = {"wall_s": 1.0, "tokens_per_s": 8.0, "decode_fit": [0.1, 0.01]}
    >>> rate, extrapolated = tokens_per_s({"closed": closed, "num_requests": 2, "isl": 10, "osl": 4}, 10)
    >>> round(rate, 3), extrapolated
    (7.722, True)
    """
    closed = answer.get("closed")
    if closed is None:
        return None
    if answer["osl"] >= osl:
        return closed["tokens_per_s"], False
    if not closed.get("decode_fit"):
        return None
    a, b = closed["decode_fit"]
    rest = sum(a + b * (answer["isl"] + i) for i in range(answer["osl"], osl))
    return answer["num_requests"] * osl / (closed["wall_s"] + rest), True


def price(answers: dict[str, Answer]) -> tuple[float, str] | None:
    """(share of tokens/s that deterministic mode costs, on which set); None: not known."""
    fast, exact = answers.get("fast", {}), answers.get("deterministic", {})
    rates = tokens_per_s(fast), tokens_per_s(exact)
    if rates[0] is not None and rates[1] is not None:
        how = ", extrapolated" if rates[0][1] or rates[1][1] else ""
        return 1 - rates[1][0] / rates[0][0], f"1000/1000: {rates[1][0]:.0f} against {rates[0][0]:.0f}{how}"
    if "compare" in fast and "compare" in exact:
        return 1 - exact["compare"]["tokens_per_s"] / fast["compare"]["tokens_per_s"], "compared set"
    return None


def _one_line(answer: Answer) -> str:
    parts = []
    if "startup_s" in answer:
        parts.append(f"start-up {answer['startup_s']:.0f} s")
    if "compare" in answer:
        parts.append(f"compared set {answer['compare']['tokens_per_s']:.0f} tokens/s")
    if "closed" in answer:
        closed = answer["closed"]
        what = f"{answer['num_requests']} x {answer['isl']}/{answer['osl']}"
        parts.append(f"closed set ({what}) {closed['tokens_per_s']:.0f} tokens/s in {closed['wall_s']:.1f} s")
    parts += [f"{key}: {answer[key]}" for key in ("why_not", "skipped", "error") if key in answer]
    return "; ".join(parts)


def print_steps(answers: dict[str, Answer], shape: ModelShape, ceilings: Ceilings) -> None:
    """Ours: milliseconds by kind of step, and of a decode step on the device by part."""
    parts = ("schedule", "batch", "enqueue", "wait", "update")
    head = "".join(f"{part:>10}" for part in parts)
    print(f"\n{'ms per step':34}{'steps':>7}{'rows':>8}{'step':>9}{'floor':>8}{'of floor':>10}{head}")
    for name in ("fast", "deterministic"):
        for kind, row in answers.get(name, {}).get("closed", {}).get("steps", {}).items():
            cells = "".join(f"{row[part]:10.3f}" for part in parts)
            print(
                f"{f'{name}, {kind}':34}{row['steps']:7}{row['rows']:8.1f}{row['ms']:9.3f}{row['floor_ms']:8.3f}"
                f"{row['floor_ms'] / row['ms']:10.1%}{cells}"
            )
    print(
        "floor: max(W / BW, 2 (P_body T + P_head S) / F) + context c / BW + 4 L H D pairs / F, of the very same steps:"
        f" W {shape.weight_bytes_per_step(2) / 1e9:.1f} GB,"
        f" P_body {shape.num_layers * shape.layer_linear_parameters / 1e9:.2f}e9, P_head"
        f" {shape.head_parameters / 1e9:.2f}e9, c {shape.kv_bytes_per_token(2)} B, BW"
        f" {ceilings.bandwidth / 1e12:.2f} TB/s, F {ceilings.flops / 1e12:.0f} TFLOP/s"
    )
    for name in ("fast", "deterministic"):
        answer = answers.get(name, {})
        if split := answer.get("device_us"):
            shares = ", ".join(f"{part} {us:.0f}" for part, us in sorted(split.items(), key=lambda item: -item[1]))
            print(f"{name}: us of a full decode step on the device: {shares}")
        elif why := answer.get("device_us_why_not"):
            print(f"{name}: no split of the step on the device: {why}")


def steady_floor(ceilings: Ceilings) -> float:
    """Tokens/s of 1,000 in and 1,000 out at the floor."""
    return theory.steady_tokens_per_s(LLAMA_8B, ceilings, 1000, 1000)
