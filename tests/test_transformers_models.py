"""Models of transformers on our cache and kernels: its greedy tokens, one prompt at a time, from hostile ragged runs.

Every run starts with NaN in all KV slots. The judge is a forward of transformers without a cache (`greedy_margins`).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.config import ServeArgs
from serve_app.errors import DeterminismError, UnsupportedModelError, WeightsError
from serve_app.llm import LLM, SamplingParams
from serve_app.models import transformers_parts
from serve_app.models.decoder_config import load_model_config
from serve_app.models.transformers_config import TransformersConfig
from serve_app.models.transformers_model import TransformersModel
from serve_app.replica.load import load_engine
from serve_app.runner.model_runner import ModelRunner
from tests.tiny_models import OTHERS, greedy_margins, load_reference, make_other_model, make_tiny_model
from tests.tiny_runs import NEAR_TIE, Answer, Witness, assert_same_bits, make_engine, make_request, make_runner, run

VOCAB_SIZE = 307
NUM_TOKENS = 12


OPTIONS: dict[str, Any] = {
    "block_size": 16,
    "max_model_len": 128,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
}


def _prompts() -> list[list[int]]:
    """1 to 70 tokens; some begin alike, for 33 tokens."""
    rng = random.Random(7)
    alike = [rng.randrange(VOCAB_SIZE) for _ in range(33)]
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (1, 70, 16, 31)]
    return prompts + [alike + [rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (0, 9, 30)]


PROMPTS = _prompts()
REQUESTS = [make_request(str(i), prompt, max_tokens=NUM_TOKENS) for i, prompt in enumerate(PROMPTS)]


class Tiny(NamedTuple):
    directory: Path
    reference: Any
    runner: ModelRunner


@pytest.fixture(scope="module", params=OTHERS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    directory = make_other_model(tmp_path_factory.mktemp("model"), request.param)
    # With max_model_len within the original length, longrope has its short factors.
    runner = make_runner(directory, **OPTIONS)
    assert isinstance(runner.model, TransformersModel)
    return Tiny(directory, load_reference(directory), runner)


def judge(reference: Any, answers: dict[tuple[str, int], Answer]) -> None:
    """Every token is transformers' choice, but for near ties."""
    for (name, _), answer in answers.items():
        assert len(answer.token_ids) == NUM_TOKENS, answer.error
        margins = greedy_margins(reference, PROMPTS[int(name)], answer.token_ids)
        assert max(margins) <= NEAR_TIE, f"prompt {name}: {margins}"
    tokens = [token for answer in answers.values() for token in answer.token_ids]
    assert len(set(tokens)) > 6, "a model that repeats itself shows nothing"


def test_hostile_budgets_with_preemption_and_prefix_hits(tiny: Tiny) -> None:
    engine = make_engine(tiny.runner, num_kv_blocks=10, max_num_batched_tokens=23, max_num_seqs=5)
    judge(tiny.reference, run(engine, REQUESTS, arrivals={3: 4, 5: 9}))
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.num_prefix_hits > 0
    assert max(record.num_tokens for record in engine.recorder.records) == 23
    engine = make_engine(tiny.runner, num_kv_blocks=40, max_num_batched_tokens=7, max_num_seqs=7)
    judge(tiny.reference, run(engine, REQUESTS[:3]))


def test_bits_do_not_depend_on_the_batch(tiny: Tiny) -> None:
    """Alone with whole prompts, and chopped up in company: equal K, V and logits, and so equal tokens."""
    assert tiny.runner.deterministic
    with Witness(tiny.runner) as together:
        engine = make_engine(tiny.runner, num_kv_blocks=60, max_num_batched_tokens=19, enable_prefix_caching=False)
        answers = run(engine, REQUESTS)
    for request in (REQUESTS[1], REQUESTS[5]):
        with Witness(tiny.runner) as alone:
            engine = make_engine(tiny.runner, num_kv_blocks=60, max_num_batched_tokens=64, enable_prefix_caching=False)
            answer = run(engine, [request])
        key = (request.request_id, 0)
        assert answer[key].token_ids == answers[key].token_ids
        assert assert_same_bits(key, together, alone) >= NUM_TOKENS


def test_prompt_logprobs_take_the_models_own_end(tiny: Tiny) -> None:
    """Soft-caps and scales behind the head count for every row."""
    request = make_request("a", PROMPTS[3], max_tokens=1, prompt_logprobs=0)
    answer = run(make_engine(tiny.runner, max_num_batched_tokens=9), [request])["a", 0]
    assert answer.prompt_logprobs is not None
    with torch.no_grad():
        logits = tiny.reference(input_ids=torch.tensor([PROMPTS[3]]), use_cache=False).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(PROMPTS[3][1:])[:, None])[:, 0]
    found = [entry.logprob for entry in answer.prompt_logprobs if entry is not None]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-3, atol=1e-3)


def test_longrope_has_the_factors_of_max_model_len(tmp_path: Path) -> None:
    """Beyond the original length all positions have the long factors, from the first token on: a key that is in the cache
    may not change when its sequence grows. transformers is asked the same by making both sets the long one."""
    directory = make_other_model(tmp_path, "Phi3ForCausalLM")
    runner = make_runner(directory, **{**OPTIONS, "max_model_len": 256})
    answers = run(make_engine(runner, max_num_batched_tokens=23), REQUESTS)
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    judge(load_reference(directory, rope_parameters={**rope, "short_factor": rope["long_factor"]}), answers)
    short = load_reference(directory)
    margins = [m for (i, _), a in answers.items() for m in greedy_margins(short, PROMPTS[int(i)], a.token_ids)]
    assert max(margins) > NEAR_TIE, "both sets of factors give the same tokens"


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4}),  # its layers are Conv1D
        ("PhiForCausalLM", {"partial_rotary_factor": 0.5}),  # a head with a bias
        ("MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": 21}),
        ("Olmo2ForCausalLM", {}),
        ("Starcoder2ForCausalLM", {"sliding_window": 17, "tie_word_embeddings": True}),
    ],
)
def test_more_architectures(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    directory = make_other_model(tmp_path, architecture, **(changes or {"rms_norm_eps": 1e-5}))
    runner = make_runner(directory, **OPTIONS)
    engine = make_engine(runner, num_kv_blocks=10, max_num_batched_tokens=23, max_num_seqs=5)
    judge(load_reference(directory), run(engine, REQUESTS))
    assert engine.scheduler.num_preemptions > 0


def test_our_own_architectures_stay_ours_unless_forced(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, "Qwen3ForCausalLM", hidden_size=64, sliding_window=21, eos=())
    options: dict[str, Any] = {"num_kv_blocks": 14, "block_size": 16, "max_num_batched_tokens": 32, "max_num_seqs": 5}
    ours = LLM(directory, dtype="float32", **options)
    theirs = LLM(directory, dtype="float32", implementation="transformers", **options)
    assert not isinstance(ours.runner.model, TransformersModel)
    assert isinstance(theirs.runner.model, TransformersModel)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    a, b = ([answer.token_ids for answer in llm.generate(PROMPTS, params)] for llm in (ours, theirs))
    assert a == b
    args = ServeArgs.parse({"model": {"model": str(directory), "implementation": "transformers"}, "engine": options})
    assert isinstance(load_engine(args).runner.model, TransformersModel)  # type: ignore[attr-defined]


def test_16_bit_models_run(tmp_path: Path) -> None:
    directory = make_other_model(tmp_path, "Gemma2ForCausalLM")
    runner = make_runner(directory, dtype="bfloat16", **OPTIONS)
    assert runner.dtype == torch.bfloat16
    answers = run(make_engine(runner), REQUESTS[:3])
    reference = load_reference(directory)
    # bfloat16 rounds what float32 ties do not: the choice is near the best, of logits within a soft-cap of 4
    margins = [m for (i, _), a in answers.items() for m in greedy_margins(reference, PROMPTS[int(i)], a.token_ids)]
    assert sum(margin <= 0.1 for margin in margins) > 0.7 * len(margins)


# ---- weights ------------------------------------------------------------------------------------------------------------


def change_weights(directory: Path, change: Any) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.down_proj.weight"]


def _add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.third_proj.weight"] = torch.zeros(3)


def _reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 81)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop, r"lacks tensors that the model needs: model\.layers\.1\.mlp\.down_proj\.weight"),
        (_add, r"does not use: model\.layers\.0\.mlp\.third_proj"),
        (_reshape, r"of other shapes than the config asks for: .*\.1\.mlp\.down_proj.*81.*80"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_load_strictly(change: Any, words: str, tmp_path: Path) -> None:
    directory = make_other_model(tmp_path, "GraniteForCausalLM")
    change_weights(directory, change)
    with pytest.raises(WeightsError, match=words):
        make_runner(directory)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    directory = make_other_model(tmp_path, "GraniteForCausalLM")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors is truncated or corrupt"):
        make_runner(directory)


def test_no_weight_is_kept_twice(tmp_path: Path) -> None:
    """What our layers packed, the modules of transformers have given up."""
    directory = make_other_model(tmp_path, "Qwen3MoeForCausalLM")
    model = make_runner(directory, max_model_len=128).model
    assert isinstance(model, TransformersModel)
    modules = list(model._body.modules()) + list(model._model.modules())
    left = {id(p): p for module in modules for p in module.parameters()}.values()
    shapes = sorted(tuple(p.shape) for p in left if p.ndim > 1)
    assert shapes == [(5, 64), (VOCAB_SIZE, 64)]  # the router and the embedding
    assert len(model.linears) == 2 * 4 + 2 * 5 + 1 + 3 + 1


def test_dummy_weights_follow_from_the_seed(tmp_path: Path) -> None:
    directory = make_other_model(tmp_path, "Qwen3MoeForCausalLM")
    (directory / "model.safetensors").unlink()
    tokens = []
    for seed in (3, 3, 4):
        runner = make_runner(directory, load_format="dummy", max_model_len=128, seed=seed)
        tokens.append(run(make_engine(runner), REQUESTS[1:3])["2", 0].token_ids)
    assert tokens[0] == tokens[1] != tokens[2]


def test_buffers_of_a_dummy_model_are_the_real_ones(tmp_path: Path) -> None:
    """What follows from the config and is in no checkpoint: frequencies, the scale of embeddings."""
    directory = make_other_model(tmp_path, "Gemma3ForCausalLM")
    real = make_runner(directory, max_model_len=128).model
    dummy = make_runner(directory, load_format="dummy", max_model_len=128).model
    assert isinstance(real, TransformersModel)
    assert isinstance(dummy, TransformersModel)
    a, b = dict(real._body.named_buffers()), dict(dummy._body.named_buffers())
    assert a.keys() == b.keys()
    assert len(a) >= 4
    for name, buffer in a.items():
        assert torch.equal(buffer, b[name]), name


# ---- the check at start-up ----------------------------------------------------------------------------------------------


def test_an_activation_whose_bits_depend_on_its_place_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch computes what its vectors leave over by another function. 75 is no multiple of a vector."""
    directory = make_other_model(tmp_path, "GraniteForCausalLM", intermediate_size=75)
    plain = torch.nn.Identity

    def sometimes(module: Any) -> Any:
        class Sometimes(plain):  # type: ignore[valid-type,misc]
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = module(x)
                return y * (1 + 1e-6 * (x.numel() % 2))

        return Sometimes()

    monkeypatch.setattr(transformers_parts, "RowActivation", sometimes)
    with pytest.raises(DeterminismError, match=r"bits of its rows depend on the batch \(.*rows"):
        make_runner(directory, deterministic=True, max_model_len=128)
    runner = make_runner(directory, deterministic=None, max_model_len=128)
    assert not runner.deterministic
    assert "Going on in fast mode" in caplog.text


def test_a_model_whose_rows_see_each_other_is_refused_in_any_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_other_model(tmp_path, "GraniteForCausalLM")
    product = transformers_parts.RowLinear.forward

    def of_the_batch(self: Any, x: torch.Tensor) -> torch.Tensor:
        return product(self, x) + 0.5 * x.mean()

    monkeypatch.setattr(transformers_parts.RowLinear, "forward", of_the_batch)
    for deterministic in (False, True):
        with pytest.raises(UnsupportedModelError, match="depends on rows of other sequences"):
            make_runner(directory, deterministic=deterministic, max_model_len=128)


def test_attention_that_we_read_wrongly_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_other_model(tmp_path, "Gemma2ForCausalLM")
    read = TransformersConfig.from_directory

    def without_soft_caps(*args: Any, **named: Any) -> TransformersConfig:
        config = read(*args, **named)
        object.__setattr__(config, "layers", tuple(layer._replace(soft_cap=0.0) for layer in config.layers))
        return config

    monkeypatch.setattr(TransformersConfig, "from_directory", without_soft_caps)
    with pytest.raises(UnsupportedModelError, match="its own attention gives other logits than ours"):
        make_runner(directory, deterministic=False, max_model_len=128)


def test_the_fingerprint_knows_the_version(tmp_path: Path) -> None:
    import transformers

    config = load_model_config(make_other_model(tmp_path, "OPTForCausalLM"))
    assert isinstance(config, TransformersConfig)
    assert config.version == transformers.__version__
    assert config.hidden_size == 32
