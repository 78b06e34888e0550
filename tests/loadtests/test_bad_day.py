"""loadtests/bad_day.py without its day: what it starts is configured rightly, and what it measured is told rightly."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.monitoring import dashboard, draw
from loadtests import bad_day
from loadtests.bad_day import Day
from serve_app.check_config import check
from tests.test_draw import Answers

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load((ROOT / "deploy/monitoring/alerts.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
}
TOLD = {
    "start": 1_000.0,
    "flood": 1_010.0,
    "calm": 1_030.0,
    "kill": 1_045.0,
    "end": 1_060.0,
    "loads": {
        "users": {"completed": 9, "refused": 3, "failed_with_an_error": 1, "lost": 0, "median_ttft_ms": 80.4},
        "flood": {"completed": 5, "refused": 70, "failed_with_an_error": 0, "lost": 0},
    },
    "answers": {"flood": {"200": 5, "429": 70}},
    "alerts": [
        {"alert": "Slow", "severity": "warning", "pending": 1_015.0, "firing": 1_061.0 + 59.0, "ended": None},
    ],
}


def test_the_server_s_file_is_one(tmp_path: Path) -> None:
    config = bad_day.server_config(8123)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert check(str(file)) == []
    assert config["http_options"]["port"] == 8123
    (replica,) = (one for one in config["applications"][0]["deployments"] if one["name"] == "Replica")
    assert replica["num_replicas"] == 2, "one is left when one is killed"


def test_prometheus_looks_at_this_server_with_the_real_rules() -> None:
    config = bad_day.prometheus_config(8123)
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "ragged-serve"
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8123"]}]
    assert config["rule_files"] == ["alerts.yaml"]
    assert set(bad_day.prometheus_config(None)) == {"global"}, "old data alone: nobody is asked, nothing is judged"


def test_the_flood_lasts_longer_than_alerts_wait() -> None:
    """Those of an overload, that is. A minute more for their windows to fill."""
    shown = 0.92 * Day().flood
    for name in ("RaggedServeRefusing", "RaggedServeLongWait", "RaggedServeSlowFirstToken"):
        minutes = re.fullmatch(r"(\d+)m", ALERTS[name]["for"])
        assert minutes is not None
        assert 60 * int(minutes[1]) + 60 < shown


def test_the_pictures_rows_are_there() -> None:
    rows = {draw.ALERTS, *draw.rows_of(dashboard.dashboard())}
    assert {row for asked, _ in bad_day.PICTURES.values() for row in asked} <= rows
    spans = bad_day.spans(TOLD)
    assert {span for _, span in bad_day.PICTURES.values()} == set(spans)
    assert spans["day"].start <= TOLD["start"]
    assert spans["kill"].start < TOLD["kill"] < spans["kill"].end


def test_alerts_are_timed() -> None:
    found = bad_day.alert_times(Answers(), TOLD | {"start": 1_000.0, "end": 1_060.0})
    assert found == [
        {"alert": "TooSlow<>", "severity": "warning", "pending": 1_000.0, "firing": 1_015.0, "ended": 1_020.0}
    ]


def test_answers_are_differences_of_counters() -> None:
    def ask(path: str, parameters: dict[str, Any]) -> Any:
        assert path == "query"
        late = {"200": "15", "429": "70"}
        counts = {"200": "10"} if parameters["time"] == 1_010.0 else late
        return {"result": [{"metric": {"status": s}, "value": [0, number]} for s, number in counts.items()]}

    assert bad_day.answers_of(ask, 1_010.0, 1_030.0) == {"200": 5, "429": 70}


def test_the_day_is_told() -> None:
    lines = bad_day.tell(TOLD)
    assert lines[0] == "flood 0:10 to 0:30, kill 0:45, end 1:00"
    assert "| Slow | warning | 0:15 | 2:00 |  |" in lines
    assert "| users | 9 | 3 | 1 | 0 | 80, 0 | 0 |" in lines
    assert "| flood | 5 | 70 | 0 | 0 | 0, 0 | 0 |" in lines
    assert "HTTP answers, flood: {'200': 5, '429': 70}" in lines


def test_a_process_that_ends_at_once_is_told_of(tmp_path: Path) -> None:
    said = [sys.executable, "-c", "raise SystemExit('no such file')"]
    with (
        pytest.raises(RuntimeError, match="did not start: no such file"),
        bad_day.running(said, tmp_path / "log", "http://127.0.0.1:1/ready"),
    ):
        raise AssertionError("never entered")


def test_a_load_test_without_figures_is_an_error(tmp_path: Path) -> None:
    """locust refuses the option before it sends anything."""
    load = bad_day.LoadTest("users", tmp_path, "http://127.0.0.1:1", 1.0, 1.0, ["--no-such-option"])
    with pytest.raises(RuntimeError, match=r"locust ended without figures: .*no-such-option"):
        load.results()
    load.end()


def test_the_page_s_pictures_are_there_and_small() -> None:
    page = (DOCS / "bad_day.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\((\w+\.png)\)", page)
    assert set(bad_day.PICTURES) <= set(shown)
    assert len(shown) == len(set(shown)) >= 5
    for name in shown:
        data = (DOCS / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(data) <= bad_day.MAX_BYTES


def test_the_page_names_alerts_that_there_are() -> None:
    page = (DOCS / "bad_day.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\(runbook\.md#(\w+)\) \|", page, re.M)
    assert len(rows) >= 3
    for name, anchor in rows:
        assert name in ALERTS
        assert anchor == name.lower()
