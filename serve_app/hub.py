"""Where a model's files are: a directory, or the local snapshot of a hub repository. Knows paths and the hub; no contents.

The HTTP face uses it too, for the tokenizer alone: no torch here.
"""

from __future__ import annotations

from pathlib import Path

from serve_app.errors import ConfigurationError, ModelNotFoundError

TEXT_FILES = ("*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "vocab.txt", "merges.txt")
"""All that is needed to make token ids from text."""
ALL_FILES = ("*.safetensors", *TEXT_FILES)


def resolve_model(model: str | Path, revision: str | None = None, patterns: tuple[str, ...] = ALL_FILES) -> Path:
    """The directory of a model: ``model`` itself if it is one, else a snapshot of the hub repository of that name.

    The hub's own environment counts (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT), and what is in its cache is not
    loaded again. ``patterns``: the files that are wanted of a repository. Raises ModelNotFoundError naming ``model``,
    and ConfigurationError for a revision of a directory.
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
    # Slow to import, and a model in a directory needs none of it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # hub, HTTP, cache and validation errors have no common root
        at = "" if revision is None else f" at revision {revision!r}"
        raise ModelNotFoundError(
            f"model {name!r}{at} is neither a directory nor can it be had from the hub: {type(error).__name__}: {error}"
        ) from error
