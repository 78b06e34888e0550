"""Where a model's files are: a directory, or the local snapshot of a hub repository. Knows paths and the hub; no contents.

The HTTP face uses it too, for the tokenizer alone: no torch here.

Where many machines share one cache, one process fills it (fetch_model.py) while others start: they wait until it has said
that the model is whole, for a snapshot that is being written looks like one that is done.
"""

from __future__ import annotations

import os
import time
import urllib.parse
from pathlib import Path

from serve_app.errors import ConfigurationError, ModelNotFoundError
from serve_app.logs import get_logger

logger = get_logger(__name__)

TEXT_FILES = ("*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "vocab.txt", "merges.txt")
"""All that is needed to make token ids from text."""
ALL_FILES = ("*.safetensors", *TEXT_FILES)
WAIT_VARIABLE = "RAGGED_SERVE_MODEL_WAIT_SECONDS"
"""Where it is set, a model of the hub is used only when `fetch` has said that it is whole; so long that is waited for."""
LOOK_SECONDS = 5.0
"""Between two looks whether it is."""


def resolve_model(model: str | Path, revision: str | None = None, patterns: tuple[str, ...] = ALL_FILES) -> Path:
    """The directory of a model: ``model`` itself if it is one, else a snapshot of the hub repository of that name.

    The hub's own environment counts (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT), and what is in its cache is not
    loaded again. ``patterns``: the files that are wanted of a repository. May wait (WAIT_VARIABLE). Raises
    ModelNotFoundError naming ``model``, and ConfigurationError for a revision of a directory.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigurationError(
                f"revision is {revision!r}, but model {str(model)!r} is a directory, which has none"
            )
        return path
    name = str(model)
    if path.is_absolute() or name.startswith(("~", ".")) or name.count("/") > 1:
        raise ModelNotFoundError(f"model {name!r} is not a directory")
    _wait_until_whole(name, revision)
    return _download(name, revision, patterns)


def fetch(model: str | Path, revision: str | None = None) -> Path:
    """`resolve_model` of all files, which then says to those who wait that the model is whole."""
    directory = resolve_model(model, revision)
    if not Path(model).expanduser().is_dir():
        mark = _mark(str(model), revision)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return directory


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    # Slow to import, and a model in a directory needs none of it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # hub, HTTP, cache and validation errors have no common root
        at = "" if revision is None else f" at revision {revision!r}"
        raise ModelNotFoundError(
            f"model {name!r}{at} is neither a directory nor can it be had from the hub: {type(error).__name__}: {error}"
        ) from error


def _mark(name: str, revision: str | None) -> Path:
    """An empty file, which says that this revision of the repository is whole in the cache beside it."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "ragged-serve" / urllib.parse.quote(f"{name}@{revision or 'main'}", safe="@")


def _wait_until_whole(name: str, revision: str | None) -> None:
    value = os.environ.get(WAIT_VARIABLE)
    if not value:
        return
    try:
        seconds = float(value)
    except ValueError as error:
        raise ConfigurationError(f"{WAIT_VARIABLE} is {value!r}; it must be a number of seconds") from error
    mark = _mark(name, revision)
    deadline = time.monotonic() + seconds
    if not mark.exists():
        logger.info("waits up to %g s for model %r: %s is not there yet", seconds, name, mark)
    while not mark.exists():
        left = deadline - time.monotonic()
        if left <= 0:
            raise ModelNotFoundError(
                f"model {name!r} is not whole in the cache after {seconds:g} s ({WAIT_VARIABLE}): {mark} is missing; python"
                " -m serve_app.fetch_model puts it there"
            )
        time.sleep(min(LOOK_SECONDS, left))
