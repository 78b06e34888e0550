"""One measured system in a process of its own. Knows how to drive each; knows nothing of tables or of who is better.

    measure(spec)                  in the bench: writes the spec, starts a fresh process, waits, returns its answer
    python systems.py SPEC.json    that process: starts the system, warms it up, runs the request set, prints one JSON line

This file runs under the Python of the system it measures, so at its top it imports only the standard library and
workloads.py. Every system gets the same prompts as token ids, the same output lengths with end-of-sequence ignored,
greedy decoding and the same number of threads, and is timed by the same clock: CLOCK_MONOTONIC, which all processes of a
machine share, so that start-up counts from before the process exists.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from workloads import Request, RequestSet, percentiles

REPOSITORY = Path(__file__).resolve().parent.parent
GIB = 2**30

OURS = ("continuous", "static", "dynamic")
SYSTEMS = (*OURS, "transformers", "transformers-cb", "vllm")

Spec = dict[str, Any]
"""system, dtype, model (directory), requests and warmup (RequestSet JSON), threads, budget (tokens of a step), rows
(requests at a time), kv_bytes; deterministic, implementation (ours), attention (transformers-cb), vllm_python,
vllm_defaults, cache (directory for compiled code)."""
Answer = dict[str, Any]


# ------------------------------------------------------------------------------------------------- the bench's side


def measure(spec: Spec, timeout: float = 1800.0) -> Answer:
    """Runs one system in a fresh process and returns its answer, or {"error": what it said last}."""
    environment = _environment(spec)
    python = spec["vllm_python"] if spec["system"] == "vllm" else sys.executable
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        log = Path(directory) / "stderr"
        path = Path(directory) / "spec.json"
        answer_path = Path(directory) / "answer.json"
        path.write_text(json.dumps({**spec, "answer": str(answer_path), "spawned": time.monotonic()}))
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [python, str(Path(__file__).resolve()), str(path)],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=environment,
                cwd=directory,
                start_new_session=True,
            )
            try:
                code: int | str = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = f"no answer in {timeout:.0f} s"
            finally:
                # Its own session: whatever it started and left behind ends with it, and nothing else.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if answer_path.exists():
            answer: Answer = json.loads(answer_path.read_text())
            return answer
        lines = log.read_text(errors="replace").strip().splitlines()
        said = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "nothing")
        return {"error": f"exit {code}: {said.strip()[:300]}", "log": lines[-40:]}


def _environment(spec: Spec) -> dict[str, str]:
    """The caller's, with threads fixed and compiled code in a directory of its own, so that its first run is cold."""
    environment = dict(os.environ)
    threads = spec["threads"]
    cache = Path(spec["cache"])
    cache.mkdir(parents=True, exist_ok=True)
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        "NUMBA_CACHE_DIR": str(cache / "numba"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    if spec["system"] == "vllm":
        environment.pop("PYTHONPATH", None)
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(spec["kv_bytes"] / GIB))),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }
    else:
        path = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = str(REPOSITORY) + (os.pathsep + path if path else "")
    return environment


# ----------------------------------------------------------------------------------------------------- one timed run


class Timeline:
    """When which token of which request came; seconds after the start of the run."""

    def __init__(self, requests: RequestSet) -> None:
        self.requests = requests.requests
        self.token_ids: list[list[int]] = [[] for _ in self.requests]
        self.times: list[list[float]] = [[] for _ in self.requests]

    def add(self, index: int, token_ids: list[int] | tuple[int, ...], now: float) -> None:
        self.token_ids[index] += token_ids
        self.times[index] += [now] * len(token_ids)

    def summary(self) -> Answer:
        """Raises RuntimeError naming the first request whose answer has another length than asked for."""
        for i, (request, tokens) in enumerate(zip(self.requests, self.token_ids, strict=True)):
            if len(tokens) != request.num_output_tokens:
                raise RuntimeError(f"request {i}: {len(tokens)} tokens instead of {request.num_output_tokens}")
        wall = max(times[-1] for times in self.times) - min(request.arrival for request in self.requests)
        first = [times[0] - request.arrival for request, times in zip(self.requests, self.times, strict=True)]
        gaps = [b - a for times in self.times for a, b in itertools.pairwise(times)]
        num_tokens = sum(map(len, self.token_ids))
        return {
            "wall_s": wall,
            "output_tokens": num_tokens,
            "tokens_per_s": num_tokens / wall,
            "ttft_ms": percentiles(first, 1e3),
            "itl_ms": percentiles(gaps, 1e3),
            "tokens": self.token_ids,
        }


class Arrivals:
    """Hands out requests when their time has come."""

    def __init__(self, requests: RequestSet) -> None:
        self._waiting = deque(enumerate(requests.requests))
        self._started = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self._started

    @property
    def started(self) -> float:
        return self._started

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def due(self) -> Iterator[tuple[int, Request]]:
        now = self.now()
        while self._waiting and self._waiting[0][1].arrival <= now:
            yield self._waiting.popleft()

    def wait(self) -> None:
        """Sleeps until the next request is due."""
        time.sleep(max(0.0, self._waiting[0][1].arrival - self.now()))


# ---------------------------------------------------------------------------------------------------------- our own


class OurEngine:
    """Our engine with one of the policies of serve_app.engine.baselines, on our runner."""

    def __init__(self, spec: Spec) -> None:
        from serve_app.engine.baselines import policy_engine
        from serve_app.engine.config import EngineConfig
        from serve_app.runner.model_runner import ModelRunner

        config = EngineConfig(
            max_num_seqs=2 * spec["rows"],  # a padded row may be two sequences; see policy_engine
            max_num_batched_tokens=spec["budget"],
            kv_cache_memory_bytes=spec["kv_bytes"],
            num_threads=spec["threads"],
            deterministic=spec["deterministic"],
        )
        self.runner = ModelRunner(
            spec["model"],
            config,
            dtype=spec["dtype"],
            device="cpu",
            implementation=spec.get("implementation", "auto"),
        )
        self.engine = policy_engine(spec["system"], config, self.runner, max_num_rows=spec["rows"])
        self._num_runs = 0

    def run(self, requests: RequestSet) -> Timeline:
        from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams

        timeline, arrivals, engine = Timeline(requests), Arrivals(requests), self.engine
        self._num_runs += 1
        index: dict[str, int] = {}
        while arrivals or engine.has_work:
            if not engine.has_work:
                arrivals.wait()
            for i, request in arrivals.due():
                name = f"{self._num_runs}-{i}"
                index[name] = i
                sampling = SamplingParams(
                    max_tokens=request.num_output_tokens, temperature=0.0, ignore_eos=True, seed=0
                ).resolved()
                engine.add(GenerateRequest(name, request.prompt_token_ids, sampling))
            for output in engine.step():
                if output.finish_reason is FinishReason.ERROR:
                    raise RuntimeError(f"request {output.request_id}: {output.error}")
                timeline.add(index[output.request_id], output.token_ids, arrivals.now())
        return timeline

    def measure(self, requests: RequestSet, spec: Spec) -> Answer:
        """The run with its parts, then the linears of the very same steps alone."""
        from serve_app.engine.step_record import StepRecorder

        self.engine.recorder = recorder = StepRecorder(capacity=1 << 20)
        linears = self.runner.model.linears
        padded = sum(linear.num_padded_rows for linear in linears)
        parts = _Parts(self.runner)
        with parts.watching():
            summary = self.run(requests).summary()
        records = list(recorder.records)
        num_steps = len(records)
        padded = sum(linear.num_padded_rows for linear in linears) - padded  # by fixed tiles of rows
        num_rows = sum(record.num_tokens for record in records)
        # With arrivals over time the engine also waits for work: then only its steps count.
        waits = any(request.arrival for request in requests.requests)
        busy = sum(record.duration for record in records) if waits else summary["wall_s"]
        answer = summary | {
            "steps": num_steps,
            "rows": num_rows,
            "waste": 1 - requests.num_rows / num_rows,
            "recomputed": recorder.num_recomputed_tokens,
            "preempted": recorder.num_preempted,
            "step_ms": 1e3 * busy / num_steps,
            "parts_ms": {part: 1e3 * seconds / num_steps for part, seconds in parts.seconds(records, busy).items()},
            "kv_bytes": self.runner.kv_cache.k[0].untyped_storage().nbytes() * 2,
            "mode": "deterministic" if self.runner.deterministic else "fast",
            "row_tiles": {f"{x.in_features}x{x.out_features}": list(x.row_tiles) for x in linears},
            "tile_waste": padded / (padded + sum(_linear_rows(linears, records))),
            "memory": memory(),
        }
        answer["floor"] = floor = self._floor(records)
        floor |= {
            "tokens_per_s": summary["output_tokens"] / floor["s"],
            "reached": floor["s"] / busy,
            "reached_usual": floor["usual_s"] / busy,
            "of_theory": floor["theory_s"] / floor["s"],
        }
        return answer

    def _floor(self, records: list[Any]) -> Answer:
        """Seconds of the linears of all steps alone, best of two passes, as the model runs them and in the usual way.

        As it runs them: the last layer's o, gate_up, down, and the head, on sampled rows only. Usual: the last layer
        on all rows. Inputs are random rows that stay in place, so this is what the library can do at its best.
        """
        import torch

        *layers, head = linears = self.runner.model.linears
        earlier, last = layers[:-3], layers[-3:]
        steps = [(record.num_tokens, sum(s.samples for s in record.sequences)) for record in records]
        widest = max(num_rows for num_rows, _ in steps)
        inputs = {linear.in_features: torch.randn(widest, linear.in_features).to(linear.dtype) for linear in linears}

        @torch.inference_mode()
        def seconds(saves_last: bool) -> float:
            started = time.perf_counter()
            for num_rows, num_sampled in steps:
                for linear in earlier:
                    linear(inputs[linear.in_features][:num_rows])
                num_last = num_sampled if saves_last else num_rows
                if num_last:
                    for linear in last:
                        linear(inputs[linear.in_features][:num_last])
                if num_sampled:
                    head(inputs[head.in_features][:num_sampled])
            return time.perf_counter() - started

        bandwidth, peak = _limits(linears)
        theory = 0.0
        for num_rows, num_sampled in steps:
            for group, num in ((earlier, num_rows), (last, num_sampled), ([head], num_sampled)):
                for linear in group if num else ():
                    size = linear.in_features * linear.out_features
                    theory += max(2.0 * num * size / peak, size * linear.dtype.itemsize / bandwidth)
        return {
            "s": min(seconds(True) for _ in range(2)),
            "usual_s": seconds(False),
            "theory_s": theory,
            "bandwidth_gbs": bandwidth / 1e9,
            "peak_gflops": peak / 1e9,
        }


def _limits(linears: list[Any]) -> tuple[float, float]:
    """Bytes per second that all threads read from memory, and FLOP/s of the model's best product; best of seven."""
    import torch

    data = torch.ones(1 << 26)
    bandwidth = data.nbytes / _best_seconds(data.sum)
    peak = 0.0
    for linear in {linear.shape_key: linear for linear in linears}.values():
        x = torch.randn(256, linear.in_features).to(linear.dtype)
        flops = 2.0 * x.shape[0] * linear.in_features * linear.out_features
        peak = max(peak, flops / _best_seconds(lambda x=x, linear=linear: linear(x)))  # type: ignore[misc]
    return bandwidth, peak


def _best_seconds(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(7):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def _linear_rows(linears: list[Any], records: list[Any]) -> Iterator[int]:
    """Rows that every linear of every step was asked for."""
    num_last, num_head = 3, 1
    for record in records:
        num_sampled = sum(s.samples for s in record.sequences)
        yield (len(linears) - num_last - num_head) * record.num_tokens + (num_last + num_head) * num_sampled


class _Parts:
    """Time by part, from wrappers around the product's functions, put there for the run and taken away again."""

    def __init__(self, runner: Any) -> None:
        from serve_app.kernels.linear import Linear
        from serve_app.kernels.ops import Ops
        from serve_app.runner.batch import BatchBuilder
        from serve_app.runner.sampler import Sampler

        ops = [name for name in vars(Ops) if not name.startswith("_")]
        self._head = runner.model.head
        self._wrapped: list[tuple[Any, str, Callable[..., str]]] = [
            (Linear, "__call__", lambda linear, *_: "head" if linear is self._head else "linears"),
            (Sampler, "sample", lambda *_: "sampler"),
            (BatchBuilder, "build", lambda *_: "batch"),
        ]
        self._wrapped += [
            (runner.ops, name, lambda *_, part="attention" if name == "ragged_attention" else "small ops": part)
            for name in ops
        ]
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        originals = [(owner, name, getattr(owner, name)) for owner, name, _ in self._wrapped]
        clock, seconds = time.perf_counter, self._seconds

        def wrap(function: Callable[..., Any], part_of: Callable[..., str]) -> Callable[..., Any]:
            def timed(*arguments: Any, **options: Any) -> Any:
                started = clock()
                result = function(*arguments, **options)
                seconds[part_of(*arguments)] += clock() - started
                return result

            return timed

        for (owner, name, original), (_, _, part_of) in zip(originals, self._wrapped, strict=True):
            setattr(owner, name, wrap(original, part_of))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def seconds(self, records: list[Any], total: float) -> dict[str, float]:
        """linears, head, attention, small ops, sampler, host (schedule, batch, update), and what none saw of total."""
        parts = {part: self._seconds[part] for part in ("linears", "head", "attention", "small ops", "sampler")}
        parts["host"] = self._seconds["batch"] + sum(
            record.seconds[part] for record in records for part in ("schedule", "update")
        )
        parts["unaccounted"] = total - sum(parts.values())
        return parts


# ------------------------------------------------------------------------------------------------------ transformers


class TransformersGenerate:
    """transformers' ``generate`` on batches of those who wait, sorted by length, padded on the left."""

    def __init__(self, spec: Spec) -> None:
        self.model = _transformers_model(spec, "sdpa")
        self.num_rows = min(spec["rows"], spec["transformers_rows"])
        self.num_computed = 0

    def run(self, requests: RequestSet) -> Timeline:
        timeline, arrivals = Timeline(requests), Arrivals(requests)
        waiting: list[tuple[int, Request]] = []
        while arrivals or waiting:
            if not waiting:
                arrivals.wait()
            waiting += arrivals.due()
            waiting.sort(key=lambda item: len(item[1].prompt_token_ids))
            batch, waiting = waiting[: self.num_rows], waiting[self.num_rows :]
            self._generate(batch, timeline, arrivals.now)
        return timeline

    def _generate(self, batch: list[tuple[int, Request]], timeline: Timeline, now: Callable[[], float]) -> None:
        import torch
        from transformers import GenerationConfig
        from transformers.generation.streamers import BaseStreamer

        class Stamps(BaseStreamer):
            """Called with the prompt once, then with each column of new tokens."""

            num_columns = -1

            def put(self, value: torch.Tensor) -> None:
                if self.num_columns >= 0:
                    for (index, request), token in zip(batch, value.tolist(), strict=True):
                        if self.num_columns < request.num_output_tokens:
                            timeline.add(index, [token], now())
                self.num_columns += 1

            def end(self) -> None:
                pass

        width = max(len(request.prompt_token_ids) for _, request in batch)
        num_columns = max(request.num_output_tokens for _, request in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (_, request) in enumerate(batch):
            prompt = torch.tensor(request.prompt_token_ids)
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        config = GenerationConfig(max_new_tokens=num_columns, do_sample=False, eos_token_id=None, pad_token_id=0)
        with torch.inference_mode():
            self.model.generate(ids, attention_mask=mask, generation_config=config, streamer=Stamps())
        self.num_computed += len(batch) * (width + num_columns - 1)

    def measure(self, requests: RequestSet, spec: Spec) -> Answer:
        self.num_computed = 0
        summary = self.run(requests).summary()
        waste = 1 - requests.num_rows / self.num_computed
        return summary | {"rows": self.num_computed, "waste": waste, "memory": memory()}


class TransformersContinuous:
    """transformers' continuous batching, through its manager."""

    def __init__(self, spec: Spec) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        self.model = _transformers_model(spec, spec.get("attention", "sdpa"))
        config = self.model.config
        page = 256
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
        block_bytes = page * token_bytes * self.model.dtype.itemsize
        requests = RequestSet.from_json(spec["requests"]).requests
        # Its masks grow with the cache, so it gets no more than all places can fill.
        longest = max(len(r.prompt_token_ids) + r.num_output_tokens for r in requests)
        num_blocks = min(spec["kv_bytes"] // block_bytes, spec["rows"] * -(-longest // page))
        self.kv_bytes = num_blocks * block_bytes
        self.manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page,
                num_blocks=num_blocks,
                max_batch_tokens=spec["budget"],
                auto_switch_to_flash=False,
            ),
            workload_hints=WorkloadHints(
                max_prompt_length=max(len(r.prompt_token_ids) for r in requests),
                max_generated_length=max(r.num_output_tokens for r in requests),
                num_requests=spec["rows"],
            ),
        )
        self.manager.start()
        self._num_runs = 0

    def run(self, requests: RequestSet) -> Timeline:
        timeline, arrivals = Timeline(requests), Arrivals(requests)
        self._num_runs += 1
        num_left = len(requests.requests)
        while num_left:
            for i, request in arrivals.due():
                self.manager.add_request(
                    list(request.prompt_token_ids),
                    request_id=f"{self._num_runs}-{i}",
                    max_new_tokens=request.num_output_tokens,
                    record_timestamps=True,
                    eos_token_id=-1,
                )
            result = self.manager.get_result(timeout=0.002 if arrivals else 0.2)
            if result is None:
                if not self.manager.is_running():
                    raise RuntimeError("its generation thread has ended")
                continue
            if result.error is not None:
                raise RuntimeError(result.error)
            if result.is_finished():
                num_left -= 1
                index = int(result.request_id.split("-")[1])
                for token, stamp in zip(result.generated_tokens, result.timestamps, strict=True):
                    timeline.add(index, [token], stamp - arrivals.started)
        return timeline

    def measure(self, requests: RequestSet, spec: Spec) -> Answer:
        summary = self.run(requests).summary()
        return summary | {"kv_bytes": self.kv_bytes, "memory": memory()}


def _transformers_model(spec: Spec, attention: str) -> Any:
    import torch
    import transformers

    torch.set_num_threads(spec["threads"])
    transformers.logging.set_verbosity_error()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=getattr(torch, spec["dtype"]), attn_implementation=attention
    )
    return model.eval()


def make_model(directory: Path, seed: int = 0) -> None:
    """Random bfloat16 weights for the config.json in ``directory``, by transformers.

    Every system then computes with the same numbers, whatever its dtype. They are large enough that greedy answers
    wander through the vocabulary.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                scale = 0.1 if "embed_tokens" in name else parameter.shape[1] ** -0.5
                parameter.normal_(0.0, scale, generator=generator)
    model.generation_config = transformers.GenerationConfig()
    model.to(torch.bfloat16).save_pretrained(directory)


# -------------------------------------------------------------------------------------------------------------- vLLM


class Vllm:
    """vLLM's offline LLM, stepped from here, so that requests can arrive while it runs."""

    def __init__(self, spec: Spec) -> None:
        from vllm import LLM

        options: dict[str, Any] = {}
        if not spec["vllm_defaults"]:
            options = {"max_num_batched_tokens": spec["budget"], "max_num_seqs": spec["rows"]}
        self.llm = LLM(
            model=spec["model"],
            dtype=spec["dtype"],
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
            **options,
        )
        self._num_runs = 0

    def run(self, requests: RequestSet) -> Timeline:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        timeline, arrivals = Timeline(requests), Arrivals(requests)
        self._num_runs += 1
        while arrivals or engine.has_unfinished_requests():
            if not engine.has_unfinished_requests():
                arrivals.wait()
            for i, request in arrivals.due():
                engine.add_request(
                    f"{self._num_runs}-{i}",
                    {"prompt_token_ids": list(request.prompt_token_ids)},
                    SamplingParams(
                        max_tokens=request.num_output_tokens,
                        temperature=0.0,
                        ignore_eos=True,
                        detokenize=False,
                        output_kind=RequestOutputKind.DELTA,
                    ),
                )
            for output in engine.step():
                index = int(output.request_id.split("-")[1])
                timeline.add(index, list(output.outputs[0].token_ids), arrivals.now())
        return timeline

    def measure(self, requests: RequestSet, spec: Spec) -> Answer:
        summary = self.run(requests).summary()
        kv_bytes = max(1, round(spec["kv_bytes"] / GIB)) * GIB
        return summary | {"kv_bytes": kv_bytes, "memory": memory()}


# ----------------------------------------------------------------------------------------------------- that process


def memory() -> dict[str, float]:
    """Bytes of this process and all it has started: sum of their peaks, and of their proportional shares now.

    peak: VmHWM of /proc/PID/status, summed; pages that processes share, as libraries, count once in each. now: Pss of
    smaps_rollup, summed, which counts every page once.
    """
    total = {"peak": 0.0, "now": 0.0, "processes": 0.0}
    for pid in _tree():
        with contextlib.suppress(OSError):
            total["peak"] += _kib(Path(f"/proc/{pid}/status"), "VmHWM:")
            total["now"] += _kib(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")
            total["processes"] += 1
    return total


def _tree() -> list[int]:
    """This process and all that descend from it."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children[int(path.read_text().rpartition(")")[2].split()[1])].append(int(path.parent.name))
    tree = [os.getpid()]
    for pid in tree:
        tree += children[pid]
    return tree


def cpu_ticks() -> tuple[int, int, int]:
    """Since the machine started, in clock ticks: of all CPUs together, idle or not; busy; busy for this process tree."""
    # user nice system idle iowait irq softirq steal
    ticks = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    own = 0
    for pid in _tree():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own += int(fields[11]) + int(fields[12])
    return sum(ticks), sum(ticks) - ticks[3] - ticks[4], own


def _kib(path: Path, key: str) -> float:
    for line in path.read_text().splitlines():
        if line.startswith(key):
            return 1024.0 * int(line.split()[1])
    return 0.0


def _start(spec: Spec) -> Any:
    system = spec["system"]
    if system in OURS:
        return OurEngine(spec)
    return {"transformers": TransformersGenerate, "transformers-cb": TransformersContinuous, "vllm": Vllm}[system](spec)


def _main(spec: Spec) -> None:
    started = _start(spec)
    warmup = RequestSet.from_json(spec["warmup"])
    first = warmup.requests[0]
    begun = time.monotonic()
    started.run(RequestSet((Request(first.prompt_token_ids, 1),)))
    now = time.monotonic()
    startup = {"startup_s": now - spec["spawned"], "first_token_s": now - begun}
    started.run(RequestSet(warmup.requests[1:]))
    versions = {
        name: sys.modules[name].__version__ for name in ("torch", "transformers", "vllm") if name in sys.modules
    }
    before = cpu_ticks()
    answer = {"versions": versions} | started.measure(RequestSet.from_json(spec["requests"]), spec)
    total, busy, own = (now - then for now, then in zip(cpu_ticks(), before, strict=True))
    answer["others_cpu"] = max(0.0, (busy - own) / total)
    Path(spec["answer"]).write_text(json.dumps(startup | answer))
    # What the system started is ended by who started us; some of these never end by themselves.
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "make-model":
        make_model(Path(sys.argv[2]))
    else:
        _main(json.loads(Path(sys.argv[1]).read_text()))
