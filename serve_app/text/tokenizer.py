"""Tokenizer: text <-> token ids, and what a model directory says about its special tokens and chat templates.

Knows the `tokenizers` package and the small JSON files beside the weights. Knows no torch, no transformers and no model:
the HTTP ingress loads it. What tokenizer.json says is believed: whether encoding adds a bos or an eos token is decided
by its post-processor, not by add_bos_token in tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from serve_app.errors import ConfigurationError, InvalidPromptError, ModelNotFoundError, UnsupportedModelError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that have a name in tokenizer_config.json. A chat template sees them as variables."""

TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
"""Where the same file lists special tokens without a name."""


class Tokenizer:
    """One model's tokenizer. Immutable once made, so threads may share it.

    ``special_tokens`` names special tokens (bos_token -> "<s>"), ``chat_templates`` maps a name to Jinja source ("default"
    is the one a chat gets), ``generation_config`` is the parsed generation_config.json.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        # A tokenizer.json may carry the padding and truncation of a training script. A prompt wants neither.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self.chat_templates: dict[str, str] = dict(chat_templates or {})
        self.generation_config: dict[str, Any] = dict(generation_config or {})

        self.special_ids: frozenset[int] = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        """Ids that skip_special_tokens leaves out."""
        self.byte_fallback_ids: frozenset[int] = frozenset(_byte_fallback_ids(backend))
        """Ids that stand for one raw byte ("<0x0A>"), where the decoder joins such bytes to characters."""
        self.is_byte_level = _decoder_steps(backend) == ["ByteLevel"]
        """decode joins the bytes of the tokens, and nothing else: see `token_bytes`."""
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
        additional_chat_templates/*.jinja, generation_config.json and config.json (only for eos ids).

        Raises ModelNotFoundError (no directory, no tokenizer.json), UnsupportedModelError (a tokenizer.json that the
        installed `tokenizers` cannot read), ConfigurationError (one of the other files is not valid).
        """
        directory = Path(path)
        if not directory.is_dir():
            raise ModelNotFoundError(
                f"{str(directory)!r} is not a directory; it must be one that holds a tokenizer.json"
            )
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ModelNotFoundError(_no_tokenizer_json(directory))
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises plain Exception
            raise UnsupportedModelError(
                f"{file}: tokenizers {tokenizers.__version__} cannot read it: {error}"
            ) from error

        config = {
            **_read_json(directory / "special_tokens_map.json"),
            **_read_json(directory / "tokenizer_config.json"),
        }
        generation_config = _read_json(directory / "generation_config.json")
        if generation_config.get("eos_token_id") is None:
            # transformers derives the one from the other where the file is missing or silent.
            generation_config["eos_token_id"] = _read_json(directory / "config.json").get("eos_token_id")
        _mark_special(backend, config)
        return cls(
            backend,
            special_tokens={name: _content(config[name]) for name in NAMED_TOKENS if config.get(name) is not None},
            chat_templates=_read_chat_templates(directory, config),
            generation_config={name: value for name, value in generation_config.items() if value is not None},
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. ``add_special_tokens=False`` is for text that already holds them: a rendered chat.

        Raises InvalidPromptError for text that is not valid Unicode (an unpaired surrogate, as JSON can smuggle in).
        """
        check_unicode(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``, decoded in one go. Ids that name no token (a padded vocabulary has some) give no text."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None if there is none with this id."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, empty for an id that names none. Only where `is_byte_level`."""
        found = self._token_bytes.get(token_id)
        if found is None:
            token = self.id_to_token(token_id) or ""
            spelled = [BYTE_OF.get(character) for character in token]
            # An added token that holds another character stands for itself, as in the decoder of `tokenizers`.
            found = token.encode() if None in spelled else bytes(spelled)  # type: ignore[arg-type]
            self._token_bytes[token_id] = found
        return found

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """For reading alone: threads share it."""
        return self._backend

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model may have more rows than that, never fewer."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.token_to_id(self.eos_token)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends an answer: the tokenizer's eos token and those of generation_config.json."""
        given = self.generation_config.get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        return frozenset(token_id for token_id in (*ids, self.eos_token_id) if token_id is not None)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the default chat template, or None: such a model can complete text but not chat."""
        return self.chat_templates.get("default")


def check_unicode(text: str) -> None:
    """Raises InvalidPromptError naming the first unpaired surrogate of ``text`` and its place."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidPromptError(
            f"the text holds an unpaired surrogate, U+{ord(text[error.start]):04X}, at character {error.start};"
            " it must be valid Unicode"
        ) from error


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes (bytes_to_unicode in its encoder.py): what prints is itself, the rest is U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _bytes_of_characters()
"""How a byte-level vocabulary spells its bytes: character -> byte."""


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[str]:
    decoder = json.loads(backend.to_str())["decoder"] or {}
    return [step.get("type", "") for step in decoder.get("decoders", [decoder])]


def _byte_fallback_ids(backend: tokenizers.Tokenizer) -> list[int]:
    if "ByteFallback" not in _decoder_steps(backend):
        return []
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return [token_id for token_id in ids if token_id is not None]


def _mark_special(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Makes special what the configuration calls so and tokenizer.json only lists as a word, as transformers does.

    A token that the vocabulary lacks is not added: the model has no row for it.
    """
    entries = [config.get(name) for name in NAMED_TOKENS]
    for name in TOKEN_LISTS:
        listed = config.get(name)
        entries.extend(listed.values() if isinstance(listed, dict) else listed or [])
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for entry in entries:
        if entry is None or (content := _content(entry)) in known or backend.token_to_id(content) is None:
            continue
        flags = {name: entry[name] for name in ("lstrip", "rstrip", "single_word") if name in entry}
        backend.add_special_tokens([tokenizers.AddedToken(content, normalized=False, special=True, **flags)])


def _content(entry: str | Mapping[str, Any]) -> str:
    """A special token is written as a string or as a mapping with its flags."""
    content = entry if isinstance(entry, str) else entry.get("content") if isinstance(entry, Mapping) else None
    if not isinstance(content, str):
        raise ConfigurationError(
            f"tokenizer_config.json: a special token is {entry!r}; it must be a string or an object"
        )
    return content


def _read_chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The files win over tokenizer_config.json, where the template is one string or a list of named ones."""
    files = {"default": directory / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    templates = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    if templates:
        return templates
    given = config.get("chat_template")
    if isinstance(given, list):
        try:
            return {entry["name"]: entry["template"] for entry in given}
        except (TypeError, KeyError) as error:
            raise ConfigurationError(
                f"{directory / 'tokenizer_config.json'}: an entry of chat_template lacks its name or its template"
            ) from error
    return {} if given is None else {"default": given}


def _read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{file} holds a JSON {type(value).__name__}; it must be an object")
    return value


def _no_tokenizer_json(directory: Path) -> str:
    message = f"{str(directory)!r} has no tokenizer.json"
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"):
        if (directory / name).is_file():
            return (
                f"{message}, only the older {name}. Convert it once, where transformers and sentencepiece are installed:"
                f' python -c "from transformers import AutoTokenizer as T;'
                f' T.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"'
            )
    return message
