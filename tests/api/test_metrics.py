"""/metrics of a whole service in one process: parsed by Prometheus' own parser, right after known requests and deaths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app import metrics
from serve_app.engine.request import FinishReason
from tests.api.house import House
from tests.api.test_resume import OtherIngress
from tests.tiny_models import make_tiny_model

ENGINE = {"block_size": 8, "num_kv_blocks": 384, "max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=300, eos=())


@pytest.fixture
def house(directory: Path) -> Iterator[House]:
    model = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": 0.002}}
    with House({"model": model, "engine": ENGINE}) as made:
        yield made


Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(url: str) -> Values:
    """(name of a sample, its labels without the model's name) -> value."""
    found: Values = {}
    answer = httpx.get(url + "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == metrics.CONTENT_TYPE
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name"))
            assert (sample.name, labels) not in found, "a sample stands there twice"
            found[sample.name, labels] = sample.value
    return found


def total(values: Values, name: str, **labels: str) -> float:
    """The sum over all samples of that name with these labels."""
    return sum(v for (n, given), v in values.items() if n == name and labels.items() <= dict(given).items())


def scrape_until(url: str, condition: Callable[[Values], bool], house: House) -> Values:
    found: Values = {}

    def holds() -> bool:
        found.clear()
        found.update(scrape(url))
        return condition(found)

    house.wait_until(holds)
    return found


def ask(url: str, max_tokens: int, n: int = 1, prompt: int = 20, stop: str | None = None) -> None:
    body = {"prompt": [1] * prompt, "max_tokens": max_tokens, "n": n, "ignore_eos": True, "stop": stop}
    assert httpx.post(url + "/v1/completions", json=body, timeout=60).status_code == 200


def test_what_is_there_stands_in_the_table_and_the_other_way_round(house: House) -> None:
    ask(house.url, 3)
    scrape_until(house.url, lambda values: total(values, "vllm:generation_tokens_total") == 3, house)
    families = {f.name: f for f in text_string_to_metric_families(httpx.get(house.url + "/metrics").text)}
    # The parser takes the end from a counter's name.
    expected = {
        metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name: metric
        for metric in metrics.TABLE
    }
    # Nobody has asked it to end, and nobody has waited.
    unknown = {metrics.LEDGER[key].name for key in ("seconds_left", "drain_tokens_per_second")}
    assert expected.keys() - unknown <= families.keys() <= expected.keys()
    for name, family in families.items():
        metric = expected[name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), sample
        if metric.kind == "histogram":
            edges = {float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")}
            assert edges == {*metric.bounds, float("inf")}


def test_values_after_known_requests(house: House) -> None:
    ask(house.url, 5)
    ask(house.url, 7, n=3, prompt=30)
    assert httpx.post(house.url + "/v1/completions", json={"prompt": []}).status_code == 400
    assert httpx.get(house.url + "/v1/nothing/here").status_code == 404
    values = scrape_until(house.url, lambda values: total(values, "vllm:generation_tokens_total") == 26, house)
    assert total(values, "vllm:prompt_tokens_total") == 50
    assert total(values, "vllm:prefix_cache_queries_total") == 50
    assert total(values, "vllm:iteration_tokens_total_sum") >= 50 + 26 - 4 - 16
    assert total(values, "ragged_serve_sequences_ended_total", finished_reason="length") == 4
    assert total(values, "vllm:request_success_total", finished_reason="length") == 4
    assert total(values, "vllm:request_success_total") == 4
    assert total(values, "vllm:time_to_first_token_seconds_count") == 2
    assert total(values, "vllm:e2e_request_latency_seconds_count") == 2
    assert total(values, "vllm:request_queue_time_seconds_count") == 2
    assert total(values, "vllm:request_prompt_tokens_sum") == 50
    assert total(values, "vllm:request_generation_tokens_sum") == 26
    assert total(values, "vllm:request_max_num_generation_tokens_sum") == 12
    assert total(values, "vllm:request_params_n_sum") == 4
    assert total(values, "vllm:request_params_max_tokens_sum") == 12
    # Outputs may arrive together, and then there are fewer gaps.
    assert 0 <= total(values, "vllm:inter_token_latency_seconds_count") <= 26 - 4
    assert total(values, "vllm:request_time_per_output_token_seconds_count") == 4
    answers = {
        k: v
        for k, v in values.items()
        if k[0] == "ragged_serve_http_answers_total" and ("route", "/metrics") not in k[1]
    }
    assert {(dict(labels)["route"], dict(labels)["status"]): v for (_, labels), v in answers.items()} == {
        ("/v1/completions", "200"): 2,
        ("/v1/completions", "400"): 1,
        ("other", "404"): 1,
    }
    assert total(values, "ragged_serve_ledger_drift_total") == 0
    sums = ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time")
    whole, *parts = (total(values, f"vllm:{name}_seconds_sum") for name in sums)
    assert 0 < sum(parts) <= whole
    for part in ("schedule", "launch", "wait", "update", "model"):
        assert total(values, "ragged_serve_step_part_seconds_total", part=part) > 0


def test_a_stop_string_a_client_that_goes_and_a_refusal(house: House) -> None:
    with httpx.stream(
        "POST",
        house.url + "/v1/completions",
        json={"prompt": [1] * 8, "max_tokens": 400, "ignore_eos": True, "stream": True},
    ) as answer:
        next(answer.iter_lines())
    values = scrape_until(
        house.url, lambda values: total(values, "vllm:request_success_total", finished_reason="abort") == 1, house
    )
    assert total(values, "vllm:e2e_request_latency_seconds_count") == 0
    assert total(values, "vllm:time_to_first_token_seconds_count") == 1
    assert {dict(k)["finished_reason"] for n, k in values if n == "vllm:request_success_total"} == {
        *map(str, FinishReason)
    }
    body = {"prompt": [1] * 8, "max_tokens": 600}
    assert httpx.post(house.url + "/v1/completions", json=body).status_code == 400
    after = scrape(house.url)
    assert total(after, "vllm:request_success_total") == 1
    assert total(after, "ragged_serve_http_answers_total", route="/v1/completions", status="400") == 1


def test_gauges_tell_who_runs_and_who_waits(house: House) -> None:
    """Two replicas of four places, and a place more that stands by: the others wait at the router."""
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, house.url, 440) for _ in range(14)]
        values = scrape_until(
            house.url,
            lambda values: (
                total(values, "vllm:num_requests_running") == 8
                and total(values, "vllm:num_requests_waiting", replica=metrics.ROUTER) == 4
                and total(values, "vllm:num_requests_waiting") == 6
                and total(values, "vllm:kv_cache_usage_perc") > 0
            ),
            house,
        )
        assert {dict(k)["replica"] for n, k in values if n == "vllm:num_requests_running"} == {"replica0", "replica1"}
        assert total(values, "ragged_serve_replica_kv_blocks_booked") > 0
        for one in asked:
            one.result()
    house.check_rest()
    values = scrape_until(house.url, lambda values: total(values, "vllm:generation_tokens_total") == 14 * 440, house)
    assert total(values, "vllm:num_requests_waiting") == total(values, "vllm:num_requests_running") == 0
    drifts = [v for (n, _), v in values.items() if n == "ragged_serve_replica_kv_blocks_drift"]
    assert drifts == [0, 0]
    assert total(values, "vllm:cache_config_info", block_size="8", num_gpu_blocks="384") == 2


def test_each_of_two_ingresses_tells_of_both_and_of_one_that_has_left(house: House) -> None:
    with OtherIngress(house, "ingress1") as other:
        for _ in range(3):
            ask(house.url, 4)
        for _ in range(2):
            ask(other.url, 4)

        def has_both(values: Values) -> bool:
            """The other one may have told of an answer between its last token and its status."""
            answers = total(values, "ragged_serve_http_answers_total", route="/v1/completions", status="200")
            return total(values, "vllm:request_generation_tokens_sum") == 20 and answers == 5

        first, second = (scrape_until(url, has_both, house) for url in (house.url, other.url))
        for values in (first, second):
            assert total(values, "vllm:e2e_request_latency_seconds_count") == 5
        ask(other.url, 4)
    # It told its last counts as it left.
    values = scrape(house.url)
    assert total(values, "vllm:e2e_request_latency_seconds_count") == 6


def test_counters_only_grow_when_replicas_die(house: House) -> None:
    """A dead replica's counters still stand there, its gauges do not; the streams that it lost go on and are counted."""
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, house.url, 480) for _ in range(6)]
        house.wait_until(lambda: all(r.engine.num_unfinished for r in house.replicas))
        before = scrape_until(
            house.url,
            lambda values: total(values, "vllm:generation_tokens_total", replica="replica0") > 0,
            house,
        )

        async def kill() -> None:
            house.transport.kill("replica0")
            house.replicas[0].reporter.cancel()

        house.run(kill())
        for one in asked:
            one.result()
    house.replicas.pop(0).engine.stop(5.0)
    after = scrape_until(
        house.url, lambda values: ("ragged_serve_replica_kv_blocks", (("replica", "replica0"),)) not in values, house
    )
    assert total(after, "ragged_serve_stream_events_total", kind="lost") > 0
    assert total(after, "ragged_serve_stream_events_total", kind="resumed") > 0
    assert total(after, "vllm:request_success_total", finished_reason="length") == 6
    for (name, labels), value in before.items():
        if name.endswith(("_total", "_bucket", "_count", "_sum")):
            assert after[name, labels] >= value, f"{name} {labels} has fallen"
    assert ("vllm:kv_cache_usage_perc", (("replica", "replica0"),)) not in after
    assert total(after, "vllm:generation_tokens_total", replica="replica0") > 0
