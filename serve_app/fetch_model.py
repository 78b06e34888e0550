"""Loads the models of a deploy/*.yaml into the local cache of the hub, and says there that they are whole.

    python -m serve_app.fetch_model deploy/config.gpu.yaml
    SERVE_CONFIG="$(cat deploy/config.gpu.yaml)" python -m serve_app.fetch_model     the file's text in a variable

For a cache that many machines share: one process fills it, others wait (hub.py, k8s/base/model-cache.yaml). What is there
already is not loaded again. Knows the file and the hub; loads neither Ray nor torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from serve_app import hub
from serve_app.config import IMPORT_PATH, ServeArgs
from serve_app.errors import ConfigurationError, StartupError
from serve_app.logs import get_logger

logger = get_logger(__name__)

CONFIG_VARIABLE = "SERVE_CONFIG"


def models(text: str) -> list[tuple[str, str | None]]:
    """(directory or hub id, revision) of every model and tokenizer that the file's applications of ours name.

    Raises ConfigurationError, which says what is wrong with the text.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"no valid YAML: {error}") from error
    applications = data.get("applications") if isinstance(data, dict) else None
    found: dict[tuple[str, str | None], None] = {}
    for application in applications or []:
        if isinstance(application, dict) and application.get("import_path") in (
            IMPORT_PATH,
            IMPORT_PATH.replace(":", "."),
        ):
            model = ServeArgs.parse(application.get("args") or {}).model
            found[model.source, model.revision] = None
            if model.tokenizer is not None:
                found[model.tokenizer, None] = None
    if not found:
        raise ConfigurationError(f"no application has import_path: {IMPORT_PATH}")
    return list(found)


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """The command line. Returns the exit code: 0 if every model is whole."""
    parser = argparse.ArgumentParser(prog="fetch_model", description="Fill the hub's cache with the models of a file.")
    parser.add_argument("file", nargs="?", metavar="FILE", help=f"a deploy/*.yaml; without it {CONFIG_VARIABLE}'s text")
    file = parser.parse_args(argv).file
    if file is None and not environ.get(CONFIG_VARIABLE):
        parser.error(f"name a file, or set {CONFIG_VARIABLE} to the text of one")
    try:
        text = environ[CONFIG_VARIABLE] if file is None else Path(file).read_text(encoding="utf-8")
        for model, revision in models(text):
            logger.info("%s is whole in %s", model, hub.fetch(model, revision))
    except (OSError, UnicodeDecodeError, StartupError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
