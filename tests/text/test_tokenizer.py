"""Tokenizer reads a model directory as transformers does, says what is wrong with a bad one, and loads no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tokenizers

from serve_app.errors import ConfigurationError, InvalidPromptError, ModelNotFoundError, UnsupportedModelError
from serve_app.text.tokenizer import Tokenizer
from tests.text.tokenizers_made import MAKERS, TEXTS, tokenizer_json, write_directory

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", MAKERS)
def test_encodes_and_decodes_as_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    config = {"additional_special_tokens": ["<|im_end|>"], "tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, kind, config))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in [*TEXTS, "", " ", "<s>a<|im_end|><tool></s>"]:
        for add in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=add)
            assert ids == theirs.encode(text, add_special_tokens=add)
            for skip in (True, False):
                wanted = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert tokenizer.decode(ids, skip_special_tokens=skip) == wanted
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.special_ids >= set(theirs.all_special_ids)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == (theirs.bos_token, theirs.bos_token_id) == ("<s>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (theirs.eos_token, theirs.eos_token_id) == ("</s>", 2)


def test_bos_is_added_by_tokenizer_json_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, config={"add_bos_token": False}))
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    assert tokenizer.encode("a")[1:] == tokenizer.encode("a", add_special_tokens=False)


def test_ids_past_the_vocabulary_name_no_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path))
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None
    assert tokenizer.id_to_token(2) == "</s>"
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size + 7]) == "ab"


def test_truncation_and_padding_of_a_training_script_are_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer_json("byte_level_bpe"))
    wanted = backend.encode(TEXTS[0]).ids
    backend.enable_truncation(max_length=5)
    backend.enable_padding(length=2048)
    write_directory(tmp_path, tokenizer__json=backend.to_str())
    assert Tokenizer.from_directory(tmp_path).encode(TEXTS[0]) == wanted
    assert len(wanted) > 5


def test_a_token_the_configuration_calls_special_is_special(tmp_path: Path) -> None:
    """tokenizer.json lists <tool> as a plain added token; as eos it must vanish from the text, as in transformers."""
    plain = Tokenizer.from_directory(write_directory(tmp_path / "plain"))
    special = Tokenizer.from_directory(
        write_directory(tmp_path / "special", config={"eos_token": {"content": "<tool>"}})
    )
    ids = plain.encode("a<tool>b", add_special_tokens=False)
    assert ids == special.encode("a<tool>b", add_special_tokens=False)
    assert plain.decode(ids) == "a<tool>b"
    assert special.decode(ids) == "ab"
    assert special.vocab_size == plain.vocab_size


def test_a_special_token_without_a_row_is_not_invented(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, config={"pad_token": "[PAD]", "bos_token": None}))
    assert tokenizer.token_to_id("[PAD]") is None
    assert tokenizer.special_tokens["pad_token"] == "[PAD]"
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == (None, None)


def test_special_tokens_map_counts_where_the_configuration_is_silent(tmp_path: Path) -> None:
    write_directory(tmp_path, tokenizer_config__json={}, special_tokens_map__json={"eos_token": "<|im_end|>"})
    assert Tokenizer.from_directory(tmp_path).eos_token == "<|im_end|>"


def test_eos_ids_come_from_all_files(tmp_path: Path) -> None:
    files = {
        "generation_config__json": {"eos_token_id": [4, 2], "temperature": 0.6},
        "config__json": {"eos_token_id": 9},
    }
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path / "both", **files))
    assert tokenizer.eos_token_ids == {2, 4}
    assert tokenizer.generation_config["temperature"] == 0.6
    only_config = write_directory(tmp_path / "config", config={"eos_token": None}, config__json={"eos_token_id": 9})
    assert Tokenizer.from_directory(only_config).eos_token_ids == {9}
    neither = write_directory(tmp_path / "neither", config={"eos_token": None})
    assert Tokenizer.from_directory(neither).eos_token_ids == frozenset()


def test_where_chat_templates_come_from(tmp_path: Path) -> None:
    def templates(name: str, config: dict[str, object], **files: str) -> dict[str, str]:
        return Tokenizer.from_directory(write_directory(tmp_path / name, config=config, **files)).chat_templates

    assert templates("none", {}) == {}
    assert templates("string", {"chat_template": "A"}) == {"default": "A"}
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    assert templates("named", {"chat_template": named}) == {"default": "A", "tool_use": "B"}
    assert templates("file", {"chat_template": "A"}, chat_template__jinja="C") == {"default": "C"}
    (tmp_path / "more" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "more" / "additional_chat_templates" / "tool_use.jinja").write_text("D")
    assert templates("more", {"chat_template": "A"}, chat_template__jinja="C") == {"default": "C", "tool_use": "D"}
    assert Tokenizer.from_directory(tmp_path / "named").chat_template == "A"
    assert Tokenizer.from_directory(tmp_path / "none").chat_template is None


def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="not a directory"):
        Tokenizer.from_directory(tmp_path / "missing")
    with pytest.raises(ModelNotFoundError, match=r"has no tokenizer\.json$"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(ModelNotFoundError, match=r"only the older tokenizer\.model.*save_pretrained"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json: tokenizers .* cannot read it"):
        Tokenizer.from_directory(write_directory(tmp_path / "broken", tokenizer__json='{"version": "1.0"}'))
    for i, bad in enumerate(("{", "[1]", json.dumps({"eos_token": 7}), json.dumps({"chat_template": [{"name": "x"}]}))):
        with pytest.raises(ConfigurationError, match="tokenizer_config"):
            Tokenizer.from_directory(write_directory(tmp_path / str(i), tokenizer_config__json=bad))


@pytest.mark.parametrize("text", ["\ud800", "abc\udfff", "\ude00\ud83d"])
def test_an_unpaired_surrogate_is_the_callers_mistake(text: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path))
    with pytest.raises(InvalidPromptError, match=r"unpaired surrogate, U\+D[89A-F]\w\w, at character [03]"):
        tokenizer.encode(text)


def test_the_whole_text_path_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write_directory(tmp_path, chat_template__jinja="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    program = f"""
        import sys
        from serve_app.engine.request import SamplingParams
        from serve_app.text.chat_template import ChatTemplate
        from serve_app.text.text_stream import TextStream
        from serve_app.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_directory({str(tmp_path)!r})
        template = ChatTemplate(tokenizer.chat_templates, tokenizer.special_tokens)
        text = template.render([{{"role": "user", "content": "hello world"}}])
        assert text == "<s>hello world", text
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream = TextStream(tokenizer, SamplingParams(stop=("world",)))
        assert "".join(stream.push([i]).text for i in ids) == "hello "
        loaded = {{"torch", "transformers", "ray", "numpy"}} & set(sys.modules)
        assert not loaded, loaded
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
