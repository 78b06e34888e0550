"""The worked example, drawn from the real scheduler and the real baselines, as literals. And the mask of a mixed step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from serve_app.engine.step_record import SequenceStep, StepRecord
from serve_app.engine.timeline import (
    EXAMPLE,
    NOTE,
    Seen,
    Work,
    chart,
    chart_text,
    charts_svg,
    example_charts,
    main,
    mask,
    mask_svg,
    mask_text,
    mixed_step,
    worked_example,
)

DOCS = Path(__file__).parents[2] / "docs"

STATIC = """\
Static batching
  t      0    1    2    3    4    5    6
  slot 0 R1 p R1 P R1 d R1 d R1 d R4 P R4 d
  slot 1 R2 x R2 P R2 d R2 x R2 x .    .
  slot 2 R3 x R3 P R3 x R3 x R3 x .    .
  7 steps; 62 tokens computed, 29 of them padding; 4 of 21 places idle
  R4 has its first token at t = 6, after R1 ends at t = 5
"""

DYNAMIC = """\
Dynamic batching with padding
  t      0    1    2    3    4    5    6
  slot 0 R1 p R1 P R1 d R1 d R1 d R2 P R2 d
  slot 1 .    .    .    .    .    R3 P R3 x
  slot 2 .    .    .    .    .    R4 P R4 d
  7 steps; 34 tokens computed, 1 of them padding; 10 of 21 places idle
  R4 has its first token at t = 6, after R1 ends at t = 5
"""

CONTINUOUS = """\
Continuous batching
  t      0    1    2    3    4
  slot 0 R1 p R1 P R1 d R1 d R1 d
  slot 1 .    R2 P R2 d R4 P R4 d
  slot 2 .    R3 P .    .    .
  5 steps; 33 tokens computed, 0 of them padding; 5 of 15 places idle
  R4 has its first token at t = 4, before R1 ends at t = 5
"""

MASK = """\
keys  A            B              C
A[5]  o o o o o #  . . . . . . .  . . .
B[3]  . . . . . .  o o o # - - -  . . .
B[4]  . . . . . .  o o o # # - -  . . .
B[5]  . . . . . .  o o o # # # -  . . .
B[6]  . . . . . .  o o o # # # #  . . .
C[0]  . . . . . .  . . . . . . .  # - -
C[1]  . . . . . .  . . . . . . .  # # -
C[2]  . . . . . .  . . . . . . .  # # #

o  seen, from the cache
#  seen, new in this step
-  hidden: later in its own sequence
.  another sequence: never looked at
"""


@pytest.mark.parametrize(
    ("policy", "text"),
    [("static", STATIC), ("dynamic", DYNAMIC), ("continuous", CONTINUOUS)],
    ids=["static", "dynamic", "continuous"],
)
def test_the_worked_example(policy: str, text: str) -> None:
    (drawn,) = example_charts([policy])
    assert chart_text(drawn) == text
    assert (drawn.first_tokens["R4"] < drawn.ends["R1"]) is (policy == "continuous")


@pytest.mark.parametrize("policy", ["static", "dynamic", "continuous"])
def test_the_work_of_the_example_is_the_same_under_every_policy(policy: str) -> None:
    """Prompts of 16, 4, 4 and 4 tokens, and 4, 2, 1 and 2 out, the last of each never computed; the rest is padding."""
    records = worked_example(policy)
    assert sum(record.num_tokens - record.num_padded_tokens for record in records) == 28 + 3 + 1 + 0 + 1
    assert [record.started for record in records] == [float(i) for i in range(len(records))]
    (drawn,) = example_charts([policy])
    for arrival in EXAMPLE:
        cells = [cell for slot in drawn.slots for cell in slot if cell.request == arrival.name]
        work = [cell.work for cell in cells if cell.work is not Work.PAD]
        prefill = [Work.PREFILL] * (arrival.num_prompt_tokens > 12) + [Work.FIRST_TOKEN]
        assert work == prefill + [Work.DECODE] * (arrival.num_output_tokens - 1)


def test_a_prompt_of_one_token_and_a_second_choice_are_drawn_right() -> None:
    def record(*sequences: SequenceStep) -> StepRecord:
        num_tokens = sum(sequence.num_tokens for sequence in sequences)
        return StepRecord(0, 0.0, sequences, num_tokens, 8, 0, 0, 9, 0, 0, 0)

    drawn = chart(
        "two choices",
        [
            record(SequenceStep("r", 0, 0, 1, 0, True)),
            record(SequenceStep("r", 0, 1, 1, 0, True), SequenceStep("r", 1, 0, 1, 0, True)),
            record(SequenceStep("r", 1, 1, 1, 0, True)),
        ],
        num_slots=2,
    )
    assert chart_text(drawn) == (
        "two choices\n"
        "  t      0     1     2\n"
        "  slot 0 r P   r d   .\n"
        "  slot 1 .     r#1 P r#1 d\n"
        "  3 steps; 4 tokens computed, 0 of them padding; 2 of 6 places idle\n"
    )


def test_the_mask_of_a_mixed_step() -> None:
    """A decode, the rest of a prompt and the beginning of another, in one step that fills its budget of 8."""
    step = mixed_step()
    drawn = mask(step)
    assert mask_text(drawn) == MASK
    assert len(drawn.rows) == step.num_tokens == step.token_budget == 8
    for row, block in zip(drawn.rows, [b for b in drawn.blocks for _ in range(b.start, b.end)], strict=True):
        assert row.count(Seen.CACHED) == block.start
        assert row.count(Seen.OTHER) == sum(other.end for other in drawn.blocks if other is not block)


def test_the_pictures_in_docs_are_what_is_drawn() -> None:
    charts = charts_svg(example_charts(), arrivals=EXAMPLE, note=NOTE)
    assert (DOCS / "continuous_batching.svg").read_text(encoding="utf-8") == charts
    assert (DOCS / "ragged_mask.svg").read_text(encoding="utf-8") == mask_svg(mask(mixed_step()))


@pytest.mark.parametrize("picture", ["continuous_batching.svg", "ragged_mask.svg"])
def test_a_picture_is_one_image_with_a_name_and_stays_in_its_frame(picture: str) -> None:
    namespace = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(DOCS / picture).getroot()
    assert root.get("role") == "img"
    named = {element.get("id"): element.text for element in root if element.get("id")}
    assert all(named[name] for name in str(root.get("aria-labelledby")).split())
    for rectangle in root.iter(f"{namespace}rect"):
        if rectangle.get("x") is not None:
            for start, size in (("x", "width"), ("y", "height")):
                assert float(rectangle.get(start, "")) + float(rectangle.get(size, "")) <= float(root.get(size, ""))
    assert len(list(root.iter(f"{namespace}rect"))) > 50


def test_names_are_escaped() -> None:
    nasty = 'a<&>"'
    record = StepRecord(0, 0.0, (SequenceStep(nasty, 0, 0, 2, 0, True),), 2, 8, 1, 0, 9, 1, 0, 0)
    for svg in (charts_svg([chart("<b>", [record], 1)]), mask_svg(mask(record))):
        assert any(nasty in (element.text or "") for element in ElementTree.fromstring(svg).iter())


def test_the_command_draws_in_the_terminal_and_as_svg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    text = capsys.readouterr().out
    assert text.startswith("\n".join([STATIC, DYNAMIC, CONTINUOUS]))
    assert text.endswith(NOTE + "\n")
    main(["--policy", "dynamic", "--svg", str(tmp_path / "dynamic.svg")])
    assert capsys.readouterr().out.startswith(DYNAMIC)
    assert "Static" not in (tmp_path / "dynamic.svg").read_text(encoding="utf-8")
    command = [sys.executable, "-m", "serve_app.engine.timeline", "--mask", "--svg", str(tmp_path / "mask.svg")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=DOCS.parent)
    assert done.stdout == MASK
    assert (tmp_path / "mask.svg").read_text(encoding="utf-8") == mask_svg(mask(mixed_step()))


def test_colours_change_nothing_but_colours() -> None:
    for drawn in example_charts():
        coloured = chart_text(drawn, colour=True)
        assert "\x1b[97;44m" in coloured
        plain = "".join(part.split("m", 1)[1] if i else part for i, part in enumerate(coloured.split("\x1b[")))
        assert [line.rstrip() for line in plain.splitlines()] == chart_text(drawn).splitlines()
