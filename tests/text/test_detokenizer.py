"""The sum of all pushes and the flush is decode in one go, for any ids, in any grouping, for every kind of tokenizer."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings, strategies as st

from serve_app.text.detokenizer import (
    MAX_WINDOW_TOKENS,
    REPLACEMENT,
    ByteDetokenizer,
    WindowDetokenizer,
    make_detokenizer,
)
from serve_app.text.tokenizer import Tokenizer
from tests.text.tokenizers_made import MAKERS, PLAIN_ADDED, TEXTS, byte_ids, made, some_ids


def run(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, skip: bool = True) -> list[str]:
    detokenizer = make_detokenizer(tokenizer, prompt or (), skip)
    return [*(detokenizer.push([token_id]) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=120)
@given(data=st.data())
def test_pushes_add_up_to_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = made(kind)
    ids = data.draw(some_ids(tokenizer))
    skip = data.draw(st.booleans())
    assert "".join(run(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)

    borders = sorted(data.draw(st.sets(st.integers(0, len(ids)), max_size=4)))
    groups = [ids[a:b] for a, b in zip([0, *borders], [*borders, len(ids)], strict=True)]
    detokenizer = make_detokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join([*(detokenizer.push(group) for group in groups), detokenizer.flush()])
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=80)
@given(data=st.data())
def test_after_a_prompt_it_is_what_the_output_adds(kind: str, data: st.DataObject) -> None:
    tokenizer = made(kind)
    prompt, output = data.draw(some_ids(tokenizer)), data.draw(some_ids(tokenizer))
    before, both = tokenizer.decode(prompt), tokenizer.decode([*prompt, *output])
    text = "".join(run(tokenizer, output, prompt))
    if both.startswith(before):
        assert text == both[len(before) :]
    else:  # the prompt ended inside a character
        assert REPLACEMENT in before + both
        assert both.endswith(text)


@pytest.mark.parametrize("kind", ["byte_level_bpe", "metaspace_bpe"])
def test_a_long_run_of_random_bytes(kind: str) -> None:
    """Hundreds of invalid bytes with a word here and there: more than a window, in one text."""
    tokenizer, generator = made(kind), random.Random(7)
    words = tokenizer.encode("the fox", add_special_tokens=False)
    for _ in range(20):
        ids: list[int] = []
        while len(ids) < 300:
            ids += byte_ids(tokenizer, generator.randbytes(generator.randint(1, 9)))
            ids += byte_ids(tokenizer, generator.choice(["é", "€", "😀", "\ufffd"]).encode())
            ids += words[: generator.randint(0, 2)]
        text = "".join(run(tokenizer, ids))
        assert text == tokenizer.decode(ids)
        assert text.count(REPLACEMENT) > 30


def test_a_character_comes_out_whole() -> None:
    tokenizer = made("byte_level_bpe")
    ids = byte_ids(tokenizer, "a€😀!".encode())
    assert run(tokenizer, ids) == ["a", "", "", "€", "", "", "", "😀", "!", ""]


def test_the_end_of_a_text_may_be_half_a_character() -> None:
    tokenizer = made("byte_level_bpe")
    assert run(tokenizer, byte_ids(tokenizer, "a€".encode()[:-1])) == ["a", "", "", REPLACEMENT]


def test_only_one_character_of_a_hopeless_run_is_held_back() -> None:
    """A run of bytes that never becomes text must neither pile up nor be decoded again and again."""
    tokenizer = made("byte_level_bpe")
    window, exact = WindowDetokenizer(tokenizer), ByteDetokenizer(tokenizer)
    ids = byte_ids(tokenizer, b"\x80" * 1000)
    for i, token_id in enumerate(ids):
        assert window.push([token_id]) == ("" if i == 0 else REPLACEMENT)
        assert exact.push([token_id]) == REPLACEMENT  # which no further byte can change
    assert len(window._window) <= MAX_WINDOW_TOKENS
    assert (window.flush(), exact.flush()) == (REPLACEMENT, "")


@pytest.mark.parametrize("kind", ["byte_level_bpe", "metaspace_bpe"])
def test_cost_per_token_does_not_grow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the ids handed to decode: a constant times the tokens, for text, for junk and for one endless byte run."""
    tokenizer = made(kind)
    decoded = 0
    decode = Tokenizer.decode

    def counting(self: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(self, ids, skip_special_tokens)

    text = tokenizer.encode(" ".join(TEXTS), add_special_tokens=False)
    junk = byte_ids(tokenizer, random.Random(1).randbytes(2000))
    word = tokenizer.encode("fox", add_special_tokens=False)
    monkeypatch.setattr(Tokenizer, "decode", counting)
    # A byte-level vocabulary too can reach the window: a prompt that ends inside a character.
    half = byte_ids(tokenizer, "€".encode()[:1]) if kind == "byte_level_bpe" else []
    for ids in (text * 4, junk, junk + word + junk + word * 20):
        decoded = 0
        run(tokenizer, ids, prompt=half)
        assert 0 < decoded <= 3 * MAX_WINDOW_TOKENS * len(ids)


def test_a_byte_run_waits_for_its_end() -> None:
    """One stray byte makes decode turn every byte of its run to U+FFFD, so nothing of a run is sure before it ends."""
    tokenizer = made("metaspace_bpe")
    euro, stray = byte_ids(tokenizer, "€".encode()), byte_ids(tokenizer, b"\xff")
    word = [tokenizer.token_to_id("▁the") or 0]
    assert tokenizer.decode(euro + word) == "€ the"
    assert tokenizer.decode(euro + stray + word) == REPLACEMENT * 4 + " the"
    assert run(tokenizer, euro + word) == ["", "", "", "€ the", ""]
    assert run(tokenizer, euro + stray + word) == ["", "", "", "", REPLACEMENT * 4 + " the", ""]
    assert run(tokenizer, euro) == ["", "", "", "€"]
    assert "".join(run(tokenizer, word, prompt=word + euro)) == " the"


def test_the_first_space_belongs_to_the_prompt_or_is_dropped() -> None:
    tokenizer = made("metaspace_bpe")
    hello = tokenizer.encode("hello world", add_special_tokens=False)
    assert "".join(run(tokenizer, hello)) == "hello world"
    assert "".join(run(tokenizer, hello, prompt=hello)) == " hello world"
    assert "".join(run(tokenizer, hello, prompt=[tokenizer.token_to_id("<s>") or 0])) == "hello world"


def test_special_and_added_tokens() -> None:
    tokenizer = made("byte_level_bpe")
    ids = tokenizer.encode(f"a<|im_end|>b{PLAIN_ADDED}c")
    assert "".join(run(tokenizer, ids)) == f"ab{PLAIN_ADDED}c"
    assert "".join(run(tokenizer, ids, skip=False)) == f"<s>a<|im_end|>b{PLAIN_ADDED}c"
    # A character around a special token that is left out is joined, as decode joins it.
    euro = byte_ids(tokenizer, "€".encode())
    split = [euro[0], *sorted(tokenizer.special_ids), *euro[1:]]
    assert "".join(run(tokenizer, split)) == tokenizer.decode(split) == "€"


def test_a_prompt_that_ends_inside_a_character() -> None:
    tokenizer = made("byte_level_bpe")
    euro, a = byte_ids(tokenizer, "€".encode()), byte_ids(tokenizer, b"a")
    assert run(tokenizer, euro[1:] + a, prompt=a + euro[:1]) == ["", "€", "a", ""]
    assert run(tokenizer, a, prompt=a + euro[:1]) == ["a", ""]
    replacement = byte_ids(tokenizer, REPLACEMENT.encode())
    assert run(tokenizer, a, prompt=a + replacement) == ["a", ""]
    byte_fallback = made("metaspace_bpe")
    euro = byte_ids(byte_fallback, "€".encode())
    the = byte_fallback.token_to_id("▁the") or 0
    assert "".join(run(byte_fallback, [*euro[2:], the], prompt=[the, *euro[:2]])) == "€ the"


@pytest.mark.parametrize("kind", MAKERS)
def test_bytes_are_read_as_bytes_where_a_token_is_nothing_else(kind: str) -> None:
    tokenizer = made(kind)
    wanted = ByteDetokenizer if kind == "byte_level_bpe" else WindowDetokenizer
    ids = tokenizer.encode("the fox")
    assert type(make_detokenizer(tokenizer)) is wanted
    assert type(make_detokenizer(tokenizer, ids)) is wanted
    if kind == "byte_level_bpe":
        assert type(make_detokenizer(tokenizer, [*ids, *byte_ids(tokenizer, "€".encode()[:2])])) is WindowDetokenizer
        assert type(make_detokenizer(tokenizer, [*ids, *byte_ids(tokenizer, b"\xff")])) is wanted


def test_the_bytes_of_every_token_are_what_decode_makes_of_them() -> None:
    tokenizer = made("byte_level_bpe")
    assert len([i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)]) > 300
    for i in range(tokenizer.vocab_size + 2):
        text = tokenizer.decode([i], skip_special_tokens=False)
        assert tokenizer.token_bytes(i).decode(errors="replace") == text
