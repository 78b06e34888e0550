"""From the application's arguments to an Engine: the model, or the simulated runner. Knows which options go where."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from serve_app import hub
from serve_app.config import ServeArgs
from serve_app.engine.engine import Engine
from serve_app.engine.sequence import Sequence
from serve_app.engine.simulated_runner import Script, SimulatedRunner
from serve_app.errors import ConfigurationError
from serve_app.text.tokenizer import Tokenizer

SIMULATED_KV_BLOCKS = 1024
SIMULATED_MODEL_LEN = 4096
"""Where the configuration does not say it, a runner without a model has these."""


def environment(args: ServeArgs) -> dict[str, str]:
    """Variables of a replica's process. They are read when torch is loaded.

    Threads: Ray sets OMP_NUM_THREADS to the actor's CPUs, and bits are promised for equal thread counts alone. oneDNN's
    default may be changed from outside to round float32 products to a shorter type: not here.
    """
    variables = {"ONEDNN_DEFAULT_FPMATH_MODE": "STRICT", "TOKENIZERS_PARALLELISM": "false"}
    if args.engine.num_threads is not None:
        variables["OMP_NUM_THREADS"] = variables["MKL_NUM_THREADS"] = str(args.engine.num_threads)
    return variables


def load_engine(args: ServeArgs) -> Engine:
    """Takes as long as the model does. Raises a StartupError that says what is wrong.

    Sets `environment` first: where a YAML file has ray_actor_options, Ray Serve drops the runtime_env that app.build
    gave, and torch is not loaded yet.
    """
    os.environ.update(environment(args))
    if args.model.runner == "simulated":
        return _simulated(args)
    from serve_app.runner.model_runner import ModelRunner  # torch: only where a model is loaded

    model, config = args.model, args.engine.to_engine_config()
    runner = ModelRunner(
        model.source,
        config,
        dtype=model.dtype,
        device=model.device,
        load_format=model.load_format,
        revision=model.revision,
        tokenizer=model.tokenizer,
        implementation=model.implementation,
    )
    return Engine(config, runner)


def _simulated(args: ServeArgs) -> Engine:
    model, config = args.model, args.engine.to_engine_config()
    costs = model.simulated
    vocab_size = costs.vocab_size if costs is not None else None
    if vocab_size is None:
        directory = hub.resolve_model(model.tokenizer or model.source, patterns=hub.TEXT_FILES)
        vocab_size = Tokenizer.from_directory(directory).vocab_size
    options = {} if costs is None else costs.model_dump(exclude={"vocab_size", "eos_token_ids", "answers"})
    eos_token_ids = frozenset(costs.eos_token_ids if costs is not None else ())
    if costs is not None and costs.answers:
        tokenizer = Tokenizer.from_directory(
            hub.resolve_model(model.tokenizer or model.source, patterns=hub.TEXT_FILES)
        )
        eos_token_id = next(iter(costs.eos_token_ids), None) or _eos_token_id(tokenizer)
        eos_token_ids |= {eos_token_id}
        options["script"] = _script(costs.answers, tokenizer, eos_token_id)
    runner = SimulatedRunner(
        num_kv_blocks=config.num_kv_blocks or SIMULATED_KV_BLOCKS,
        block_size=config.block_size,
        max_model_len=config.max_model_len or SIMULATED_MODEL_LEN,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        **options,
    )
    return Engine(config, runner)


def _eos_token_id(tokenizer: Tokenizer) -> int:
    given = tokenizer.generation_config.get("eos_token_id")
    found: Any = given[0] if isinstance(given, list) and given else given
    if found is None:
        found = tokenizer.token_to_id(tokenizer.special_tokens.get("eos_token", ""))
    if found is None:
        raise ConfigurationError("simulated.answers need a token to end with; name it in simulated.eos_token_ids")
    return int(found)


def _script(answers: Mapping[str, str], tokenizer: Tokenizer, eos_token_id: int) -> Script:
    tokens = {
        text: (*tokenizer.encode(answer, add_special_tokens=False), eos_token_id) for text, answer in answers.items()
    }

    @functools.lru_cache(maxsize=1024)
    def answer_to(prompt_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        prompt = tokenizer.decode(prompt_token_ids, skip_special_tokens=False)
        last = max(tokens, key=prompt.rfind)
        return tokens[last] if last in prompt else (eos_token_id,)

    def script(sequence: Sequence, index: int) -> int:
        answer = answer_to(sequence.request.prompt_token_ids)
        return answer[min(index, len(answer) - 1)]

    return script
