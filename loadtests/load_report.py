"""The report of a load test: one HTML file with its figures and pictures, which loads nothing from anywhere.

Pictures are inline SVG. Knows the tally (`load_stats`) and what kills a run had; no socket, no locust.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from loadtests.load_stats import METRICS, Histogram, Second, Tally, table

Json = dict[str, Any]
Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 640, 190
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 30
MAX_BINS = 160
"""Columns of a picture over time: a longer run has several seconds in each."""
COLOURS = ("#3b7dd8", "#d9822b", "#2e9e5b", "#c23b4a", "#8a63c9")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
:root { color-scheme: light dark; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
pre { overflow-x: auto; line-height: 1.35; } .figures { display: grid; gap: 0 2rem; }
@media (min-width: 62rem) { .figures { grid-template-columns: 1fr 1fr; } }
svg { width: 100%; height: auto; } text { font: 11px system-ui, sans-serif; fill: currentColor; }
.grid { stroke: currentColor; opacity: .15; } .mark { stroke: #c23b4a; stroke-dasharray: 3 3; }
.verdict { padding: .5rem .8rem; border-left: 5px solid #2e9e5b; } .verdict.bad { border-color: #c23b4a; }
.verdict.warning { border-color: #d9822b; }
"""


@dataclass(frozen=True)
class Line:
    name: str
    points: Points


def report(tally: Tally, results: Json, *, title: str, options: Json, wrong: Sequence[str]) -> str:
    """The whole page. ``results``: the tally's, and `kills` beside them where there were any: [{"at": seconds, ...}]."""
    marks = [float(kill["at"]) for kill in results.get("kills", ())]
    step, bins = binned(tally)

    def over_time(name: str, value: Callable[[Second], float]) -> Line:
        return Line(name, [(at, value(second)) for at, second in bins])

    counts = [("due", "due"), ("good", "good"), ("refused", "refused"), ("failed", "failed"), ("lost", "lost")]
    rates = [
        over_time(name, lambda second, key=key: getattr(second, key) / step)  # type: ignore[misc]
        for name, key in counts
        if name in ("due", "good") or any(getattr(second, key) for _, second in bins)
    ]
    waits = [(at, second) for at, second in bins if second.ttft.num]
    streams = Line("open streams", highest(tally.open_streams()))
    limits = tally.slo.limits
    pictures = [
        figure("Requests a second, when due and when they ended", chart(rates, x="seconds", marks=marks)),
        figure(
            "Output tokens a second",
            chart([over_time("tokens/s", lambda s: s.tokens / step)], x="seconds", marks=marks),
        ),
        figure(
            "Time to first token by the second in which a request was due, ms",
            chart(
                [
                    Line("p50", [(at, s.ttft.percentile(50) * 1000) for at, s in waits]),
                    Line("p99", [(at, s.ttft.percentile(99) * 1000) for at, s in waits]),
                ],
                x="seconds",
                marks=marks,
                level=limits.get("ttft"),
            ),
        ),
        figure("Streams open at a time", chart([streams], x="seconds", marks=marks)),
        figure(
            "Longest gap in any stream, ms",
            chart([over_time("gap", lambda s: s.gap * 1000)], x="seconds", marks=marks, level=limits.get("itl")),
        ),
    ]
    for key, name, words in METRICS:
        line = Line(name, distribution(tally.histograms[key]))
        slo = [limits[key]] if key in limits else []
        pictures.append(
            figure(f"{words}: share of the values below, by ms", chart([line], x="ms", marks=slo, is_log=True))
        )
    said = [f'<p class="verdict bad">{escape(text)}</p>' for text in wrong]
    said = said or ['<p class="verdict">Passed: nothing was lost, and every SLO that was given was kept.</p>']
    said += [f'<p class="verdict warning">{escape(text)}</p>' for text in tally.warnings()]
    kills = "".join(
        f"<li>{kill['at']:.1f} s: {escape(str(kill.get('replica', '')))}</li>" for kill in results.get("kills", ())
    )
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
            *said,
            f"<pre>{escape(chr(10).join(table(results)))}</pre>",
            f'<div class="figures">{"".join(pictures)}</div>',
            f"<h2>Replicas killed (dashed lines)</h2><ul>{kills}</ul>" if kills else "",
            f"<h2>Asked for</h2><pre>{escape(json.dumps(options, indent=1))}</pre>",
            f"<h2>All figures</h2><pre>{escape(json.dumps(results, indent=1))}</pre>",
            "</body></html>",
        ]
    )


def binned(tally: Tally) -> tuple[int, list[tuple[float, Second]]]:
    """(seconds in a bin, [(begin, what was in it), ...]), without holes, at most `MAX_BINS`."""
    last = max(tally.seconds, default=0)
    step = max(1, math.ceil((last + 1) / MAX_BINS))
    bins = [Second() for _ in range(last // step + 1)]
    for at, second in tally.seconds.items():
        bins[at // step].merge(second)
    return step, [(float(i * step), second) for i, second in enumerate(bins)]


def highest(levels: Sequence[tuple[float, int]]) -> list[tuple[float, float]]:
    """Of a level that changes at these times: the highest in each of at most `MAX_BINS` parts of the time."""
    width = (levels[-1][0] / MAX_BINS if levels else 0.0) or 1.0
    found: dict[int, int] = {}
    now = at = 0
    for time, num in levels:
        for part in range(at, int(time / width) + 1):
            found[part] = max(found.get(part, 0), now)
        at, now = int(time / width), num
        found[at] = max(found[at], now)
    return [(part * width, float(num)) for part, num in sorted(found.items())]


def distribution(histogram: Histogram) -> list[tuple[float, float]]:
    """(milliseconds, share at most that), thinned to what a picture shows."""
    shares = histogram.shares() if histogram.num else []
    kept, last = [], -1.0
    for value, share in shares:
        if share - last >= 0.004 or share == 1.0:
            kept.append((value * 1000, share))
            last = share
    return kept


def figure(title: str, picture: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{picture}</section>"


# ------------------------------------------------------------------------------------------------------------ pictures


def chart(
    lines: Iterable[Line],
    *,
    x: str,
    marks: Sequence[float] = (),
    level: float | None = None,
    is_log: bool = False,
) -> str:
    """Lines over x and y from 0. ``marks``: dashed verticals at these x. ``level``: a dashed horizontal. ``is_log``: x is
    logarithmic, and y ends at 1."""
    lines = [line for line in lines if line.points]
    if not lines:
        return "<p>no values</p>"
    xs = [px for line in lines for px, _ in line.points] + list(marks)
    ys = [py for line in lines for _, py in line.points] + ([level] if level is not None else [])
    low = max(min(xs), 1e-3) if is_log else 0.0
    high = max(max(xs), low * 1.1 if is_log else 1.0)
    top = 1.0 if is_log else max(nice(max(ys)), 1e-9)

    def px(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low) if is_log else (value - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        return HEIGHT - BOTTOM - min(value / top, 1.0) * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for i in range(5):
        value = top * i / 4
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(value):.1f}" y2="{py(value):.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{py(value) + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in ticks(low, high, is_log):
        out.append(f'<line class="grid" x1="{px(value):.1f}" x2="{px(value):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(f'<text x="{px(value):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{short(value)}</text>')
    out.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x)}</text>')
    dashed = [(px(value), px(value), TOP, HEIGHT - BOTTOM) for value in marks]
    if level is not None:
        dashed.append((LEFT, WIDTH - RIGHT, py(level), py(level)))
    out += [f'<line class="mark" x1="{a:.1f}" x2="{b:.1f}" y1="{c:.1f}" y2="{d:.1f}"/>' for a, b, c, d in dashed]
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{px(ax):.1f},{py(ay):.1f}" for ax, ay in line.points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        at = LEFT + 8 + number * 84
        out.append(f'<rect x="{at}" y="{HEIGHT - 12}" width="9" height="9" fill="{colour}"/>')
        out.append(f'<text x="{at + 13}" y="{HEIGHT - 3}">{escape(line.name)}</text>')
    return "".join([*out, "</svg>"])


def nice(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 10) if step * power >= value * 0.999999)


def ticks(low: float, high: float, is_log: bool) -> list[float]:
    if is_log:
        found = [
            step * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for step in (1, 2, 5)
        ]
        found = [value for value in found if low <= value <= high]
        return found[:: max(1, math.ceil(len(found) / 9))]
    step = nice((high - low) / 6)
    return [low + i * step for i in range(int((high - low) / step) + 1)]


def short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:.0f}k"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
