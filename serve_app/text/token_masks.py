"""Token masks: which tokens may come next in a grammar. Knows llguidance and a tokenizer's bytes; knows no batch, no torch.

    GrammarTokenizer    the vocabulary as a trie of bytes    one per process, built on a thread of its own
    Grammar             a grammar, compiled                  shared by the requests that name it
    Matcher             a place in a sentence                one per sequence: a function of the sequence's output tokens

Tokens are bytes here. A special token (one that skip_special_tokens leaves out) is no text: it comes only where the
grammar names it. An added token that is not special is the text it shows, however a grammar spells that text. Ids that
name no token never come.

The end is not a token of the model. llguidance gets an end of its own, one id behind the vocabulary, whose bit says that
a sentence may end here; only then `Matcher.fill` sets the bits of the model's eos ids. So a model without eos and a
request that ignores it need nothing else.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence as SequenceOf
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tokenizers

from serve_app.errors import InvalidParameterError, StartupError, UnsupportedParameterError
from serve_app.text.tokenizer import BYTE_OF, Tokenizer

if TYPE_CHECKING:
    import llguidance

MAX_KEPT_GRAMMARS = 64
"""Compiled grammars that are kept though no request uses them: the least recently named one goes first."""

WORD_BITS = 32


class GrammarTokenizer:
    """``make_tokenizer`` is called once, on the thread that builds. ``vocab_size``: the model's, not the tokenizer's.

    Building takes about 2 s of one core for 150,000 tokens, most of it inside two calls that hold the interpreter's
    lock. So `start` it while the model loads, before anybody waits for a token.
    """

    def __init__(
        self, make_tokenizer: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: Iterable[int] = ()
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(sorted(i for i in eos_token_ids if i < vocab_size))
        self._make_tokenizer = make_tokenizer
        self._lock = threading.Lock()
        """Guards the three below."""
        self._built: Future[llguidance.LLTokenizer] | None = None
        self._alive: weakref.WeakValueDictionary[str, Grammar] = weakref.WeakValueDictionary()
        self._kept: OrderedDict[str, Grammar] = OrderedDict()

    @classmethod
    def of_directory(
        cls, directory: str | Path, vocab_size: int, eos_token_ids: Iterable[int] = ()
    ) -> GrammarTokenizer:
        """Of the tokenizer.json there. Where there is none, the first grammar is refused."""
        return cls(lambda: Tokenizer.from_directory(directory), vocab_size, eos_token_ids)

    @property
    def num_words(self) -> int:
        """int32 words of a mask: a bit for each id of the model, and one for the end."""
        return self.vocab_size // WORD_BITS + 1

    def start(self) -> None:
        """Begins to build, on a daemon thread. The second call does nothing."""
        with self._lock:
            if self._built is None:
                self._built = Future()
                threading.Thread(target=self._build, args=(self._built,), name="grammar tokenizer", daemon=True).start()

    def compile(self, text: str) -> Grammar:
        """The grammar with this canonical text; from any thread. What somebody holds, or was named lately, is found.

        Waits for the tokenizer. A grammar's work is bounded by `grammar_helper.LIMITS`, and so is each mask's.
        Raises UnsupportedParameterError if the model's tokenizer has no bytes, InvalidParameterError with llguidance's
        own words if the grammar is wrong or too large.
        """
        with self._lock:
            grammar = self._alive.get(text)
        if grammar is None:
            grammar = Grammar(self._tokenizer(), self, text)
        with self._lock:
            grammar = self._alive.setdefault(text, grammar)  # two may have compiled it at the same time
            self._kept[text] = grammar
            self._kept.move_to_end(text)
            if len(self._kept) > MAX_KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        return grammar

    def _tokenizer(self) -> llguidance.LLTokenizer:
        self.start()
        assert self._built is not None
        return self._built.result()

    def _build(self, built: Future[llguidance.LLTokenizer]) -> None:
        try:
            import llguidance  # a tenth of a second: not when this file is imported

            vocabulary = _Vocabulary(self._make_tokenizer(), self.vocab_size)
            tokenizer = llguidance.LLTokenizer(vocabulary)  # type: ignore[arg-type]
            vocabulary.trie, vocabulary.tokens = tokenizer, []
        except StartupError as error:
            built.set_exception(UnsupportedParameterError("grammar", f"needs the model's tokenizer: {error}"))
        except BaseException as error:  # it goes to whoever asks
            built.set_exception(error)
        else:
            built.set_result(tokenizer)


class Grammar:
    """A compiled grammar. Immutable: every sequence takes a matcher of its own."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, vocabulary: GrammarTokenizer, text: str) -> None:
        import llguidance

        self.text = text
        self.vocab_size = vocabulary.vocab_size
        self.num_words = vocabulary.num_words
        self.eos_token_ids = vocabulary.eos_token_ids
        from serve_app.text.grammar_helper import LIMITS

        limits = llguidance.LLParserLimits(**LIMITS)
        self._start = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=limits)
        if not self._start.is_error():
            first = (
                self._start.deep_copy()
            )  # a grammar whose first mask is too much work is refused here, not in a step
            first.compute_bitmask()
            self._start = first if first.is_error() else self._start
        if self._start.is_error():
            reason = self._start.get_error().strip().partition("\n")[0]
            raise InvalidParameterError("grammar", text, f"a grammar: {reason}")

    def matcher(self, *, takes_eos: bool = True) -> Matcher:
        """At the beginning of a sentence. ``takes_eos``: the model's eos ids may come where it may end."""
        return Matcher(self, self._start.deep_copy(), takes_eos)


class Matcher:
    """Where one sequence stands in a sentence. Not thread-safe; two of them may work at the same time.

    >>> matcher = tokenizer.compile(lark_or_schema).matcher()
    >>> matcher.consume(output_token_ids)
    >>> matcher.fill(words)                    # int32 [num_words]; bit i: token i may come next
    """

    def __init__(self, grammar: Grammar, matcher: llguidance.LLMatcher, takes_eos: bool) -> None:
        self.grammar = grammar
        self._matcher = matcher
        self._eos_token_ids = grammar.eos_token_ids if takes_eos else ()
        self._has_eos = False

    def consume(self, token_ids: SequenceOf[int]) -> None:
        """Goes on by these tokens. Raises ValueError naming the first that may not come; then the matcher is void."""
        for token_id in token_ids:
            if token_id in self._eos_token_ids and self._matcher.is_accepting():
                self._has_eos = True
            elif self._has_eos or not self._matcher.consume_token(token_id):
                reason = self._matcher.get_error().strip().partition("\n")[0] or "the sentence has ended"
                raise ValueError(f"token {token_id} does not continue the grammar's sentence: {reason}")

    @property
    def has_ended(self) -> bool:
        """No token but an eos can come any more."""
        return self._has_eos or self._matcher.is_stopped()

    def fill(self, words: npt.NDArray[np.int32]) -> None:
        """Makes the mask of the next token: ``words`` int32 [num_words], contiguous. Lets other threads run.

        All bits are 0 if nothing can come. Raises ValueError if the grammar is too complex here.
        """
        assert words.shape == (self.grammar.num_words,) and words.flags.c_contiguous and words.dtype == np.int32
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._finish(words)

    def _finish(self, words: npt.NDArray[np.int32]) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar has no mask here: {self._matcher.get_error().strip().partition(chr(10))[0]}")
        vocab_size = self.grammar.vocab_size
        word, bit = divmod(vocab_size, WORD_BITS)
        unsigned = words.view(np.uint32)
        may_end = bool(unsigned[word] >> bit & 1)
        unsigned[word] &= (1 << bit) - 1
        if self._has_eos:
            words[:] = 0
        elif may_end and self._matcher.is_accepting():
            for token_id in self._eos_token_ids:
                unsigned[token_id // WORD_BITS] |= 1 << token_id % WORD_BITS


class MaskMaker:
    """Fills the masks of many matchers, on ``num_threads`` threads at a time."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._executor: llguidance.LLExecutor | None = None

    def fill(self, matchers: SequenceOf[Matcher], words: npt.NDArray[np.int32]) -> None:
        """Row i of ``words``, int32 [len(matchers), num_words], is matchers[i]'s mask. Raises what Matcher.fill does."""
        if self._num_threads == 1 or len(matchers) == 1:
            for matcher, row in zip(matchers, words, strict=True):
                matcher.fill(row)
            return
        if self._executor is None:
            import llguidance

            self._executor = llguidance.LLExecutor(self._num_threads)
        assert words.flags.c_contiguous and words.shape == (len(matchers), matchers[0].grammar.num_words)
        rows = [(matcher._matcher, i) for i, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(rows, words.ctypes.data, words.strides[0], len(words))
        for matcher, row in zip(matchers, words, strict=True):
            matcher._finish(row)


class _Vocabulary:
    """What llguidance asks of a tokenizer: bytes by id, and how a text is usually cut (for bytes that are forced)."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id = vocab_size
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < vocab_size)
        self.tokens = [*_bytes_by_id(tokenizer, vocab_size), b""]
        self.trie: llguidance.LLTokenizer | None = None
        self._backend = tokenizer.backend if tokenizer.is_byte_level else _without_prefix(tokenizer.backend)

    def __call__(self, text: str) -> list[int]:
        """Must not raise, and its tokens must be the text: llguidance takes the first of them for the only one allowed."""
        assert self.trie is not None, "no text is cut while the trie is built"
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids if self.trie.decode_bytes(ids) == text.encode() else self.trie.greedy_tokenize(text)


def _bytes_by_id(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """[vocab_size]; empty where an id names no token."""
    tokens = [b""] * vocab_size
    if tokenizer.is_byte_level:
        latin1 = {ord(character): byte for character, byte in BYTE_OF.items()}
        for token, token_id in tokenizer.backend.get_vocab(with_added_tokens=False).items():
            if token_id < vocab_size:
                spelled = token.translate(latin1)
                try:
                    tokens[token_id] = spelled.encode("latin-1")
                except UnicodeEncodeError:  # it holds a character that spells no byte, so it stands for itself
                    tokens[token_id] = token.encode()
    elif tokenizer.byte_fallback_ids:
        space = _space_of(tokenizer.backend)
        for token, token_id in tokenizer.backend.get_vocab(with_added_tokens=False).items():
            if token_id < vocab_size:
                is_byte = token_id in tokenizer.byte_fallback_ids
                tokens[token_id] = bytes([int(token[3:5], 16)]) if is_byte else token.replace(space, " ").encode()
    else:
        raise UnsupportedParameterError(
            "grammar", "needs a model whose tokenizer is byte-level or falls back to bytes; this model's does neither"
        )
    for token_id, added in tokenizer.backend.get_added_tokens_decoder().items():
        if token_id < vocab_size:
            tokens[token_id] = added.content.encode()
    return tokens


def _space_of(backend: tokenizers.Tokenizer) -> str:
    """The character that stands for a space, by the decoder's own words."""
    decoder = json.loads(backend.to_str())["decoder"]
    for step in decoder.get("decoders", [decoder]):
        if step.get("type") == "Replace" and step.get("content") == " ":
            return str(step["pattern"].get("String", _SENTENCEPIECE_SPACE))
    return _SENTENCEPIECE_SPACE


_SENTENCEPIECE_SPACE = "\u2581"


def _without_prefix(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """One that puts no space before a text: what is forced stands in the middle of one."""
    parts = json.loads(backend.to_str())

    def cleaned(part: dict[str, Any] | None) -> dict[str, Any] | None:
        if part is None or part["type"] == "Prepend":
            return None
        if part["type"] == "Metaspace":
            return {**part, "prepend_scheme": "never"}
        for inner in ("normalizers", "pretokenizers"):
            if inner in part:
                return {**part, inner: [kept for each in part[inner] if (kept := cleaned(each)) is not None]}
        return part

    for name in ("normalizer", "pre_tokenizer"):
        parts[name] = cleaned(parts[name])
    return tokenizers.Tokenizer.from_str(json.dumps(parts))
