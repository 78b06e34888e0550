"""Models that run through transformers: our engine against transformers' own continuous batching, on the same model.

Each model is a config of 25 to 45 million parameters with random weights. In one process, both systems are loaded, warmed
up, and given one seeded set of requests in turns (A B, B A, ...), all at once, greedy, end-of-sequence ignored, float32.
Ratios are taken within a turn, then their median. qwen3 is there because it runs both ways here: what it costs that
transformers' layers are run instead of our own page, which fuses norms, rotary embeddings and products.

Theory: each step's products at the FLOP/s of the model's best product, or its weights at the bandwidth of memory,
whichever is longer; of experts as many as the step's tokens can reach. "of theory" is that time over the run's CPU time
for each thread. "by CPU time" compares what a token costs the processor: with one thread it says the same as tokens/s on
a quiet machine, and much the same on a busy one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from systems import GIB, OurEngine, Spec, TransformersContinuous, make_model
from workloads import RequestSet, make_requests

VOCAB_SIZE = 32_000
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1152,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
MODELS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {}),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", {"sliding_window": 256, "query_pre_attn_scalar": 64}),
    "phi3": ("Phi3ForCausalLM", "phi3", {"num_attention_heads": 6, "num_key_value_heads": 6}),
    "granite": ("GraniteForCausalLM", "granite", {"attention_multiplier": 0.125, "num_attention_heads": 6,
                                                   "num_key_value_heads": 3}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 4,
                                                       "moe_intermediate_size": 192, "norm_topk_prob": True}),
}  # fmt: skip
"""Architecture, model_type, changes of COMMON."""
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 96, "vocab_size": 512}
"""To try the bench with."""


def write_model(directory: Path, name: str, changes: Mapping[str, Any]) -> Path:
    architecture, model_type, own = MODELS[name]
    directory.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [architecture], "model_type": model_type, **COMMON, **own, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    make_model(directory)
    return directory


def theory(engine: OurEngine, records: list[Any], config: Mapping[str, Any]) -> float:
    """Seconds that the products of these steps need at least."""
    linears = engine.runner.model.linears
    bandwidth, peak = limits(linears)
    dense = [x for x in linears if not _is_expert(x, config)]
    experts = [x for x in linears if _is_expert(x, config)]
    num, chosen = config.get("num_experts", 1), config.get("num_experts_per_tok", 1)
    seconds = 0.0
    for record in records:
        rows = record.num_tokens
        reached = min(1.0, rows * chosen / num)
        for group, share, touched in ((dense, 1.0, 1.0), (experts, chosen / num, reached)):
            size = sum(x.in_features * x.out_features for x in group)
            size_bytes = sum(x.in_features * x.out_features * x.dtype.itemsize for x in group)
            seconds += max(2.0 * rows * size * share / peak, size_bytes * touched / bandwidth)
    return seconds


def limits(linears: list[Any]) -> tuple[float, float]:
    """Bytes per second that a sum reads from memory, FLOP/s of the model's best product: by CPU time, best of seven."""

    def best_seconds(function: Any, times: int) -> float:
        found = []
        for _ in range(7):
            began = time.process_time()
            for _ in range(times):
                function()
            found.append((time.process_time() - began) / times)
        return min(found) / torch.get_num_threads()

    data = torch.ones(1 << 26)
    bandwidth = data.nbytes / best_seconds(data.sum, 1)
    peak = 0.0
    for linear in {linear.shape_key: linear for linear in linears}.values():
        x = torch.randn(256, linear.in_features).to(linear.dtype)
        flops = 2.0 * x.shape[0] * linear.in_features * linear.out_features
        peak = max(peak, flops / best_seconds(lambda x=x, linear=linear: linear(x), 8))
    return bandwidth, peak


def _is_expert(linear: Any, config: Mapping[str, Any]) -> bool:
    width = config.get("moe_intermediate_size")
    shape = linear.out_features, linear.in_features
    hidden = config["hidden_size"]
    return width is not None and shape in ((2 * width, hidden), (hidden, width))


def compare(directory: Path, name: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way to run the model. Raises RuntimeError if an answer has the wrong length."""
    from serve_app.engine.step_record import StepRecorder

    model = write_model(directory / name, name, TINY if given.tiny else {})
    config = json.loads((model / "config.json").read_text())

    def requests(num: int, seed: int, outputs: tuple[int, int]) -> RequestSet:
        lens = tuple(given.prompt_lens)
        return make_requests(num, vocab_size=config["vocab_size"], prompt_lens=lens, output_lens=outputs, seed=seed)

    work = requests(given.requests, 0, tuple(given.output_lens))
    warmup = requests(4, 1, (4, 8))
    spec: Spec = {
        "model": str(model),
        "dtype": "float32",
        "requests": work.to_json(),
        "threads": given.threads,
        "budget": given.budget,
        "rows": given.rows,
        "kv_bytes": GIB // 2,
        "deterministic": given.deterministic,
        "system": "continuous",
        # Theirs; Gemma 2's soft-cap has no other.
        "attention": "eager" if name == "gemma2" else "sdpa",
    }
    systems: dict[str, Any] = {"ours": OurEngine({**spec, "implementation": "transformers"})}
    if name == "qwen3":
        systems["our own page"] = OurEngine(spec)
    systems["transformers-cb"] = TransformersContinuous(spec)
    for system in systems.values():
        system.run(warmup)
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in systems}
    for turn in range(given.repeat):
        for label in list(systems) if turn % 2 == 0 else list(systems)[::-1]:
            system = systems[label]
            if isinstance(system, OurEngine):
                system.engine.recorder = StepRecorder(capacity=1 << 18)
            began = time.process_time()
            run = system.run(work).summary()
            run["cpu_s"] = time.process_time() - began
            runs[label].append(run)
    rows = []
    for label, found in runs.items():
        speeds = [run["tokens_per_s"] for run in found]
        theirs = runs["transformers-cb"]
        row = {
            "model": name,
            "system": label,
            "tokens_per_s": statistics.median(speeds),
            "ratio": statistics.median(
                run["tokens_per_s"] / their["tokens_per_s"] for run, their in zip(found, theirs, strict=True)
            ),
            "cpu_ratio": statistics.median(
                their["cpu_s"] / run["cpu_s"] for run, their in zip(found, theirs, strict=True)
            ),
            "cpu_s": statistics.median(run["cpu_s"] for run in found),
            "itl_p50_ms": statistics.median(run["itl_ms"]["p50"] for run in found),
            "same_tokens": _same(found[0]["tokens"], runs["transformers-cb"][0]["tokens"]),
            "of_theory": None,
            "mode": None,
        }
        system = systems[label]
        if isinstance(system, OurEngine):
            records = list(system.engine.recorder.records)
            row["of_theory"] = theory(system, records, config) / found[-1]["cpu_s"] * given.threads
            row["mode"] = "deterministic" if system.runner.deterministic else "fast"
        rows.append(row)
    systems["transformers-cb"].manager.stop(block=True)
    return rows


def _same(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of tokens up to the first that differs, of each answer: near ties, and what rounding makes of them."""
    num = sum(
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(ours, theirs, strict=True)
    )
    return num / sum(map(len, ours))


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| model | system | tokens/s | of transformers-cb | by CPU time | latency p50 ms | of theory | same tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        share = "" if row["of_theory"] is None else f"{row['of_theory']:.2f}"
        mode = "" if row["mode"] is None else f" ({row['mode']})"
        print(
            f"| {row['model']} | {row['system']}{mode} | {row['tokens_per_s']:.0f} | {row['ratio']:.2f} |"
            f" {row['cpu_ratio']:.2f} | {row['itl_p50_ms']:.1f} | {share} | {row['same_tokens']:.0%} |",
            flush=True,
        )


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = options.add_argument
    add("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    add("--requests", type=int, default=32)
    add("--prompt-lens", type=int, nargs=2, default=(16, 256))
    add("--output-lens", type=int, nargs=2, default=(16, 64))
    add("--rows", type=int, default=16, help="requests at a time")
    add("--budget", type=int, default=512, help="tokens of a step")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--repeat", type=int, default=3)
    add("--deterministic", action="store_true")
    add("--tiny", action="store_true", help="to try the bench")
    given = options.parse_args()
    load = os.getloadavg()[0]
    print(
        f"{given.requests} requests at once, prompts of {given.prompt_lens[0]} to {given.prompt_lens[1]} tokens, answers of"
        f" {given.output_lens[0]} to {given.output_lens[1]}; {given.rows} at a time, {given.budget} tokens a step;"
        f" {given.threads} threads, load average {load:.1f}, {given.repeat} turns",
        flush=True,
    )
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-transformers-") as directory:
        for name in given.models:
            rows += compare(Path(directory), name, given)
            print_table(rows[-3 if name == "qwen3" else -2 :])
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), "load_average": load, **vars(given), "rows": rows}))


if __name__ == "__main__":
    main()
