"""What checkpoints say of their embeddings, in the files that sentence-transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.engine.request import PoolingParams
from serve_app.errors import InvalidParameterError, UnsupportedModelError
from serve_app.text.pooling_config import PoolingConfig, load_pooling_config

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


def write(directory: Path, modules: list[Any] | None, pooling: Any = None, **config: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({"hidden_size": 48, **config}))
    if modules is not None:
        (directory / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return directory


@pytest.mark.parametrize(
    ("modules", "pooling", "kind", "expected"),
    [
        (None, None, None, PoolingConfig("last", True, 48)),
        (None, None, "mean", PoolingConfig("mean", True, 48)),
        (
            [TRANSFORMER, POOLING, NORMALIZE],
            {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False, "include_prompt": True},
            None,
            PoolingConfig("last", True, 48),
        ),
        ([TRANSFORMER, POOLING], {"pooling_mode_mean_tokens": True}, None, PoolingConfig("mean", False, 48)),
        ([TRANSFORMER, POOLING, NORMALIZE], {"pooling_mode": "lasttoken"}, None, PoolingConfig("last", True, 48)),
        ([TRANSFORMER, POOLING, NORMALIZE], {"pooling_mode_cls_token": True}, "last", PoolingConfig("last", True, 48)),
        ([TRANSFORMER, POOLING, DENSE], None, "mean", PoolingConfig("mean", False, 48)),
    ],
)
def test_what_is_read(tmp_path: Path, modules: Any, pooling: Any, kind: str | None, expected: PoolingConfig) -> None:
    assert load_pooling_config(write(tmp_path, modules, pooling), kind) == expected


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([TRANSFORMER, POOLING], {"pooling_mode_cls_token": True}, "asks for cls_token; this server has lasttoken"),
        (
            [TRANSFORMER, POOLING],
            {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True},
            "asks for lasttoken and mean_tokens",
        ),
        ([TRANSFORMER, POOLING], {}, "asks for no pooling"),
        ([TRANSFORMER, POOLING], None, "is missing, and modules.json names it"),
        ([TRANSFORMER, POOLING, DENSE], {"pooling_mode_lasttoken": True}, "has Dense, which this server does not"),
    ],
)
def test_what_is_refused(tmp_path: Path, modules: Any, pooling: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load_pooling_config(write(tmp_path, modules, pooling))


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    write(tmp_path, [])
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match=r"modules\.json cannot be read"):
        load_pooling_config(tmp_path)


def test_shorter_vectors(tmp_path: Path) -> None:
    any_length = load_pooling_config(write(tmp_path, None, is_matryoshka=True))
    assert any_length.params(7) == PoolingParams("last", 7)
    assert any_length.params(48) == any_length.params() == PoolingParams("last")
    with pytest.raises(InvalidParameterError, match="dimensions is 49; it must be at most 48"):
        any_length.params(49)
    some = load_pooling_config(write(tmp_path, None, matryoshka_dimensions=[32, 16]))
    assert some.params(16) == PoolingParams("last", 16)
    with pytest.raises(InvalidParameterError, match="dimensions is 17; it must be one of 16, 32, or 48"):
        some.params(17)
    none = load_pooling_config(write(tmp_path, None))
    with pytest.raises(InvalidParameterError, match="dimensions is 16; it must be 48: this model was not trained"):
        none.params(16)
