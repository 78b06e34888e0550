"""GrammarTokenizer and Matcher: what may come next, for tokenizers of each kind. The oracle is text: tokens are allowed
exactly where the text they make is the beginning of a sentence."""

from __future__ import annotations

import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from serve_app.errors import InvalidParameterError, UnsupportedParameterError
from serve_app.text import grammar, token_masks
from serve_app.text.token_masks import GrammarTokenizer, MaskMaker, Matcher
from serve_app.text.tokenizer import Tokenizer
from tests.text.tokenizers_made import made

KINDS = ("byte_level_bpe", "metaspace_bpe")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ages": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}


def make(kind: str, eos: tuple[int, ...] = (4,), more: int = 21) -> tuple[Tokenizer, GrammarTokenizer]:
    """A vocabulary of the model that is larger than the tokenizer's by ``more``."""
    tokenizer = made(kind)
    return tokenizer, GrammarTokenizer(lambda: tokenizer, tokenizer.vocab_size + more, eos)


def allowed(matcher: Matcher) -> list[int]:
    words = np.full(matcher.grammar.num_words, -1, dtype=np.int32)
    matcher.fill(words)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_may_come_where_its_text_goes_on(kind: str) -> None:
    """By brute force, against Python's re."""
    tokenizer, masks = make(kind)
    text = b""
    sentence = re.compile(rb"(?:[0-9]|the|quick| |o){0,9}")
    matcher = masks.compile(grammar.regex("([0-9]|the|quick| |o){0,9}")).matcher()
    beginnings = {b"the"[:i] for i in range(1, 3)} | {b"quick"[:i] for i in range(1, 5)}

    def goes_on(candidate: bytes) -> bool:
        """A sentence, or one that lacks the rest of its last word."""
        if sentence.fullmatch(candidate):
            return True
        for tail in beginnings:
            head = candidate.removesuffix(tail)
            if len(head) < len(candidate) and (found := sentence.fullmatch(head)):
                return len(re.findall(rb"[0-9]|the|quick| |o", found.group())) < 9
        return False

    rng = random.Random(2)
    bytes_of = token_masks._bytes_by_id(tokenizer, tokenizer.vocab_size)
    special = tokenizer.special_ids
    num_compared = 0
    for _ in range(6):
        ids = allowed(matcher)
        expected = [i for i, data in enumerate(bytes_of) if data and i not in special and goes_on(text + data)]
        eos = [4] if sentence.fullmatch(text) else []
        if len(ids) == 1:  # the bytes that follow are forced, and cut as the tokenizer cuts them
            assert ids[0] in expected
        else:
            assert ids == sorted(expected + eos)
            num_compared += len(expected)
        choice = rng.choice([i for i in ids if i != 4])
        matcher.consume([choice])
        text += bytes_of[choice]
    assert num_compared > 30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_random_walk_makes_valid_json_and_the_state_is_the_tokens(kind: str, seed: int) -> None:
    tokenizer, masks = make(kind)
    compiled = masks.compile(grammar.json_schema(SCHEMA))
    matcher, rng, walked = compiled.matcher(), random.Random(seed), list[int]()
    bytes_of = token_masks._bytes_by_id(tokenizer, tokenizer.vocab_size)
    while not matcher.has_ended:
        ids = allowed(matcher)
        assert 4 not in ids
        assert all(i < tokenizer.vocab_size for i in ids)
        ends = [i for i in ids if bytes_of[i] in (b'"', b"]", b"}")]
        walked.append(rng.choice(ends if ends and len(walked) > 40 else ids))
        matcher.consume(walked[-1:])
        if len(walked) % 5 == 0:  # made anew from the tokens, whole and in parts
            again = compiled.matcher()
            cut = rng.randrange(len(walked))
            again.consume(walked[:cut])
            again.consume(walked[cut:])
            assert allowed(again) == allowed(matcher)
            assert again.has_ended == matcher.has_ended
    value = json.loads(b"".join(bytes_of[i] for i in walked).decode())
    assert set(value) == {"name", "ages"}
    assert all(isinstance(age, int) for age in value["ages"])
    assert allowed(matcher) == [4], "where nothing but the end can come, the mask says so"
    matcher.consume([4])
    assert allowed(matcher) == []


@pytest.mark.parametrize("eos", [(), (2, 4)])
def test_eos_may_come_exactly_where_a_sentence_may_end(eos: tuple[int, ...]) -> None:
    tokenizer, masks = make("byte_level_bpe", eos)
    digit = tokenizer.encode("7", add_special_tokens=False)
    compiled = masks.compile(grammar.regex("[0-9]{1,3}"))
    matcher, deaf = compiled.matcher(), compiled.matcher(takes_eos=False)
    for step in range(3):
        ids = allowed(matcher)
        assert [i for i in ids if i in tokenizer.special_ids] == (list(eos) if step else [])
        assert [i for i in allowed(deaf) if i in tokenizer.special_ids] == []
        assert not matcher.has_ended
        matcher.consume(digit)
        deaf.consume(digit)
    assert matcher.has_ended
    assert deaf.has_ended
    assert allowed(matcher) == list(eos)
    assert allowed(deaf) == []
    if eos:
        early = compiled.matcher()
        early.consume([*digit, 4])
        assert early.has_ended
        assert allowed(early) == []
        with pytest.raises(ValueError, match="the sentence has ended"):
            early.consume(digit)
        with pytest.raises(ValueError, match="token 4 does not continue"):
            compiled.matcher(takes_eos=False).consume([*digit, 4])
        with pytest.raises(ValueError, match="token 4 does not continue"):
            compiled.matcher().consume([4])


@pytest.mark.parametrize("more", [0, 1, 31, 32, 33])
def test_ids_behind_the_tokenizers_never_come(more: int) -> None:
    """Also where the last word of the mask is full, and where the end's bit stands alone in one."""
    tokenizer, masks = make("byte_level_bpe", more=more)
    matcher = masks.compile(grammar.regex("(.|\\n)*")).matcher()
    ids = allowed(matcher)
    assert max(ids) < tokenizer.vocab_size
    assert len(ids) > 200
    words = np.zeros((2, masks.num_words), dtype=np.int32)
    MaskMaker(2).fill([matcher, masks.compile(grammar.choice(["hello"])).matcher()], words)
    assert np.flatnonzero(np.unpackbits(words[0].view(np.uint8), bitorder="little")).tolist() == ids
    assert words[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_forced_text_is_cut_as_the_tokenizer_cuts_it(kind: str) -> None:
    tokenizer, masks = make(kind)
    matcher = masks.compile(grammar.choice(["hello there, other hello"])).matcher()
    made_ids: list[int] = []
    while not matcher.has_ended:
        (only,) = allowed(matcher)
        made_ids.append(only)
        matcher.consume([only])
    bytes_of = token_masks._bytes_by_id(tokenizer, tokenizer.vocab_size)
    assert b"".join(bytes_of[i] for i in made_ids) == b"hello there, other hello"
    assert len(made_ids) < 20, "not byte by byte"


def test_added_tokens_are_text_and_special_ones_come_by_name_alone() -> None:
    tokenizer, masks = make("byte_level_bpe", eos=())
    tool, start = tokenizer.token_to_id("<tool>"), tokenizer.token_to_id("<|im_start|>")
    assert tool is not None
    assert tool not in tokenizer.special_ids
    assert tool in allowed(masks.compile(grammar.regex("<(tool|fool)>x")).matcher())
    free = allowed(masks.compile(grammar.regex("(.|\\n)*")).matcher())
    assert tool in free
    assert start not in free
    named = masks.compile(grammar.grammar("start: <|im_start|>")).matcher()
    assert allowed(named) == [start]


def test_a_tokenizer_without_bytes_is_refused_and_so_is_a_missing_one(tmp_path: object) -> None:
    for kind in ("wordpiece", "suffix_bpe"):
        _, masks = make(kind)
        for _ in range(2):
            with pytest.raises(UnsupportedParameterError, match="byte-level or falls back to bytes"):
                masks.compile(grammar.json_object())
    missing = GrammarTokenizer.of_directory(str(tmp_path), 300)
    with pytest.raises(UnsupportedParameterError, match=r"no tokenizer\.json"):
        missing.compile(grammar.json_object())


def test_a_wrong_grammar_is_refused_with_the_librarys_words() -> None:
    _, masks = make("byte_level_bpe")
    with pytest.raises(InvalidParameterError, match=r"grammar is 'start: nobody'; it must be a grammar: .*nobody"):
        masks.compile("start: nobody")


def test_equal_grammars_are_compiled_once_while_held_or_lately_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_masks, "MAX_KEPT_GRAMMARS", 2)
    num_built = 0

    def make_tokenizer() -> Tokenizer:
        nonlocal num_built
        num_built += 1
        return made("byte_level_bpe")

    masks = GrammarTokenizer(make_tokenizer, 400)
    texts = [grammar.choice([str(i)]) for i in range(4)]
    held = masks.compile(texts[0])
    begun = threading.Barrier(8)

    def compile_all(_: int) -> list[object]:
        begun.wait()
        return [masks.compile(text) for text in texts]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(compile_all, range(8)))
    assert num_built == 1
    assert all(each[0] is held for each in found)
    last = found[0][3]
    del found
    assert masks.compile(texts[3]) is last
    assert set(masks._kept) == {texts[2], texts[3]} or set(masks._kept) == {texts[3], texts[2]}
    del held
    assert texts[0] not in masks._alive, "nobody holds it, and others were named since"
