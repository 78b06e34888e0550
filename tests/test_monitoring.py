"""deploy/monitoring: alerts and dashboard name only what /metrics has, each alert is tested and explained.

The last tests need `promtool`, of Prometheus: on PATH, or where the variable PROMTOOL says.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.monitoring import dashboard, prometheusrule
from serve_app.engine.request import FinishReason
from serve_app.metrics import ROUTER, TABLE, Metric
from tests.api.house import House
from tests.promql import Selector, named
from tests.tiny_models import make_tiny_model

REPOSITORY = Path(__file__).parent.parent
MONITORING = REPOSITORY / "deploy/monitoring"
RUNBOOK = (REPOSITORY / "docs/runbook.md").read_text(encoding="utf-8")
RULES = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))
STORIES = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text(encoding="utf-8"))["tests"]
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
METRICS = {metric.name: metric for metric in TABLE}

SCRAPE_LABELS = {"job", "instance"}
"""Prometheus adds them."""
RAY_LABELS = {"job", "application", "deployment"}
RAY_PREFIX = "ray_serve_"
PROMETHEUS_OWN = {"up"}


def expressions() -> dict[str, str]:
    """Where it stands -> PromQL, of the rules and the dashboard."""
    made = dashboard.dashboard()
    found = {name: rule["expr"] for name, rule in ALERTS.items()}
    for panel in made["panels"]:
        for target in panel.get("targets", ()):
            found[f"{panel['title']}, {target['legendFormat']}"] = target["expr"]
    for annotation in made["annotations"]["list"]:
        found[annotation["name"]] = annotation["expr"]
    for variable in made["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert match is not None, variable["query"]
            found[f"${variable['name']}"] = f"count by ({match[2]}) ({match[1]})"
    return found


EXPRESSIONS = expressions()


def metric_of(name: str) -> tuple[Metric, str]:
    """Of a series' name, and what of the metric it is: "", bucket, sum or count. KeyError: there is no such metric."""
    for suffix in ("bucket", "sum", "count"):
        stem = name.removesuffix(f"_{suffix}")
        if stem != name and stem in METRICS and METRICS[stem].kind == "histogram":
            return METRICS[stem], suffix
    if METRICS[name].kind == "histogram":
        raise KeyError(f"{name} is a histogram: it has _bucket, _sum and _count")
    return METRICS[name], ""


def labels_of(selector: Selector) -> set[str]:
    """That its series have. KeyError: nobody exports it."""
    if selector.metric in PROMETHEUS_OWN:
        return SCRAPE_LABELS
    if selector.metric.startswith(RAY_PREFIX):
        return RAY_LABELS
    metric, part = metric_of(selector.metric)
    return {*metric.labels, *SCRAPE_LABELS, *(["le"] if part == "bucket" else [])}


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "metrics", "grouped_by"),
    [
        ("up", ["up"], set()),
        ("a:b_total{x='}', y=~\"1|2\"}[5m] offset 1h", ["a:b_total"], set()),
        ("sum by (le, job) (rate(a_bucket[$__rate_interval])) > 1.5e3", ["a_bucket"], {"le", "job"}),
        ("a / on (x) group_left (y) b unless max without (z) (c) or vector(0)", ["a", "b", "c"], {"x", "y", "z"}),
        ("sum(a) by (x) # but not this_one\n+ b", ["a", "b"], {"x"}),
        ("offset_seconds and by_name", ["offset_seconds", "by_name"], set()),
    ],
)
def test_names_are_found(expression: str, metrics: list[str], grouped_by: set[str]) -> None:
    found = named(expression)
    assert [selector.metric for selector in found.selectors] == metrics
    assert found.grouped_by == grouped_by


def test_matchers_are_found() -> None:
    (selector,) = named("a{x='}', y=~\"1|2\"}").selectors
    assert selector.matchers == (("x", "=", "}"), ("y", "=~", "1|2"))
    assert selector.values("y") == ["1", "2"]
    assert selector.values("x") == ["}"]
    for wrong in ("{x='1'}", "a ; b", "a{x}"):
        with pytest.raises(ValueError, match=r"PromQL|without a name|matchers"):
            named(wrong)


@pytest.mark.parametrize("place", EXPRESSIONS)
def test_metrics_and_labels_exist(place: str) -> None:
    found = named(EXPRESSIONS[place])
    assert found.selectors
    known: set[str] = set()
    for selector in found.selectors:
        labels = labels_of(selector)
        known |= labels
        assert {label for label, _, _ in selector.matchers} <= labels, selector
    assert found.grouped_by <= known


@pytest.mark.parametrize("place", EXPRESSIONS)
def test_counters_are_asked_for_their_growth_and_nothing_else_is(place: str) -> None:
    expression = EXPRESSIONS[place]
    for function, metric in re.findall(r"\b(rate|increase|delta|changes)\(([\w:]+)", expression):
        kind = metric_of(metric)[0].kind
        assert (kind == "gauge") == (function in ("delta", "changes")), f"{function}({metric}), a {kind}"
    of_counters = [s.metric for s in named(expression).selectors if grows(s.metric)]
    assert len(of_counters) == len(re.findall(r"\b(?:rate|increase)\(", expression))


def grows(name: str) -> bool:
    return name.startswith(("ragged_serve_", "vllm:")) and metric_of(name)[0].kind != "gauge"


def test_metrics_of_ray_exist() -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "serve/_private/deployment_state.py").read_text(encoding="utf-8")
    asked = {s.metric for e in EXPRESSIONS.values() for s in named(e).selectors if s.metric.startswith(RAY_PREFIX)}
    assert asked == {"ray_serve_autoscaling_target_replicas", "ray_serve_deployment_replica_healthy"}
    for name in asked:
        declared = source.split(f'"{name.removeprefix("ray_")}"', 1)[1].split("set_default_tags(", 1)[1]
        assert re.findall(r'"(\w+)":', declared.split(")", 1)[0]) == ["deployment", "application"]


def test_label_values_exist() -> None:
    """kind="lost", not kind="losses"; the bounds that the SLO may take."""
    package = REPOSITORY / "serve_app"
    counted = {
        "ragged_serve_ledger_events_total": ("routing/ledger.py", "routing/lease_book.py", "routing/admission.py"),
        "ragged_serve_stream_events_total": ("api/failover.py",),
        "ragged_serve_router_client_events_total": ("routing/router_client.py",),
    }
    num_kinds = 0
    for expression in EXPRESSIONS.values():
        for selector in named(expression).selectors:
            for kind in selector.values("kind"):
                source = "".join((package / path).read_text(encoding="utf-8") for path in counted[selector.metric])
                assert re.search(rf'"{kind}"|\b{kind}=0', source), f"nobody counts {kind}"
                num_kinds += 1
            for reason in selector.values("finished_reason"):
                assert reason in map(str, FinishReason)
            for part in selector.values("part"):
                assert f'record.seconds["{part}"]' in (package / "engine/engine.py").read_text(encoding="utf-8")
    assert num_kinds > 10
    variables = {variable["name"]: variable for variable in dashboard.dashboard()["templating"]["list"]}
    for variable, name in (
        ("slo_ttft", "vllm:time_to_first_token_seconds"),
        ("slo_tpot", "vllm:request_time_per_output_token_seconds"),
    ):
        for option in variables[variable]["options"]:
            assert option["value"] in [str(bound) for bound in METRICS[name].bounds], f"{variable}: no such bucket"


def test_planted_mistakes_are_caught() -> None:
    with pytest.raises(KeyError):
        labels_of(Selector("ragged_serve_leases_total", ()))
    with pytest.raises(KeyError, match="is a histogram"):
        labels_of(Selector("vllm:iteration_tokens_total", ()))
    with pytest.raises(KeyError):
        labels_of(Selector("ragged_serve_leases_sum", ()))
    assert "le" in labels_of(Selector("vllm:iteration_tokens_total_bucket", ()))
    assert "le" not in labels_of(Selector("vllm:iteration_tokens_total_sum", ()))


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """/metrics of a whole service, after a little traffic: answers, one that is refused, one to a route that is none."""
    directory = make_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=300, eos=())
    engine = {"num_threads": 1, "num_kv_blocks": 96, "max_model_len": 256, "max_num_seqs": 16}
    model = {"model": str(directory), "runner": "simulated"}
    with House({"model": model, "engine": engine}) as house, httpx.Client(base_url=house.url, timeout=60) as http:

        def ask(i: int) -> None:
            asked = {"prompt": "the quick brown fox " * 4, "max_tokens": 8, "n": 2, "stream": bool(i % 2)}
            assert http.post("/v1/completions", json=asked).status_code == 200

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(16)))
        assert http.post("/v1/completions", json={"prompt": 1.5}).status_code == 400
        house.wait_until(house.is_at_rest)
        wanted = 'ragged_serve_http_answers_total{route="/v1/completions",status="400"} 1.0'
        house.wait_until(lambda: wanted in http.get("/metrics").text and all_replicas_tell(http.get("/metrics").text))
        yield http.get("/metrics").text


def all_replicas_tell(text: str) -> bool:
    return {"replica0", "replica1"} == set(re.findall(r'^ragged_serve_step_seconds_count{replica="(\w+)"', text, re.M))


def test_what_is_asked_for_is_there(scraped: str) -> None:
    """Each name, of a service that works, with each label that an expression asks for."""
    series: dict[str, list[set[str]]] = {}
    for name, labels in re.findall(r"^([\w:]+)(?:{(.*)})? \S+$", scraped, re.M):
        series.setdefault(name, []).append(set(re.findall(r'(\w+)="', labels)))
    num_looked = 0
    for place, expression in EXPRESSIONS.items():
        for selector in named(expression).selectors:
            if selector.metric in PROMETHEUS_OWN or selector.metric.startswith(RAY_PREFIX):
                continue
            assert selector.metric in series, f"{place}: {selector.metric} is not in /metrics"
            wanted = {label for label, _, _ in selector.matchers} - SCRAPE_LABELS
            assert all(wanted <= labels for labels in series[selector.metric]), f"{place}: {selector}"
            num_looked += 1
    assert num_looked > 60


def test_rare_events_stand_at_zero_before_they_happen(scraped: str) -> None:
    """A counter that appears together with its first event has grown by nothing, for Prometheus: no alert."""
    num_looked = 0
    for alert, rule in ALERTS.items():
        if "increase(" not in rule["expr"]:
            continue
        for selector in named(rule["expr"]).selectors:
            for label in ("kind", "finished_reason"):
                for value in selector.values(label):
                    pattern = rf'^{re.escape(selector.metric)}{{(?:.*,)?{label}="{value}"(?:,.*)?}} 0\.0$'
                    assert re.search(pattern, scraped, re.M), f"{alert}: no series for {label}={value}"
                    num_looked += 1
    assert num_looked > 5


def test_the_router_s_own_line_is_named(scraped: str) -> None:
    assert re.search(rf'^vllm:num_requests_waiting{{.*replica="{ROUTER}"}} 0\.0$', scraped, re.M)


# ---- alerts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    annotations = rule["annotations"]
    assert set(annotations) == {"summary", "description", "action", "runbook"}
    assert all(annotations.values())
    page, _, anchor = annotations["runbook"].partition("#")
    assert page == "docs/runbook.md"
    assert anchor == alert.lower()
    section = RUNBOOK.split(f"\n## {alert}\n", 1)[1].split("\n## ", 1)[0]
    for part in ("**Means.**", "**Look.**", "**Do.**"):
        assert section.count(part) == 1, f"{alert} in the runbook has no {part}"


def test_the_runbook_has_no_other_alerts() -> None:
    assert re.findall(r"^## (RaggedServe\w+)$", RUNBOOK, re.M) == list(ALERTS), "in the order of alerts.yaml"


def test_the_table_of_alerts_is_theirs() -> None:
    page = (REPOSITORY / "docs/observability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\(runbook\.md#(\w+)\) \| (\w+) \| (.+) \|$", page, re.M)
    assert rows == [
        (name, name.lower(), rule["labels"]["severity"], re.sub(r"{{.*?}} ", "", rule["annotations"]["summary"]))
        for name, rule in ALERTS.items()
    ]


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_is_seen_quiet_and_firing(alert: str) -> None:
    """Stories name alerts in ALERTS{alertname=...}: before it fires it must be seen not to."""
    asked = f'ALERTS{{alertname="{alert}", alertstate="firing"}}'
    quiet, firing = False, False
    for story in STORIES:
        steps = [step for step in story.get("promql_expr_test", ()) if step["expr"] == asked]
        times = [seconds(step["eval_time"]) for step in steps]
        assert times == sorted(times)
        for before, step in zip([None, *steps], steps, strict=False):
            quiet |= not step["exp_samples"]
            firing |= bool(step["exp_samples"]) and before is not None and not before["exp_samples"]
    assert quiet
    assert firing


def test_the_rules_for_kubernetes_are_what_the_script_writes() -> None:
    written = prometheusrule.TARGET.read_text(encoding="utf-8")
    assert written == prometheusrule.text(), "run: python deploy/monitoring/prometheusrule.py"
    assert yaml.safe_load(written)["spec"] == RULES


def test_on_a_good_day_nothing_fires() -> None:
    good, *_ = STORIES
    looks = [step for step in good["promql_expr_test"] if step["expr"] == 'ALERTS{alertstate="firing"}']
    assert looks
    assert not any(step["exp_samples"] for step in looks)
    longest = max(seconds(rule.get("for", "0s")) for rule in ALERTS.values())
    assert max(seconds(step["eval_time"]) for step in looks) >= 2 * longest
    there = {named(line["series"]).selectors[0].metric for line in good["input_series"]}
    asked = {selector.metric for rule in ALERTS.values() for selector in named(rule["expr"]).selectors}
    assert asked <= there, "a quiet alert without its series proves nothing"


def seconds(duration: str) -> int:
    units = {"s": 1, "m": 60, "h": 3600}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([smh])", duration))


# ---- the dashboard ---------------------------------------------------------------------------------------------------


def test_the_dashboard_is_what_the_script_writes() -> None:
    written = (MONITORING / "dashboard.json").read_text(encoding="utf-8")
    assert written == dashboard.text(), "run: python deploy/monitoring/dashboard.py"


def test_panels_lie_beside_each_other() -> None:
    made = dashboard.dashboard()
    taken: set[tuple[int, int]] = set()
    for panel in made["panels"]:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in made["panels"]]
    assert len(set(titles)) == len(titles)


def test_panels_use_variables_that_are_there() -> None:
    made = dashboard.dashboard()
    names = {variable["name"] for variable in made["templating"]["list"]} | {"__rate_interval", "__all"}
    assert {"datasource", "job", "model", "replica"} <= names
    used = set(re.findall(r"\$\{?(\w+)", dashboard.text()))
    assert used <= names
    assert used >= names - {"__all"}
    for panel in made["panels"]:
        for target in panel.get("targets", ()):
            assert "$job" in target["expr"], f"{panel['title']} mixes servers"
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert labels <= named(target["expr"]).grouped_by, f"{panel['title']}: {labels} were summed away"


# ---- what Prometheus itself says -------------------------------------------------------------------------------------

needs_promtool = pytest.mark.may_skip("promtool is Prometheus' own program; a machine without Prometheus has none")


@pytest.fixture(scope="module")
def promtool() -> str:
    found = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool on PATH, and the variable PROMTOOL names none: the rules' own tests did not run")
    return found


def run(promtool: str, *arguments: str) -> str:
    done = subprocess.run(
        [promtool, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_prometheus_takes_the_rules_and_the_configuration(promtool: str, tmp_path: Path) -> None:
    """promtool opens what a configuration names: of this machine's Ray that may be a link to a cluster that is gone."""
    assert f"{len(ALERTS)} rules found" in run(promtool, "check", "rules", "deploy/monitoring/alerts.yaml")
    shutil.copy(MONITORING / "alerts.yaml", tmp_path)
    config = (MONITORING / "prometheus.yml").read_text(encoding="utf-8")
    assert "/tmp/ray/" in config
    copy = tmp_path / "prometheus.yml"
    copy.write_text(config.replace("/tmp/ray/", f"{tmp_path}/"), encoding="utf-8")
    assert "valid prometheus config file" in run(promtool, "check", "config", str(copy))


@needs_promtool
def test_the_stories_come_true(promtool: str) -> None:
    assert "SUCCESS" in run(promtool, "test", "rules", "deploy/monitoring/alerts_test.yaml")


@needs_promtool
def test_prometheus_takes_the_dashboard_s_expressions(promtool: str, tmp_path: Path) -> None:
    """As rules, with the variables filled in: promtool of older versions parses expressions nowhere else."""
    rules: list[dict[str, Any]] = []
    for number, expression in enumerate(EXPRESSIONS.values()):
        filled = expression.replace("$__rate_interval", "1m")
        rules.append({"record": f"looked_at:{number}", "expr": re.sub(r"\$\w+", "x", filled)})
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    assert f"{len(rules)} rules found" in run(promtool, "check", "rules", str(file))
