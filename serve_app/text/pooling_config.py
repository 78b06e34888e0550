"""What a checkpoint says of its embeddings: sentence-transformers' modules.json, and config.json. Knows files; no model.

    modules.json            [{"type": "...Transformer", "path": ""}, {"type": "...Pooling", "path": "1_Pooling"}, ...]
    1_Pooling/config.json   {"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": false, ...}

A checkpoint without modules.json pools its last token and scales to length 1, as vLLM has it. One with modules.json is
scaled where a Normalize module is listed. Prompts of config_sentence_transformers.json are the client's to send.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from serve_app.engine.request import PoolingParams
from serve_app.errors import InvalidParameterError, UnsupportedModelError

_MODES = {"lasttoken": "last", "mean_tokens": "mean", "mean": "mean"}
"""sentence-transformers' names -> ours."""


class PoolingConfig(NamedTuple):
    """How a model's prompts become vectors."""

    kind: str = "last"
    normalize: bool = True
    hidden_size: int | None = None
    """Elements of a vector; None: not known."""
    dimensions: tuple[int, ...] | None = None
    """Shorter lengths that the model was trained for (matryoshka); empty: all. None: none."""

    def params(self, dimensions: int | None = None) -> PoolingParams:
        """For a request that asks for so many elements. Raises InvalidParameterError."""
        if dimensions is None or dimensions == self.hidden_size:
            return PoolingParams(self.kind, None, self.normalize)
        whole = "the model's own number" if self.hidden_size is None else str(self.hidden_size)
        if self.dimensions is None:
            raise InvalidParameterError(
                "dimensions", dimensions, f"{whole}: this model was not trained for shorter vectors (matryoshka)"
            )
        if self.dimensions and dimensions not in self.dimensions:
            known = ", ".join(map(str, self.dimensions))
            raise InvalidParameterError("dimensions", dimensions, f"one of {known}, or {whole}")
        if self.hidden_size is not None and dimensions > self.hidden_size:
            raise InvalidParameterError("dimensions", dimensions, f"at most {whole}")
        return PoolingParams(self.kind, dimensions, self.normalize)


def load_pooling_config(directory: Path, kind: str | None = None) -> PoolingConfig:
    """``kind``: of PoolingParams, where it is configured; None: as the checkpoint says.

    Raises UnsupportedModelError for a way of pooling that is not here, or modules that change the vector.
    """
    config = _read(directory / "config.json") or {}
    hidden_size = config.get("hidden_size")
    dimensions = None
    if config.get("matryoshka_dimensions"):
        dimensions = tuple(sorted(config["matryoshka_dimensions"]))
    elif config.get("is_matryoshka"):
        dimensions = ()
    normalize = True
    modules = _read(directory / "modules.json")
    if modules is not None:
        types = {str(module.get("type", "")).rsplit(".", 1)[-1]: module for module in modules}
        if kind is None:
            if strange := types.keys() - {"Transformer", "Pooling", "Normalize"}:
                raise UnsupportedModelError(
                    f"modules.json of {directory} has {', '.join(sorted(strange))}, which this server does not implement;"
                    " set model.pooling to serve without"
                )
            kind = _kind_of(directory / types.get("Pooling", {}).get("path", "1_Pooling") / "config.json")
        normalize = "Normalize" in types
    return PoolingConfig(kind or "last", normalize, hidden_size, dimensions)


def _kind_of(path: Path) -> str:
    config = _read(path)
    if config is None:
        raise UnsupportedModelError(f"{path} is missing, and modules.json names it; set model.pooling")
    modes = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True and "mode_" in name]
    if isinstance(config.get("pooling_mode"), str):
        modes.append(config["pooling_mode"])
    if len(modes) != 1 or modes[0] not in _MODES:
        raise UnsupportedModelError(
            f"{path} asks for {' and '.join(modes) or 'no pooling'}; this server has lasttoken and mean_tokens."
            " Set model.pooling to choose one"
        )
    return _MODES[modes[0]]


def _read(path: Path) -> Any:
    """None: there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}") from error
