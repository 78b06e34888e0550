"""Draws dashboard.json without Grafana: its panels, their own queries, asked of Prometheus' HTTP API, as one SVG.

    python deploy/monitoring/draw.py --minutes 20 all.svg
    python deploy/monitoring/draw.py --rows "The budget" --set replica=abcd1234 --prometheus http://host:9090 budget.svg

Knows what Grafana makes of such a file: variables, $__rate_interval, legends, units, stacks, annotations, the grid. It is
not Grafana's own drawing: every axis begins at 0 (or below), colours are others, and nothing moves. Above the dashboard's
rows stands one that is not in the file: which alerts were pending and firing. Needs the standard library alone; knows no
server.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

Json = dict[str, Any]
Ask = Callable[[str, Json], Any]
"""(path below /api/v1/, parameters) -> `data` of Prometheus' answer."""

FILE = Path(__file__).with_name("dashboard.json")
ALERTS = "Alerts"
"""The row that is not in the file."""
SCRAPE_SECONDS = 15.0
"""Grafana's own default for a Prometheus that it was told nothing of: queries' shortest step, a quarter of their window."""
MAX_POINTS = 240

WIDTH = 1200
COLUMN, ROW = WIDTH / 24, 26
"""Pixels of one unit of the grid."""
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 26, 36
GAP = 6
BAR = 18
COLOURS = ("#3b7dd8", "#d9822b", "#2e9e5b", "#c23b4a", "#8a63c9", "#1f9ea8", "#9a7b1f", "#c75fa6")
SEVERITIES = {"critical": "#c23b4a", "warning": "#d9822b"}
LETTER = 5.6
"""Pixels, about, of one letter at the size of a legend."""


class DrawError(Exception):
    """What cannot be drawn, and why: a panel of an unknown type, a variable without values, a Prometheus that refuses."""


class Range(NamedTuple):
    """Unix seconds."""

    start: float
    end: float
    step: float

    @property
    def times(self) -> list[float]:
        return [self.start + i * self.step for i in range(int((self.end - self.start) / self.step + 1e-6) + 1)]


class Line(NamedTuple):
    name: str
    values: list[float | None]
    """One for each of the range's times; None: there was none, or none that is a number."""


class Band(NamedTuple):
    """A part of the time, shaded in every panel. ``end`` is ``start``: a moment, a line."""

    start: float
    end: float
    text: str
    is_annotation: bool = False
    """Of the dashboard; else the caller's."""

    @property
    def kind(self) -> str:
        return "shaded" if self.end > self.start else "dashed" if self.is_annotation else "line"


# ---- what is asked ---------------------------------------------------------------------------------------------------


def prometheus(url: str) -> Ask:
    """Of a Prometheus at ``url``. What it refuses, and where there is none, is a DrawError."""

    def ask(path: str, parameters: Json) -> Any:
        full = f"{url.rstrip('/')}/api/v1/{path}?{urllib.parse.urlencode(parameters, doseq=True)}"
        try:
            with urllib.request.urlopen(full, timeout=60) as answer:
                said = json.load(answer)
        except urllib.error.HTTPError as error:
            raise DrawError(f"Prometheus says {error.code}: {error.read()[:300].decode(errors='replace')}") from error
        except OSError as error:
            raise DrawError(f"no answer from Prometheus at {url}: {error}") from error
        except ValueError as error:
            raise DrawError(f"{url} does not answer as Prometheus does: {error}") from error
        return said["data"]

    return ask


def fill(text: str, values: dict[str, str]) -> str:
    """``$name`` and ``${name}`` replaced."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in values:
            raise DrawError(f"{text!r} asks for ${name}, and there are {', '.join(sorted(values))}")
        return values[name]

    return re.sub(r"\$(?:{(\w+)}|(\w+))", value, text)


def variables(dashboard: Json, ask: Ask, span: Range, given: dict[str, str]) -> dict[str, str]:
    """Name -> value: those given, else as Grafana begins: all replicas, the chosen limit, the first server found."""
    values = {"__rate_interval": f"{max(span.step + SCRAPE_SECONDS, 4 * SCRAPE_SECONDS):.0f}s"}
    declared = dashboard["templating"]["list"]
    if unknown := set(given) - {variable["name"] for variable in declared}:
        raise DrawError(f"the dashboard has no variable {', '.join(sorted(unknown))}")
    for variable in declared:
        name, kind = variable["name"], variable["type"]
        if name in given:
            values[name] = given[name]
        elif kind == "datasource":
            continue
        elif variable.get("includeAll"):
            values[name] = variable["allValue"]
        elif kind == "custom":
            values[name] = variable["current"]["value"]
        elif kind == "query" and (asked := re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])):
            series = fill(asked[1], values)
            found = ask(f"label/{asked[2]}/values", {"match[]": series, "start": span.start, "end": span.end})
            if not found:
                raise DrawError(f"${name}: Prometheus has no {series} in this time")
            values[name] = sorted(found)[0]
        else:
            raise DrawError(f"${name}: a variable of type {kind} with the query {variable.get('query')!r} is not known")
    return values


def lines_of(ask: Ask, expression: str, legend: str, span: Range) -> list[Line]:
    """The series of an expression over the time, in the order of their legends."""
    answer = ask("query_range", {"query": expression, "start": span.start, "end": span.end, "step": span.step})
    times = {round(at, 3): i for i, at in enumerate(span.times)}
    lines = []
    for series in answer["result"]:
        values: list[float | None] = [None] * len(times)
        for at, text in series["values"]:
            value = float(text)
            if (i := times.get(round(float(at), 3))) is not None and math.isfinite(value):
                values[i] = value
        lines.append(Line(name_of(legend, series["metric"]), values))
    return sorted(lines, key=lambda line: line.name)


def name_of(legend: str, labels: dict[str, str]) -> str:
    """``{{label}}`` replaced; a label that is not there is empty."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match[1], ""), legend)


def panel_lines(ask: Ask, panel: Json, values: dict[str, str], span: Range) -> list[Line]:
    """Of all its targets. Raises DrawError for a type of panel that is not known."""
    if panel["type"] != "timeseries":
        raise DrawError(f"{panel['title']!r} is a panel of type {panel['type']}; timeseries alone can be drawn")
    return [
        line
        for target in panel["targets"]
        for line in lines_of(ask, fill(target["expr"], values), fill(target["legendFormat"], values), span)
    ]


def moments(ask: Ask, annotation: Json, values: dict[str, str], span: Range) -> list[Band]:
    """Where an annotation begins to hold."""
    found = []
    for line in lines_of(ask, fill(annotation["expr"], values), annotation["name"], span):
        for i, at in enumerate(span.times):
            if line.values[i] is not None and (i == 0 or line.values[i - 1] is None):
                found.append(Band(at, at, annotation["name"], is_annotation=True))
    return found


class Alert(NamedTuple):
    name: str
    severity: str
    states: list[str | None]
    """firing, pending or None, for each of the range's times."""

    def since(self, state: str, span: Range) -> float | None:
        """When it first was so."""
        return next((at for at, now in zip(span.times, self.states, strict=True) if now == state), None)


def alerts(ask: Ask, span: Range) -> list[Alert]:
    """All that were pending or firing, in the order in which they first were; of several series of one, the worst."""
    found: dict[tuple[str, str], list[str | None]] = {}
    for state in ("pending", "firing"):
        query = f'max by (alertname, severity) (ALERTS{{alertstate="{state}"}})'
        for line in lines_of(ask, query, "{{alertname}} {{severity}}", span):
            name, _, severity = line.name.partition(" ")
            states = found.setdefault((name, severity), [None] * len(line.values))
            for i, value in enumerate(line.values):
                states[i] = state if value is not None else states[i]
    made = [Alert(name, severity, states) for (name, severity), states in found.items()]
    return sorted(made, key=lambda alert: next(i for i, state in enumerate(alert.states) if state))


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def seconds_text(value: float) -> str:
    for size, unit in ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {unit}"
    return "0 s"


def short_text(value: float) -> str:
    for size, unit in ((1e9, " Bil"), (1e6, " Mil"), (1e3, " K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


UNITS: dict[str, Callable[[float], str]] = {
    "s": seconds_text,
    "short": short_text,
    "percentunit": lambda value: f"{100 * value:.3g} %",
    "ops": lambda value: f"{short_text(value)}/s",
    "reqps": lambda value: f"{short_text(value)} req/s",
}
"""Of Grafana's units, those that the dashboard has."""


def nice(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 10) if step * power >= value * 0.999999)


def levels_of(low: float, high: float) -> list[float]:
    """Round values from ``low`` (0 or less) to ``high`` (0 or more) or just beyond: the lines of a scale."""
    high = high if high > low else 1.0
    step = nice((high - low) / 4)
    return [step * i for i in range(math.floor(low / step + 1e-9), max(1, math.ceil(high / step - 1e-9)) + 1)]


def stacked(lines: Sequence[Line]) -> list[Line]:
    """Each upon the sum of those before it; where there is none of one, it adds nothing."""
    below = [0.0] * max((len(line.values) for line in lines), default=0)
    made = []
    for line in lines:
        below = [b + (value or 0.0) for b, value in zip(below, line.values, strict=True)]
        made.append(
            Line(line.name, [None if v is None else b for b, v in zip(below, line.values, strict=True)]),
        )
    return made


def runs(values: Sequence[float | None]) -> Iterable[range]:
    """The half-open ranges without a hole."""
    begin = 0
    for i in range(len(values) + 1):
        if i == len(values) or values[i] is None:
            if i > begin:
                yield range(begin, i)
            begin = i + 1


class Frame:
    """A panel's place in the picture, and where its values lie in it."""

    def __init__(self, x: float, y: float, width: float, height: float, span: Range, levels: Sequence[float]) -> None:
        self.x, self.y, self.width, self.height = x, y, width, height
        self.left, self.right = x + LEFT, x + width - RIGHT
        self.top, self.bottom = y + TOP, y + height - BOTTOM
        self.span, self.levels, self.low, self.high = span, levels, levels[0], levels[-1]

    def px(self, at: float) -> float:
        share = (at - self.span.start) / max(self.span.end - self.span.start, 1e-9)
        return self.left + min(1.0, max(0.0, share)) * (self.right - self.left)

    def py(self, value: float) -> float:
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def head(self, title: str) -> str:
        box = f'<rect class="panel" x="{self.x:.0f}" y="{self.y:.0f}" width="{self.width:.0f}" height="{self.height:.0f}"/>'
        return f'{box}<text class="title" x="{self.x + 10:.0f}" y="{self.y + 17:.0f}">{escape(title)}</text>'

    def shade(self, bands: Sequence[Band]) -> str:
        out = []
        for band in bands:
            begin, end = self.px(band.start), self.px(band.end)
            if band.end > band.start:
                size = f'width="{end - begin:.1f}" height="{self.bottom - self.top:.1f}"'
                out.append(f'<rect class="shaded" x="{begin:.1f}" y="{self.top:.1f}" {size}/>')
            else:
                out.append(
                    f'<line class="{band.kind}" x1="{begin:.1f}" x2="{begin:.1f}" y1="{self.top}" y2="{self.bottom}"/>'
                )
        return "".join(out)

    def hours(self) -> str:
        """The times below it: local, at round minutes."""
        length = self.span.end - self.span.start
        step = next((s for s in (15, 30, 60, 120, 300, 600, 1800, 3600, 10800, 43200) if length / s <= 6), 86400)
        out = []
        at = math.ceil(self.span.start / step) * step
        while at <= self.span.end:
            text = time.strftime("%H:%M:%S" if step < 60 else "%H:%M", time.localtime(at))
            x = self.px(at)
            out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top:.1f}" y2="{self.bottom:.1f}"/>')
            out.append(f'<text x="{x:.1f}" y="{self.bottom + 13:.1f}" text-anchor="middle">{text}</text>')
            at += step
        return "".join(out)

    def scale(self, unit: str) -> str:
        out = []
        for value in self.levels:
            y = self.py(value)
            out.append(f'<line class="grid" x1="{self.left:.1f}" x2="{self.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text x="{self.left - 5:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{UNITS[unit](value)}</text>')
        return "".join(out)

    def legend(self, lines: Sequence[Line]) -> str:
        """One line: those that are not 0 all the time first. What does not fit is counted."""
        out, at = [], self.left - 40
        ordered = sorted(enumerate(lines), key=lambda one: not any(one[1].values))
        for place, (number, (name, _)) in enumerate(ordered):
            width = 16 + LETTER * len(name) + 8
            if at + width > self.right - (40 if place + 1 < len(lines) else 0):
                out.append(f'<text x="{at:.1f}" y="{self.y + self.height - 7:.1f}">+ {len(lines) - place}</text>')
                break
            y = self.y + self.height - 14
            colour = COLOURS[number % len(COLOURS)]
            out.append(f'<rect x="{at:.1f}" y="{y:.1f}" width="10" height="4" fill="{colour}"/>')
            out.append(f'<text x="{at + 14:.1f}" y="{y + 7:.1f}">{escape(name)}</text>')
            at += width
        return "".join(out)


def draw_panel(panel: Json, lines: Sequence[Line], span: Range, bands: Sequence[Band], y: float) -> str:
    """``y``: where row 0 of the grid begins."""
    place, defaults = panel["gridPos"], panel["fieldConfig"]["defaults"]
    if defaults["unit"] not in UNITS:
        raise DrawError(f"{panel['title']!r} has the unit {defaults['unit']}; known are {', '.join(UNITS)}")
    custom = defaults["custom"]
    is_stacked = custom.get("stacking", {}).get("mode") == "normal"
    shown = stacked(lines) if is_stacked else list(lines)
    known = [value for line in shown for value in line.values if value is not None]
    levels = levels_of(min([0.0, *known]), max([0.0, *known]))
    frame = Frame(
        place["x"] * COLUMN + GAP / 2,
        y + place["y"] * ROW + GAP / 2,
        place["w"] * COLUMN - GAP,
        place["h"] * ROW - GAP,
        span,
        levels,
    )
    out = [frame.head(panel["title"]), frame.shade(bands), frame.scale(defaults["unit"]), frame.hours()]
    if not known:
        middle = (frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2
        return "".join([*out, f'<text x="{middle[0]:.0f}" y="{middle[1]:.0f}" text-anchor="middle">No data</text>'])
    times = span.times
    opacity = custom.get("fillOpacity", 0) / 100
    for number, line in reversed(list(enumerate(shown))):
        colour = COLOURS[number % len(COLOURS)]
        under = shown[number - 1].values if is_stacked and number else None
        for run in runs(line.values):
            points = [f"{frame.px(times[i]):.1f},{frame.py(line.values[i] or 0.0):.1f}" for i in run]
            floor = [(times[i], (under[i] if under else None) or 0.0) for i in reversed(run)]
            base = [f"{frame.px(at):.1f},{frame.py(value):.1f}" for at, value in floor]
            out.append(f'<polygon points="{" ".join(points + base)}" fill="{colour}" fill-opacity="{opacity:g}"/>')
            if len(points) == 1:
                px, py = points[0].split(",")
                out.append(f'<circle cx="{px}" cy="{py}" r="1.5" fill="{colour}"/>')
            out.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return "".join([*out, frame.legend(lines)])


def draw_alerts(found: Sequence[Alert], span: Range, bands: Sequence[Band], y: float) -> tuple[str, float]:
    """A bar for each alert: outlined while it is pending, full while it fires. And the height of it all."""
    names = 230
    height = TOP + BOTTOM + max(1, len(found)) * BAR
    frame = Frame(GAP / 2, y + GAP / 2, WIDTH - GAP, height - GAP, span, (0.0, 1.0))
    frame.left = frame.x + names
    out = [frame.head("Pending (pale) and firing"), frame.shade(bands), frame.hours()]
    if not found:
        out.append(f'<text x="{frame.left + 8:.0f}" y="{frame.top + 14:.0f}">None.</text>')
    for number, alert in enumerate(found):
        top = frame.top + number * BAR
        out.append(f'<text x="{frame.left - 8:.0f}" y="{top + 13:.1f}" text-anchor="end">{escape(alert.name)}</text>')
        colour = SEVERITIES.get(alert.severity, "#777777")
        for state, opacity in (("pending", 0.25), ("firing", 1.0)):
            for run in runs([1.0 if now == state else None for now in alert.states]):
                begin, end = frame.px(span.times[run[0]]), frame.px(span.times[run[-1]] + span.step)
                size = f'width="{max(2.0, end - begin):.1f}" height="{BAR - 6}"'
                out.append(
                    f'<rect x="{begin:.1f}" y="{top + 3:.1f}" {size} fill="{colour}" fill-opacity="{opacity:g}"/>'
                )
    keys = [("critical", SEVERITIES["critical"]), ("warning", SEVERITIES["warning"])]
    for number, (text, colour) in enumerate(keys):
        at = frame.left + number * 80
        out.append(f'<rect x="{at:.0f}" y="{y + height - 18:.0f}" width="10" height="8" fill="{colour}"/>')
        out.append(f'<text x="{at + 14:.0f}" y="{y + height - 11:.0f}">{text}</text>')
    return "".join(out), height


STYLE = """
svg { background: #f4f5f7; } text { font: 10.5px system-ui, 'DejaVu Sans', sans-serif; fill: #333; }
.title { font-weight: 600; font-size: 12px; } .row { font-weight: 600; font-size: 14px; }
.panel { fill: #fff; stroke: #dcdfe4; } .grid { stroke: #000; stroke-opacity: .1; }
.shaded { fill: #d9822b; fill-opacity: .1; } .line { stroke: #c23b4a; } .dashed { stroke: #c23b4a; stroke-dasharray: 3 3; }
"""


def rows_of(dashboard: Json) -> dict[str, list[Json]]:
    """Title of a row -> its panels, as they stand in the file."""
    found: dict[str, list[Json]] = {}
    title = dashboard["title"]
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            title = panel["title"]
            found[title] = list(panel["panels"])
        else:
            found.setdefault(title, []).append(panel)
    return found


def draw(
    dashboard: Json,
    ask: Ask,
    span: Range,
    *,
    rows: Sequence[str] = (),
    given: dict[str, str] | None = None,
    bands: Sequence[Band] = (),
) -> str:
    """An SVG of the rows with these titles (none: of all, the alerts first). Raises DrawError."""
    there = rows_of(dashboard)
    for title in rows:
        if title not in there and title != ALERTS:
            raise DrawError(f"the dashboard has no row {title!r}; it has {', '.join([ALERTS, *there])}")
    values = variables(dashboard, ask, span, given or {})
    seen = [m for annotation in dashboard["annotations"]["list"] for m in moments(ask, annotation, values, span)]
    marks = [*bands, *seen]
    begin, end = (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) for at in (span.start, span.end))
    told = [f"{begin} to {end[11:]}", *(f"{name}: {value}" for name, value in values.items() if name[:2] != "__")]
    told += sorted({f"{band.kind}: {band.text}" for band in marks})
    out = [f'<text x="6" y="16">{escape("   ·   ".join(told))}</text>']
    y = 24.0
    for title in rows or [ALERTS, *there]:
        out.append(f'<text class="row" x="6" y="{y + 16:.0f}">{escape(title)}</text>')
        y += 22
        if title == ALERTS:
            drawn, height = draw_alerts(alerts(ask, span), span, marks, y)
            out.append(drawn)
            y += height
            continue
        panels = there[title]
        top = min(panel["gridPos"]["y"] for panel in panels)
        corner = y - top * ROW
        out += [draw_panel(p, panel_lines(ask, p, values, span), span, marks, corner) for p in panels]
        y += max(panel["gridPos"]["y"] + panel["gridPos"]["h"] - top for panel in panels) * ROW
    y += 4
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y:.0f}" viewBox="0 0 {WIDTH} {y:.0f}">'
    return "".join([head, f"<style>{STYLE}</style>", *out, "</svg>\n"])


def whole_range(start: float, end: float) -> Range:
    """With Grafana's step: as many points as fit, none closer than a scrape."""
    step = math.ceil(max(SCRAPE_SECONDS, (end - start) / MAX_POINTS))
    return Range(math.floor(start), math.floor(end), float(step))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="the SVG to write")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address")
    parser.add_argument("--minutes", type=float, default=30.0, help="how much, up to --until")
    parser.add_argument("--until", type=float, help="Unix seconds; by default now")
    parser.add_argument("--rows", default="", help=f"titles, with commas between them; {ALERTS} is one. By default all")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the dashboard")
    options = parser.parse_args(arguments)
    end = options.until or time.time()
    given = dict(text.partition("=")[::2] for text in options.set)
    rows = [title.strip() for title in options.rows.split(",") if title.strip()]
    span = whole_range(end - 60 * options.minutes, end)
    try:
        dashboard = json.loads(FILE.read_text(encoding="utf-8"))
        options.file.write_text(
            draw(dashboard, prometheus(options.prometheus), span, rows=rows, given=given), encoding="utf-8"
        )
    except (DrawError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
