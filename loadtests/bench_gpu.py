"""Kernels and engine on an NVIDIA GPU, against its own ceilings, torch, transformers and vLLM. At most 10 minutes.

    python loadtests/bench_gpu.py                       all parts; safe to run again, leaves nothing behind
    python loadtests/bench_gpu.py --parts ceilings decode
    python loadtests/bench_gpu.py --predict             no GPU: the floors and what each target means, as markdown
    python loadtests/bench_gpu.py --tiny                no GPU: every part on toy shapes, in Triton's interpreter on the
                                                        CPU. It tests this bench; its timings mean nothing

    ceilings      a copy of 8 GB and a product of 8192^3 on random data; an empty launch, a node of a graph
    correctness   every shipped kernel compiled for this card; attention and the deterministic product in bfloat16 against
                  float64 oracles; their bits alone, in company, in chunks, on other pages
    decode        attention of batch x context; torch's SDPA on contiguous memory beside it, the best case without paging
    prefill       attention of prompts, fresh and behind a context; the same beside it
    ops           fused ops and the sampler against torch, the deterministic product against cuBLAS
    engine        a dummy-weight Llama-3.1-8B: 1,000 tokens in, 1,000 out; the price of deterministic mode; transformers'
                  continuous batching and, with --vllm-python, vLLM on a set that all of them run

Theory (gpu_bench/theory.py) stands beside each figure: bytes, FLOPs, and the floor they set at this run's ceilings, or,
where these were not measured, at an H200's as assumed. Every kernel is timed as a CUDA graph over buffers larger than
five times the L2 cache, the median over replays, twice (gpu_bench/meter.py). A part has a share of --minutes; what does
not fit is left out, and said. Verdicts hold measured figures against the targets. Exit code 1: something failed, or is
wrong; 2: no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from loadtests.gpu_bench import theory  # noqa: E402

PARTS = {"ceilings": 25.0, "correctness": 80.0, "decode": 70.0, "prefill": 30.0, "ops": 45.0, "engine": 330.0}
"""Seconds each may take at most; the engine takes what is left."""
LEAST = 5.0
"""With less left, a part is not begun."""

LOADED = (
    "loadtests.gpu_bench.attention",
    "loadtests.gpu_bench.ceilings",
    "loadtests.gpu_bench.child",
    "loadtests.gpu_bench.engine",
    "loadtests.gpu_bench.meter",
    "loadtests.gpu_bench.small_ops",
    "loadtests.machine_code.kernel",
    "serve_app.engine.engine",
    "serve_app.runner.cuda_device",
    "serve_app.runner.model_runner",
)
"""What a run imports, this process or those it starts: tried by --dry-run."""


class Compilation:
    """Every shipped kernel compiled for one capability, in a process beside this one, while others of its parts run."""

    def __init__(self, capability: tuple[int, int], only: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="bench-gpu-")
        self._path = Path(self._directory.name) / "reports.json"
        self._log = Path(self._directory.name) / "log"
        number = "80" if capability < (9, 0) else "90" if capability < (10, 0) else "100"  # those that are recorded
        command = [sys.executable, "-m", "loadtests.machine_code", "--capability", number, "--json", str(self._path)]
        command += ["--only", only] if only else []
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(Path(self._directory.name) / "cache")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def result(self, seconds: float) -> dict[str, Any]:
        """{"kernels": number, "spilling": names}, or {"error": ...}. Waits so long at most."""
        try:
            code = self._process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return {"error": f"not compiled after {seconds:.0f} s"}
        if code or not self._path.exists():
            said = self._log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            return {"error": f"exit {code}: {said[-1][:300]}"}
        reports = json.loads(self._path.read_text())["reports"]
        return {
            "kernels": len(reports),
            "spilling": [report["name"] for report in reports if report["spills"] or report["stack"]],
        }

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._directory.cleanup()


class Bench:
    """The parts, one after the other, and what they found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from loadtests.gpu_bench.meter import Meter, find_setup

        self.arguments = arguments
        self.tiny: bool = arguments.tiny
        self.setup = find_setup(self.tiny)
        self.meter = Meter(self.setup)
        self.end = time.monotonic() + 60 * arguments.minutes
        self.found: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.problems: list[str] = []

    def run(self) -> None:
        chosen = [part for part in PARTS if part in self.arguments.parts]
        compilation = None
        if "correctness" in chosen:
            compilation = Compilation(self.setup.capability, "silu" if self.tiny else "")
        try:
            for part in chosen:
                if part == "engine":
                    self._collect(compilation)
                left = self.end - time.monotonic()
                if left < LEAST:
                    self.skipped[part] = f"{max(0.0, left):.0f} s are left of {self.arguments.minutes:g} minutes"
                    print(f"\n== {part}: skipped, {self.skipped[part]}", flush=True)
                    continue
                seconds = left if part == "engine" else min(left, PARTS[part])
                self._one(part, seconds)
            self._collect(compilation)
        finally:
            if compilation is not None:
                compilation.end()

    def _one(self, part: str, seconds: float) -> None:
        print(f"\n== {part}, at most {seconds:.0f} s", flush=True)
        started = time.monotonic()
        self.setup.deadline, self.setup.num_skipped = started + seconds, 0
        try:
            getattr(self, f"_{part}")()
        except Exception as error:
            if self.arguments.debug:
                raise
            self.problems.append(f"{part} failed: {type(error).__name__}: {str(error).strip()[:300]}")
            print(self.problems[-1])
        if self.setup.num_skipped:
            self.skipped[part] = f"{self.setup.num_skipped} cases left out after {seconds:.0f} s"
            print(f"{part}: {self.skipped[part]}")
        print(f"({time.monotonic() - started:.0f} s)", flush=True)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _ceilings(self) -> None:
        from loadtests.gpu_bench import ceilings

        self.setup.ceilings, self.found["ceilings"] = ceilings.measure(self.setup, self.meter)
        ceilings.print_figures(self.found["ceilings"], self.setup.ceilings)

    def _correctness(self) -> None:
        from loadtests.gpu_bench import attention, small_ops

        rows = small_ops.check_products(self.setup) + attention.check_bits(self.setup)
        rows += attention.check_values(self.setup)
        for row in rows:
            what = f"error {row['error']:.2e}" if "error" in row else f"{row['differing']} rows differ"
            print(f"{row['name']:52}{row['rows']:6} rows   {what:18} {'right' if row['ok'] else 'WRONG'}")
            if not row["ok"]:
                self.problems.append(f"{row['name']}: {what}")
        self.found["correctness"] = rows

    def _collect(self, compilation: Compilation | None) -> None:
        """What was compiled meanwhile. Asked for late, and before the engine, whose host should be undisturbed."""
        if compilation is None or "compiled" in self.found:
            return
        compiled = compilation.result(min(60.0, self.end - time.monotonic()))
        if "error" in compiled:
            self.problems.append(f"compilation: {compiled['error']}")
        elif compiled["spilling"]:
            self.problems.append(f"spilling registers: {', '.join(compiled['spilling'])}")
        self.found["compiled"] = compiled
        print(f"\ncompiled ahead for this card: {compiled}")

    def _decode(self) -> None:
        from loadtests.gpu_bench import attention

        attention.bench_decode(self.setup, self.meter, self.found.setdefault("decode", []))

    def _prefill(self) -> None:
        from loadtests.gpu_bench import attention

        attention.bench_prefill(self.setup, self.meter, self.found.setdefault("prefill", []))

    def _ops(self) -> None:
        from loadtests.gpu_bench import small_ops

        rows, products = self.found.setdefault("ops", []), self.found.setdefault("products", [])
        try:
            small_ops.bench_ops(self.setup, self.meter, rows)
            small_ops.bench_sampler(self.setup, self.meter, rows)
            small_ops.bench_products(self.setup, self.meter, products)
        finally:
            small_ops.print_all(rows, products)

    def _engine(self) -> None:
        from loadtests.gpu_bench import engine
        from loadtests.gpu_bench.meter import release

        release()
        answers = engine.run_all(self.setup.ceilings, self.end, self.arguments.vllm_python, self.tiny)
        engine.print_steps(answers, engine.TINY if self.tiny else theory.LLAMA_8B, self.setup.ceilings)
        self.found["engine"] = answers
        for name, answer in answers.items():
            if "error" in answer and name in ("fast", "deterministic"):
                self.problems.append(f"engine, {name}: {answer['error']}")
            elif "error" in answer:  # another's failure is not ours
                self.skipped[f"engine, {name}"] = answer["error"]
            if "skipped" in answer:
                self.skipped[f"engine, {name}"] = answer["skipped"]
            if names := answer.get("closed", {}).get("recompilations"):
                self.problems.append(f"engine, {name}: compiled after start-up: {', '.join(names)}")

    # ---- results -----------------------------------------------------------------------------------------------------

    def conditions(self) -> dict[str, Any]:
        import torch
        import triton

        found = {
            "gpu": self.setup.name,
            "gpu_memory": self.setup.memory,
            "multiprocessors": self.setup.num_processors,
            "l2_bytes": self.setup.l2_bytes,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "minutes": self.arguments.minutes,
            "date": time.strftime("%Y-%m-%d"),
            "dtype": str(self.setup.dtype).removeprefix("torch."),
        }
        for name in ("transformers", "numpy"):
            found[name] = getattr(importlib.import_module(name), "__version__", None)
        return found

    def summary(self) -> list[tuple[str, str, str]]:
        """(figure, measured, beside it)."""
        ceilings, lines = self.setup.ceilings, []

        def add(name: str, value: str, beside: str = "") -> None:
            lines.append((name, value, beside))

        add("ceilings", f"{ceilings.bandwidth / 1e12:.2f} TB/s, {ceilings.flops / 1e12:.0f} TFLOP/s", ceilings.source)
        if rows := self.found.get("correctness"):
            wrong = sum(not row["ok"] for row in rows)
            add(
                "correct, and exact bits",
                f"{len(rows) - wrong} of {len(rows)}",
                "float64 oracles; alone, in company, chunked",
            )
        if found := self._large_decodes():
            worst = min(found, key=lambda row: row["of_copy"])
            add("decode with 64k tokens or more, worst", f"{worst['of_copy']:.1%} of copy", worst["name"])
        prefill = self.found.get("prefill", ())
        for row in prefill:
            if row["heads"] == prefill[0]["heads"]:
                beside = f"{row['of_gemm']:.1%} of gemm; {row['us']:.0f} us, floor {row['floor_us']:.0f}"
                if row.get("flash"):
                    beside += f"; flash without pages {row['flash']:.0f}"
                add(f"prefill {row['name']}", f"{row['tflops']:.0f} TFLOP/s", beside)
        for row in self.found.get("ops", ()):
            if self.tiny or row["name"].endswith(("2048 rows", "256 rows, greedy", "256 rows, top-k 50, top-p 0.9")):
                beside = f"{row['us']:.1f} us, floor {row['floor_us']:.1f}; torch {row['torch']:.1f}"
                add(row["name"], f"{row['of_floor']:.1%} of copy", beside)
        by_rows: dict[str, list[float]] = {}
        for row in self.found.get("products", ()):
            by_rows.setdefault(row["name"].split(", ")[1], []).append(row["gain"])
        for rows_name, gains in by_rows.items():
            mean = math.exp(sum(math.log(gain) for gain in gains) / len(gains))
            add(f"deterministic product, {rows_name}", f"{mean:.2f} of cuBLAS", f"{min(gains):.2f} to {max(gains):.2f}")
        return lines + self._engine_summary()

    def _large_decodes(self) -> list[dict[str, Any]]:
        least = 0 if self.tiny else theory.DECODE_TARGET_TOKENS
        return [row for row in self.found.get("decode", ()) if row["context"] >= least]

    def _engine_summary(self) -> list[tuple[str, str, str]]:
        from loadtests.gpu_bench import engine

        lines: list[tuple[str, str, str]] = []
        answers = self.found.get("engine", {})
        fast = answers.get("fast", {})
        if "closed" in fast:
            closed, floor = fast["closed"], engine.steady_floor(self.setup.ceilings)
            what = f"{fast['num_requests']} x {fast['isl']}/{fast['osl']}"
            if rate := engine.tokens_per_s(fast):
                how = "extrapolated from" if rate[1] else "measured on"
                beside = f"{how} {what}; floor {floor:.0f}"
                lines.append(("engine, 1000/1000", f"{rate[0]:.0f} tokens/s", beside))
            beside = f"{closed['floor_s']:.2f} of {closed['wall_s']:.2f} s, the same steps at the floor; {what}"
            lines.append(("engine, of the roofline", f"{closed['of_roofline']:.1%}", beside))
            padded = f"{closed['padded_rows']} of {closed['rows'] + closed['padded_rows']}"
            beside = f"{closed['replays']} replays; compiled after start-up: {len(closed['recompilations'])}"
            lines.append(("engine, padded rows", padded, beside))
        if found := engine.price(answers):
            lines.append(("price of deterministic mode", f"{found[0]:.1%}", f"of tokens/s, {found[1]}"))
        for name, answer in answers.items():
            if "compare" in answer and name != "fast" and "compare" in fast:
                rate = answer["compare"]["tokens_per_s"]
                beside = f"ours, fast: {fast['compare']['tokens_per_s'] / rate:.2f} times that"
                lines.append((f"compared set, {name}", f"{rate:.0f} tokens/s", beside))
            if name == "vllm" and "closed" in answer and "closed" in fast:
                rate = answer["closed"]["tokens_per_s"]
                beside = f"ours, fast: {fast['closed']['tokens_per_s'] / rate:.2f} times that"
                lines.append(("closed set, vllm", f"{rate:.0f} tokens/s", beside))
        return lines

    def verdicts(self) -> list[dict[str, Any]]:
        from loadtests.gpu_bench import engine

        rate = engine.tokens_per_s(self.found.get("engine", {}).get("fast", {}))
        prefill = [row["tflops"] for row in self.found.get("prefill", ()) if row["case"] == "2k after 8k"]  # 8B's first
        return theory.verdicts(
            {
                "decode_of_copy": min((row["of_copy"] for row in self._large_decodes()), default=None),
                "prefill_tflops": prefill[0] if prefill else None,
                "tokens_per_s": None if rate is None else rate[0],
            }
        )


def main() -> int:
    options = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run")
    options.add_argument("--minutes", type=float, default=9.5, help="budget of the whole run")
    options.add_argument("--vllm-python", help="the Python of a venv with vLLM, to be compared with")
    options.add_argument("--predict", action="store_true", help="print the floors and targets; needs no GPU")
    options.add_argument("--tiny", action="store_true", help="toy shapes in the interpreter, to test this bench")
    options.add_argument("--dry-run", action="store_true", help="import all that a run needs, and say what it would do")
    options.add_argument("--debug", action="store_true", help="end with a traceback where a part fails")
    arguments = options.parse_args()
    if arguments.predict:
        print(theory.prediction())
        return 0
    if arguments.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which is below
    if arguments.dry_run:
        for name in LOADED:
            importlib.import_module(name)
        for part in arguments.parts:
            print(f"{part}: at most {PARTS[part]:.0f} s")
        return 0
    if (missing := None if arguments.tiny else no_gpu()) is not None:
        print(f"{missing}. --predict prints the theory, --tiny tests the bench; neither needs a GPU.", file=sys.stderr)
        return 2

    import torch

    if arguments.tiny:
        torch.set_num_threads(1)
        print("TINY: toy shapes in Triton's interpreter on the CPU. No timing below means anything.")
    torch.manual_seed(0)
    bench = Bench(arguments)
    conditions = bench.conditions()
    print(", ".join(f"{key} {value}" for key, value in conditions.items()), flush=True)
    with torch.inference_mode():
        bench.run()
    return report(bench, conditions)


def no_gpu() -> str | None:
    """Why this machine cannot run the bench."""
    import torch

    if not torch.cuda.is_available():
        return f"bench_gpu needs an NVIDIA GPU, and torch {torch.__version__} finds none"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"bench_gpu needs compute capability 8.0 or later, and {name} has {capability[0]}.{capability[1]}"
    return None


def report(bench: Bench, conditions: dict[str, Any]) -> int:
    """The last table, the verdicts and the JSON line; the exit code."""
    print("\n" + ("TINY: these timings mean nothing\n" if bench.tiny else ""), end="")
    lines = bench.summary()
    name_width = max(len(name) for name, _, _ in lines) + 2
    for name, value, beside in lines:
        print(f"{name:{name_width}}{value:>26}   {beside}")
    if bench.meter.worst_spread > 0.05:
        print(f"each kernel was timed twice; at worst the two differ by {bench.meter.worst_spread:.0%}")
    for part, why in bench.skipped.items():
        print(f"skipped: {part}: {why}")
    for problem in bench.problems:
        print(f"PROBLEM: {problem}")
    found = bench.verdicts()
    for verdict in found:
        value = "-" if verdict["value"] is None else f"{verdict['value']:.4g}"
        said = {True: "reached", False: "NOT reached", None: "not measured"}[verdict["met"]]
        said = "tiny, no verdict" if bench.tiny else said
        print(f"{verdict['what']:60}{value:>10}   {said}: at least {verdict['target']:g}")
    from loadtests.gpu_bench.meter import rounded

    content = {
        "bench": "gpu",
        "tiny": bench.tiny,
        "conditions": conditions,
        "theory": {"bandwidth": bench.setup.ceilings.bandwidth, "flops": bench.setup.ceilings.flops},
        "results": bench.found,
        "verdicts": found,
        "skipped": bench.skipped,
        "problems": bench.problems,
    }
    print(json.dumps(rounded(content)), flush=True)
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())
