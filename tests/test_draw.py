"""deploy/monitoring/draw.py: the dashboard drawn from what a Prometheus would answer. No Prometheus, no browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pytest

from deploy.monitoring import dashboard, draw
from deploy.monitoring.draw import Band, DrawError, Line, Range

SVG = "{http://www.w3.org/2000/svg}"
SPAN = Range(1_000.0, 1_060.0, 15.0)
DASHBOARD = dashboard.dashboard()
REPLICAS = ("aa11", "bb22")


class Answers:
    """What a Prometheus says of a server with two replicas: every series is 1, 2, (nothing), NaN, 5."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.is_quiet = False
        """No alert is pending or firing, and no annotation holds."""

    def __call__(self, path: str, parameters: dict[str, Any]) -> Any:
        self.asked.append((path, parameters))
        if path == "label/job/values":
            return ["ragged-serve"]
        if path == "label/model_name/values":
            return ["the-model"]
        assert path == "query_range"
        query = parameters["query"]
        rare = "ALERTS" in query or query.rstrip().endswith("> 0")
        if self.is_quiet and rare:
            return {"result": []}
        values = [[1_000, "1"], [1_015.0, "2"], [1_045, "NaN"], [1_060, "5"]]
        labels = {"alertname": "TooSlow<>", "severity": "warning", "status": "200", "kind": "lost", "part": "wait"}
        labels |= {"finished_reason": "stop"}
        if "firing" in query:
            values = values[1:2]
        return {"result": [{"metric": labels | {"replica": replica}, "values": values} for replica in REPLICAS]}


def drawn(**options: Any) -> tuple[ElementTree.Element, Answers]:
    answers = Answers()
    return ElementTree.fromstring(draw.draw(DASHBOARD, answers, SPAN, **options)), answers


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


def test_every_panel_is_drawn_and_asks_its_own_queries() -> None:
    svg, answers = drawn()
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert len(panels) > 30
    said = texts(svg)
    assert {panel["title"] for panel in panels} <= set(said)
    assert [row["title"] for row in DASHBOARD["panels"] if row["type"] == "row"] == [t for t in said if t in ROWS]
    assert "No data" not in said
    asked = {parameters["query"] for path, parameters in answers.asked if path == "query_range"}
    for panel in panels:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "60s").replace("$job", "ragged-serve")
            expression = expression.replace("$model", "the-model").replace("$replica", ".*")
            expression = expression.replace("$slo_ttft", "1.0").replace("$slo_tpot", "0.1")
            assert expression in asked
    assert not [query for query in asked if "$" in query]
    assert "first token within 1.0 s" in said
    assert "padding aa11" in said


ROWS = draw.rows_of(DASHBOARD)


def test_panels_of_a_row_lie_inside_the_picture_and_beside_each_other() -> None:
    svg, _ = drawn(rows=["The budget", "The batch"])
    width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
    boxes = [rect.attrib for rect in svg.iter(f"{SVG}rect") if rect.get("class") == "panel"]
    assert len(boxes) == len(ROWS["The budget"]) + len(ROWS["The batch"])
    taken: set[tuple[int, int]] = set()
    for box in boxes:
        x, y, w, h = (float(box[key]) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
        cells = {(i, j) for i in range(int(x), int(x + w), 10) for j in range(int(y), int(y + h), 10)}
        assert not cells & taken
        taken |= cells


def test_rows_are_chosen_and_unknown_ones_refused() -> None:
    svg, _ = drawn(rows=["The budget"])
    assert "Free KV blocks" in texts(svg)
    assert "Time to first token" not in texts(svg)
    with pytest.raises(DrawError, match="no row 'The bugdet'; it has Alerts, What clients see"):
        drawn(rows=["The bugdet"])


def test_variables() -> None:
    answers = Answers()
    values = draw.variables(DASHBOARD, answers, SPAN, {"replica": "aa11", "slo_ttft": "0.5"})
    assert values["replica"] == "aa11"
    assert values["slo_ttft"] == "0.5"
    assert values["model"] == "the-model"
    asked = {path: parameters["match[]"] for path, parameters in answers.asked}
    assert asked["label/model_name/values"] == 'vllm:num_requests_running{job="ragged-serve"}', "of this server alone"
    with pytest.raises(DrawError, match="no variable modell"):
        draw.variables(DASHBOARD, answers, SPAN, {"modell": "x"})
    with pytest.raises(DrawError, match=r"\$job: Prometheus has no ragged_serve_router_epoch"):
        draw.variables(DASHBOARD, lambda path, parameters: [], SPAN, {})


def test_a_text_is_filled() -> None:
    assert draw.fill('a{x="$job", y=~"${replica}|$job_2"}', {"job": "1", "replica": "2", "job_2": "3"}) == (
        'a{x="1", y=~"2|3"}'
    )
    with pytest.raises(DrawError, match=r"asks for \$jop, and there are job"):
        draw.fill("$jop", {"job": "1"})
    assert draw.name_of("{{replica}} of {{ part }}{{gone}}", {"replica": "aa", "part": "wait"}) == "aa of wait"


def test_the_window_of_a_rate_is_grafana_s() -> None:
    """The step and a scrape, and never less than four scrapes."""
    for step, window in ((15.0, "60s"), (60.0, "75s")):
        assert draw.variables(DASHBOARD, Answers(), Range(0, 600, step), {})["__rate_interval"] == window
    assert draw.whole_range(0.0, 600.0).step == draw.SCRAPE_SECONDS
    assert draw.whole_range(0.0, 86_400.0).step == 86_400 / draw.MAX_POINTS


def test_what_is_no_number_is_a_hole() -> None:
    lines = draw.lines_of(Answers(), "x", "{{replica}}", SPAN)
    assert lines == [Line(replica, [1.0, 2.0, None, None, 5.0]) for replica in REPLICAS]
    assert [list(run) for run in draw.runs(lines[0].values)] == [[0, 1], [4]]
    assert list(draw.runs([])) == []
    assert list(draw.runs([None])) == []


def test_stacks_add_up_over_holes() -> None:
    lines = [Line("a", [1.0, 2.0, None]), Line("b", [10.0, None, 30.0]), Line("c", [0.5, 0.5, 0.5])]
    assert [line.values for line in draw.stacked(lines)] == [[1.0, 2.0, None], [11.0, None, 30.0], [11.5, 2.5, 30.5]]


def test_a_panel_without_data_says_so_and_one_of_another_type_or_unit_is_refused() -> None:
    panel = next(panel for panel in DASHBOARD["panels"] if panel["type"] == "timeseries")
    assert "No data" in draw.draw_panel(panel, [], SPAN, [], 0.0)
    assert "No data" in draw.draw_panel(panel, [Line("a", [None] * 5)], SPAN, [], 0.0)
    assert "No data" not in draw.draw_panel(panel, [Line("a", [0.0] * 5)], SPAN, [], 0.0)
    with pytest.raises(DrawError, match="is a panel of type gauge; timeseries alone"):
        draw.panel_lines(Answers(), panel | {"type": "gauge"}, {}, SPAN)
    other = panel | {"fieldConfig": {"defaults": {"unit": "furlongs", "custom": {}}}}
    with pytest.raises(DrawError, match="has the unit furlongs; known are s, short"):
        draw.draw_panel(other, [], SPAN, [], 0.0)


@pytest.mark.parametrize(
    ("low", "high", "levels"),
    [
        (0.0, 0.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0.0, 163.0, [0.0, 50.0, 100.0, 150.0, 200.0]),
        (-2.0, 160.0, [-50.0, 0.0, 50.0, 100.0, 150.0, 200.0]),
        (-3.0, 0.0, [-3.0, -2.0, -1.0, 0.0]),
    ],
)
def test_scales_have_round_levels(low: float, high: float, levels: list[float]) -> None:
    found = draw.levels_of(low, high)
    assert [round(level, 9) for level in found][: len(levels)] == levels
    assert found[0] <= low
    assert found[-1] >= high


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("s", 0.0, "0 s"),
        ("s", 0.0123, "12.3 ms"),
        ("s", 90.0, "1.5 min"),
        ("s", 7200.0, "2 h"),
        ("percentunit", 0.125, "12.5 %"),
        ("short", 1500.0, "1.5 K"),
        ("short", -2.0, "-2"),
        ("ops", 2.5, "2.5/s"),
        ("reqps", 2_000_000.0, "2 Mil req/s"),
    ],
)
def test_units(unit: str, value: float, text: str) -> None:
    assert draw.UNITS[unit](value) == text


def test_alerts_and_marks_are_drawn() -> None:
    """Of one pending all the time and firing at the second look; names are no markup."""
    found = draw.alerts(Answers(), SPAN)
    assert found == [draw.Alert("TooSlow<>", "warning", ["pending", "firing", None, None, "pending"])]
    assert found[0].since("firing", SPAN) == 1_015.0
    assert found[0].since("gone", SPAN) is None
    bands = [Band(1_010, 1_040, "the flood"), Band(1_050, 1_050, "a kill")]
    svg, _ = drawn(rows=[draw.ALERTS], bands=bands)
    assert "TooSlow<>" in texts(svg)
    head = texts(svg)[0]
    assert all(told in head for told in ("shaded: the flood", "line: a kill", "dashed: Streams lost a replica"))
    kinds = [element.get("class") for element in svg.iter()]
    assert {"shaded", "line", "dashed"} <= set(kinds)
    quiet = Answers()
    quiet.is_quiet = True
    assert "None." in texts(ElementTree.fromstring(draw.draw(DASHBOARD, quiet, SPAN, rows=[draw.ALERTS])))


class Canned(BaseHTTPRequestHandler):
    answers: Answers

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        parameters = {name: values[0] for name, values in parse_qs(parts.query).items()}
        is_good = "broken" not in parts.path
        if "page" in parts.path:
            body = b"<html>"
        elif is_good:
            data = self.answers(parts.path.removeprefix("/api/v1/"), parameters)
            body = json.dumps({"status": "success", "data": data}).encode()
        else:
            body = b'{"status":"error","error":"parse error"}'
        self.send_response(200 if is_good else 400)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def prometheus() -> Iterator[str]:
    Canned.answers = Answers()
    with ThreadingHTTPServer(("127.0.0.1", 0), Canned) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_command_writes_a_file(prometheus: str, tmp_path: Any) -> None:
    file = tmp_path / "budget.svg"
    asked = ["--prometheus", prometheus, "--minutes", "1", "--until", "1060", "--rows", "Alerts, The budget"]
    draw.main([*asked, "--set", "replica=aa11", str(file)])
    said = texts(ElementTree.fromstring(file.read_text(encoding="utf-8")))
    assert {"Alerts", "The budget", "Queue"} <= set(said)
    assert any(re.search(r"replica: aa11", text) for text in said)
    queries = [str(parameters.get("query")) for _, parameters in Canned.answers.asked]
    assert any('replica=~"aa11"' in query for query in queries)


def test_the_command_says_what_is_wrong(prometheus: str, tmp_path: Any) -> None:
    with pytest.raises(SystemExit, match=r"Prometheus says 400: .*parse error"):
        draw.main(["--prometheus", f"{prometheus}/broken", str(tmp_path / "a.svg")])
    with pytest.raises(SystemExit, match="no row 'Nothing'"):
        draw.main(["--prometheus", prometheus, "--rows", "Nothing", str(tmp_path / "a.svg")])
    with pytest.raises(SystemExit, match=r"no answer from Prometheus at http://127\.0\.0\.1:1"):
        draw.main(["--prometheus", "http://127.0.0.1:1", str(tmp_path / "a.svg")])
    with pytest.raises(SystemExit, match="page does not answer as Prometheus does"):
        draw.main(["--prometheus", f"{prometheus}/page", str(tmp_path / "a.svg")])
    assert not list(tmp_path.iterdir())
