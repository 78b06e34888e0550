"""One engine on the card in a process of its own: starts it, runs the request sets, leaves an answer. Knows no table.

    python child.py SPEC.json        under the Python of the system it measures, so at its top it imports little

Every system gets the same dummy-weight model, prompts, output lengths and limits, and greedy decoding. Ours makes its
random weights on the card: made on the host, 8 billion numbers take a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Not this folder, which a script's path begins with: its modules have names that others may have too.
sys.path[:] = [str(HERE.parent.parent), str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from loadtests import systems  # noqa: E402
from loadtests.gpu_bench import theory  # noqa: E402
from loadtests.workloads import ModelShape, RequestSet, make_requests  # noqa: E402

Spec = dict[str, Any]
"""system, deterministic, model (directory), shape (fields of ModelShape), rows, budget, block_size, max_model_len,
utilization, isl, osls (longest first), compare ([requests, osl]), num_requests (None: as many as the cache holds),
ceilings ([bytes/s, FLOP/s]), deadline (time.monotonic), tiny, answer (file)."""
Answer = dict[str, Any]

REACH = {False: 0.45, True: 0.22}
"""Share of the steady state's floor that is reckoned with, fast and deterministic, to choose how long a run may be."""


# ---- ours -----------------------------------------------------------------------------------------------------------


class Ours(systems.OurEngine):
    """The engine on the GPU; ``run`` is inherited."""

    def __init__(self, spec: Spec) -> None:
        from serve_app.engine.config import EngineConfig
        from serve_app.engine.engine import Engine
        from serve_app.runner import model_runner

        if spec["tiny"]:
            _without_a_card()
        else:
            model_runner.DummyWeights = _CardWeights  # type: ignore[misc,assignment]
        config = EngineConfig(
            block_size=spec["block_size"],
            num_kv_blocks=40 if spec["tiny"] else None,
            gpu_memory_utilization=spec["utilization"],
            max_model_len=spec["max_model_len"],
            max_num_seqs=spec["rows"],
            max_num_batched_tokens=spec["budget"],
            deterministic=spec["deterministic"],
        )
        self.runner = model_runner.ModelRunner(spec["model"], config, device="cuda", load_format="dummy")
        self.engine = Engine(config, self.runner)
        self.kv_tokens = self.runner.num_kv_blocks * spec["block_size"]
        self._num_runs = 0

    def measure(self, requests: RequestSet, spec: Spec) -> Answer:
        """The run, its steps by kind beside their floor, and what must not have happened."""
        from serve_app.engine.step_record import StepRecorder

        self.engine.recorder = recorder = StepRecorder(capacity=1 << 20)
        summary = _brief(self.run(requests).summary())
        records = list(recorder.records)
        shape, ceilings = ModelShape(*spec["shape"]), _ceilings(spec)
        steps = _steps(records, shape, ceilings)
        device: Any = self.runner.device
        return summary | {
            "steps": steps["table"],
            "floor_s": steps["floor_s"],
            "of_roofline": steps["floor_s"] / summary["wall_s"],
            "decode_fit": steps["fit"],
            "num_steps": len(records),
            "preempted": recorder.num_preempted,
            "recomputed": recorder.num_recomputed_tokens,
            "rows": recorder.num_tokens,
            "padded_rows": recorder.num_padded_tokens,
            "replays": device.graphs.num_replays,
            "recompilations": list(device.recompilations.names),
        }

    def device_split(self, requests: RequestSet, tiny: bool) -> Answer:
        """Microseconds of a decode step on the device, by part, from the profiler over a few full steps."""
        import torch

        from serve_app.engine.request import GenerateRequest, SamplingParams

        # Long enough that the first ones still run when the last prompt is through.
        max_tokens, num_profiled = (4, 1) if tiny else (100, 6)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=0).resolved()
        for i, request in enumerate(requests.requests):
            self.engine.add(GenerateRequest(f"split-{i}", request.prompt_token_ids, sampling))
        recorder = self.engine.recorder
        num_before = recorder.num_steps
        while self.engine.has_work:
            self.engine.step()
            is_full = len(recorder.records[-1].sequences) == len(requests.requests)
            if (
                recorder.num_steps > num_before
                and is_full
                and recorder.records[-1].num_tokens == len(requests.requests)
            ):
                break
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CUDA] if torch.cuda.is_available() else [activity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(num_profiled):
                self.engine.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        while self.engine.has_work:
            self.engine.step()
        parts: dict[str, float] = {}
        for event in profile.key_averages():
            micros = getattr(event, "self_device_time_total", 0.0)
            if micros:
                part = _part_of(event.key)
                parts[part] = parts.get(part, 0.0) + micros / num_profiled
        return dict(parts)


_PARTS = {
    "attention": ("_prompt_kernel", "_decode_kernel", "_merge_kernel"),
    "products": ("gemm", "nvjet", "cutlass", "matmul", "xmma", "gemv", "splitk"),
    "small ops": ("rms_norm", "qk_norm", "silu"),
    "sampler": ("scan_kernel", "draw_kernel", "choose_kernel", "cut_kernel"),
}


def _part_of(name: str) -> str:
    lower = name.lower()
    return next((part for part, names in _PARTS.items() if any(x in lower for x in names)), "other")


def _steps(records: Sequence[Any], shape: ModelShape, ceilings: theory.Ceilings) -> Answer:
    """Milliseconds by kind of step. A step lasts until the next one begins: launches run ahead of the device."""
    most = max(len(record.sequences) for record in records)
    kinds: dict[str, list[tuple[float, Any, float]]] = {"decode": [], "with a chunk": []}
    fit: list[tuple[float, float]] = []
    floor_s = 0.0
    for record, later in zip(records, [*records[1:], None], strict=True):
        period = record.duration if later is None else later.started - record.started
        spans = [(s.start, s.num_tokens) for s in record.sequences]
        floor = theory.step(shape, ceilings, spans, sum(s.samples for s in record.sequences)).seconds
        floor_s += floor
        decodes = all(n == 1 for _, n in spans)
        kinds["decode" if decodes else "with a chunk"].append((period, record, floor))
        if decodes and len(spans) == most:
            fit.append((sum(start for start, _ in spans) / len(spans), period))
    table = {}
    for kind, found in kinds.items():
        if found:
            num = len(found)
            table[kind] = {
                "steps": num,
                "rows": sum(record.num_tokens for _, record, _ in found) / num,
                "ms": 1e3 * sum(period for period, _, _ in found) / num,
                "floor_ms": 1e3 * sum(floor for _, _, floor in found) / num,
            } | {
                part: 1e3 * sum(record.seconds.get(part, 0.0) for _, record, _ in found) / num
                for part in ("schedule", "batch", "enqueue", "wait", "update")
            }
    return {"table": table, "floor_s": floor_s, "fit": _line(fit)}


def _line(points: Sequence[tuple[float, float]]) -> list[float] | None:
    """(a, b) of seconds = a + b * context, least squares; None for too few points."""
    if len(points) < 8:
        return None
    num = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / num, sum(y for _, y in points) / num
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return [mean_y - slope * mean_x, slope]


class _CardWeights:
    """serve_app.models.weights.DummyWeights, made on the card."""

    def __init__(self, seed: int = 0, std: float = 0.02) -> None:
        self._seed, self._std = seed, std

    def take(self, name: str, shape: Sequence[int], dtype: Any) -> Any:
        import torch

        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator("cuda").manual_seed(int.from_bytes(digest[:4], "little"))
        tensor = torch.empty(tuple(shape), dtype=dtype, device="cuda").normal_(0.0, self._std, generator=generator)
        return tensor + 1 if "norm" in name else tensor

    def finish(self) -> None:
        pass


def _without_a_card() -> None:
    """For --tiny: the card is the CPU, and start-up rehearses little."""
    from serve_app.runner import cuda_device, model_runner
    from serve_app.runner.device_sampler import DeviceSampler
    from serve_app.runner.rehearsal import GREEDY
    from tests.runner.fake_gpu import FakeGpu

    changes: list[tuple[Any, str, Any]] = [
        (model_runner, "find_gpu", lambda name: FakeGpu("cuda")),
        (cuda_device, "variants", lambda *_: []),
        (cuda_device, "largest_spans", lambda *_: [(0, 2)]),
        (cuda_device, "DRAWN", GREEDY),
        (DeviceSampler, "warm_up", lambda *_: None),
    ]
    for owner, name, value in changes:
        setattr(owner, name, value)


# ---- others ---------------------------------------------------------------------------------------------------------


class Transformers(systems.TransformersContinuous):
    """transformers' continuous batching, its own choice of kernels; ``run`` is inherited."""

    def __init__(self, spec: Spec) -> None:
        import torch
        import transformers
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        transformers.logging.set_verbosity_error()
        config = transformers.AutoConfig.from_pretrained(spec["model"])
        with torch.device("cpu" if spec["tiny"] else "cuda"):
            model: Any = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32 if spec["tiny"] else torch.bfloat16, attn_implementation="sdpa"
            )
        self.model = model.eval()
        num, osl = spec["compare"]
        page = 256
        self.manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page,
                num_blocks=num * -(-(spec["isl"] + osl) // page),  # its masks grow with the cache
                max_batch_tokens=spec["budget"],
            ),
            workload_hints=WorkloadHints(max_prompt_length=spec["isl"], max_generated_length=osl, num_requests=num),
        )
        self.manager.start()
        self._num_runs = 0


class Vllm(systems.Vllm):
    """vLLM as it comes, dummy weights; ``run`` is inherited."""

    def __init__(self, spec: Spec) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=spec["model"],
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            disable_log_stats=True,
            max_model_len=spec["max_model_len"],
            max_num_seqs=spec["rows"],
            max_num_batched_tokens=spec["budget"],
            gpu_memory_utilization=spec["utilization"],
            seed=0,
        )
        self._num_runs = 0


# ---- the run --------------------------------------------------------------------------------------------------------


def main(spec: Spec) -> None:
    started = time.monotonic()
    shape = ModelShape(*spec["shape"])
    kinds: dict[str, Any] = {"ours": Ours, "transformers-cb": Transformers, "vllm": Vllm}
    system = kinds[spec["system"]](spec)
    answer: Answer = {"startup_s": time.monotonic() - started}

    def requests(num: int, osl: int, seed: int) -> RequestSet:
        isl = spec["isl"]
        return make_requests(
            num, vocab_size=shape.vocab_size, prompt_lens=(isl, isl), output_lens=(osl, osl), seed=seed
        )

    def say() -> None:
        Path(spec["answer"]).write_text(json.dumps(answer))

    num_compared, compared_osl = spec["compare"]
    system.run(requests(1 if spec["tiny"] else 8, 2, seed=1))
    answer["compare"] = _brief(system.run(requests(num_compared, compared_osl, seed=2)).summary())
    say()
    if spec["system"] != "transformers-cb":
        num = spec["num_requests"] or _num_requests(system, spec)
        osl = _affordable(spec, shape, num)
        if osl is None:
            answer["why_not"] = "no time was left for the closed set"
        else:
            answer |= {"num_requests": num, "isl": spec["isl"], "osl": osl}
            main_set = requests(num, osl, seed=3)
            if isinstance(system, Ours):
                answer["closed"] = system.measure(main_set, spec)
                say()
                if time.monotonic() < spec["deadline"] - 15:
                    try:
                        answer["device_us"] = system.device_split(main_set, spec["tiny"])
                    except Exception as error:  # the profiler needs rights that a container may lack
                        answer["device_us_why_not"] = f"{type(error).__name__}: {error}"[:200]
            else:
                answer["closed"] = _brief(system.run(main_set).summary())
    say()
    sys.stdout.flush()
    os._exit(0)  # what the system started is ended by who started us


def _num_requests(system: Any, spec: Spec) -> int:
    """As many as run at once without preemption, also where deterministic mode leaves the cache a little less."""
    longest = spec["isl"] + spec["osls"][0] + spec["block_size"]
    return max(1, min(spec["rows"], int(0.97 * system.kv_tokens) // longest))


def _affordable(spec: Spec, shape: ModelShape, num: int) -> int | None:
    """The longest answers for which the time should do."""
    left = spec["deadline"] - time.monotonic()
    ceilings = _ceilings(spec)
    for osl in spec["osls"]:
        rate = theory.steady_tokens_per_s(shape, ceilings, spec["isl"], osl) * REACH[spec["deterministic"]]
        if spec["tiny"] or num * osl / rate < 0.9 * left:
            return int(osl)
    return None


def _ceilings(spec: Spec) -> theory.Ceilings:
    bandwidth, flops = spec["ceilings"]
    return theory.Ceilings(bandwidth, flops, "")


def _brief(summary: Answer) -> Answer:
    return {key: value for key, value in summary.items() if key != "tokens"}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
