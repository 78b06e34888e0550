"""A cache that one process fills while others wait: no snapshot is read before it is whole. The hub is a stand-in."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from serve_app import fetch_model, hub
from serve_app.errors import ConfigurationError, ModelNotFoundError

CONFIG = """
applications:
  - name: ours
    import_path: serve_app.app:build
    args:
      model: {{model: {model}, revision: {revision}, tokenizer: {tokenizer}}}
  - name: theirs
    import_path: another:app
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the hub. Its cache is empty."""
    found: list[Any] = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        found.append((repo_id, revision, "*.safetensors" in allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv(hub.WAIT_VARIABLE, raising=False)
    return found


def config(model: str = "some/model", revision: str = "null", tokenizer: str = "null") -> str:
    return CONFIG.format(model=model, revision=revision, tokenizer=tokenizer)


def test_models_of_a_file(tmp_path: Path) -> None:
    assert fetch_model.models(config()) == [("some/model", None)]
    two = config(revision="v2", tokenizer="other/tokenizer")
    assert fetch_model.models(two) == [("some/model", "v2"), ("other/tokenizer", None)]
    assert fetch_model.models(config(tokenizer="some/model")) == [("some/model", None)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("applications: [", "no valid YAML"),
        ("applications: []", "import_path"),
        ("7", "import_path"),
        ("applications: [7]", "import_path"),
        ("applications: [{import_path: 'serve_app.app:build', args: {modle: x}}]", "modle"),
    ],
)
def test_a_wrong_text_is_an_error(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        fetch_model.models(text)


def test_it_loads_all_of_the_model_and_says_so(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config(revision="refs/pr/1"))
    assert fetch_model.main([str(file)], environ={}) == 0
    assert asked == [("some/model", "refs/pr/1", True)]

    monkeypatch.setenv(hub.WAIT_VARIABLE, "0")
    assert hub.resolve_model("some/model", "refs/pr/1") == tmp_path / "snapshot"
    with pytest.raises(ModelNotFoundError, match=r"'some/model' is not whole in the cache after 0 s .*fetch_model"):
        hub.resolve_model("some/model")  # of another revision nothing was said


def test_the_text_may_stand_in_a_variable(asked: list[Any]) -> None:
    assert fetch_model.main([], environ={fetch_model.CONFIG_VARIABLE: config()}) == 0
    assert asked == [("some/model", None, True)]


def test_a_file_or_the_variable_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fetch_model.main([], environ={})
    assert fetch_model.CONFIG_VARIABLE in capsys.readouterr().err


def test_what_goes_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_model.main([str(tmp_path / "none.yaml")], environ={}) == 1
    assert fetch_model.main([], environ={fetch_model.CONFIG_VARIABLE: "{}"}) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "none.yaml" in lines[0]
    assert "import_path" in lines[1]


def test_a_model_in_a_directory_is_there_already(asked: list[Any], tmp_path: Path) -> None:
    assert hub.fetch(tmp_path) == tmp_path
    assert fetch_model.main([], environ={fetch_model.CONFIG_VARIABLE: config(model="demo")}) == 0
    assert not asked
    assert not (tmp_path / "hf").exists()


def test_others_wait_until_it_is_whole(asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fresh cluster replicas start before the model is loaded. They found half a snapshot, and failed for good."""
    monkeypatch.setenv(hub.WAIT_VARIABLE, "600")
    looks = threading.Event()
    may_look = threading.Event()
    found: list[Path] = []

    def sleep(_: float) -> None:
        looks.set()
        assert may_look.wait(60)

    monkeypatch.setattr(hub.time, "sleep", sleep)
    waiter = threading.Thread(target=lambda: found.append(hub.resolve_model("some/model")))
    waiter.start()
    assert looks.wait(60)
    assert not asked, "it reads nothing yet"
    monkeypatch.delenv(hub.WAIT_VARIABLE)
    hub.fetch("some/model")
    may_look.set()
    waiter.join(60)
    assert found == [tmp_path / "snapshot"]


def test_nobody_waits_unless_told_to(asked: list[Any], tmp_path: Path) -> None:
    assert hub.resolve_model("some/model") == tmp_path / "snapshot"
    assert not (tmp_path / "hf").exists()


def test_a_wait_is_a_number(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hub.WAIT_VARIABLE, "long")
    with pytest.raises(ConfigurationError, match="'long'; it must be a number of seconds"):
        hub.resolve_model("some/model")
    assert not asked
