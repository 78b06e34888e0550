"""Trains the bundled toy model from nothing, on the text of the examples beside it: about an hour on two idle cores.

    python -m serve_app.demo_model.train                 # writes the model's files beside this script
    python -m serve_app.demo_model.train --evaluate      # its score on the held-out set, through serve_app.llm.LLM

The same seed, machine type and package versions give the same files. Knows the shape of Qwen3 as Hugging Face names it,
for training only; the engine's own decoder (serve_app/models) runs what comes out.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch.nn import functional

from serve_app.demo_model.examples import (
    KINDS,
    Example,
    Kinds,
    arithmetic,
    chat,
    held_out_set,
    numbers,
    plain_text,
    question_sheet,
    repeated,
    repeating,
    spelling,
    sums,
)
from serve_app.demo_model.json_examples import practised
from serve_app.demo_model.tool_examples import TOOL_KINDS, tool_chat
from serve_app.llm import LLM, SamplingParams
from serve_app.logs import get_logger
from serve_app.text.chat_template import ChatTemplate

logger = get_logger("serve_app.demo_model.train")  # __name__ is __main__ here

DIRECTORY = Path(__file__).parent
SPECIAL_TOKENS = START, END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Not special: they stay in the text, where a parser of tool calls reads them."""
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') + 'Tools:' }}
    {%- for tool in tools %}
        {%- set function = tool.function if tool.function else tool %}
        {{- '\\n' + function.name + ' {' }}
        {%- for name, schema in ((function.parameters or {}).properties or {}) | items %}
            {{- ('' if loop.first else ', ') + '"' + name + '": ' + (schema.type if schema.type is string else 'any') }}
        {%- endfor %}
        {{- '}' + (' ' + function.description if function.description else '') }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '\\n' if loop.index0 and messages[loop.index0 - 1].role == 'tool' else '<|im_start|>user\\n' }}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {{- '' if not loop.last and messages[loop.index0 + 1].role == 'tool' else '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant\\n' + (message.content + '\\n' if message.content else '') }}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function else call %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' + ('' if loop.last else '\\n') }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""A tool is told to the model, in the system's turn, by its name, what its parameters are, and its description: 16 tokens
on average, where its JSON has 110. Calls and results are written as Qwen's template writes them (results in the user's
turn)."""

VOCAB_SIZE, HIDDEN, INTERMEDIATE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 1088, 192, 512, 4, 4, 2, 32
ROPE_THETA, RMS_NORM_EPS = 10_000.0, 1e-6
MAX_TRAINED_TOKENS = 512
"""Longer texts are cut; the config allows more, at the user's risk."""

SEED = 0
NUM_STEPS = 5600
REPEAT_STEPS = 250
"""So many steps at first, half of the texts are mere repetition."""
SHEET_STEPS = 900
"""So many steps at first, twice as many of the texts are sheets of questions."""
TOKENS_PER_STEP = 2048
NUM_MICRO_BATCHES = 6
LATE_STEP = 2500
"""From here on the chats ask more often for what is learned last."""
MUON_LEARNING_RATE, ADAM_LEARNING_RATE, WEIGHT_DECAY = 0.02, 3e-3, 0.1
SCHEDULE = (0, 1 / 30), (29, 1.0), (1200, 1.0), (2500, 11 / 24), (4000, 11 / 24), (5600, 0.0)
"""(step, scale of the learning rates), with straight lines between. Set while the bundled model was trained: the last two
points were (3600, 0.0) until step 2500, where too much was still wrong, and the last one (5000, 0.0) until about 3400."""
CHECKPOINT_SECONDS = 60

ALL_KINDS: Kinds = {**KINDS, **TOOL_KINDS}
LATE_KINDS: Kinds = {**ALL_KINDS, arithmetic: 7.0, numbers: 7.0, spelling: 14.0, repeating: 3.0}
Parameters = dict[str, torch.Tensor]


# ---- text to tokens --------------------------------------------------------------------------------------------------


def make_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE; every digit is a token of its own, and so is each mark of a tool's call and result."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(TOOL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = Random(f"{SEED} tokenizer")
    chats = [chat(rng, ALL_KINDS) for _ in range(6000)] + [tool_chat(rng) for _ in range(1000)]
    marks = "|".join(map(re.escape, (*TOOL_TOKENS, *SPECIAL_TOKENS)))
    texts = [part for example in chats for text, _ in chat_pieces(example) for part in re.split(marks, text)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in TOOL_TOKENS])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def signature(tool: str) -> str:
    """What the template says of a tool, given as JSON."""
    function = json.loads(tool)["function"]
    properties = function.get("parameters", {}).get("properties", {})
    parameters = ", ".join(f'"{name}": {schema["type"]}' for name, schema in properties.items())
    return f"{function['name']} {{{parameters}}}" + (f" {function['description']}" if "description" in function else "")


def chat_pieces(example: Example) -> list[tuple[str, bool]]:
    """A chat's text, as the template makes it, in pieces; True: the model learns to write it."""
    system = example.system
    if example.tools:
        system = (system and system + "\n\n") + "\n".join(["Tools:", *map(signature, example.tools)])
    pieces = [(f"{START}system\n{system}{END}\n", False)] if system else []
    for user, assistant in example.turns:
        pieces.append((f"{START}user\n{user}{END}\n{START}assistant\n", False))
        pieces.append((assistant + END, True))
        pieces.append(("\n", False))
    return pieces


def document(
    rng: Random, repeats: float = 0.0, sheets: float = 0.0, kinds: Kinds = ALL_KINDS
) -> list[tuple[str, bool]]:
    """Pieces of one training text; True: the model learns to write it.

    ``repeats``: share of texts that only say the same words again and again. To look up what stood in the prompt is what
    all the tasks have in common, and from these it is learned first. ``sheets``: share of the others that are sheets of
    questions, with more to look up than a chat. ``kinds``: what chats without tools ask.
    """
    if rng.random() < repeats:
        return [*repeated(rng), (END_OF_TEXT, True)]
    if rng.random() < sheets:
        return [*question_sheet(rng), (END_OF_TEXT, True)]
    what = rng.random()
    if what < 0.05:
        return [(plain_text(rng) + END_OF_TEXT, True)]
    if what < 0.12:
        return [*sums(rng), (END_OF_TEXT, True)]
    if what < 0.15:
        return chat_pieces(practised(rng))
    return chat_pieces(tool_chat(rng) if what < 0.34 else chat(rng, kinds))


def make_step(tokenizer: tokenizers.Tokenizer, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches (input ids, targets, both [rows, tokens]; target -1: not learned) of one step, by its number.

    Texts of similar length share a micro-batch, so that little of it is padding.
    """
    rng = Random(f"{SEED} step {step}")
    repeats, sheets = 0.5 if step < REPEAT_STEPS else 0.03, 0.3 if step < SHEET_STEPS else 0.15
    kinds = LATE_KINDS if step >= LATE_STEP else ALL_KINDS
    texts: list[tuple[list[int], list[int]]] = []
    num_tokens = 0
    while num_tokens < TOKENS_PER_STEP:
        ids, targets = [], []
        for piece, is_learned in document(rng, repeats, sheets, kinds):
            piece_ids = tokenizer.encode(piece, add_special_tokens=False).ids
            ids += piece_ids
            targets += piece_ids if is_learned else [-1] * len(piece_ids)
        texts.append((ids[:MAX_TRAINED_TOKENS], targets[:MAX_TRAINED_TOKENS]))
        num_tokens += len(texts[-1][0])
    texts.sort(key=lambda text: len(text[0]))
    batches, taken = [], 0
    rows: list[tuple[list[int], list[int]]] = []
    for text in texts:
        rows.append(text)
        taken += len(text[0])
        if taken * NUM_MICRO_BATCHES >= num_tokens or text is texts[-1]:
            width = len(rows[-1][0])
            ids_RT = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
            targets_RT = torch.tensor([targets + [-1] * (width - len(targets)) for _, targets in rows])
            batches.append((ids_RT[:, :-1], targets_RT[:, 1:]))
            rows, taken = [], 0
    return batches


# ---- the model -------------------------------------------------------------------------------------------------------


def make_parameters() -> Parameters:
    """Random weights under the names of a Qwen3 checkpoint."""
    generator = torch.Generator().manual_seed(SEED)
    heads, kv = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN)}
    for i in range(NUM_LAYERS):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (HIDDEN,),
            f"model.layers.{i}.self_attn.q_proj.weight": (heads, HIDDEN),
            f"model.layers.{i}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"model.layers.{i}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"model.layers.{i}.self_attn.o_proj.weight": (HIDDEN, heads),
            f"model.layers.{i}.self_attn.q_norm.weight": (HEAD_DIM,),
            f"model.layers.{i}.self_attn.k_norm.weight": (HEAD_DIM,),
            f"model.layers.{i}.post_attention_layernorm.weight": (HIDDEN,),
            f"model.layers.{i}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"model.layers.{i}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"model.layers.{i}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    parameters = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            value = torch.ones(shape)
        else:
            scale = 0.05 if "embed" in name else shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                scale /= math.sqrt(2 * NUM_LAYERS)
            value = torch.randn(shape, generator=generator) * scale
        parameters[name] = value.requires_grad_()
    return parameters


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x.float(), weight.shape, weight, RMS_NORM_EPS)


def rotate(x_RHTD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, the two halves of a head as real and imaginary parts."""
    frequencies = ROPE_THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(x_RHTD.shape[2])[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = x_RHTD.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def forward(parameters: Parameters, ids_RT: torch.Tensor, wanted_RT: torch.Tensor) -> torch.Tensor:
    """Qwen3's logits [wanted, vocabulary] at the places where ``wanted_RT`` is true.

    float32 between the layers, bfloat16 in the products.
    """

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x.bfloat16(), parameters[name + ".weight"].bfloat16())

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

    x = functional.embedding(ids_RT, parameters["model.embed_tokens.weight"])
    for i in range(NUM_LAYERS):
        at = f"model.layers.{i}."
        normed = rms_norm(x, parameters[at + "input_layernorm.weight"]).bfloat16()
        q, k, v = (heads(linear(normed, f"{at}self_attn.{part}_proj")) for part in "qkv")
        q = rotate(rms_norm(q, parameters[at + "self_attn.q_norm.weight"]))
        k = rotate(rms_norm(k, parameters[at + "self_attn.k_norm.weight"]))
        # float32: the bfloat16 gradient of this function is several times slower on CPU
        k, v = (part.float().repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1) for part in (k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(attended, at + "self_attn.o_proj")
        normed = rms_norm(x, parameters[at + "post_attention_layernorm.weight"]).bfloat16()
        inner = functional.silu(linear(normed, at + "mlp.gate_proj")) * linear(normed, at + "mlp.up_proj")
        x = x + linear(inner, at + "mlp.down_proj")
    return linear(rms_norm(x[wanted_RT], parameters["model.norm.weight"]), "model.embed_tokens").float()


class Optimizer:
    """Muon for the matrices of the layers, Adam for the embedding and the norms.

    Muon: the update is the momentum with all its singular values brought near 1, by Newton-Schulz iterations (K. Jordan
    et al., "Muon: an optimizer for hidden layers in neural networks", 2024, where the coefficients are from).
    """

    def __init__(self, parameters: Parameters) -> None:
        self.matrices = {name: p for name, p in parameters.items() if "_proj" in name}
        self.momentum = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        others = [p for name, p in parameters.items() if name not in self.matrices]
        self.adam = torch.optim.Adam(others, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def step(self, scale: float, pool: ThreadPoolExecutor) -> None:
        """One step on the gradients, which are cleared. ``scale``: of the learning rates."""
        for group in self.adam.param_groups:
            group["lr"] = ADAM_LEARNING_RATE * scale
        self.adam.step()
        self.adam.zero_grad()
        list(pool.map(partial(self._update, scale), self.matrices))

    @torch.no_grad()
    def _update(self, scale: float, name: str) -> None:
        weight = self.matrices[name]
        assert weight.grad is not None
        momentum = self.momentum[name].lerp_(weight.grad, 0.05)
        update = orthogonal(weight.grad.lerp(momentum, 0.95))
        rate = MUON_LEARNING_RATE * scale
        weight.mul_(1 - rate * WEIGHT_DECAY)
        weight.sub_(update * (rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5))
        weight.grad = None


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values near 1."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


# ---- training --------------------------------------------------------------------------------------------------------


def train(
    directory: Path,
    num_steps: int = NUM_STEPS,
    checkpoint: Path | None = None,
    pause_file: Path | None = None,
    num_threads: int = 2,
) -> None:
    """Trains and writes ``directory``. ``checkpoint``: goes on from there, and is written every minute. Sleeps while
    ``pause_file`` exists. A step depends on its number only, so an interrupted run ends with the same weights."""
    torch.manual_seed(SEED)
    tokenizer, parameters = make_tokenizer(), make_parameters()
    write_tokenizer(directory, tokenizer)
    optimizer = Optimizer(parameters)
    begin, seconds = 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        begin, seconds = state["step"], state["seconds"]
        parameters = {name: value.requires_grad_() for name, value in state["parameters"].items()}
        optimizer = Optimizer(parameters)
        optimizer.adam.load_state_dict(state["adam"])
        optimizer.momentum = state["momentum"]
    logger.info("%d parameters, %d steps", sum(p.numel() for p in parameters.values()), num_steps)
    saved, total, num_learned = time.monotonic(), 0.0, 0
    with ThreadPoolExecutor(num_threads) as pool:
        for step in range(begin, num_steps):
            while pause_file is not None and pause_file.exists():
                time.sleep(1)
            start = time.monotonic()
            batches = make_step(tokenizer, step)
            count = sum(int((targets >= 0).sum()) for _, targets in batches)
            for loss, gradients in pool.map(partial(gradients_of, parameters, count), batches):
                total += loss
                for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            num_learned += count
            optimizer.step(learning_rate_scale(step, num_steps), pool)
            seconds += time.monotonic() - start
            if (step + 1) % 20 == 0:
                logger.info("step %5d  loss %.4f  %6.1f s", step + 1, total / num_learned, seconds)
                total, num_learned = 0.0, 0
            if checkpoint is not None and (time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == num_steps):
                state = {"step": step + 1, "seconds": seconds, "parameters": parameters}
                state |= {"adam": optimizer.adam.state_dict(), "momentum": optimizer.momentum}
                torch.save(state, checkpoint.with_suffix(".new"))
                os.replace(checkpoint.with_suffix(".new"), checkpoint)
                saved = time.monotonic()
    write_weights(directory, parameters)
    logger.info("trained in %.0f s", seconds)


def gradients_of(
    parameters: Parameters, count: int, batch: tuple[torch.Tensor, torch.Tensor]
) -> tuple[float, tuple[torch.Tensor, ...]]:
    """The summed loss of a micro-batch, and the gradients of its share in the mean over ``count`` tokens."""
    ids, targets = batch
    is_learned = targets >= 0
    logits = forward(parameters, ids, is_learned)
    loss = functional.cross_entropy(logits, targets[is_learned], reduction="sum")
    return loss.item(), torch.autograd.grad(loss / count, list(parameters.values()))


def learning_rate_scale(step: int, num_steps: int) -> float:
    """Of SCHEDULE; stretched, if there are other than NUM_STEPS steps."""
    at = step * NUM_STEPS / num_steps
    (a, low), (b, high) = next(pair for pair in itertools.pairwise(SCHEDULE) if at < pair[1][0])
    return low + (high - low) * (at - a) / (b - a)


# ---- the files -------------------------------------------------------------------------------------------------------


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_weights(directory: Path, parameters: Parameters) -> None:
    weights = {name: value.detach().bfloat16() for name, value in parameters.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(directory: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Everything but the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    names = {"eos_token": END, "pad_token": END_OF_TEXT}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(directory / "tokenizer_config.json", {**settings, **names, "model_max_length": 2048})
    eos = [tokenizer.token_to_id(END), tokenizer.token_to_id(END_OF_TEXT)]
    write_json(directory / "generation_config.json", {"eos_token_id": eos, "pad_token_id": eos[1]})
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_theta": ROPE_THETA,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": eos[0],
        "pad_token_id": eos[1],
        "torch_dtype": "bfloat16",
    }
    write_json(directory / "config.json", config)


# ---- the score -------------------------------------------------------------------------------------------------------


def evaluate(llm: LLM, examples: list[Example]) -> tuple[dict[str, float], list[tuple[Example, str]]]:
    """Share of right answers by kind of example and over "all", greedy; and the wrong ones. An answer that does not
    end by itself is wrong."""
    assert llm.tokenizer is not None
    template = ChatTemplate(llm.tokenizer.chat_templates, llm.tokenizer.special_tokens)
    prompts = []
    for example in examples:
        tools = [json.loads(tool) for tool in example.tools]
        text = template.render(example.messages(), tools=tools or None, add_generation_prompt=True)
        prompts.append(llm.tokenizer.encode(text, add_special_tokens=False))
    answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=256))
    seen, right = Counter[str](), Counter[str]()
    wrong = []
    for example, answer in zip(examples, answers, strict=True):
        is_right = answer.finish_reason == "stop" and example.is_right(answer.text)
        seen.update([example.kind, "all"])
        right.update([example.kind, "all"] if is_right else [])
        if not is_right:
            wrong.append((example, answer.text))
    return {kind: right[kind] / seen[kind] for kind in seen}, wrong


def keep_freed_memory() -> None:
    """glibc maps every large buffer afresh, which made a step twice as long (mallopt: trim at -1, mmap at -3)."""
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 32 << 20)
        ctypes.CDLL(None).mallopt(-1, 1 << 30)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains, or evaluates, the bundled toy model.")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where the model's files are (default: here)")
    parser.add_argument("--evaluate", action="store_true", help="do not train, print the held-out score")
    parser.add_argument("--per-kind", type=int, default=30, help="held-out examples of each kind")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument(
        "--threads", type=int, default=2, help="more than 2 are of no use; the files do not depend on it"
    )
    parser.add_argument("--checkpoint", type=Path, help="file to go on from, written every minute")
    parser.add_argument("--pause-file", type=Path, help="training sleeps while it exists")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if not options.evaluate:
        train(options.directory, options.steps, options.checkpoint, options.pause_file, options.threads)
        return
    llm = LLM(options.directory, dtype="float32", num_threads=options.threads, num_kv_blocks=2048)
    scores, wrong = evaluate(llm, held_out_set(options.per_kind, kinds=ALL_KINDS))
    for example, text in wrong:
        logger.info("%s: %r\n    wanted %r\n    got    %r", example.kind, example.turns[-1][0], example.answer, text)
    for kind, score in scores.items():
        logger.info("%-12s %5.1f %%", kind, 100 * score)


if __name__ == "__main__":
    main()
