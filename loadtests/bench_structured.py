"""The price of structured output: a step's masks, and what an unconstrained neighbour loses by constrained company.

Theory. A mask is a walk over a trie of the vocabulary, less what precomputed slices of it answer: some 50 us of one core
at 32k tokens and some 150 us at 150k, so 64 rows cost 3 to 10 ms of one core. On a GPU the host is idle while the device
computes the forward: what is waited for is what exceeds it. On a CPU every core already computes the forward, so masks
cost what they compute, divided by the cores; a neighbour loses under 3 % as long as a step takes 33 times that.

Part 1 times masks alone (no model), on one thread: rows at different places of sentences of a JSON schema. Times are of
the process's processors, so other programs disturb little. Part 2 runs a model of random weights: one unconstrained
sequence among 15 others that are constrained, or are not, alternated. Loss: 1 - steps/s with / steps/s without, by the
clock and by the processors' time.

The vocabularies are made here: random words, cased, with punctuation and digits, in byte-level spelling.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import GenerateRequest, SamplingParams
from serve_app.runner.model_runner import ModelRunner
from serve_app.text import grammar
from serve_app.text.token_masks import GrammarTokenizer, MaskMaker
from serve_app.text.tokenizer import Tokenizer

VOCAB_SIZES = (32_000, 151_936)
NUM_ROWS = (1, 16, 64)
NUM_NEIGHBOURS = 15
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 30}},
        "kind": {"enum": ["person", "place", "thing"]},
        "at": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
            "required": ["x", "y"],
        },
    },
    "required": ["name", "tags", "kind", "at"],
}
SENTENCE = '{"name": "Jane of the hill", "tags": ["one two", "three"], "kind": "place", "at": {"x": 1.5, "y": -20.25}}'


def make_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    rng = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    letters, weights = "etaoinshrdlucmfwypvbgkjqxz", [1 / (i + 1) for i in range(26)]
    while len(vocab) < vocab_size - len(SPECIAL):
        word = "".join(rng.choices(letters, weights, k=rng.choice((2, 3, 4, 4, 5, 5, 6, 7, 8, 10))))
        kind = rng.random()
        if kind < 0.45:
            word = "Ġ" + word
        elif kind < 0.55:
            word = word.capitalize()
        elif kind < 0.65:
            word = "".join(rng.choices("0123456789", k=3))
        elif kind < 0.75:
            word = "".join(rng.choices("{}[]\":,;()<>=+-*/\\_.!?'#@$%^&|~ĠĊ", k=rng.randint(2, 5)))
        elif kind < 0.85:
            word = "".join(rng.choices(alphabet[-120:], k=rng.randint(2, 6)))
        vocab.setdefault(word, len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def time_masks(vocab_size: int, repeat: int) -> dict[str, Any]:
    """Milliseconds of one core: building, compiling, and for each number of rows a step's masks and consumes."""
    tokenizer = Tokenizer(make_tokenizer(vocab_size))
    ids = tokenizer.encode(SENTENCE)
    masks = GrammarTokenizer(lambda: tokenizer, vocab_size, (vocab_size - 2,))
    started = time.process_time()
    masks.compile(grammar.choice(["a"]))
    built = (time.process_time() - started) * 1000
    started = time.process_time()
    compiled = masks.compile(grammar.json_schema(SCHEMA))
    found: dict[str, Any] = {"build_ms": built, "compile_ms": (time.process_time() - started) * 1000, "rows": {}}
    maker = MaskMaker(1)
    for num_rows in NUM_ROWS:
        filled, consumed = [], []
        for _ in range(repeat):
            matchers = [compiled.matcher() for _ in range(num_rows)]
            for i, matcher in enumerate(matchers):
                matcher.consume(ids[: 1 + i % (len(ids) - 8)])
            words = np.empty((num_rows, masks.num_words), dtype=np.int32)
            for step in range(6):
                started = time.process_time()
                maker.fill(matchers, words)
                between = time.process_time()
                for i, matcher in enumerate(matchers):
                    matcher.consume([ids[1 + i % (len(ids) - 8) + step]])
                filled.append((between - started) * 1000)
                consumed.append((time.process_time() - between) * 1000)
        found["rows"][num_rows] = {
            "mask_ms": statistics.mean(filled),
            "mask_worst_ms": max(filled),
            "consume_ms": statistics.mean(consumed),
        }
    return found


def write_model(directory: Path, vocab_size: int, hidden: int, layers: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "head_dim": 64,
        "vocab_size": vocab_size,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": vocab_size - 2,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    make_tokenizer(vocab_size).save(str(directory / "tokenizer.json"))


def steps(engine: Engine, text: str | None, num_tokens: int) -> tuple[float, float, dict[str, float]]:
    """Seconds a step by the clock and of processors, and the mean milliseconds of its parts, while one free sequence runs
    among 15 others."""
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1).resolved()
    other = dataclasses.replace(sampling, grammar=text, temperature=1.0)
    requests = [GenerateRequest("free", tuple(range(300, 316)), sampling)]
    requests += [
        GenerateRequest(str(i), tuple(range(300 + i, 316 + i)), dataclasses.replace(other, seed=i))
        for i in range(NUM_NEIGHBOURS)
    ]
    for request in requests:
        engine.add(request)
    engine.step()
    first = engine.recorder.num_steps
    started, used = time.perf_counter(), time.process_time()
    while engine.has_work:
        engine.step()
    num = engine.recorder.num_steps - first
    seconds, processors = (time.perf_counter() - started) / num, (time.process_time() - used) / num
    records = list(engine.recorder.records)[-num:]
    assert all(len(record.sequences) == 1 + NUM_NEIGHBOURS for record in records), "everybody ran to the end"
    parts = {
        part: statistics.mean(r.seconds.get(part, 0.0) for r in records) * 1000
        for part in ("model", "sampler", "masks")
    }
    return seconds, processors, parts


def time_neighbours(
    vocab_size: int, hidden: int, layers: int, num_tokens: int, repeat: int, num_threads: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), vocab_size, hidden, layers)
        config = EngineConfig(
            num_kv_blocks=400, max_num_seqs=16, max_num_batched_tokens=512, max_model_len=512, num_threads=num_threads
        )
        runner = ModelRunner(name, config, device="cpu", dtype="float32", load_format="dummy")
        engine = Engine(config, runner)
        # Goes on for ever, as a free sequence does: words in a JSON array.
        text = grammar.json_schema({"type": "array", "items": {"type": "string"}, "minItems": 10_000})
        steps(engine, text, 8)
        free, constrained = [], []
        for i in range(repeat):
            for kind in ((None, text), (text, None))[i % 2]:
                (free if kind is None else constrained).append(steps(engine, kind, num_tokens))
    report: dict[str, Any] = {}
    for name, column in (("clock", 0), ("processors", 1)):
        losses = [1.0 - f[column] / c[column] for f, c in zip(free, constrained, strict=True)]
        report[name] = {
            "step_free_ms": statistics.median(run[column] for run in free) * 1000,
            "step_constrained_ms": statistics.median(run[column] for run in constrained) * 1000,
            "loss": statistics.median(losses),
            "losses": losses,
        }
    report["parts_free_ms"] = {k: statistics.median(run[2][k] for run in free) for k in free[0][2]}
    report["parts_constrained_ms"] = {k: statistics.median(run[2][k] for run in constrained) for k in free[0][2]}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=60, help="steps of a run of part 2")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of the model, in part 2")
    parser.add_argument("--vocab", type=int, nargs="*", default=VOCAB_SIZES)
    arguments = parser.parse_args()
    print("\n\n".join((__doc__ or "").split("\n\n")[1:]))
    report: dict[str, Any] = {"bench": "structured", "masks": {}, "neighbours": {}}
    print(
        f"{'vocabulary':>10}{'build ms':>10}{'compile ms':>12}{'rows':>6}{'masks ms':>10}{'worst':>8}{'consume ms':>12}"
    )
    for vocab_size in arguments.vocab:
        found = report["masks"][vocab_size] = time_masks(vocab_size, arguments.repeat)
        for num_rows, row in found["rows"].items():
            print(
                f"{vocab_size:10}{found['build_ms']:10.0f}{found['compile_ms']:12.1f}{num_rows:6}{row['mask_ms']:10.2f}"
                f"{row['mask_worst_ms']:8.2f}{row['consume_ms']:12.2f}"
            )
    print(f"\n{'vocabulary':>10}{'measured':>12}{'step free':>11}{'constrained':>13}{'waited':>8}{'loss':>8}")
    for vocab_size in arguments.vocab:
        found = report["neighbours"][vocab_size] = time_neighbours(
            vocab_size,
            arguments.hidden,
            arguments.layers,
            arguments.tokens,
            arguments.repeat,
            arguments.threads,
        )
        for name in ("clock", "processors"):
            row = found[name]
            print(
                f"{vocab_size:10}{name:>12}{row['step_free_ms']:11.1f}{row['step_constrained_ms']:13.1f}"
                f"{found['parts_constrained_ms']['masks']:8.2f}{row['loss']:8.1%}"
            )
    print("step, waited: milliseconds, medians; waited: for masks, beyond the forward; processors: of all threads")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
