"""Request sets are the same for the same seed and stay in their ranges; shapes count what transformers would build."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.workloads import (
    DISTRIBUTIONS,
    MODEL_SHAPES,
    ModelShape,
    Request,
    RequestSet,
    make_requests,
    percentiles,
    write_config,
)
from serve_app.models.decoder_config import load_model_config

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_lengths_stay_in_their_ranges_and_differ(distribution: str) -> None:
    requests = make_requests(
        301, vocab_size=37, prompt_lens=(3, 41), output_lens=(1, 9), distribution=distribution, seed=5
    ).requests
    prompts = [len(r.prompt_token_ids) for r in requests]
    outputs = [r.num_output_tokens for r in requests]
    assert min(prompts) >= 3
    assert max(prompts) <= 41
    assert min(outputs) >= 1
    assert max(outputs) <= 9
    assert len(set(prompts)) > 20
    assert len(set(outputs)) >= 7
    assert {token for r in requests for token in r.prompt_token_ids} == set(range(37))


def test_uniform_reaches_both_ends() -> None:
    lens = {len(r.prompt_token_ids) for r in make_requests(200, vocab_size=2, prompt_lens=(2, 5)).requests}
    assert lens == {2, 3, 4, 5}


def test_lognormal_has_its_median_in_the_geometric_middle() -> None:
    requests = make_requests(2001, vocab_size=2, prompt_lens=(32, 512), distribution="lognormal").requests
    lens = sorted(len(r.prompt_token_ids) for r in requests)
    assert 115 < lens[1000] < 142  # sqrt(32 * 512) = 128
    assert lens[0] == 32
    assert lens[-1] == 512


def test_the_seed_decides_everything() -> None:
    one, same, other = (make_requests(7, vocab_size=999, rate=2.0, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_all_at_once_or_poisson_arrivals() -> None:
    assert {r.arrival for r in make_requests(5, vocab_size=9).requests} == {0.0}
    arrivals = [r.arrival for r in make_requests(2000, vocab_size=9, prompt_lens=(1, 1), rate=4.0).requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] > 0
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.25, rel=0.1)
    assert deviation == pytest.approx(mean, rel=0.1)  # of an exponential distribution both are equal


def test_the_rate_changes_nothing_but_arrivals() -> None:
    lens = [
        [(len(r.prompt_token_ids), r.num_output_tokens) for r in make_requests(11, vocab_size=9, rate=rate).requests]
        for rate in (None, 3.0)
    ]
    assert lens[0] == lens[1]


def test_counts() -> None:
    """Prompt of 3, answer of 2: rows are the 3 and the first sampled token; they see 1 + 2 + 3 + 4 keys."""
    requests = RequestSet((Request((5, 6, 7), 2), Request((8,), 1)))
    assert requests.num_prompt_tokens == 4
    assert requests.num_output_tokens == 3
    assert requests.num_rows == 5
    assert requests.num_attended == 10 + 1


def test_json_round_trip() -> None:
    requests = make_requests(5, vocab_size=50, prompt_lens=(1, 7), rate=1.5, seed=3)
    assert RequestSet.from_json(requests.to_json()) == requests


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_requests": 0}, "num_requests is 0"),
        ({"prompt_lens": (0, 4)}, "0 to 4"),
        ({"output_lens": (5, 4)}, "5 to 4"),
        ({"distribution": "normal"}, "'normal'"),
        ({"rate": 0.0}, r"rate is 0\.0"),
    ],
    ids=["no-requests", "empty-prompt", "descending", "distribution", "rate"],
)
def test_wrong_arguments_are_named(changes: dict[str, object], named: str) -> None:
    arguments: dict[str, object] = {"num_requests": 2, "vocab_size": 9, **changes}
    with pytest.raises(ValueError, match=named):
        make_requests(**arguments)  # type: ignore[arg-type]


def test_percentiles() -> None:
    assert percentiles([0.001 * n for n in range(101)], 1e3) == pytest.approx(
        {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    )
    assert all(math.isnan(value) for value in percentiles([]).values())


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_shapes_are_what_our_config_reader_and_transformers_make_of_them(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    shape: ModelShape = MODEL_SHAPES[name]
    directory = write_config(shape, tmp_path / name)
    config = load_model_config(directory)
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (
        shape.hidden_size,
        shape.num_layers,
        shape.vocab_size,
    )
    assert config.eos_token_ids == ()
    assert config.head_dim == shape.head_dim
    assert config.bytes_per_token_and_layer(4) * config.num_layers == shape.kv_bytes_per_token(4)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    assert sum(p.numel() for p in model.parameters()) == shape.num_parameters
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert linear == shape.num_layers * shape.layer_linear_parameters + shape.head_parameters
    assert shape.linear_flops(1, 1) == 2.0 * linear


def test_it_loads_neither_torch_nor_the_project() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import workloads;"
        "print(sorted(m for m in ('torch', 'serve_app', 'transformers') if m in sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(REPOSITORY / "loadtests")], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_config_is_valid_json(tmp_path: Path) -> None:
    directory = write_config(MODEL_SHAPES["qwen3-tiny"], tmp_path)
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
