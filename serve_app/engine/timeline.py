"""Timeline: pictures of who did what in each step, and of the mask of a ragged step. As text and as SVG.

    python -m serve_app.engine.timeline [--policy POLICY] [--mask] [--svg FILE]

Everything is a pure function of step records: records -> `Chart` -> text or SVG, record -> `Mask` -> text or SVG. The
records of the worked example come from the real scheduler and from the baselines, on a runner whose every step takes
one unit of time. Knows no request but by its id.
"""

from __future__ import annotations

import argparse
import enum
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from serve_app.engine.baselines import POLICIES, padded_request_id, policy_engine
from serve_app.engine.config import EngineConfig
from serve_app.engine.request import GenerateRequest, SamplingParams
from serve_app.engine.simulated_runner import SimulatedRunner, VirtualClock
from serve_app.engine.step_record import StepRecord

TITLES = {
    "static": "Static batching",
    "dynamic": "Dynamic batching with padding",
    "continuous": "Continuous batching",
}
NOTE = (
    "The note that this example comes from lets the first token come one unit after the prefill, and holds R2 and R3"
    " back until R1's prefill is over. This engine is earlier: the last unit of a prefill samples the first token, and"
    " R2 and R3 fill what R1's last unit leaves of the token budget. (A padded batch has a unit of budget for each of its"
    " three rows, so that a unit of time is the same in all three charts.)"
)


# ---- the worked example ----------------------------------------------------------------------------------------------


class Arrival(NamedTuple):
    name: str
    time: float
    num_prompt_tokens: int
    num_output_tokens: int


UNIT = 12
"""Tokens that one sequence can prefill in one unit of time."""

EXAMPLE = (
    Arrival("R1", 0.0, UNIT + 4, 4),
    Arrival("R2", 0.0, 4, 2),
    Arrival("R3", 0.0, 4, 1),
    Arrival("R4", 3.0, 4, 2),
)
"""R1 prefills for 2 units and has 4 tokens of output; R2 1 and 2; R3 1 and 1; R4, which comes at t = 3, 1 and 2."""

NUM_SLOTS = 3


def worked_example(policy: str) -> list[StepRecord]:
    """The steps of EXAMPLE in three slots under one of POLICIES; a step takes one unit of time.

    Continuous batching has a token budget of one UNIT per step. A padded batch computes all its rows at once, so the
    baselines get one UNIT for each of three rows, three times as much: a unit is a unit in each picture.
    """
    budget = UNIT if policy == "continuous" else NUM_SLOTS * UNIT
    config = EngineConfig(block_size=4, max_num_seqs=2 * NUM_SLOTS, max_num_batched_tokens=budget)
    clock = VirtualClock()
    runner = SimulatedRunner(num_kv_blocks=64, block_size=4, seconds_per_step=1.0, sleep=clock.sleep)
    engine = policy_engine(policy, config, runner, clock, max_num_rows=NUM_SLOTS, max_row_tokens=UNIT)
    coming = list(EXAMPLE)
    while coming or engine.has_work:
        if not engine.has_work:
            clock.now = max(clock.now, coming[0].time)
        while coming and coming[0].time <= clock.now:
            engine.add(_request(coming.pop(0)))
        engine.step()
    return list(engine.recorder.records)


def mixed_step() -> StepRecord:
    """A step with a decode (A), the rest of a prompt (B) and the beginning of another (C)."""
    config = EngineConfig(block_size=4, max_num_seqs=3, max_num_batched_tokens=8)
    engine = policy_engine("continuous", config, SimulatedRunner(num_kv_blocks=64, block_size=4), max_num_rows=3)
    for arrival in (Arrival("A", 0.0, 5, 2), Arrival("B", 0.0, 7, 1), Arrival("C", 0.0, 6, 1)):
        engine.add(_request(arrival))
    engine.step()
    engine.step()
    return engine.recorder.records[-1]


def _request(arrival: Arrival) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=arrival.num_output_tokens, ignore_eos=True, seed=0).resolved()
    first = 100 * ord(arrival.name[-1])  # no two prompts begin alike: nothing comes from the prefix cache
    return GenerateRequest(arrival.name, tuple(range(first, first + arrival.num_prompt_tokens)), sampling)


# ---- records -> chart ------------------------------------------------------------------------------------------------


class Work(enum.Enum):
    """What a slot does in a step; the value is its letter."""

    PREFILL = "p"
    FIRST_TOKEN = "P"
    """A prefill that ends, and samples the first token."""
    DECODE = "d"
    PAD = "x"
    IDLE = "."


WORDS = {
    Work.PREFILL: "prefill",
    Work.FIRST_TOKEN: "last prefill: first token",
    Work.DECODE: "decode",
    Work.PAD: "padding: computed, dropped",
    Work.IDLE: "idle",
}


class Cell(NamedTuple):
    request: str
    """Id of the request (with #choice, if it is not the first); empty if idle."""
    work: Work


IDLE = Cell("", Work.IDLE)


@dataclass(frozen=True)
class Chart:
    title: str
    slots: list[list[Cell]]
    """One list per slot, one cell per step."""
    num_tokens: int
    num_padded_tokens: int
    first_tokens: dict[str, int]
    """Request -> number of steps after which it has its first token."""
    ends: dict[str, int]
    """Request -> number of steps after which it has its last token."""

    @property
    def num_steps(self) -> int:
        return len(self.slots[0])

    def count(self, work: Work) -> int:
        return sum(cell.work is work for slot in self.slots for cell in slot)


def chart(title: str, records: Sequence[StepRecord], num_slots: int) -> Chart:
    """A request takes the lowest free slot when it first runs (or is first padded), and keeps it to its last step."""
    steps: list[dict[str, Work]] = []
    first_tokens: dict[str, int] = {}
    ends: dict[str, int] = {}
    for i, record in enumerate(records):
        step: dict[str, Work] = {}
        for item in record.sequences:
            owner = padded_request_id(item.request_id)
            name = item.request_id if owner is None else owner
            name += f"#{item.choice_index}" if item.choice_index else ""
            if owner is not None:
                step.setdefault(name, Work.PAD)
            elif item.num_tokens == 1 and name in first_tokens:
                step[name] = Work.DECODE
            else:
                step[name] = Work.FIRST_TOKEN if item.samples else Work.PREFILL
            if owner is None and item.samples:
                first_tokens.setdefault(name, i + 1)
                ends[name] = i + 1
        steps.append(step)

    last = {name: i for i, step in enumerate(steps) for name in step}
    slots = [[IDLE] * len(steps) for _ in range(num_slots)]
    places: dict[str, int] = {}
    for i, step in enumerate(steps):
        places = {name: slot for name, slot in places.items() if last[name] >= i}
        for name, work in step.items():
            if name not in places:
                places[name] = min(set(range(num_slots)) - set(places.values()))
            slots[places[name]][i] = Cell(name, work)
    num_tokens = sum(record.num_tokens for record in records)
    num_padded = sum(record.num_padded_tokens for record in records)
    return Chart(title, slots, num_tokens, num_padded, first_tokens, ends)


def example_charts(policies: Iterable[str] = POLICIES) -> list[Chart]:
    return [chart(TITLES[policy], worked_example(policy), NUM_SLOTS) for policy in policies]


# ---- chart -> text, SVG ----------------------------------------------------------------------------------------------

_ANSI = {
    Work.PREFILL: "\x1b[97;44m",
    Work.FIRST_TOKEN: "\x1b[1;97;44m",
    Work.DECODE: "\x1b[97;42m",
    Work.PAD: "\x1b[30;43m",
    Work.IDLE: "\x1b[2m",
}


def summary(chart: Chart) -> list[str]:
    """One or two lines below a chart; the second is what the worked example is about."""
    num_places = chart.num_steps * len(chart.slots)
    work = f"{chart.num_steps} steps; {chart.num_tokens} tokens computed, {chart.num_padded_tokens} of them padding"
    lines = [f"{work}; {chart.count(Work.IDLE)} of {num_places} places idle"]
    if "R1" in chart.ends and "R4" in chart.first_tokens:
        first, end = chart.first_tokens["R4"], chart.ends["R1"]
        order = "before" if first < end else "after"
        lines.append(f"R4 has its first token at t = {first}, {order} R1 ends at t = {end}")
    return lines


def chart_text(chart: Chart, *, colour: bool = False) -> str:
    """One line per slot, one column per step."""
    width = max(len(cell.request) for slot in chart.slots for cell in slot) + 2
    lines = [chart.title, "  t      " + " ".join(str(i).ljust(width) for i in range(chart.num_steps)).rstrip()]
    for i, slot in enumerate(chart.slots):
        cells = []
        for cell in slot:
            text = f"{cell.request} {cell.work.value}".strip().ljust(width)
            cells.append(f"{_ANSI[cell.work]}{text}\x1b[0m" if colour else text)
        lines.append((f"  slot {i} " + " ".join(cells)).rstrip())
    return "\n".join([*lines, *(f"  {line}" for line in summary(chart))]) + "\n"


def legend_text() -> str:
    return ", ".join(f"{work.value} {words}" for work, words in WORDS.items()) + "\n"


# Okabe and Ito's palette, which colour-blind readers can tell apart; letters say the same without colour.
_FILLS = {
    Work.PREFILL: ("#56b4e9", "#000000"),
    Work.FIRST_TOKEN: ("#0072b2", "#ffffff"),
    Work.DECODE: ("#009e73", "#ffffff"),
    Work.PAD: ("url(#pad)", "#000000"),
    Work.IDLE: ("#ffffff", "#767676"),
}
_STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;font-size:13px;fill:#1a1a1a}"
    ".title{font-size:16px;font-weight:bold}.small{font-size:12px;fill:#444444}.middle{text-anchor:middle}.end{text-anchor:end}"
)
_PAD_PATTERN = (
    '<pattern id="pad" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#f7d488"/><rect width="2" height="6" fill="#e69f00"/></pattern>'
)


def charts_svg(charts: Sequence[Chart], *, arrivals: Sequence[Arrival] = (), note: str = "") -> str:
    """All charts on one time axis, a mark where a request arrives later than at 0, a legend and a note below."""
    left, cell_width, cell_height = 70, 84, 32
    num_steps = max(chart.num_steps for chart in charts)
    width = max(left + num_steps * cell_width + 30, 740)
    body: list[str] = []
    y = 20
    for chart in charts:
        body.append(_text(20, y + 14, chart.title, "title"))
        y += 48
        bottom = y + len(chart.slots) * cell_height
        for i, slot in enumerate(chart.slots):
            top = y + i * cell_height
            body.append(_text(20, top + 21, f"slot {i}"))
            for j, cell in enumerate(slot):
                x = left + j * cell_width
                body.append(_cell(x, top, cell_width, cell_height, cell.work, _label(cell)))
        for arrival in arrivals:
            if arrival.time > 0:
                x = left + round(arrival.time * cell_width)
                line = f'<line x1="{x}" y1="{y - 6}" x2="{x}" y2="{bottom + 4}"'
                body.append(f'{line} stroke="#d55e00" stroke-width="2.5" stroke-dasharray="5 3"/>')
                body.append(_text(x, y - 10, f"{arrival.name} arrives", "small middle"))
        body += [
            _text(left + i * cell_width, bottom + 18, f"t = {i}" if i == 0 else str(i), "small middle")
            for i in range(chart.num_steps + 1)
        ]
        y = bottom + 40
        for line in summary(chart):
            body.append(_text(20, y, line, "small"))
            y += 16
        y += 12
    x = 20
    for work, words in WORDS.items():
        body.append(_cell(x, y, 22, 18, work, ""))
        body.append(_text(x + 28, y + 14, words))
        x += 28 + 7 * len(words) + 20
    y += 42
    for line in _wrap(note, width):
        body.append(_text(20, y, line, "small"))
        y += 16
    described = " ".join(f"{chart.title}: {'; '.join(summary(chart))}." for chart in charts)
    return _svg(width, y + 6, "Who prefills, decodes, pads or idles in each step", described, body)


def _label(cell: Cell) -> str:
    words = {Work.PREFILL: "prefill", Work.FIRST_TOKEN: "prefill", Work.DECODE: "decode", Work.PAD: "pad"}
    return f"{cell.request} {words[cell.work]}" if cell.request else "idle"


def _cell(x: int, y: int, width: int, height: int, work: Work, label: str) -> str:
    fill, ink = _FILLS[work]
    dashes = ' stroke-dasharray="3 3"' if work is Work.IDLE else ""
    shape = f'<rect x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{height - 2}" rx="3"'
    shape += f' fill="{fill}" stroke="#767676"{dashes}/>'
    if not label:
        return shape
    where = f'x="{x + width / 2:g}" y="{y + height / 2 + 4.5:g}"'
    return f'{shape}<text {where} class="middle" style="fill:{ink}">{escape(label)}</text>'


def _text(x: float, y: float, text: str, style: str = "") -> str:
    classes = f' class="{style}"' if style else ""
    return f'<text x="{x:g}" y="{y:g}"{classes}>{escape(text)}</text>'


def _wrap(text: str, width: int) -> list[str]:
    """Lines of the small font that fit ``width`` pixels (6 per character)."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= (width - 40) // 6:
            lines[-1] += " " + word
        else:
            lines.append(word)
    return lines


def _svg(width: int, height: int, title: str, description: str, body: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ' role="img" aria-labelledby="title description">'
    )
    return "\n".join(
        [
            head,
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="description">{escape(description)}</desc>',
            f"<style>{_STYLE}</style>",
            f"<defs>{_PAD_PATTERN}</defs>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


# ---- record -> mask --------------------------------------------------------------------------------------------------


class Seen(enum.Enum):
    """What a query row makes of a key; the value is its letter."""

    CACHED = "o"
    """Seen: computed in an earlier step, read through the block table."""
    NEW = "#"
    """Seen: computed in this step."""
    LATER = "-"
    """Hidden: its own sequence, a later position."""
    OTHER = "."
    """Hidden: another sequence. The kernel never looks there."""


SEEN_WORDS = {
    Seen.CACHED: "seen, from the cache",
    Seen.NEW: "seen, new in this step",
    Seen.LATER: "hidden: later in its own sequence",
    Seen.OTHER: "another sequence: never looked at",
}


class Block(NamedTuple):
    """One sequence of the step: rows are its positions [start, end), columns [0, end)."""

    name: str
    start: int
    end: int


class Mask(NamedTuple):
    blocks: list[Block]
    rows: list[list[Seen]]
    """One row per token of the step, one column per key of all its sequences, in the order of the plan."""


def mask(record: StepRecord) -> Mask:
    """Block-diagonal and causal: position p sees positions 0..p of its own sequence, and nothing else.

    The matrix is drawn, and never made: the kernel walks each sequence's keys by itself.
    """
    blocks = [Block(item.request_id, item.start, item.start + item.num_tokens) for item in record.sequences]
    rows: list[list[Seen]] = []
    for block in blocks:
        for position in range(block.start, block.end):
            row: list[Seen] = []
            for other in blocks:
                if other is not block:
                    row += [Seen.OTHER] * other.end
                else:
                    row += [Seen.CACHED] * block.start
                    row += [Seen.NEW if key <= position else Seen.LATER for key in range(block.start, block.end)]
            rows.append(row)
    return Mask(blocks, rows)


def _row_names(mask: Mask) -> list[str]:
    return [f"{block.name}[{position}]" for block in mask.blocks for position in range(block.start, block.end)]


def mask_text(mask: Mask) -> str:
    """Queries down, keys across; a gap between sequences."""
    names = _row_names(mask)
    indent = max(map(len, names)) + 2
    heads = [block.name.ljust(2 * block.end - 1)[: 2 * block.end - 1] for block in mask.blocks]
    lines = ["keys".ljust(indent) + "  ".join(heads)]
    for name, row in zip(names, mask.rows, strict=True):
        parts, start = [], 0
        for block in mask.blocks:
            parts.append(" ".join(seen.value for seen in row[start : start + block.end]))
            start += block.end
        lines.append(name.ljust(indent) + "  ".join(parts))
    lines += ["", *(f"{seen.value}  {words}" for seen, words in SEEN_WORDS.items())]
    return "\n".join(line.rstrip() for line in lines) + "\n"


_SEEN_FILLS = {Seen.CACHED: "#56b4e9", Seen.NEW: "#0072b2", Seen.LATER: "#dddddd", Seen.OTHER: "#ffffff"}


def mask_svg(mask: Mask) -> str:
    size, gap, left, top = 24, 8, 76, 66
    num_columns = sum(block.end for block in mask.blocks)
    width = max(left + num_columns * size + (len(mask.blocks) - 1) * gap + 20, 620)
    body = [_text(20, 26, "The mask of one ragged step: queries down, keys across", "title")]
    x = left
    for block in mask.blocks:
        body.append(_text(x + block.end * size / 2, top - 22, f"keys of {block.name}", "small middle"))
        body += [_text(x + (i + 0.5) * size, top - 6, str(i), "small middle") for i in range(block.end)]
        x += block.end * size + gap
    names = iter(_row_names(mask))
    rows = iter(mask.rows)
    y = top
    for block in mask.blocks:
        for _ in range(block.start, block.end):
            body.append(_text(left - 10, y + 16, next(names), "small end"))
            row, x, start = next(rows), left, 0
            for other in mask.blocks:
                for seen in row[start : start + other.end]:
                    square = f'<rect x="{x + 1}" y="{y + 1}" width="{size - 2}" height="{size - 2}" rx="2"'
                    ink = "#dddddd" if seen is Seen.OTHER else "#767676"
                    body.append(f'{square} fill="{_SEEN_FILLS[seen]}" stroke="{ink}"/>')
                    x += size
                x, start = x + gap, start + other.end
            y += size
        y += gap
    y += 10
    for i, (seen, words) in enumerate(SEEN_WORDS.items()):
        column, line = i % 2, i // 2
        legend_x, legend_y = 20 + 280 * column, y + 26 * line
        body.append(
            f'<rect x="{legend_x}" y="{legend_y}" width="18" height="18" rx="2" fill="{_SEEN_FILLS[seen]}"'
            ' stroke="#767676"/>'
        )
        body.append(_text(legend_x + 26, legend_y + 14, words))
    described = "; ".join(
        f"{b.name} computes positions {b.start} to {b.end - 1} and sees only its own positions up to each"
        for b in mask.blocks
    )
    return _svg(width, y + 60, "Block-diagonal causal mask of a ragged step", described, body)


# ---- command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m serve_app.engine.timeline", description=__doc__.split("\n")[0])
    parser.add_argument("--policy", choices=(*POLICIES, "all"), default="all", help="whose timeline to draw")
    parser.add_argument("--mask", action="store_true", help="draw the attention mask of a mixed step instead")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture there too")
    parser.add_argument("--no-colour", action="store_true", help="letters only; so it is anyway if not on a terminal")
    options = parser.parse_args(arguments)
    if options.mask:
        drawn = mask(mixed_step())
        text, svg = mask_text(drawn), mask_svg(drawn)
    else:
        charts = example_charts(POLICIES if options.policy == "all" else (options.policy,))
        colour = sys.stdout.isatty() and not options.no_colour
        text = "\n".join([*(chart_text(chart, colour=colour) for chart in charts), legend_text(), NOTE + "\n"])
        svg = charts_svg(charts, arrivals=EXAMPLE, note=NOTE)
    sys.stdout.write(text)
    if options.svg is not None:
        options.svg.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
